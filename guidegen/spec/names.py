"""What modes and the values of axes are called, in grids, tables, curves and pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MODE_NAMES = {
    "cfg": "classifier-free guidance",
    "classifier": "classifier guidance",
    "both": "classifier-free and classifier guidance",
    "none": "no guidance",
    "autoguidance": "autoguidance",
}
_AXIS_NAMES = {"w_classifier": "classifier w", "w_guide": "guide w", "w_schedule": "w-schedule", "guide_model": "against"}
_BARE = ("model", "guidance", "run")  # values that are names of themselves


def axis_name(axis: str) -> str:
    """An axis, as people call it."""
    return _AXIS_NAMES.get(axis, axis)


def value_name(axis: str, value: Any) -> str:
    """A value along an axis, without the axis."""
    if value is None:
        return "not given"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.removesuffix("Scheduler") if axis == "scheduler" else text


def named(axis: str, value: Any) -> str:
    """`w = 3`, `interval 0.3:2`, `apg`: a value along an axis that says which axis that is."""
    text = value_name(axis, value)
    if axis in _BARE:
        return text
    equals = " = " if isinstance(value, int | float) and axis != "seed" else " "
    return f"{axis_name(axis)}{equals}{text}"


def describe(axes: Sequence[str], values: Sequence[Any]) -> str:
    """`w = 3, apg, steps = 10`."""
    return ", ".join(map(named, axes, values))
