"""What a scheduler's config says of the noise that a network was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guidegen.errors import CheckpointError
from guidegen.models.configs import check_scheduler, read_json


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
