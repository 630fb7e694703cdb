"""Rounds of drawing: in each the same seeds at a few settings, more seeds and fewer settings from round to round.

All settings of a round have equal numbers of images, as metrics that depend on it demand; those of an earlier round
serve again. What is next follows from the values alone, so that every process that reads them goes on alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from guidegen.tune.model import Array, Points, Posterior, error_covariance, posterior
from guidegen.tune.space import Box, Setting, Space

_LATER, _MORE = 5, 2
"""Settings along one number, for each combination of the rest, after the first round; and for each further metric."""
_FIRST_SHARE = 8
"""The first round takes one part in so many of the budget."""
_GROWTH, _LEAST_GROWTH = 2, 1.2
_EXPLORED = 2
"""Rounds, of the seeds of the first, in which a search proposes where to look along several numbers."""
_RULED_OUT = 0.005
"""A combination, or a part of a range, that holds the best with less probability is not drawn again."""
_PAD = 0.25
_LEAST_WIDTH = 0.08
_AT_END, _SURE = 0.04, 0.95


@dataclass(frozen=True)
class Evaluation:
    """What was measured at a setting.

    Attributes:
        setting: which.
        seeds: of each label, counted from the first seed.
        images: how many that is.
        values: by metric.
        errors: standard errors, by metric.
        replicates: by metric, the values without one group of seeds, the same groups at every setting.
    """

    setting: Setting
    seeds: int
    images: int
    values: Mapping[str, float]
    errors: Mapping[str, float]
    replicates: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Goal:
    """What is looked for, and what it may cost.

    Attributes:
        metrics: name -> +1 where more is better, -1 where less is.
        budget: images.
        target: the search ends once the first metric is this near to the best; None for when the budget is spent.
        per_seed: images of one seed.
        first: seeds of the first round.
    """

    metrics: Mapping[str, int]
    budget: int
    target: float | None = None
    per_seed: int = 1
    first: int = 1


@dataclass(frozen=True)
class Round:
    """Settings to draw at the same seeds.

    Attributes:
        seeds: of each label.
        settings: each once.
        boxes: where the best may lie: arm -> box.
    """

    seeds: int
    settings: tuple[Setting, ...]
    boxes: Mapping[int, Box]


@dataclass(frozen=True)
class Fit:
    """A metric in a round.

    Attributes:
        candidates: settings that lie densely where the best may be.
        curve: the metric there; less is better.
    """

    candidates: list[Setting]
    points: Points
    curve: Posterior


@dataclass(frozen=True)
class Progress:
    """How far a search has come.

    Attributes:
        rounds: all so far; the last may not be complete.
        todo: the settings of the last that are not measured.
        reason: why it has ended; None while it has not.
        fits: by metric, of the last complete round.
        measured: the evaluations of that round, in its order.
    """

    rounds: list[Round]
    todo: list[Setting] = field(default_factory=list)
    reason: str | None = None
    fits: Mapping[str, Fit] = field(default_factory=dict)
    measured: list[Evaluation] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Seeds that the rounds take in all; of each label."""
        return sum(_seeds(self.rounds).values())


Propose = Callable[[Sequence[Evaluation], int], Sequence[Setting]]


