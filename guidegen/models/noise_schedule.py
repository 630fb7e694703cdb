"""What a scheduler's config says of the noise that a network was trained with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    own_class = own_class_of(config)
    try:
        own = build(own_class, config)
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


def build(class_name: str, config: Mapping[str, Any]) -> Any:
    """A class of diffusers with those keys of a config that it takes; all of them count as given."""
    import diffusers

    cls = getattr(diffusers, class_name)
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
    return cls(**{key: value for key, value in config.items() if key in known})  # from_config would load scipy


def noise_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the noise schedule that a config means, its own class's defaults included: equal ones are the same.

    Raises:
        CheckpointError, UsageError: as `own_scheduler`.
    """
    own = own_scheduler(config).config
    keys = ("num_train_timesteps",) if is_flow(config) else NOISE_SCHEDULE  # a flow has no betas, whatever its class takes
    return {key: own[key] for key in keys if own.get(key)}
