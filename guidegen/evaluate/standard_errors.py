"""Standard errors of metrics over the images of a run, each from the images alone and the reference held fixed.

Images are taken as independent draws within their label. That images of one seed share their noise
across labels is not accounted for; one image that stands for several labels counts as one.

The bootstrap is of no use here: an image drawn twice is its own neighbour. Half-samples and the plain
delete-one jackknife count the part of a statistic that comes from c images at once 2^c − 1 and c times
(Efron & Stein 1981, doi 10.1214/aos/1176345462), so they are too wide for all but means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from guidegen.evaluate.cache import Features

LEAST = 4
"""Images of a class or parts of a sample that a variance is taken of."""
_UNITS = 16
_HALVES = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))
_OF_A_SPLIT = torch.tensor([[i in half for half in _HALVES] + [i == k for k in range(4)] for i in range(4)])
_SMOOTHING = 4


def indices_of(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """key -> its indices, in the order in which the keys come."""
    found: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


def strata(labels: Sequence[Hashable], least: int = LEAST) -> list[Tensor]:
    """Indices of each label's images. Labels of fewer than `least` are pooled, which makes an error wider, not smaller."""
    found = indices_of(labels)
    large = sorted((index for index in found.values() if len(index) >= least), key=len)
    if pooled := [i for index in found.values() if len(index) < least for i in index]:
        if len(pooled) < least and large:
            pooled += large.pop(0)
        large.append(pooled)
    return [torch.tensor(index) for index in large]


def of_mean(values: Tensor, labels: Sequence[Hashable], images: Sequence[Hashable]) -> float | None:
    """Of the mean of `values` (N,), stratified by label; rows of one image are one draw.

    Args:
        values: of each row.
        labels: of each row.
        images: of each row; equal ones are one image.
    """
    numbers: dict[Hashable, int] = {}
    unit = torch.tensor([numbers.setdefault(image, len(numbers)) for image in images])
    if len(numbers) < 2:
        return None
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, unit, (values - values.mean()).double())
    of_units: Sequence[Hashable] = labels
    if len(numbers) < len(values):
        of_units = [tuple(sorted(str(labels[i]) for i in rows)) for rows in indices_of(unit.tolist()).values()]
    variance = sum(len(one) * float(sums[one].var()) for one in strata(of_units, 2))
    return math.sqrt(variance) / len(values)


def of_weighted_sum(values: Tensor, weights: Tensor, labels: Sequence[Hashable]) -> float | None:
    """Of the sum of `values` (N,) by fixed weights (N,), stratified by label."""
    if len(values) < LEAST:
        return None
    variance = 0.0
    for one in strata(labels, 2):
        rest = values[one] - values[one].mean()
        variance += float((weights[one] * rest).square().sum()) * len(one) / (len(one) - 1)
    return math.sqrt(variance)


def of_union(covers: Tensor, only: Tensor, sets: Tensor, labels: Sequence[Hashable]) -> float | None:
    """Of the share of M points that N sets cover: by inclusion and exclusion over how many sets a point needs.

    For a Poisson number of sets the variance is Σ_S (−1)^(|S|+1) g_S² / M² without bias, g_S the points that
    just the sets S cover, all of them together. The alternating sum is Good & Toulmin's (1956), and
    is smoothed as Efron & Thisted's (1976): the term of |S| is weighed by P(Binomial(4, ½) ≥ |S|).
    The terms of single sets, which alone are the plain jackknife, are taken about their mean in each stratum, as N is
    fixed; a fifth of them is the least that it comes to.

    Args:
        covers: (M,) in how many of the sets each point is.
        only: (N,) how many points each set covers alone.
        sets: (M,) a number that identifies the sets that a point is in.
        labels: of the sets.
    """
    if len(only) < LEAST:
        return None
    variance = 0.0
    for one in strata(labels, 2):
        alone = only[one].double()
        variance += len(alone) * float(alone.var())
    least = variance / 5
    several = covers >= 2
    _, inverse, counts = torch.unique(sets[several], return_inverse=True, return_counts=True)
    size = torch.zeros_like(counts)
    size[inverse] = covers[several]
    tail = [sum(math.comb(_SMOOTHING, k) for k in range(n, _SMOOTHING + 1)) / 2**_SMOOTHING for n in range(_SMOOTHING + 2)]
    weight = torch.tensor(tail, dtype=torch.float64)[size.clamp_max(_SMOOTHING + 1)]
    sign = 1 - 2 * (1 - size % 2)
    variance += float((sign * weight * counts.double().square()).sum())
    return math.sqrt(max(least, variance)) / len(covers)


def quarters(labels: Sequence[Hashable], splits: int) -> Iterator[list[Tensor]]:
    """Indices of the 4 quarters of each random split of seed 0: each has its share of every label, an image more or less."""
    generator = torch.Generator().manual_seed(0)
    parts = strata(labels)
    for _ in range(splits):
        order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])
        yield [order[i::4] for i in range(4)]


