"""The schedulers that guidegen walks, of diffusers and of `sigma_schedulers`: which fit, on which schedule, at which levels.

A class fits where the network's input is x_t = alpha x_0 + sigma eps at a level that is known, and where an exact
score draws the data's own distribution as the steps grow. `tests/oracles/test_schedulers.py` holds each to that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from guidegen.arguments import instance
from guidegen.errors import UsageError, first_line
from guidegen.models.noise_schedule import (
    EDM_CLASSES,
    NOISE_SCHEDULE,
    Convention,
    build,
    convention_of,
    in_sigma,
    is_flow,
    own_class_of,
    own_scheduler,
)
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
SIGMA_SCHEDULERS = {
    "edm": "EDMHeunScheduler",
    "euler": "EDMEulerScheduler",
    "heun": "EDMHeunScheduler",
    "dpm++": "EDMDPMSolverMultistepScheduler",
}
_SHORT = {"vp": SCHEDULERS, "flow": SCHEDULERS | FLOW_SCHEDULERS, "sigma": SIGMA_SCHEDULERS, "consistency": {}}
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


def _unit_alpha(scheduler: Any) -> list[Level]:
    """alpha = 1, and the sigmas that a sampler of `sigma_schedulers` has as timesteps."""
    return [Level(1.0, sigma) for sigma in scheduler.timesteps.double().tolist()]


def _alpha_bars(scheduler: Any) -> list[Level]:
    return [_of_alpha_bar(alpha_bar) for alpha_bar in scheduler.alpha_bars]


def _after_unit_alpha(scheduler: Any) -> list[Level]:
    return [Level(1.0, sigma) for sigma in scheduler.sigmas.double().tolist()[1:]]


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
        predictions: the prediction types that its step reads, of variance preserving models.
        conventions: of the noise that it walks.
        orders: the `solver_order`s whose images stay right however many the steps.
        after: the level that each step leads to, where a step only puts x0 and eps together anew: DDIM and Euler.
        strides: whether a step goes T // steps timesteps on, wherever the next timestep is.
    """

    levels: Levels
    predictions: tuple[str, ...] = _ANY
    conventions: tuple[Convention, ...] = ("vp",)
    orders: tuple[int, ...] = (1, 2, 3)
    after: Levels | None = None
    strides: bool = False


def _after_euler(scheduler: Any) -> list[Level]:
    return _sigmas(scheduler, shift=1)


