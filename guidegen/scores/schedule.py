"""When guidance acts, and how strongly at each step: intervals, weight schedules, and a method's own gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from guidegen.errors import UsageError
from guidegen.scores.interfaces import Weights
from guidegen.scores.method import Method
from guidegen.scores.noise import Level

Shape = Callable[[float], float]
"""From progress, 0 at noise and 1 at the image, to a weight of any size."""


def interval_factors(levels: Sequence[Level], interval: str | None) -> list[float]:
    """1 where guidance is on, 0 where it is off.

    Args:
        levels: alpha and sigma of each evaluation, from noise to image; none to check the form alone.
        interval: `LO:HI` in sigma / alpha (EDM's sigma), on where LO < sigma / alpha <= HI, as in
            Kynkäänniemi et al. 2024 (arXiv 2404.07724), `inf` allowed; or `10%:60%` of the
            steps, on from the first to before the second, as the start and stop of diffusers' guiders.
            None: on everywhere.

    Raises:
        UsageError: not of this form, empty, or holding none of the steps.
    """
    if interval is None:
        return [1.0] * len(levels)
    ends = interval.split(":")
    try:
        if all(end.strip().endswith("%") for end in ends):
            low, high = (Fraction(end.strip()[:-1]) / 100 for end in ends)
            on = [math.floor(low * len(levels)) <= i < math.floor(high * len(levels)) for i in range(len(levels))]
            right = 0 <= low < high <= 1
        else:
            start, stop = (float(end) for end in ends)
            on = [start < noise_ratio(level) <= stop for level in levels]
            right = 0 <= start < stop
    except (ValueError, ZeroDivisionError):
        right, on = False, []
    if not right:
        raise UsageError(
            f"--interval {interval}: give LOW:HIGH in sigma / alpha, such as 0.3:5, or of the steps, as 10%:60%."
        )
    if levels and not any(on):
        ratios = f"{noise_ratio(levels[-1]):.3g} to {noise_ratio(levels[0]):.3g}"
        raise UsageError(f"--interval {interval}: holds none of the {len(levels)} steps, whose sigma / alpha is {ratios}.")
    return [float(each) for each in on]


def noise_ratio(level: Level) -> float:
    """sigma / alpha, EDM's sigma; inf for pure noise."""
    return level.sigma / level.alpha if level.alpha else math.inf


_SHAPES: dict[str, Shape] = {
    "constant": lambda p: 1,
    "linear": lambda p: p,
    "cosine": lambda p: 1 - math.cos(math.pi * p),
    "sine": lambda p: 1 + math.cos(math.pi * p),
    "v": lambda p: abs(1 - 2 * p),
    "lambda": lambda p: 1 - abs(1 - 2 * p),
}
_PARAMETRIC: dict[str, tuple[tuple[float, ...], Callable[..., Shape]]] = {
    "clamp-linear": ((0.5,), lambda floor: lambda p: max(floor, 2 * p)),
    "clamp-cosine": ((0.5,), lambda floor: lambda p: max(floor, 1 - math.cos(math.pi * p))),
    "power-cosine": ((2.0,), lambda s: lambda p: 1 - math.cos(math.pi * p**s)),
    "beta": ((2.0, 2.0), lambda a, b: lambda p: p ** (a - 1) * (1 - p) ** (b - 1)),
}
SCHEDULES = tuple(_SHAPES) + tuple(
    f"{name}:{','.join('AB'[: len(defaults)])}" for name, (defaults, _) in _PARAMETRIC.items()
)
"""What `--w-schedule` takes, each also with `inverse-` before it, which turns it round."""


def schedule_factors(name: str | None, count: int) -> list[float]:
    """What multiplies w at each of `count` steps, with mean 1.

    Taken at the middle of each step. `linear` and `cosine` rise from noise to image, `sine` and
    `inverse-linear` fall, `v` falls and rises, `lambda` rises and falls, `clamp-linear:A` and
    `clamp-cosine:A` rise from a floor of A times the mean before it, and `power-cosine:A` bends the
    cosine: Wang et al. 2024 (arXiv 2404.13040), the last after Gao et al. 2023 (2303.14389).
    `beta:A,B` is the density of that distribution: Malarz et al. 2025 (2502.10574).

    Args:
        name: one of `SCHEDULES`, with or without its numbers, maybe after `inverse-`; None: constant.
        count: how many steps.

    Raises:
        UsageError: no such schedule, or numbers that it cannot take.
    """
    asked = (name or "constant").lower()
    shape = _shape(asked.removeprefix("inverse-"), name)
    progress = [(i + 0.5) / count for i in range(count)]
    values = [shape(1 - p if asked.startswith("inverse-") else p) for p in progress]
    scale = _scale(values, [1.0] * count, name)
    return [value * scale for value in values]


def _shape(asked: str, flag: str | None) -> Shape:
    kind, _, text = asked.partition(":")
    if kind in _SHAPES and not text:
        return _SHAPES[kind]
    if kind not in _PARAMETRIC:
        raise UsageError(f"--w-schedule {flag}: no such schedule. There are {', '.join(SCHEDULES)}, and inverse- of each.")
    defaults, make = _PARAMETRIC[kind]
    try:
        numbers = tuple(float(number) for number in text.split(",")) if text else defaults
    except ValueError:
        numbers = ()
    if len(numbers) != len(defaults) or not all(0 < number < math.inf for number in numbers):
        example = ",".join(f"{number:g}" for number in defaults)
        raise UsageError(f"--w-schedule {flag}: give numbers above 0, such as {kind}:{example}.")
    return make(*numbers)


def _scale(values: Sequence[float], on: Sequence[float], name: str | None) -> float:
    """What makes the mean of `values` 1 where guidance is on."""
    total = math.fsum(value * each for value, each in zip(values, on, strict=True))
    if not 0 < total < math.inf:
        raise UsageError(f"--w-schedule {name}: is zero at each of the {len(values)} steps where guidance is on.")
    return math.fsum(on) / total


@dataclass(frozen=True)
class GuidanceSchedule:
    """How strongly guidance acts at each evaluation.

    Attributes:
        gains: what the method multiplies w by.
        factors: what interval and schedule make of what guidance adds; 0 where it is off, and of
            mean 1 over the evaluations where it is on.
    """

    gains: tuple[float, ...]
    factors: tuple[float, ...]

    def weights(self, index: int, asked: Weights) -> Weights:
        """The weights of one evaluation.

        Each goes from where it adds nothing, at factor 0, to its full value, at factor 1. For w that is
        the conditional model, w = 1, or w itself below it, which amplifies nothing; for the
        classifier's gradient 0; for a guide model 1, the model alone.
        """
        gain, factor = self.gains[index], self.factors[index]
        w, w_classifier, w_guide = asked
        off = min(gain * w, 1.0)
        # spelt so that factor 1 gives back w to the last bit
        return Weights(
            gain * w if factor == 1 else off + (gain * w - off) * factor,
            gain * w_classifier * factor,
            w_guide if factor == 1 else 1 + (w_guide - 1) * factor,
        )


def make_schedule(
    levels: Sequence[Level],
    interval: str | None,
    w_schedule: str | None,
    method: Method,
    after: Sequence[Level] | None = None,
) -> GuidanceSchedule:
    """The schedule of one sampler.

    The schedule runs over all steps, keeps its part inside the interval, and is scaled so that its mean
    there is 1: with equal w, grids of different schedules spend the same weight.

    Args:
        levels: alpha and sigma of each evaluation, from noise to image.
        interval: as `interval_factors`.
        w_schedule: as `schedule_factors`.
        method: whose gain it takes.
        after: the level that each step leads to; needed where the method has a gain.

    Raises:
        UsageError: as these two, or the method's gain is not finite at some step.
    """
    on = interval_factors(levels, interval)
    values = schedule_factors(w_schedule, len(levels))
    scale = _scale(values, on, w_schedule)
    factors = tuple(value * scale * each for value, each in zip(values, on, strict=True))
    return GuidanceSchedule(_gains(levels, method, after), factors)


def _gains(levels: Sequence[Level], method: Method, after: Sequence[Level] | None) -> tuple[float, ...]:
    if method.gain is None:
        return (1.0,) * len(levels)
    if after is None:
        raise ValueError(f"{method.name} has a gain, which takes the levels after the steps")
    for now, then in zip(levels, after, strict=True):
        if not noise_ratio(then) < noise_ratio(now):
            raise UsageError(
                f"--guidance {method.name}: the scheduler has a step that takes no noise away, at sigma / alpha "
                f"{noise_ratio(now):.3g}, where no weight does what the method says. Set steps_offset to 1 or "
                "set_alpha_to_one to true in scheduler_config.json, or take another method or scheduler."
            )
    return tuple(method.gain(now, then) for now, then in zip(levels, after, strict=True))
