"""The schedulers of diffusers that guidegen walks: which fit, on which noise schedule, at which noise levels.

A class fits where the network's input is x_t = alpha x_0 + sigma eps at a level that is known, and where an exact
score draws the data's own distribution as the steps grow. `tests/oracles/test_schedulers.py` holds each to that.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from guidegen.arguments import instance
from guidegen.errors import UsageError, first_line
from guidegen.models.noise_schedule import NOISE_SCHEDULE, build, is_flow, own_class_of, own_scheduler
from guidegen.scores.noise import Level

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
FLOW_SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
Levels = Callable[[Any], list[Level]]
"""From a scheduler with its timesteps set to the level of each step."""


def _variance_preserving(ratio: float) -> Level:
    """The level of a sigma / alpha with alpha^2 + sigma^2 = 1."""
    alpha = 1 / (1 + ratio * ratio) ** 0.5
    return Level(alpha, ratio * alpha)


def _of_alpha_bar(alpha_bar: float) -> Level:
    return Level(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)


def _by_timestep(scheduler: Any) -> list[Level]:
    """`alphas_cumprod` at each timestep: DDIM, DDPM, PNDM."""
    return [_of_alpha_bar(kept) for kept in scheduler.alphas_cumprod.double()[scheduler.timesteps.long()].tolist()]


def _after_ddim(scheduler: Any) -> list[Level]:
    """Where DDIM's steps lead: T // steps timesteps on, whatever the spacing; past the end, to its last alpha."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    kept, last = scheduler.alphas_cumprod.double(), float(scheduler.final_alpha_cumprod)
    return [_of_alpha_bar(float(kept[t]) if t >= 0 else last) for t in (scheduler.timesteps - stride).tolist()]


def _sigmas(scheduler: Any, shift: int = 0) -> list[Level]:
    """`sigmas` step by step: of sigma / alpha, or of sigma itself where it is a flow.

    Schedulers that scale their input (Euler, Heun) still show the network a variance preserving x_t.
    """
    numbers = scheduler.sigmas.double().tolist()[shift : shift + len(scheduler.timesteps)]
    if is_flow({"_class_name": type(scheduler).__name__, **scheduler.config}):
        return [Level(1 - sigma, sigma) for sigma in numbers]
    return [_variance_preserving(ratio) for ratio in numbers]


def _interpolated(lag: int) -> Levels:
    """DPM-Solver-2 evaluates `sigmas` and the `sigmas_interpol` between them in turn, the latter `lag` places before."""

    def levels(scheduler: Any) -> list[Level]:
        own, between = (numbers.double().tolist() for numbers in (scheduler.sigmas, scheduler.sigmas_interpol))
        count = len(scheduler.timesteps)
        return [_variance_preserving(between[i - lag] if i % 2 else own[i]) for i in range(count)]

    return levels


_NOISE_OR_V = ("epsilon", "v_prediction")
_ANY = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class _Walk:
    """How guidegen walks a class of diffusers.

    Attributes:
        levels: alpha and sigma of the network's input at each step.
        predictions: the prediction types that its step reads, of models that are no flow.
        vp: whether it walks variance preserving schedules.
        flow: whether it walks flow-matching ones.
        orders: the `solver_order`s whose images stay right however many the steps.
        after: the level that each step leads to, where a step only puts x0 and eps together anew: DDIM and Euler.
        strides: whether a step goes T // steps timesteps on, wherever the next timestep is.
    """

    levels: Levels
    predictions: tuple[str, ...] = _ANY
    vp: bool = True
    flow: bool = False
    orders: tuple[int, ...] = (1, 2, 3)
    after: Levels | None = None
    strides: bool = False


def _after_euler(scheduler: Any) -> list[Level]:
    return _sigmas(scheduler, shift=1)


