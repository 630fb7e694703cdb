"""What a search found, as tune.json keeps it: the best of each metric, and where the samples went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from guidegen.spec.axes import value_name
from guidegen.tune.rounds import Evaluation, Fit, Goal, Progress
from guidegen.tune.space import Setting, Space
from guidegen.tune.study import pareto_front

FILE = "tune.json"
LEVEL = 0.95
_END = 0.1
"""With more probability than this at the end of a range, the best may be beyond it."""


def result_of(space: Space, goal: Goal, progress: Progress, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The result of a search of which one round at least is complete."""
    front = pareto_front(progress.measured, goal.metrics, space) if len(goal.metrics) == 2 else []
    spent: dict[Setting, int] = {}
    for one in evaluations:
        spent[one.setting] = max(one.images, spent.get(one.setting, 0))
    return {
        "axes": {each.name: each.as_json() for each in space.dimensions},
        "images": progress.measured[0].images,
        "spent": sum(spent.values()),
        "budget": goal.budget,
        "ended": progress.reason,
        "metrics": [_of_metric(space, name, goal.metrics[name], one, progress) for name, one in progress.fits.items()],
        "samples": [
            {"at": _named(space, one.setting), "images": one.images, "values": dict(one.values), "errors": dict(one.errors)}
            for one in sorted(evaluations, key=lambda one: (one.images, tuple(map(str, one.setting))))
        ],
        "front": [_named(space, one.setting) for one in front],
    }


def _of_metric(space: Space, name: str, better: int, one: Fit, progress: Progress) -> dict[str, Any]:
    curve, best = one.curve, one.candidates[one.curve.best]
    ties = dict(zip(one.candidates, curve.ties(LEVEL), strict=True))
    interval, ends = _interval(space, one)
    return {
        "metric": name,
        "better": better,
        "best": _named(space, best),
        "value": -better * float(curve.mean[curve.best]),
        "error": float(curve.spread[curve.best]),
        "loss": curve.loss,
        "interval": interval,
        "at_end": ends,
        "ties": [_named(space, each.setting) for each in progress.measured if ties[each.setting] and each.setting != best],
        "curve": [
            {"at": _named(space, setting), "value": -better * float(mean), "error": float(spread)}
            for setting, mean, spread in zip(one.candidates, curve.mean, curve.spread, strict=True)
        ],
    }


def _interval(space: Space, one: Fit) -> tuple[dict[str, list[Any]], list[str]]:
    """Between which values of each numeric axis the best lies, and the axes at an end of which it may lie."""
    curve = one.curve
    arm = one.points.arm[curve.best]
    x = one.points.x[curve.minima[one.points.arm[curve.minima] == arm]]
    interval: dict[str, list[Any]] = {}
    ends = []
    for i, each in enumerate(space.numeric):
        scaled = x[:, i] if len(x) else one.points.x[[curve.best], i]
        low, high = np.quantile(scaled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval[each.name] = [each.value(float(low)), each.value(float(high))]
        tips = np.array([each.scaled(each.value(end)) for end in (0.0, 1.0)])
        at_end = (np.abs(scaled[:, None] - tips) < 1e-9).mean(0)
        mine = np.abs(one.points.x[curve.best, i] - tips) < 1e-9
        ends += [each.name] if (at_end > _END).any() or mine.any() else []
    return interval, ends


def _named(space: Space, setting: Setting) -> dict[str, Any]:
    return {each.name: value for each, value in zip(space.dimensions, setting, strict=True)}


def words(at: dict[str, Any]) -> str:
    """`2.4, apg`: a setting in a table; the axes stand above it."""
    return ", ".join(value_name(axis, value) for axis, value in at.items())