def balanced_order(labels: Sequence[Hashable]) -> Tensor:
    """A random order of seed 0, the first of which, however many, have about their share of every label."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    for index in indices_of(labels).values():
        rank[index] = (rank[index] + torch.randperm(len(index), generator=generator)) / len(index)
    return rank.argsort()


@dataclass(frozen=True)
class Subsamples:
    """Half-samples and quarter-samples of N images: of each random split 3 times 2 half-samples, then its 4 quarters.

    Attributes:
        quarter: (N, S) uint8: which of its 4 quarters an image is in, for each split.
        sets: (4, 10) bool: which quarters the subsamples of a split are of.
    """

    quarter: Tensor
    sets: Tensor = _OF_A_SPLIT

    def __len__(self) -> int:
        return self.quarter.shape[1] * self.sets.shape[1]

    def members(self, index: Tensor | slice) -> Tensor:
        """Whether images are in each subsample, bool (n, len(self))."""
        return self.sets[self.quarter[index].int()].flatten(1)

    def members_of(self, subsample: int) -> Tensor:
        """Which of all images are in one of them, bool (N,)."""
        split, which = divmod(subsample, self.sets.shape[1])
        return self.sets[:, which][self.quarter[:, split].int()]


def subsamples(labels: Sequence[Hashable], splits: int) -> Subsamples:
    """Half-samples and quarter-samples that each have their share of every label."""
    quarter = torch.zeros(len(labels), splits, dtype=torch.uint8)
    for split, four in enumerate(quarters(labels, splits)):
        for i, index in enumerate(four):
            quarter[index, split] = i
    return Subsamples(quarter)


def of_subsamples(values: Sequence[float]) -> float | None:
    """Of a statistic of all images, from its values on `subsamples`.

    The half-samples of a pair are independent, as the quarters are, so (θ_A − θ_B)²/2 is the variance at N/2
    without bias, and so at N/4. From there to N it goes on by the power of N that the two have between them: 1/N
    for a smooth statistic, 1/N² for a degenerate one such as the kernel distance of samples from the
    reference's own distribution, less for recall, whose balls shrink as images are added. The pairs of half-samples
    of a split are the three contrasts of its quarters, so that for a mean the power is 1/N exactly.
    """
    if not values:
        return None
    found = torch.tensor(values, dtype=torch.float64).view(-1, 10)
    half = float((found[:, 0:6:2] - found[:, 1:6:2]).square().mean()) / 2
    quarter = float(found[:, 6:].var(1).mean())
    return math.sqrt(half * min(1.0, max(0.25, half / quarter))) if quarter else math.sqrt(half / 2)


Scale = Callable[[float, int, int], tuple[float, float, float]]


def as_it_is(score: float, n: int, of: int) -> tuple[float, float, float]:
    """The scale of what does not depend on n."""
    return score, 1.0, 1.0


def of_classes(
    classes: Sequence[tuple[Features, Hashable]],
    score: Callable[[Tensor], float],
    scale: Scale = as_it_is,
    of_many: Callable[[Features], float | None] = lambda features: None,
) -> float | None:
    """Of the mean over classes of a score: the jackknife of each class, corrected for what comes from two images at once.

    With S₁ and S₂ the variances among the values with one and with two of G units left out, the variance is
    (G − 2)·((G − 1)·S₁ − (G − 3)/2·S₂), without bias for U-statistics of order two, where
    the plain jackknife, (G − 1)·S₁, counts the second order twice (Efron & Stein 1981). It is kept between that
    and (G − 2)/2·S₁, which it is where all is of second order. A unit is an image, or a sixteenth of
    them where there are more than 16. Classes that have the very same images count as one of their joint weight.

    Args:
        classes: features (n, D) of each class, and what is the same for classes of the same images.
        score: of features.
        scale: takes a score, its n and that of the whole class to a scale on which it does not depend on n; with it
            the derivative of the score by that scale, and how much the correction weighs.
        of_many: the variance of the score of a class that is large enough for it without a jackknife, else None.

    Returns:
        None where a class has fewer than 4 images.
    """
    distinct = {key: features for features, key in classes}
    if not distinct or min(map(len, distinct.values())) < LEAST:
        return None
    weights = Counter(key for _, key in classes)
    variance = least = most = 0.0
    for key, features in distinct.items():
        share = weights[key] / len(classes)
        if (known := of_many(features)) is not None:
            variance, least, most = (of + share**2 * known for of in (variance, least, most))
            continue
        units, held = min(len(features), _UNITS), features[:]
        first, second = (_left_out(held, units, some, score, scale) for some in (1, 2))
        _, slope, weight = scale(score(held), len(held), len(held))
        factor = (slope * share) ** 2
        plain = (units - 1) * first
        corrected = (units - 2) * (plain - (units - 3) / 2 * second)
        variance += factor * (weight * corrected + (1 - weight) * plain)
        least += factor * (units - 2) / 2 * first
        most += factor * plain
    return math.sqrt(min(most, max(least, variance)))


def _left_out(features: Tensor, units: int, some: int, score: Callable[[Tensor], float], scale: Scale) -> float:
    """Variance among the scores with `some` of the units left out."""
    unit = torch.arange(len(features)) * units // len(features)
    values = []
    for left_out in combinations(range(units), some):
        kept = features[~torch.isin(unit, torch.tensor(left_out))]
        values.append(scale(score(kept), len(kept), len(features))[0])
    return float(torch.tensor(values, dtype=torch.float64).var(correction=0))
