"""The axes along which images of a run, or runs, differ: an entry each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guidegen.errors import UsageError, quoted
from guidegen.spec.parse import parse_weights
from guidegen.spec.settings import FILE_SHA256, MODE_NAMES


@dataclass(frozen=True)
class Axis:
    """An axis of a grid.

    Attributes:
        name: as rows of the manifest and settings have it.
        title: as people call it.
        flag: the flag that sets it, without dashes; None for what only whole runs differ in.
        of_cell: whether every row of a manifest has it: a flag of its own takes its list, not `--by`.
        values: the values that a part of a `--by` list means.
        neutral: what None is called.
        bare: whether its values are names of themselves.
        down: its rank among the rows of a grid, from the outermost; equal ones are in the order of `AXES`.
    """

    name: str
    title: str
    flag: str | None = None
    of_cell: bool = False
    values: Callable[[str], list[Any]] = lambda part: [part]
    neutral: str | None = None
    bare: bool = False
    down: int = 7

    @property
    def by(self) -> bool:
        """Whether `--by` varies it."""
        return self.flag is not None and not self.of_cell


def _steps(part: str) -> list[int]:
    counts = parse_weights(part, "--by steps=")
    if any(count != int(count) or count < 1 for count in counts):
        raise UsageError(f"--by steps={quoted(part)}: give whole numbers from 1.")
    return [int(count) for count in counts]


AXES = {
    axis.name: axis
    for axis in (
        Axis("w", "w", "w", of_cell=True, down=5),
        Axis("label", "label", "label", of_cell=True, down=2),
        Axis("prompt", "prompt", "prompt", of_cell=True, down=1),
        Axis("seed", "seed", "seeds", of_cell=True, down=6),
        Axis("w_classifier", "classifier w", "w-classifier", of_cell=True, down=3),
        Axis("w_guide", "guide w", "w-guide", of_cell=True, down=4),
        Axis("run", "run", bare=True, down=0),
        Axis("mode", "mode"),
        Axis("model", "model", bare=True),
        Axis("guidance", "guidance", "guidance", neutral="cfg", bare=True),
        Axis("interval", "interval", "interval", neutral="none"),
        Axis("w_schedule", "w-schedule", "w-schedule", neutral="constant"),
        Axis("scheduler", "scheduler", "scheduler"),
        Axis("timestep_spacing", "timestep spacing", "timestep-spacing"),
        Axis("steps", "steps", "steps", values=_steps),
        Axis("eta", "eta", "eta", values=lambda part: list(parse_weights(part, "--by eta="))),
        Axis("guide_model", "against"),
    )
}
"""By name. An option of a method is an axis too, METHOD.OPTION, which no entry stands for: `axis_of` makes it."""
CELL_AXES = tuple(axis.name for axis in AXES.values() if axis.of_cell)
"""The axes that every run has; those of `--by` come on top."""
BY_AXES = tuple(axis.name for axis in AXES.values() if axis.by)
"""The settings that `--by` varies."""
BY_FLAGS = ", ".join(str(AXES[axis].flag) for axis in BY_AXES)
"""Their flags, without dashes."""


def axis_of(name: str) -> Axis:
    """The axis of that name; an option of a method is one."""
    return AXES.get(name) or Axis(name, name, "guidance-opt")


def axis_options(options: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a command, flag -> value, that also set these values of axes; neutral ones need no flag."""
    found = dict(options)
    for name, value in values.items():
        axis = axis_of(name)
        if value in (None, axis.neutral):
            continue
        if axis.flag == "guidance-opt":
            found[axis.flag] = [*found.get(axis.flag, ()), f"{name.rpartition('.')[2]}={value}"]
        else:
            found[str(axis.flag)] = value
    return found


def axis_value(axis: str, settings: Mapping[str, Any]) -> Any:
    """The value of settings along an axis of `--by`; None where they have none."""
    method, _, option = axis.rpartition(".")
    if axis in AXES or not method:
        value = settings.get(axis)
        return axis_of(axis).neutral if value is None else value
    mine = (settings.get("guidance") or AXES["guidance"].neutral) == method
    return (settings.get("guidance_options") or {}).get(option) if mine else None


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes along which the settings of several runs differ."""
    options = [
        f"{some.get('guidance') or AXES['guidance'].neutral}.{option}"
        for some in settings
        for option in some.get("guidance_options") or {}
        if option != FILE_SHA256  # the hash of a custom method, which its name stands for
    ]
    axes = dict.fromkeys((*(axis for axis in AXES if axis not in (*CELL_AXES, "run")), *options))
    apart = [axis for axis in axes if len({axis_value(axis, some) for some in settings}) > 1]
    classifiers = {some.get("classifier") for some in settings} - {None}  # modes without one differ by the mode
    return [*apart, *(["classifier"] if len(classifiers) > 1 else [])]


def run_names(settings: Sequence[Mapping[str, Any]], folders: Sequence[str], elsewhere: Collection[str] = ()) -> list[str]:
    """What distinguishes runs: the mode and other settings, else their folders too.

    Args:
        settings: of each run.
        folders: the name of each run's directory.
        elsewhere: axes that are shown elsewhere.
    """
    apart = [axis for axis in differences(settings) if axis not in elsewhere]
    names = [_run_name(some, apart) for some in settings]
    return [f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)]


def _run_name(settings: Mapping[str, Any], apart: Sequence[str]) -> str:
    """The mode if it is one of these axes or none differs, and the values along the others."""
    values = [(axis, axis_value(axis, settings)) for axis in apart if axis != "mode"]
    words = [named(axis, value) for axis, value in values if value is not None and value != axis_of(axis).neutral]
    if "mode" in apart or not words:
        words.insert(0, MODE_NAMES.get(settings["mode"], settings["mode"]))
    return ", ".join(words)


def value_name(axis: str, value: Any) -> str:
    """A value along an axis, without the axis."""
    if value is None:
        return "not given"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.removesuffix("Scheduler") if axis == "scheduler" else text


def named(axis: str, value: Any) -> str:
    """`w = 3`, `interval 0.3:2`, `apg`: a value along an axis that says which axis that is."""
    text = value_name(axis, value)
    if axis_of(axis).bare:
        return text
    equals = " = " if isinstance(value, int | float) and axis != "seed" else " "
    return f"{axis_of(axis).title}{equals}{text}"


def describe(axes: Sequence[str], values: Sequence[Any]) -> str:
    """`w = 3, apg, steps = 10`."""
    return ", ".join(map(named, axes, values))
