"""The loop: a guide walks a diffusers scheduler from noise to images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from guidegen.arguments import finite, several, whole
from guidegen.checkpoints import is_flow
from guidegen.errors import CheckpointError, UsageError
from guidegen.scores.diffusion import Level

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
_OTHER_INPUTS = ("EDM", "ScoreSde", "Karras", "CM", "VQ", "RePaint", "Amused", "TCD", "Cosine")
"""Schedulers that show the network something other than alpha x_0 + sigma eps, by prefix."""
FLOW_SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}


def scheduler_class(name: str, flow: bool = False) -> str:
    """The diffusers class behind a short name; a class name stays as it is."""
    return (SCHEDULERS | FLOW_SCHEDULERS if flow else SCHEDULERS).get(name.lower(), name)


def make_scheduler(config: Mapping[str, Any], name: str | None = None) -> Any:
    """A diffusers scheduler on the checkpoint's noise schedule.

    Args:
        config: the checkpoint's `scheduler_config.json`.
        name: a short name of `SCHEDULERS` or a diffusers class name; None takes the checkpoint's own.

    Raises:
        UsageError: no such scheduler, or one that cannot walk this schedule.
        CheckpointError: the checkpoint names a scheduler that diffusers does not have.
    """
    import diffusers

    flow = is_flow(config)
    cls_name = scheduler_class(name or config.get("_class_name", "DDPMScheduler"), flow)
    cls = getattr(diffusers, cls_name, None) if cls_name.endswith("Scheduler") else None
    if cls is None and name is None:
        raise CheckpointError(
            f"The checkpoint's scheduler {cls_name} is not one of diffusers. Name another: --scheduler ddim."
        )
    if cls is None:
        raise UsageError(f"--scheduler {name!r}: no such scheduler. Use {', '.join(SCHEDULERS)}, or a diffusers class.")
    if cls_name.startswith(_OTHER_INPUTS):
        raise UsageError(f"{cls_name} does not walk x_t = alpha x_0 + sigma eps. Use {', '.join(SCHEDULERS)}.")
    settings = dict(config)
    if "variance_type" in settings and settings["variance_type"] in ("learned", "learned_range"):
        settings["variance_type"] = "fixed_small"  # guidance sees the mean only
    if flow and not cls_name.startswith("FlowMatch"):
        if "use_flow_sigmas" not in inspect.signature(cls.__init__).parameters:
            raise UsageError(f"--scheduler {name}: cannot walk a flow-matching model. Use euler, heun, dpm++ or unipc.")
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        settings.setdefault("flow_shift", settings.get("shift", 1.0))
    if not flow and cls_name.startswith("FlowMatch"):
        raise UsageError(f"--scheduler {name}: is for flow-matching models; this checkpoint is not one.")
    settings.pop("_class_name", None)
    try:
        return cls.from_config(settings)
    except ImportError as error:
        raise UsageError(f"--scheduler {name}: {cls_name} needs a package: {str(error).strip().splitlines()[0]}") from error


def without_clip(scheduler: Any) -> tuple[Any, float | None]:
    """A scheduler that does not clip the denoised estimate, and the bound that `scheduler` would clip it to.

    DDIM and DDPM of diffusers clip after guidance, where it undoes what a classifier's gradient did;
    guidegen's `clipped` does it before. None where the scheduler does not clip.
    """
    if not getattr(scheduler.config, "clip_sample", False):
        return scheduler, None
    return type(scheduler).from_config(scheduler.config, clip_sample=False), float(scheduler.config.clip_sample_range)


def noise_levels(scheduler: Any) -> list[Level]:
    """alpha and sigma of the network's input at each step, after `set_timesteps`.

    Schedulers that keep `sigmas` hold sigma/alpha there (sigma itself for flow matching);
    those that scale their input (Euler, Heun) still show the network a variance preserving x_t.
    """
    if is_flow({"_class_name": type(scheduler).__name__, **scheduler.config}):
        return [Level(1 - s, s) for s in scheduler.sigmas.tolist()[: len(scheduler.timesteps)]]
    if hasattr(scheduler, "sigmas"):
        ratios = scheduler.sigmas.double()[: len(scheduler.timesteps)]
        return [Level(1 / (1 + r * r) ** 0.5, r / (1 + r * r) ** 0.5) for r in ratios.tolist()]
    kept = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
    return [Level(a**0.5, (1 - a) ** 0.5) for a in kept.tolist()]


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
    levels = noise_levels(scheduler)
    noise, generators = initial_noise(seeds, shape)
    x = (noise * getattr(scheduler, "init_noise_sigma", 1.0)).to(device)
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generators} if "generator" in accepted else {}
    if eta is not None:
        extra["eta"] = eta
    scale_input = getattr(scheduler, "scale_model_input", None)
    # schedulers look their t up on the CPU; the networks' are copied at once, since each copy waits for the device
    there = scheduler.timesteps.to(device)
    for index, (t, level) in enumerate(zip(scheduler.timesteps, levels, strict=True)):
        x_t = scale_input(x, t) if scale_input else x
        prediction = guide(x_t, there[index], level, index)
        x = scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
        if on_step:
            on_step()
    return x


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
