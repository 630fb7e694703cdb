"""Whether the steps of a scheduler are at the noise levels that their timesteps mean to the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from guidegen.errors import UsageError
from guidegen.models.noise_schedule import is_flow
from guidegen.sampling.schedulers import goes_by_strides, noise_levels
from guidegen.scores.noise import Level

_MOST_MISSED = 0.05
"""Of the way over the timesteps. At twice that, DDIM with an exact score draws a Gaussian 6 % too wide at 150 steps."""


def check_levels(scheduler: Any) -> None:
    """Refuses steps whose timestep means to the network another noise level than its input has, after `set_timesteps`.

    Raises:
        UsageError: such a step, one that adds noise, or pure noise where the network predicts it.
    """
    name, levels, config = type(scheduler).__name__, noise_levels(scheduler), scheduler.config
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and any(now < then for now, then in pairwise(sigmas.tolist())):
        raise UsageError(f"{name} would step from less noise to more with so many steps of this config: take fewer.")
    if not levels[0].alpha and config.get("prediction_type") == "epsilon":
        raise UsageError(
            f"{name} starts from pure noise (rescale_betas_zero_snr), of which a prediction of the noise says nothing: "
            "the network should predict v_prediction, or the timestep_spacing be leading."
        )
    if goes_by_strides(scheduler):
        _check_strides(scheduler)
    for t, level in zip(scheduler.timesteps.tolist(), levels, strict=True):
        if not _is_trained_level(t, level, getattr(scheduler, "alphas_cumprod", None), config):
            raise UsageError(
                f"{name} with this config gives the network timestep {t:g} at a noise level of sigma / alpha "
                f"{level.sigma / level.alpha if level.alpha else math.inf:.4g}, which is not that of its training there. "
                "Leave out its options on sigmas, or name another: --scheduler."
            )


def _check_strides(scheduler: Any) -> None:
    """Refuses timesteps that are further apart than the steps go, which leave noise in the image."""
    name, config = type(scheduler).__name__, scheduler.config
    times = sorted(set(getattr(scheduler, "_timesteps", scheduler.timesteps).tolist()))  # PNDM repeats some of them
    stride = config.num_train_timesteps // scheduler.num_inference_steps
    gone, asked = stride * (len(times) - 1), times[-1] - times[0]
    if abs(asked - gone) > _MOST_MISSED * asked:
        raise UsageError(
            f"{name} goes {stride} timesteps at a step, and with timestep_spacing {config.timestep_spacing} these "
            f"{len(times)} are {asked / (len(times) - 1):.4g} apart: the image would keep noise. Take another number of "
            "--steps, --timestep-spacing leading, or another --scheduler."
        )


def _is_trained_level(t: float, level: Level, kept: Any, config: Mapping[str, Any]) -> bool:
    """Whether timestep t means this level, within one timestep for those that are rounded."""
    if level.alpha == 1:
        return t == level.sigma
    if is_flow({"_class_name": "FlowMatch" * (kept is None), **config}):
        return 0 <= level.sigma <= 1 and abs(t - level.sigma * config["num_train_timesteps"]) <= 1 + 1e-3
    last = len(kept) - 1
    if not 0 <= t <= last:
        return False
    least, most = float(kept[min(math.ceil(t) + 1, last)]), float(kept[max(math.floor(t) - 1, 0)])
    # fp32's rounding, and the 2**-24 that stands for an alpha of zero
    return least - 1e-6 <= level.alpha**2 <= most + 1e-6
