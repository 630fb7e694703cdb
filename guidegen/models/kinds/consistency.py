"""Consistency models (Song et al. 2023, arXiv 2303.01469): diffusers' `ConsistencyModelPipeline`."""

from __future__ import annotations

from guidegen.models.kinds.unet import UNet


class ConsistencyModel(UNet):
    """A UNet that predicts where the flow of x_t ends, with or without classes; it draws in one step or a few."""

    kind = "consistency model"
    pipeline = "ConsistencyModelPipeline"
    scheduler_class = "CMStochasticIterativeScheduler"
    recommended = (
        "1 or 2 steps, without guidance: weight 1 (Song et al. 2023, arXiv 2303.01469); for two of ImageNet at 64 "
        "--scheduler-opt timesteps=22,0 (their launch.sh)"
    )
    default_steps = 1
    asked_last = False