def first_seeds(settings: int, budget: int, per_seed: int, least: int) -> int:
    """How many seeds the first round has: a part of the budget, and the least that can be measured."""
    return max(least, budget // _FIRST_SHARE // (settings * per_seed))


class Search:
    """The rounds that follow from the values so far.

    Args:
        space: all settings.
        goal: what is looked for.
        first: the settings of the first round.
        propose: from what was measured in a round to so many settings that are likely to be good; for several numbers.
    """

    def __init__(self, space: Space, goal: Goal, first: Sequence[Setting], propose: Propose | None = None):
        self._space, self._goal, self._propose = space, goal, propose
        self._rounds = [Round(goal.first, tuple(first), space.whole)]
        self._fits: dict[str, Fit] = {}
        self._measured: list[Evaluation] = []

    def progress(self, evaluations: Iterable[Evaluation]) -> Progress:
        """How far it is, and what is to be drawn next."""
        there = {(each.setting, each.seeds): each for each in evaluations}
        while True:
            last = self._rounds[-1]
            if todo := [setting for setting in last.settings if (setting, last.seeds) not in there]:
                return Progress(self._rounds, todo, None, self._fits, self._measured)
            self._measured = [there[setting, last.seeds] for setting in last.settings]
            self._fits = {metric: self._fit(metric) for metric in self._goal.metrics}
            following = self._explore() or _next(self._space, self._goal, self._rounds, self._fits)
            if isinstance(following, str):
                return Progress(self._rounds, [], following, self._fits, self._measured)
            self._rounds.append(following)

    def _explore(self) -> Round | None:
        """The last round with more settings; None where one number varies, or that was done."""
        last = self._rounds[-1]
        if self._propose is None or len(self._space.numeric) < 2 or len(self._rounds) > _EXPLORED:
            return None
        new = self._propose(self._measured, 2 * len(self._space.numeric) * len(self._goal.metrics))
        settings = tuple(dict.fromkeys([*last.settings, *new]))
        left = self._goal.budget // self._goal.per_seed - len(settings) * last.seeds
        return Round(last.seeds, settings, last.boxes) if left > 0 else None

    def _fit(self, metric: str) -> Fit:
        """The curve of a metric from the values of the last round."""
        last, before = self._rounds[-1], self._fits.get(metric)
        points = self._space.points([each.setting for each in self._measured])
        values = np.array([each.values[metric] for each in self._measured]) * -self._goal.metrics[metric]
        replicates = np.array([each.replicates[metric] for each in self._measured])
        errors = error_covariance(points, np.array([each.errors[metric] for each in self._measured]), replicates)
        candidates = list(dict.fromkeys([*self._space.candidates(dict(last.boxes)), *last.settings]))
        at = self._space.points(candidates)
        return Fit(candidates, at, posterior(points, values, errors, at, before.curve.beliefs if before else None))


def _next(space: Space, goal: Goal, rounds: Sequence[Round], fits: Mapping[str, Fit]) -> Round | str:
    """The next round, or why there is none."""
    first_fit = next(iter(fits.values()))
    if goal.target is not None and first_fit.curve.loss <= goal.target:
        return "precision reached"
    if all(_is_at_end(one) for one in fits.values()):
        return "the best lies at the end of the range"
    seeds = _seeds(rounds)
    boxes = _boxes(rounds[-1], list(fits.values()), space)
    count = _LATER + _MORE * (len(fits) - 1)
    if len(space.numeric) > 1:
        count = 4 * len(space.numeric) + 1
    settings = tuple(s for arm, box in boxes.items() for s in space.design(arm, box, count, seeds))
    if len(settings) == 1 and len(fits) == 1:
        return "one setting left"
    left = goal.budget // goal.per_seed - sum(seeds.values())
    now = rounds[-1].seeds
    affordable = _affordable(settings, seeds, left)
    if affordable < _LEAST_GROWTH * now:
        return "budget spent"
    following = _GROWTH * now if affordable >= 1.5 * _GROWTH * now else min(affordable, 2 * _GROWTH * now)
    return Round(following, settings, boxes)


def _seeds(rounds: Sequence[Round]) -> dict[Setting, int]:
    """Seeds that each setting is drawn with."""
    return {setting: each.seeds for each in rounds for setting in each.settings}


def _affordable(settings: Sequence[Setting], seeds: Mapping[Setting, int], left: int) -> int:
    """The most seeds that all these settings can have for so many more in all."""
    low, high = 0, left + max(seeds.values(), default=0)
    while low < high:
        some = (low + high + 1) // 2
        if sum(max(0, some - seeds.get(setting, 0)) for setting in settings) <= left:
            low = some
        else:
            high = some - 1
    return low


def _boxes(last: Round, fits: Sequence[Fit], space: Space) -> dict[int, Box]:
    """Where the best of any of the metrics may lie, with a margin that shows how the curve bends."""
    boxes: dict[int, Box] = {}
    for arm, box in last.boxes.items():
        ends = [some for one in fits if (some := _ends(one, arm, box)) is not None]
        if not ends:
            continue
        low, high = np.min([some[0] for some in ends], axis=0), np.max([some[1] for some in ends], axis=0)
        boxes[arm] = tuple(map(_padded, low, high, box, _least_widths(space)))
    return boxes


def _ends(one: Fit, arm: int, box: Box) -> tuple[Array, Array] | None:
    """Low and high ends (d,) of where a metric is best in an arm; None where it is hardly ever the best of all."""
    mine = one.points.arm == arm
    best = one.points.arm[one.curve.minima] == arm
    if best.mean() < _RULED_OUT:
        return None
    x = one.points.x[mine][one.curve.paths[:, mine].argmin(1)]
    return np.quantile(x, _RULED_OUT, axis=0), np.quantile(x, 1 - _RULED_OUT, axis=0)


def _is_at_end(one: Fit) -> bool:
    """Whether the best is almost surely at one end of the only number, where more images do not help."""
    if one.points.x.shape[1] != 1:
        return False
    x = one.points.x[one.curve.minima, 0]
    return bool(max((x < _AT_END).mean(), (x > 1 - _AT_END).mean()) > _SURE)


def _least_widths(space: Space) -> list[float]:
    """Narrower than this, a box shows nothing of how the curve bends."""
    least = [1 / len(each.values) if each.values else each.step / (each.high - each.low) for each in space.numeric]
    return [max(_LEAST_WIDTH, _LATER * one) for one in least]


def _padded(low: float, high: float, box: tuple[float, float], least: float) -> tuple[float, float]:
    """A margin on both sides, a wide one at an end of the box that may cut the best off."""
    middle, width = (low + high) / 2, max(high - low, least)
    low, high = min(low, middle - width / 2), max(high, middle + width / 2)
    reach = 0.5 * (box[1] - box[0])
    low = (box[0] - reach if low <= box[0] else low) - _PAD * width
    high = (box[1] + reach if high >= box[1] else high) + _PAD * width
    return max(0.0, float(low)), min(1.0, float(high))