_WALKS = {
    "DDIMScheduler": _Walk(_by_timestep, after=_after_ddim, strides=True),
    "DDIMParallelScheduler": _Walk(_by_timestep, strides=True),
    "DDPMScheduler": _Walk(_by_timestep),
    "DDPMParallelScheduler": _Walk(_by_timestep),
    "PNDMScheduler": _Walk(_by_timestep, ("epsilon",), strides=True),
    "DPMSolverMultistepScheduler": _Walk(_sigmas, flow=True),
    "DPMSolverSinglestepScheduler": _Walk(_sigmas, flow=True),
    "UniPCMultistepScheduler": _Walk(_sigmas, flow=True),
    "DEISMultistepScheduler": _Walk(_sigmas, orders=(1, 2)),
    "SASolverScheduler": _Walk(_sigmas),
    "EulerDiscreteScheduler": _Walk(_sigmas, after=_after_euler),
    "EulerAncestralDiscreteScheduler": _Walk(_sigmas, _NOISE_OR_V),
    "HeunDiscreteScheduler": _Walk(_sigmas),
    "LMSDiscreteScheduler": _Walk(_sigmas),
    "KDPM2DiscreteScheduler": _Walk(_interpolated(0), _NOISE_OR_V),
    "KDPM2AncestralDiscreteScheduler": _Walk(_interpolated(1), _NOISE_OR_V),
    "FlowMatchEulerDiscreteScheduler": _Walk(_sigmas, vp=False, flow=True, after=_after_euler),
    "FlowMatchHeunDiscreteScheduler": _Walk(_sigmas, vp=False, flow=True),
}
"""The classes that fit; any other is refused."""
_TRAINED_WITH = (
    *("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    *("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"),
)
"""Classes that do not fit, but whose configs mean a noise schedule as those that do."""
_MOST_MISSED = 0.05
"""Of the way over the timesteps. At twice that, DDIM with an exact score draws a Gaussian 6 % too wide at 150 steps."""
TRAINED = (
    *NOISE_SCHEDULE,
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)
"""The keys that say what the network was trained on and gives; all others are how a class walks it."""
_SERVED: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "deis", "data_prediction", "noise_prediction"),
    "interpolation_type": ("linear",),
    "invert_sigmas": (False, None),
    "shift_terminal": (None,),
    "stochastic_sampling": (False, None),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False, None),
}
"""The values that fit, of the options of a config that decide whether a class does."""


def scheduler_class(name: str, flow: bool = False) -> str:
    """The diffusers class behind a short name; a class name stays as it is."""
    return (SCHEDULERS | FLOW_SCHEDULERS if flow else SCHEDULERS).get(name.lower(), name)


def fitting(flow: bool = False) -> list[str]:
    """The names of the schedulers that fit: the short ones, then the classes that have none."""
    classes = [cls for cls, walk in _WALKS.items() if (walk.flow if flow else walk.vp)]
    short = {name: scheduler_class(name, flow) for name in SCHEDULERS}
    return [n for n, cls in short.items() if cls in classes] + [cls for cls in classes if cls not in short.values()]


