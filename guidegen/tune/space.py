"""What is varied: ranges and lists along axes, as `--by` gives them, and settings in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from guidegen.errors import UsageError, quoted
from guidegen.spec import limits
from guidegen.spec.axes import AXES
from guidegen.spec.parse import parse_weight, parse_weights
from guidegen.tune.model import Array, Points

Setting = tuple[Any, ...]
"""A value along each of the axes, in their order."""
Box = tuple[tuple[float, float], ...]
"""A part of the numeric axes, each scaled to 0 to 1."""
WEIGHTS = ("w", "w_classifier", "w_guide")
_CURVED = (*WEIGHTS, "steps")
_FINE = 300
"""Values of a range at least: the others are rounded to these, so that they are short and found again."""
_DENSE = {1: 61, 2: 400, 3: 729}
MOST_RANGES = 3
_FIRST = 7
"""Settings of the first round along one number, for each combination of the rest."""


@dataclass(frozen=True)
class Dimension:
    """One `--by`.

    Attributes:
        name: of the axis, as rows of the manifest have it.
        values: of a list, in its order; empty for a range.
        low: of a range.
        high: of a range.
        step: between the values of a range.
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0

    @property
    def numeric(self) -> bool:
        """Whether values near each other draw images that are alike: of a range, and of a list of three numbers or more."""
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)
        return not self.values or (len(self.values) > 2 and numbers)

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest value of a numeric one."""
        return (min(self.values), max(self.values)) if self.values else (self.low, self.high)

    def scaled(self, value: float) -> float:
        """A value from 0 to 1; weights and steps on a scale that is finer where they are small."""
        low, high = self.ends
        part = (value - low) / (high - low)
        return math.log1p(8 * part) / math.log(9) if self._curved else part

    def value(self, scaled: float) -> Any:
        """The value of the list or of the range that is nearest."""
        low, high = self.ends
        part = math.expm1(scaled * math.log(9)) / 8 if self._curved else scaled
        value = low + min(max(part, 0.0), 1.0) * (high - low)
        if self.values:
            return min(self.values, key=lambda some: abs(some - value))
        if self.name == "steps":
            return round(value)
        value = value if value in (low, high) else round(round(value / self.step) * self.step, 12)
        return self.step if self.name in WEIGHTS and value == 0 else value  # at 0 all labels are one image

    @property
    def _curved(self) -> bool:
        return self.name in _CURVED and self.ends[0] >= 0

    def as_json(self) -> list[Any]:
        """The list, or the ends of the range."""
        return list(self.values) or [self.low, self.high]


def parse_range(word: str) -> Dimension | None:
    """A range LOW:HIGH of a weight, of steps, eta or an option of a method, or a list of weights; None for all else.

    Raises:
        UsageError: no numbers, or a range without width.
    """
    given, _, text = word.partition("=")
    name = given.strip() if "." in given else given.strip().replace("-", "_")
    if name in WEIGHTS and (text.count(":") != 1 or "," in text):
        return Dimension(name, tuple(parse_weights(text, f"--by {name}=")))
    if name not in (*WEIGHTS, "steps", "eta") and ("." not in name or name in AXES):
        return None
    ends = [part.strip() for part in text.split(":")]
    if len(ends) != 2 or "," in text:
        return None
    try:
        low, high = (parse_weight(end, f"--by {name}=") for end in ends)
    except UsageError:
        if "." in name:  # an option whose values are no numbers
            return None
        raise
    if not low < high:
        raise UsageError(f"--by {quoted(word)}: a range is LOW:HIGH, the lower end first, such as w=0.5:8.")
    if name == "steps" and (low < 1 or low % 1 or high % 1):
        raise UsageError(f"--by {quoted(word)}: give whole numbers from 1.")
    step = 1.0 if name == "steps" else 10.0 ** math.floor(math.log10((high - low) / _FINE))
    return Dimension(name, (), low, high, step)


@dataclass(frozen=True)
class Space:
    """All settings there are.

    Attributes:
        dimensions: in the order of `--by`.
    """

    dimensions: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        if len(self.numeric) > MOST_RANGES:
            names = ", ".join(each.name for each in self.numeric)
            raise UsageError(f"--by: tune varies {MOST_RANGES} numbers at once at most, and these are {names}.")
        if len(self.arms) > limits.COMBINATIONS:
            raise UsageError(
                f"--by has {len(self.arms):,} combinations of values, and takes {limits.COMBINATIONS:,} at most."
            )

    @cached_property
    def numeric(self) -> list[Dimension]:
        return [each for each in self.dimensions if each.numeric]

    @cached_property
    def arms(self) -> list[Setting]:
        """The combinations of the other ones' values."""
        return list(itertools.product(*(each.values for each in self.dimensions if not each.numeric)))

    @property
    def whole(self) -> dict[int, Box]:
        """All of it: arm -> box."""
        return {arm: ((0.0, 1.0),) * len(self.numeric) for arm in range(len(self.arms))}

    def first_settings(self) -> list[Setting]:
        """Settings spread over all of it."""
        count = _FIRST if len(self.numeric) < 2 else 5 * len(self.numeric)
        return [setting for arm, box in self.whole.items() for setting in self.design(arm, box, count, ())]

    def setting(self, arm: int, x: Iterable[float]) -> Setting:
        """The setting nearest to numbers from 0 to 1."""
        numbers, others = iter(x), iter(self.arms[arm])
        return tuple(each.value(next(numbers)) if each.numeric else next(others) for each in self.dimensions)

    def nearest(self, setting: Setting) -> Setting:
        """The setting nearest to any values of the axes."""
        pairs = zip(self.dimensions, setting, strict=True)
        return tuple(each.value(each.scaled(value)) if each.numeric else value for each, value in pairs)

    def points(self, settings: Sequence[Setting]) -> Points:
        """Settings as the model sees them."""
        x, arms = np.zeros((len(settings), len(self.numeric))), np.zeros(len(settings), np.int64)
        for i, setting in enumerate(settings):
            pairs = list(zip(self.dimensions, setting, strict=True))
            x[i] = [each.scaled(value) for each, value in pairs if each.numeric]
            arms[i] = self.arms.index(tuple(value for each, value in pairs if not each.numeric))
        return Points(x, arms)

    def candidates(self, boxes: dict[int, Box]) -> list[Setting]:
        """Settings that lie densely in boxes of some arms."""
        count = len(self.numeric)
        each = round(_DENSE.get(count, 1) ** (1 / max(count, 1)))
        found: dict[Setting, None] = {}
        for arm, box in boxes.items():
            for x in itertools.product(*(np.linspace(low, high, each) for low, high in box)):
                found[self.setting(arm, x)] = None
        return list(found)

    def design(self, arm: int, box: Box, count: int, there: Iterable[Setting]) -> list[Setting]:
        """About `count` settings spread over a box, those that are there already in place of new ones beside them."""
        if not box:
            return [self.setting(arm, ())]
        low, high = np.array(box).T
        unit: Array = np.linspace(0, 1, count)[:, None] if len(box) == 1 else _spread(count, len(box))
        wanted = low + unit * (high - low)
        near = 0.4 * (high - low) / max(1.0, count ** (1 / len(box)) - 1)
        kept = [setting for setting in there if self.points([setting]).arm[0] == arm]
        known = self.points(kept).x
        found: dict[Setting, None] = {}
        for x in wanted:
            apart = (np.abs(known - x) / np.maximum(near, 1e-9)).max(1) if kept else np.zeros(0)
            found[kept[int(apart.argmin())] if len(apart) and apart.min() <= 1 else self.setting(arm, x)] = None
        return list(found)


def _spread(count: int, dimensions: int) -> Array:
    """Numbers (count, d) from 0 to 1, both among them, each column in steps as even as those of one number."""
    from scipy.stats import qmc

    cube = qmc.LatinHypercube(dimensions, scramble=False, optimization="random-cd", rng=0).random(count)
    found: Array = (cube * count - 0.5) / (count - 1)
    return found
