"""What a scheduler's config says of the noise that a network was trained with.

There are four noise conventions, of x_t = alpha x_0 + sigma eps:

- `vp`, variance preserving: alpha^2 + sigma^2 = 1, timesteps counted from 0.
- `flow`, flow matching: alpha = 1 - sigma, timesteps of sigma times their number.
- `sigma`, variance exploding and EDM: alpha = 1, sigma up to 80 and beyond, and sigma itself as the timestep.
- `consistency`: as `sigma`, of networks that predict where the flow ends, not the mean of x_0.

A denoiser of the last two takes x_t and sigma, and predicts x_0: all preconditioning of its network is its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from guidegen.errors import CheckpointError, UsageError, first_line
from guidegen.models.configs import check_scheduler, read_json

NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""The keys of a config that make a noise schedule."""
Convention = Literal["vp", "flow", "sigma", "consistency"]
EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""Classes whose networks have the preconditioning of EDM."""
_CONVENTIONS: dict[str, Convention] = {
    **dict.fromkeys((*EDM_CLASSES, "ScoreSdeVeScheduler", "KarrasVeScheduler"), "sigma"),
    "CMStochasticIterativeScheduler": "consistency",
}


def convention_of(scheduler_config: Mapping[str, Any]) -> Convention:
    """The noise convention of a scheduler's config."""
    name = str(scheduler_config.get("_class_name"))
    return "flow" if is_flow(scheduler_config) else _CONVENTIONS.get(name, "vp")


def in_sigma(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether alpha is 1 at every step and the timestep is sigma: the conventions `sigma` and `consistency`."""
    return convention_of(scheduler_config) in ("sigma", "consistency")


def parametrisation(scheduler_config: Mapping[str, Any]) -> str:
    """How x_t is made and what the network is told, for people.

    Raises:
        CheckpointError: as `own_scheduler`.
    """
    convention, name = convention_of(scheduler_config), scheduler_config.get("_class_name")
    if convention == "vp":
        return "variance preserving: alpha^2 + sigma^2 = 1"
    if convention == "flow":
        return "flow matching: alpha = 1 - sigma"
    text = "alpha = 1, " + ("a score network" if convention == "sigma" else "a consistency function")
    if name in EDM_CLASSES:
        text = f"alpha = 1, EDM preconditioning with sigma_data {own_scheduler(scheduler_config).config.sigma_data:g}"
    return text


def sigma_range(scheduler_config: Mapping[str, Any]) -> tuple[float, float] | None:
    """The least and the largest sigma of a network's training where alpha is 1; None elsewhere.

    Raises:
        CheckpointError: as `own_scheduler`.
    """
    if not in_sigma(scheduler_config):
        return None
    config = own_scheduler(scheduler_config).config
    return float(config.sigma_min), float(config.sigma_max)


def is_flow(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config belongs to a flow-matching model."""
    return (
        str(scheduler_config.get("_class_name", "")).startswith("FlowMatch")
        or scheduler_config.get("prediction_type") == "flow_prediction"
        or bool(scheduler_config.get("use_flow_sigmas"))
    )


def scheduler_config_in(folder: Path) -> dict[str, Any] | None:
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            config = read_json(path)
            check_scheduler(config, path)
            return config
    if (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is incomplete: scheduler/scheduler_config.json is missing.")
    return None


def own_class_of(config: Mapping[str, Any]) -> str:
    """The class of diffusers that a scheduler's config is of, `DDPMScheduler` where it names none.

    Raises:
        CheckpointError: diffusers has no such class.
    """
    import diffusers

    own = config.get("_class_name") or "DDPMScheduler"
    if not isinstance(own, str) or not (own.endswith("Scheduler") and hasattr(diffusers, own)):
        raise CheckpointError(
            f"The checkpoint's scheduler {own!r} is not one of diffusers {diffusers.__version__}: "
            "what its networks were trained on is not known."
        )
    return own


def own_scheduler(config: Mapping[str, Any]) -> Any:
    """The scheduler of diffusers that a config is of, its missing keys as its own class completes them.

    Raises:
        CheckpointError: diffusers has no such class, the class refuses it, or its betas make no noise schedule.
        UsageError: it needs a package that is not installed.
    """
    import diffusers

    own_class = own_class_of(config)
    if in_sigma(config):
        _check_sigmas(config)
    try:
        own = build(getattr(diffusers, own_class), config)
    except ImportError as error:
        raise UsageError(
            f"The checkpoint's scheduler {own_class} needs a package: {' '.join(str(error).split())}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"The checkpoint's scheduler config: {own_class} refuses it: {first_line(error)}") from error
    kept = getattr(own, "alphas_cumprod", None)
    if kept is not None and not (
        kept.numel() and kept.shape == (own.config.num_train_timesteps,) and bool(((kept >= 0) & (kept <= 1)).all())
    ):
        raise CheckpointError(
            f"The checkpoint's scheduler config: its betas are none of {own.config.num_train_timesteps} steps from 0 to 1."
        )
    return own


def _check_sigmas(config: Mapping[str, Any]) -> None:
    """Refuses sigmas that are none, before a class of diffusers computes with them."""
    least, most = config.get("sigma_min", 1e-9), config.get("sigma_max", 1e9)
    numbers = {"sigma_min": least, "sigma_max": most, "sigma_data": config.get("sigma_data", 1), "rho": config.get("rho", 1)}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 <= value <= 1e9:
            found = repr(value)[:40]
            raise CheckpointError(f"The checkpoint's scheduler config: {key} should be from 1e-9 to 1e9, found {found}.")
    if least >= most:
        raise CheckpointError(f"The checkpoint's scheduler config: sigma_min {least:g} is not below sigma_max {most:g}.")


def build(cls: Any, config: Mapping[str, Any]) -> Any:
    """A class of a scheduler with those keys of a config that it takes; all of them count as given."""
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
    return cls(**{key: value for key, value in config.items() if key in known})  # from_config would load scipy


def noise_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the noise schedule that a config means, its own class's defaults included: equal ones are the same.

    Raises:
        CheckpointError, UsageError: as `own_scheduler`.
    """
    own = own_scheduler(config).config
    if in_sigma(config):
        return {"noise convention": convention_of(config)}
    keys = ("num_train_timesteps",) if is_flow(config) else NOISE_SCHEDULE  # a flow has no betas, whatever its class takes
    return {key: own[key] for key in keys if own.get(key)}