def make_scheduler(
    config: Mapping[str, Any], name: str | None = None, options: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """A diffusers scheduler on the checkpoint's noise schedule.

    Keys that the config lacks and that say what the network was trained on, such as the betas, are
    those of its own class; how another class walks them is left to that class, as with
    diffusers' `from_config`.

    Args:
        config: the checkpoint's `scheduler_config.json`; of a `DDPMScheduler` where it names no class.
        name: a short name of `SCHEDULERS` or a diffusers class name; None takes the checkpoint's own.
        options: of the class, instead of what the config says; of `parse_options`.

    Raises:
        TypeError: `config` is no mapping, or `name` no text.
        UsageError: no such scheduler, or one that does not fit this checkpoint.
        CheckpointError: the checkpoint names a scheduler that diffusers does not have, or settings that it refuses.
    """
    instance("config", config, Mapping, "the config of a scheduler as a mapping")
    instance("name", name, str | None, "the name of a scheduler")
    own_class, flow = own_class_of(config), is_flow(config)
    if own_class not in (*_WALKS, *_TRAINED_WITH):
        raise UsageError(
            f"The checkpoint's scheduler {own_class} does not fit: guidegen does not know its noise levels. "
            f"It walks checkpoints of {', '.join(fitting(flow))}."
        )
    asked = own_class if name is None else scheduler_class(name, flow)
    what = f"The checkpoint's scheduler {asked}" if name is None else f"--scheduler {name}"
    walk = _walk_of(asked, flow, what)
    what += "".join(f" with {key} = {value}" for key, value in options.items())
    own = own_scheduler(config)
    settings = {**config, **{key: own.config[key] for key in TRAINED if key in own.config}}
    if settings.get("variance_type") in ("learned", "learned_range"):
        settings["variance_type"] = "fixed_small"  # guidance sees the mean only
    family = "DPMSolver"
    if (
        asked != own_class
        and not (asked.startswith(family) and own_class.startswith(family))
        and "algorithm_type" in own.config
    ):
        settings.pop("algorithm_type", None)  # the same key, of other algorithms
    if flow:
        shift = next((c[key] for c in (own.config, config) for key in ("shift", "flow_shift") if key in c), 1.0)
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift": shift, "flow_shift": shift}
    try:
        scheduler = build(asked, settings | dict(options))
    except ImportError as error:
        raise UsageError(f"{what} needs a package: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise UsageError(f"{what}: {asked} refuses this checkpoint's scheduler config: {first_line(error)}") from error
    _check_options(own, scheduler, walk, flow, what)
    return scheduler


def _walk_of(asked: str, flow: bool, what: str) -> _Walk:
    import diffusers

    walk = _WALKS.get(asked)
    use = f"Use {', '.join(fitting(flow))}."
    if walk is None and not (asked.endswith("Scheduler") and hasattr(diffusers, asked)):
        name = what.removeprefix("--scheduler ")
        raise UsageError(f"--scheduler {name!r}: no such scheduler. {use}")
    if walk is None:
        raise UsageError(
            f"{what} does not fit: {asked} is not known to show the network x_t = alpha x_0 + sigma eps "
            f"and to draw what the network has learnt. {use}"
        )
    if flow and not walk.flow:
        raise UsageError(f"{what}: cannot walk a flow-matching model. {use}")
    if not flow and not walk.vp:
        raise UsageError(f"{what}: is for flow-matching models; this checkpoint is not one. {use}")
    return walk


def _check_options(own: Any, scheduler: Any, walk: _Walk, flow: bool, what: str) -> None:
    """Refuses what of a config makes a class that fits wrong, and a class that does not take over its noise schedule."""
    options = {**own.config, **scheduler.config}
    for key, served in {**_SERVED, "solver_order": walk.orders}.items():
        if key in options and options[key] not in served:
            fit = ", ".join(str(value) for value in served if value is not None) or "none"
            raise UsageError(f"{what}: {key} = {options[key]} in its config does not fit; what does: {fit}.")
    own_flow = "flow_prediction" if flow else None
    predicts = own.config.get("prediction_type", own_flow)
    reads = ("flow_prediction",) if flow else walk.predictions
    if predicts not in reads:
        raise UsageError(
            f"{what}: {type(scheduler).__name__} with a model whose config says prediction_type {predicts!r}; "
            f"it reads {', '.join(reads)} here."
        )
    kept, walked = (getattr(each, "alphas_cumprod", None) for each in (own, scheduler))
    if flow or kept is None or walked is None:
        return
    # 2**-24 is what diffusers' solvers put for an alpha of zero
    if kept.shape != walked.shape or float((kept - walked).abs().max()) > 2**-23:
        raise UsageError(
            f"{what}: {type(scheduler).__name__} does not take over this checkpoint's noise schedule "
            f"(beta_schedule {own.config.get('beta_schedule')}, "
            f"rescale_betas_zero_snr {own.config.get('rescale_betas_zero_snr')})."
        )


def without_clip(scheduler: Any) -> tuple[Any, float | None]:
    """A scheduler that does not clip the denoised estimate, and the bound that `scheduler` would clip it to.

    DDIM and DDPM of diffusers clip after guidance, where it undoes what a classifier's gradient did;
    guidegen's `clipped` does it before. None where the scheduler does not clip.
    """
    if not getattr(scheduler.config, "clip_sample", False):
        return scheduler, None
    unclipped = build(type(scheduler).__name__, {**scheduler.config, "clip_sample": False})
    return unclipped, float(scheduler.config.clip_sample_range)


def takes_eta(scheduler: Any) -> bool:
    """Whether the scheduler's step has DDIM's eta."""
    return "eta" in inspect.signature(scheduler.step).parameters


def noise_levels(scheduler: Any) -> list[Level]:
    """alpha and sigma of the network's input at each step, after `set_timesteps`.

    Raises:
        UsageError: of a class that does not fit.
    """
    name = type(scheduler).__name__
    if name not in _WALKS:
        raise UsageError(f"The noise levels of {name} are not known. Use {', '.join(fitting())}.")
    return _WALKS[name].levels(scheduler)


def levels_after(scheduler: Any) -> list[Level] | None:
    """The level that each step leads to, after `set_timesteps`; None but for DDIM and Euler.

    That of the last step is what the scheduler ends with: no noise, or the least it knows
    (`set_alpha_to_one`, `final_sigmas_type`). With DDIM it is off the next step's own by up to
    a stride where the spacing is not `leading`: DDIM goes T // steps timesteps on at each step.
    """
    walk = _WALKS.get(type(scheduler).__name__)
    return walk.after(scheduler) if walk and walk.after else None


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
    if _WALKS[name].strides:
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
    if is_flow({"_class_name": "FlowMatch" * (kept is None), **config}):
        return 0 <= level.sigma <= 1 and abs(t - level.sigma * config["num_train_timesteps"]) <= 1 + 1e-3
    last = len(kept) - 1
    if not 0 <= t <= last:
        return False
    least, most = float(kept[min(math.ceil(t) + 1, last)]), float(kept[max(math.floor(t) - 1, 0)])
    # fp32's rounding, and the 2**-24 that stands for an alpha of zero
    return least - 1e-6 <= level.alpha**2 <= most + 1e-6
