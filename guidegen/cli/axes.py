"""`--by AXIS=V1,V2`: what a sweep varies besides w, label, prompt and seed.

A variant is the command line with some flags set otherwise, so whatever a flag refuses is refused
of an axis too, and what a variant draws is what the plain command with these flags draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from guidegen.cli.flags import SampleOptions
from guidegen.errors import UsageError, quoted
from guidegen.spec import limits
from guidegen.spec.axes import AXES, BY_AXES, BY_FLAGS, Axis, axis_of, axis_value, describe
from guidegen.spec.cell import Variant, digest
from guidegen.spec.parse import parse_weight
from guidegen.spec.settings import Settings

if TYPE_CHECKING:
    from guidegen.sampling.setup import Setup

_METHOD = AXES["guidance"]


@dataclass(frozen=True)
class By:
    """One `--by`.

    Attributes:
        axis: what it varies.
        values: as flags have them.
        weights: the weight of each value (VALUE@W), or None where they share those of `--w`.
    """

    axis: Axis
    values: list[Any]
    weights: list[float] | None = None

    @property
    def option(self) -> tuple[str, str] | None:
        """(method, option) of an axis that is an option of a method."""
        method, _, option = self.axis.name.rpartition(".")
        return (method, option) if method else None


def parse_by(words: Sequence[str]) -> list[By]:
    """The axes that `--by` names.

    Raises:
        UsageError: no axis, one twice, one that has a flag of its own, or a value that is none.
    """
    given = [_parse(word) for word in words]
    names = [by.axis.name for by in given]
    if twice := [by.axis.title for by in given if names.count(by.axis.name) > 1]:
        raise UsageError(f"--by {twice[0]} stands there twice: give all its values in one.")
    if len([by for by in given if by.weights]) > 1:
        raise UsageError("--by: the values of one axis can have weights of their own (VALUE@W), not those of two.")
    return given


def parse_axes(text: str | None) -> tuple[str, ...]:
    """The axes of a list, as rows of the manifest name them.

    Raises:
        UsageError: a list of none.
    """
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if text is not None and not words:
        raise UsageError(f"--columns and --rows take axes, such as w or label,seed; found {text!r}.")
    return tuple(word if "." in word else word.replace("-", "_") for word in words)


_EXAMPLES = {"guidance": "cfg,apg", "steps": "10,20", "eta": "0,0.5", "scheduler": "ddim,unipc", "interval": "none,10%:60%"}


def _parse(word: str) -> By:
    given, equals, text = word.partition("=")
    name = given.strip()
    name = name if "." in name else name.replace("-", "_")
    axis = axis_of({"seeds": "seed"}.get(name, name))
    if axis.of_cell or name == "num":
        flag = axis.flag if axis.of_cell else name
        raise UsageError(f"--by {quoted(given)}: that axis has a flag of its own, which takes a list: --{flag}.")
    if name not in BY_AXES and not (name.rpartition(".")[0] and name.rpartition(".")[2].isidentifier()):
        raise UsageError(
            f"--by {quoted(word)}: no axis of that name. Choose {BY_FLAGS}, or an option of a method, such as apg.eta=0,0.5."
        )
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not (equals and parts):
        example = _EXAMPLES.get(name, "A,B")
        raise UsageError(f"--by {quoted(word)}: give values after the =, such as --by {given.strip()}={example}.")
    weighed = [part.rpartition("@") for part in parts if "@" in part]
    if not weighed:
        return By(axis, list(dict.fromkeys(value for part in parts for value in axis.values(part))))
    if len(weighed) < len(parts):
        raise UsageError(f"--by {quoted(word)}: give all of its values a weight of their own (VALUE@W), or none of them.")
    values = [value for text, _, _ in weighed for value in axis.values(text)]
    if len(values) > len(parts):
        raise UsageError(f"--by {quoted(word)}: a range has no weight of its own (VALUE@W); give its values one by one.")
    if len(set(values)) < len(values):
        raise UsageError(f"--by {quoted(word)}: one value stands there twice; with weights of their own each stands once.")
    return By(axis, values, [parse_weight(w, f"--by {name} @") for _, _, w in weighed])


@dataclass(frozen=True)
class Variants:
    """The variants of a sweep.

    Attributes:
        by: (axis, values) as `Plan.by` has them.
        own_weights: as `Plan.own_weights` has them.
        setups: what each variant is drawn with.
        settings: what they have in common; along the axes, what the command without them would have.
    """

    by: tuple[tuple[str, tuple[Any, ...]], ...]
    own_weights: tuple[str, tuple[float, ...]] | None
    setups: dict[Variant, Setup]
    settings: Settings


def vary(
    flags: SampleOptions, axes: Sequence[By], resolve: Callable[[SampleOptions], Setup], plain: dict[str, Any]
) -> Variants:
    """All combinations of the axes of `--by`; without any, the flags as they are.

    Args:
        flags: the command line.
        axes: of `parse_by`.
        resolve: from flags to the setup that they mean.
        plain: settings that hold where nothing is asked for.

    Raises:
        UsageError: a combination that cannot be drawn, or on which an axis has no effect.
    """
    _check_not_given(flags, axes)
    if (count := math.prod(len(by.values) for by in axes)) > limits.COMBINATIONS:
        raise UsageError(
            f"--by has {count:,} combinations of values, and takes {limits.COMBINATIONS:,} at most: give fewer."
        )
    setups: dict[Variant, Setup] = {}
    values: dict[str, list[Any]] = {by.axis.name: [] for by in axes}
    for some in itertools.product(*(by.values for by in axes)):
        variant, setup = _variant(flags, axes, some, resolve)
        setups[variant] = setup
        for name, value in variant:
            values[name] += [value] if value not in values[name] else []
    own = next(((by.axis.name, tuple(by.weights)) for by in axes if by.weights), None)
    if own and len(values[own[0]]) < len(own[1]):
        raise UsageError(f"--by {axis_of(own[0]).title}: two of its values are the same, and have weights of their own.")
    _check_different(setups)
    settings = _common([setup.settings for setup in setups.values()], axes, plain)
    return Variants(tuple((name, tuple(some)) for name, some in values.items()), own, setups, settings)


def _check_not_given(flags: SampleOptions, axes: Sequence[By]) -> None:
    """Refuses an axis beside the flag that it stands instead of."""
    for by in axes:
        title, option = by.axis.title, by.option
        if option is None and getattr(flags, by.axis.name) is not None:
            raise UsageError(f"--by {title} stands instead of --{by.axis.flag}: give one of them.")
        if option and any(word.partition("=")[0].strip() == option[1] for word in flags.guidance_opt or ()):
            raise UsageError(f"--by {title} stands instead of --guidance-opt {option[1]}: give one of them.")
        if by.weights and flags.w is not None:
            raise UsageError(f"--by {title} gives each value its own weight, and --w is given too: drop one.")


def _variant(
    flags: SampleOptions, axes: Sequence[By], values: Sequence[Any], resolve: Callable[[SampleOptions], Setup]
) -> tuple[Variant, Setup]:
    """One variant, by the values that its settings have, and its setup."""
    varied = replace(flags, **dict(_changes(flags, axes, values)))
    method = varied.guidance or _METHOD.neutral or ""
    try:
        for by in axes:
            if by.option and by.option[0].lower() != method.lower():
                raise UsageError(f"{by.axis.name} has no effect on --guidance {method}.")
        setup = resolve(varied)
    except UsageError as error:
        if not axes:
            raise
        combination = " ".join(f"{by.axis.title}={value}" for by, value in zip(axes, values, strict=True))
        raise UsageError(f"--by, at {combination}: {error}") from error
    return tuple((by.axis.name, axis_value(by.axis.name, asdict(setup.settings))) for by in axes), setup


def _changes(flags: SampleOptions, axes: Sequence[By], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    given = list(flags.guidance_opt or [])
    for by, value in zip(axes, values, strict=True):
        if by.option:
            given.append(f"{by.option[1]}={value}")
            yield "guidance_opt", list(given)
        else:
            yield by.axis.name, None if value == by.axis.neutral else value


def _check_different(setups: dict[Variant, Setup]) -> None:
    """Refuses two variants that are the same at every step, such as two intervals between the same two noise levels."""
    seen: dict[Any, Variant] = {}
    for variant, setup in setups.items():
        key = digest(asdict(replace(setup.settings, interval=None, w_schedule=None))), setup.schedule
        if (other := seen.setdefault(key, variant)) != variant:
            raise UsageError(
                f"--by: {describe(*zip(*other, strict=True))} and {describe(*zip(*variant, strict=True))} are the same "
                f"at each of these {setup.settings.steps} steps: leave one out."
            )


def _common(all_settings: Sequence[Settings], axes: Sequence[By], plain: dict[str, Any]) -> Settings:
    first = all_settings[0]
    changes: dict[str, Any] = {by.axis.name: plain.get(by.axis.name) for by in axes if by.option is None}
    options = [settings.guidance_options or {} for settings in all_settings]
    common = {name: value for name, value in options[0].items() if all(value == other.get(name) for other in options)}
    return replace(first, **changes, guidance_options=dict(sorted(common.items())) or None) if axes else first
