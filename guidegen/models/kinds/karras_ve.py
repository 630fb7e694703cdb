"""Variance exploding models as Karras et al. 2022 (arXiv 2206.00364) walk them: diffusers' `KarrasVePipeline`."""

from __future__ import annotations

from guidegen.models.kinds.unet import UNet


class KarrasVe(UNet):
    """An NCSN++ of the score of images in [0, 1], without classes, which draws images in [-1, 1]."""

    kind = "Karras VE"
    pipeline = "KarrasVePipeline"
    scheduler_class = "KarrasVeScheduler"
    recommended = "50 steps (diffusers' KarrasVePipeline)"
    asked_last = False
