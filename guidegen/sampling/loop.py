"""The loop: a guide walks a diffusers scheduler from noise to images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from guidegen.arguments import finite, several, whole
from guidegen.errors import UsageError, first_line
from guidegen.sampling.level_checks import check_levels
from guidegen.sampling.schedulers import noise_levels
from guidegen.scores.noise import Level

_MOST_SIGMAS = 10_000
"""Steps where the network is told sigma itself; those that were published have 2000 at most."""


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """Unit Gaussian noise (B, *shape) fp32 on the CPU and the generators that drew it, one a seed.

    The same numbers as diffusers' `randn_tensor` given that list of CPU generators.
    """
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators]), generators


@torch.no_grad()
def sample(
    guide: Callable[[Tensor, Tensor, Level, int], Tensor],
    scheduler: Any,
    seeds: Sequence[int],
    shape: Sequence[int],
    steps: int,
    eta: float | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Draws one image for each seed.

    Args:
        guide: (x_t, t, level, index of the step) -> the guided prediction of this batch, such as a `Guide`.
        scheduler: a diffusers scheduler; its timesteps are set anew.
        seeds: B seeds; each sample's noise comes from a generator of its own.
        shape: (C, H, W).
        steps: steps of the scheduler.
        eta: DDIM's eta (Song et al. 2021, arXiv 2010.02502, eq. 16); None leaves the default.
        device: where the networks are.
        on_step: called after each step; what it raises ends the loop.

    Returns:
        Images (B, C, H, W) fp32 in the network's range, usually [-1, 1].

    Raises:
        TypeError, ValueError: an argument that cannot be, by its name.
    """
    _check_sample(guide, scheduler, seeds, shape, steps, eta)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"steps={steps}: {type(scheduler).__name__} refuses: {error}") from error
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks the first timestep up, and starts late where that stands twice
    levels = noise_levels(scheduler)
    noise, generators = initial_noise(seeds, shape)
    x = (noise * getattr(scheduler, "init_noise_sigma", 1.0)).to(device)
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generators} if "generator" in accepted else {}
    if eta is not None:
        extra["eta"] = eta
    scale_input, raise_noise = (getattr(scheduler, name, None) for name in ("scale_model_input", "raise_noise"))
    # schedulers look their t up on the CPU; the networks' are copied at once, since each copy waits for the device
    there = scheduler.timesteps.to(device)
    for index, (t, level) in enumerate(zip(scheduler.timesteps, levels, strict=True)):
        if raise_noise:
            x = raise_noise(x, generators)
        x_t = scale_input(x, t) if scale_input else x
        prediction = guide(x_t, there[index], level, index)
        x = scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
        if on_step:
            on_step()
    return x


def try_out(scheduler: Any, steps: int, eta: float | None = None) -> None:
    """Walks a scheduler once over a few numbers, so that what it cannot do is refused before a model is loaded.

    Raises:
        UsageError: it does not take so many steps, steps at levels that are not its timesteps', or
            gives numbers that are not finite.
    """
    name, most = type(scheduler).__name__, scheduler.config.get("num_train_timesteps")
    if scheduler.config.get("sigma_max"):  # of which there are as many as one likes
        most = _MOST_SIGMAS
    if steps > most:
        trained = "timesteps that the network was trained with" if most != _MOST_SIGMAS else "that guidegen takes"
        raise UsageError(f"--steps {steps}: more than the {most} {trained}.")

    def nothing(x_t: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(x_t)

    try:
        scheduler.set_timesteps(steps)
        check_levels(scheduler)
        drawn = sample(nothing, scheduler, [0], (1, 2, 2), steps, eta)
        scheduler.set_timesteps(steps)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"--steps {steps}: {name} refuses: {first_line(error)}") from error
    if not drawn.isfinite().all():
        raise UsageError(
            f"--steps {steps}: {name} gives numbers that are not finite with this checkpoint's scheduler config."
        )


def _check_sample(guide: Any, scheduler: Any, seeds: Any, shape: Any, steps: Any, eta: Any) -> None:
    if not callable(guide):
        raise TypeError(f"guide takes a Guide or another callable, found {guide!r}.")
    if not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"scheduler takes a scheduler of diffusers, found {scheduler!r}.")
    for seed in several("seeds", seeds):
        whole("seeds", seed, 0, 2**64 - 1)
    for side in several("shape", shape, 3, "of C, H and W"):
        whole("shape", side, 1)
    whole("steps", steps, 1)
    if eta is not None and not 0 <= finite("eta", eta) <= 1:
        raise ValueError(f"eta is from 0 to 1, found {eta}.")
    if eta is not None and not takes_eta(scheduler):
        raise ValueError(f"eta is for ddim; {type(scheduler).__name__} has none.")


def takes_eta(scheduler: Any) -> bool:
    """Whether the scheduler's step has DDIM's eta."""
    return "eta" in inspect.signature(scheduler.step).parameters


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] (B, C, H, W) to uint8 (B, H, W, C) on the CPU, rounded as diffusers' pipelines do."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        found = f"{tuple(images.shape)} {images.dtype}" if hasattr(images, "shape") else repr(images)
        raise ValueError(f"images is a tensor (B, C, H, W) of floating point, found {found}.")
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to("cpu", torch.uint8)