_VP_AND_FLOW: tuple[Convention, ...] = ("vp", "flow")
_WALKS = {
    "DDIMScheduler": _Walk(_by_timestep, after=_after_ddim, strides=True),
    "DDIMParallelScheduler": _Walk(_by_timestep, strides=True),
    "DDPMScheduler": _Walk(_by_timestep),
    "DDPMParallelScheduler": _Walk(_by_timestep),
    "PNDMScheduler": _Walk(_by_timestep, ("epsilon",), strides=True),
    "DPMSolverMultistepScheduler": _Walk(_sigmas, conventions=_VP_AND_FLOW),
    "DPMSolverSinglestepScheduler": _Walk(_sigmas, conventions=_VP_AND_FLOW),
    "UniPCMultistepScheduler": _Walk(_sigmas, conventions=_VP_AND_FLOW),
    "DEISMultistepScheduler": _Walk(_sigmas, orders=(1, 2)),
    "SASolverScheduler": _Walk(_sigmas),
    "EulerDiscreteScheduler": _Walk(_sigmas, after=_after_euler),
    "EulerAncestralDiscreteScheduler": _Walk(_sigmas, _NOISE_OR_V),
    "HeunDiscreteScheduler": _Walk(_sigmas),
    "LMSDiscreteScheduler": _Walk(_sigmas),
    "KDPM2DiscreteScheduler": _Walk(_interpolated(0), _NOISE_OR_V),
    "KDPM2AncestralDiscreteScheduler": _Walk(_interpolated(1), _NOISE_OR_V),
    "FlowMatchEulerDiscreteScheduler": _Walk(_sigmas, conventions=("flow",), after=_after_euler),
    "FlowMatchHeunDiscreteScheduler": _Walk(_sigmas, conventions=("flow",)),
    "EDMHeunScheduler": _Walk(_unit_alpha, conventions=("sigma",)),
    "EDMEulerScheduler": _Walk(_unit_alpha, conventions=("sigma",), after=_after_unit_alpha),
    "EDMDPMSolverMultistepScheduler": _Walk(_unit_alpha, conventions=("sigma",)),
    "ScoreSdeVpScheduler": _Walk(_alpha_bars, ("epsilon",)),
    "ScoreSdeVeScheduler": _Walk(_unit_alpha, conventions=("sigma",)),
    "KarrasVeScheduler": _Walk(_unit_alpha, conventions=("sigma",)),
    "CMStochasticIterativeScheduler": _Walk(_unit_alpha, conventions=("consistency",)),
}
"""The classes that fit; any other is refused."""
_TRAINED_WITH = (
    *("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    *("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"),
)
"""Classes that do not fit, but whose configs mean a noise schedule as those that do."""
_MODELS = {
    "vp": "variance preserving models",
    "flow": "flow-matching models",
    "sigma": "models of x_0 + sigma eps",
    "consistency": "consistency models",
}
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


def scheduler_class(name: str, convention: Convention = "vp") -> str:
    """The class behind a short name; a class name stays as it is."""
    tables = (_SHORT[convention], *_SHORT.values())  # a name of another convention is refused by its class
    return next((table[name.lower()] for table in tables if name.lower() in table), name)


def fitting(convention: Convention = "vp") -> list[str]:
    """The names of the schedulers that fit: the short ones, then the classes that have none."""
    classes = [cls for cls, walk in _WALKS.items() if convention in walk.conventions]
    short = _SHORT[convention]
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
    own_class, convention = own_class_of(config), convention_of(config)
    flow = convention == "flow"
    if own_class not in (*_WALKS, *_TRAINED_WITH):
        raise UsageError(
            f"The checkpoint's scheduler {own_class} does not fit: guidegen does not know its noise levels. "
            f"It walks checkpoints of {', '.join(fitting(convention))}."
        )
    asked = own_class if name is None else scheduler_class(name, convention)
    what = f"The checkpoint's scheduler {asked}" if name is None else f"--scheduler {name}"
    walk = _walk_of(asked, convention, what)
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
    if in_sigma(config):
        settings |= {key: own.config[key] for key in ("sigma_min", "sigma_max") if key in own.config}
    if flow:
        shift = next((c[key] for c in (own.config, config) for key in ("shift", "flow_shift") if key in c), 1.0)
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift": shift, "flow_shift": shift}
    try:
        scheduler = build(_class_of(asked), settings | dict(options))
    except ImportError as error:
        raise UsageError(f"{what} needs a package: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise UsageError(f"{what}: {asked} refuses this checkpoint's scheduler config: {first_line(error)}") from error
    _check_options(own, scheduler, walk, convention, what)
    return scheduler


def _class_of(name: str) -> Any:
    import diffusers

    from guidegen.sampling import score_sde_vp, sigma_schedulers

    return next(getattr(place, name) for place in (sigma_schedulers, score_sde_vp, diffusers) if hasattr(place, name))


def _walk_of(asked: str, convention: Convention, what: str) -> _Walk:
    import diffusers

    walk = _WALKS.get(asked)
    use = f"Use {', '.join(fitting(convention))}."
    if walk is None and not (asked.endswith("Scheduler") and hasattr(diffusers, asked)):
        name = what.removeprefix("--scheduler ")
        raise UsageError(f"--scheduler {name!r}: no such scheduler. {use}")
    if walk is None:
        raise UsageError(
            f"{what} does not fit: {asked} is not known to show the network x_t = alpha x_0 + sigma eps "
            f"and to draw what the network has learnt. {use}"
        )
    if convention == "flow" and convention not in walk.conventions:
        raise UsageError(f"{what}: cannot walk a flow-matching model. {use}")
    if convention not in walk.conventions:
        models = " and ".join(_MODELS[each] for each in walk.conventions)
        raise UsageError(f"{what}: is for {models}; this checkpoint is not one. {use}")
    return walk


def _check_options(own: Any, scheduler: Any, walk: _Walk, convention: Convention, what: str) -> None:
    """Refuses what of a config makes a class that fits wrong, and a class that does not take over its noise schedule."""
    options = {**own.config, **scheduler.config}
    for key, served in {**_SERVED, "solver_order": walk.orders}.items():
        if key in options and options[key] not in served:
            fit = ", ".join(str(value) for value in served if value is not None) or "none"
            raise UsageError(f"{what}: {key} = {options[key]} in its config does not fit; what does: {fit}.")
    flow, name = convention == "flow", type(own).__name__
    own_flow = "flow_prediction" if flow else None
    predicts = own.config.get("prediction_type", own_flow)
    reads: tuple[str | None, ...] = ("flow_prediction",) if flow else walk.predictions
    if in_sigma({"_class_name": name}):
        _check_range(own.config, scheduler.config, what)
        reads = _NOISE_OR_V if name in EDM_CLASSES else (None,)
    if predicts not in reads:
        raise UsageError(
            f"{what}: {type(scheduler).__name__} with a model whose config says prediction_type {predicts!r}; "
            f"it reads {', '.join(map(str, reads))} here."
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


def _check_range(own: Any, walked: Any, what: str) -> None:
    """Refuses sigmas beyond those of the training."""
    if walked.sigma_min < own.sigma_min or walked.sigma_max > own.sigma_max:
        raise UsageError(
            f"{what}: sigma from {walked.sigma_min:g} to {walked.sigma_max:g}; the checkpoint was trained from "
            f"{own.sigma_min:g} to {own.sigma_max:g}."
        )


def without_clip(scheduler: Any) -> tuple[Any, float | None]:
    """A scheduler that does not clip the denoised estimate, and the bound that `scheduler` would clip it to.

    DDIM and DDPM of diffusers clip after guidance, where it undoes what a classifier's gradient did;
    guidegen's `clipped` does it before. None where the scheduler does not clip.
    """
    if not getattr(scheduler.config, "clip_sample", False):
        return scheduler, None
    unclipped = build(type(scheduler), {**scheduler.config, "clip_sample": False})
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


def goes_by_strides(scheduler: Any) -> bool:
    """Whether a step goes T // steps timesteps on, wherever the next timestep is: DDIM and PNDM."""
    return _WALKS[type(scheduler).__name__].strides
