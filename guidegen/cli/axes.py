"""`--by AXIS=V1,V2`: what a sweep varies besides w, label, prompt and seed.

A variant is the command line with some flags set otherwise, so whatever a flag refuses is refused
of an axis too, and what a variant draws is what the plain command with these flags draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from guidegen.errors import UsageError, quoted
from guidegen.spec import limits
from guidegen.spec.cell import Variant
from guidegen.spec.names import axis_name
from guidegen.spec.parse import parse_weight, parse_weights
from guidegen.spec.settings import NEUTRAL, VARIED, Settings, axis_value

if TYPE_CHECKING:
    from guidegen.cli.flags import Flags

_LISTS = {"w": "w", "w_classifier": "w-classifier", "w_guide": "w-guide", "label": "label", "prompt": "prompt"}
_LISTS |= {"seed": "seeds", "seeds": "seeds", "num": "num"}


@dataclass(frozen=True)
class Axis:
    """One `--by`.

    Attributes:
        name: a flag with `_` for `-`, or METHOD.OPTION.
        texts: its values as they were given.
        weights: the weight of each value (VALUE@W), or None where they share those of `--w`.
    """

    name: str
    texts: list[str]
    weights: list[float] | None = None

    @property
    def option(self) -> tuple[str, str] | None:
        """(method, option) of an axis that is an option of a method."""
        method, _, option = self.name.rpartition(".")
        return (method, option) if self.name not in VARIED else None


def parse_by(words: Sequence[str]) -> list[Axis]:
    """The axes that `--by` names.

    Raises:
        UsageError: no axis, one twice, one that has a flag of its own, or a value that is none.
    """
    axes = [_axis(word) for word in words]
    names = [axis.name for axis in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--by {axis_name(twice[0])} stands there twice: give all its values in one.")
    if len([axis for axis in axes if axis.weights]) > 1:
        raise UsageError("--by: the values of one axis can have weights of their own (VALUE@W), not those of two.")
    return axes


def parse_axes(text: str | None) -> tuple[str, ...]:
    """The axes of a list, as rows of the manifest name them.

    Raises:
        UsageError: a list of none.
    """
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if text is not None and not words:
        raise UsageError(f"--columns and --rows take axes, such as w or label,seed; found {text!r}.")
    return tuple(word if "." in word else word.replace("-", "_") for word in words)


def _axis(word: str) -> Axis:
    given, equals, text = word.partition("=")
    name = given.strip()
    name = name if "." in name else name.replace("-", "_")
    if name in _LISTS:
        raise UsageError(f"--by {quoted(given)}: that axis has a flag of its own, which takes a list: --{_LISTS[name]}.")
    if name not in VARIED and not (name.rpartition(".")[0] and name.rpartition(".")[2].isidentifier()):
        known = ", ".join(flag.replace("_", "-") for flag in VARIED)
        raise UsageError(f"--by {quoted(given)}: choose {known}, or an option of a method, such as apg.eta=0,0.5.")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not (equals and parts):
        raise UsageError(f"--by {quoted(word)}: give the values after the axis, such as --by steps=10,20.")
    weighed = [part.rpartition("@") for part in parts if "@" in part]
    if not weighed:
        return Axis(name, list(dict.fromkeys(text for part in parts for text in _texts(name, part))))
    if len(weighed) < len(parts):
        raise UsageError(f"--by {quoted(word)}: give all of its values a weight of their own (VALUE@W), or none of them.")
    texts = [value for text, _, _ in weighed for value in _texts(name, text)]
    if len(texts) > len(parts):
        raise UsageError(f"--by {quoted(word)}: a range has no weight of its own (VALUE@W); give its values one by one.")
    if len(set(texts)) < len(texts):
        raise UsageError(f"--by {quoted(word)}: one value stands there twice; with weights of their own each stands once.")
    return Axis(name, texts, [parse_weight(w, f"--by {name} @") for _, _, w in weighed])


def _texts(name: str, part: str) -> list[str]:
    """The values that a part of the list means: numbers take ranges as `--w` does."""
    if name == "steps":
        counts = parse_weights(part, "--by steps=")
        if any(count != int(count) or count < 1 for count in counts):
            raise UsageError(f"--by steps={quoted(part)}: give whole numbers from 1.")
        return [str(int(count)) for count in counts]
    return [str(value) for value in parse_weights(part, "--by eta=")] if name == "eta" else [part]


@dataclass(frozen=True)
class Varied:
    """The variants of a sweep.

    Attributes:
        by: (axis, values) as `Plan.by` has them.
        own_weights: as `Plan.own_weights` has them.
        looks: what `look` made of each variant's flags.
        base: the settings of the run.
    """

    by: tuple[tuple[str, tuple[Any, ...]], ...]
    own_weights: tuple[str, tuple[float, ...]] | None
    looks: dict[Variant, Any]
    base: Settings


def vary(
    flags: Flags, axes: Sequence[Axis], look: Callable[[Flags], tuple[Settings, Any]], scheduler: str, steps: int
) -> Varied:
    """All combinations of the axes of `--by`; without any, the flags as they are.

    Args:
        flags: the command line.
        axes: of `parse_by`.
        look: from flags to the settings and the scheduler that they mean.
        scheduler: the class that is taken where nothing is asked for.
        steps: and the steps.

    Raises:
        UsageError: a combination that cannot be drawn, or on which an axis has no effect.
    """
    for axis in axes:
        if axis.name in VARIED and getattr(flags, axis.name) is not None:
            raise UsageError(
                f"--by {axis_name(axis.name)} stands instead of --{axis.name.replace('_', '-')}: give one of them."
            )
        if axis.option and any(word.partition("=")[0].strip() == axis.option[1] for word in flags.guidance_opt or ()):
            raise UsageError(f"--by {axis.name} stands instead of --guidance-opt {axis.option[1]}: give one of them.")
        if axis.weights and flags.w is not None:
            raise UsageError(f"--by {axis_name(axis.name)} gives each value its own weight, and --w is given too: drop one.")
    if (count := math.prod(len(axis.texts) for axis in axes)) > limits.COMBINATIONS:
        raise UsageError(
            f"--by has {count:,} combinations of values, and takes {limits.COMBINATIONS:,} at most: give fewer."
        )
    looks: dict[Variant, tuple[Settings, Any]] = {}
    values: dict[str, list[Any]] = {axis.name: [] for axis in axes}
    for texts in itertools.product(*(axis.texts for axis in axes)):
        variant, seen = _look(flags, axes, texts, look)
        looks[variant] = seen
        for name, value in variant:
            values[name] += [value] if value not in values[name] else []
    own = next(((axis.name, tuple(axis.weights)) for axis in axes if axis.weights), None)
    if own and len(values[own[0]]) < len(own[1]):
        raise UsageError(f"--by {axis_name(own[0])}: two of its values are the same, and have weights of their own.")
    base = _base([settings for settings, _ in looks.values()], axes, scheduler, steps)
    return Varied(tuple((name, tuple(some)) for name, some in values.items()), own, looks, base)


def _look(
    flags: Flags, axes: Sequence[Axis], texts: Sequence[str], look: Callable[[Flags], tuple[Settings, Any]]
) -> tuple[Variant, tuple[Settings, Any]]:
    """One variant, by the values that its settings have, and what it is drawn with."""
    varied = replace(flags, **dict(_changes(flags, axes, texts)))
    method = varied.guidance or NEUTRAL["guidance"]
    try:
        for axis in axes:
            if axis.option and axis.option[0].lower() != method.lower():
                raise UsageError(f"{axis.name} has no effect on --guidance {method}.")
        settings, scheduler = look(varied)
    except UsageError as error:
        if not axes:
            raise
        combination = " ".join(f"{axis_name(axis.name)}={text}" for axis, text in zip(axes, texts, strict=True))
        raise UsageError(f"--by, at {combination}: {error}") from error
    return tuple((axis.name, axis_value(axis.name, asdict(settings))) for axis in axes), (settings, scheduler)


def _changes(flags: Flags, axes: Sequence[Axis], texts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    given = list(flags.guidance_opt or [])
    for axis, text in zip(axes, texts, strict=True):
        if axis.option:
            given.append(f"{axis.option[1]}={text}")
            yield "guidance_opt", list(given)
        elif axis.name in ("steps", "eta"):
            yield axis.name, int(text) if axis.name == "steps" else float(text)
        else:
            yield axis.name, None if text == NEUTRAL.get(axis.name) else text


def _base(all_settings: Sequence[Settings], axes: Sequence[Axis], scheduler: str, steps: int) -> Settings:
    """What the variants have in common; along the axes, what the command without them would have."""
    first = all_settings[0]
    plain = {"scheduler": scheduler, "steps": steps}
    changes: dict[str, Any] = {axis.name: plain.get(axis.name) for axis in axes if axis.name in VARIED}
    options = [settings.guidance_options or {} for settings in all_settings]
    common = {name: value for name, value in options[0].items() if all(value == other.get(name) for other in options)}
    return replace(first, **changes, guidance_options=_sorted(common) or None) if axes else first


def _sorted(options: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(options.items()))
