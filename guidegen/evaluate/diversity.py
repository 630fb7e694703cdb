"""How different the images of a class are from each other: the Vendi score and the mean distance of a pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guidegen.evaluate import standard_errors
from guidegen.evaluate.cache import Features, rows_of
from guidegen.evaluate.distances import BLOCK, blocks, of_each
from guidegen.evaluate.moments import Sums

_MANY, _MANY_A_FEATURE = 200, 4.5
"""Images from which on the variance by influence is within 10 % of the true one, found by Monte Carlo."""


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1)


def _sums(features: Features) -> Sums:
    """Of features of unit length."""
    sums = Sums(features.shape[1])
    for part in blocks(features):
        sums.update(_unit(part))
    return sums


def vendi_score(features: Features) -> float:
    """exp of the entropy of the eigenvalues of K/N, K cosine similarity (Friedman & Dieng 2023, arXiv 2210.02410).

    From 1 (all alike) to N (nothing in common) for features (N, D). It grows with N as long as new images bring
    something new: compare scores of equal N only (section 4 there; the value at N is a biased
    estimate of that of the distribution, and too small). Of uᵀu/N, whose eigenvalues other than 0 are the same, where D < N.
    """
    if features.shape[1] < len(features):
        matrix = _sums(features).second / len(features)
    else:
        unit = _unit(features[:])
        matrix = unit @ unit.T / len(unit)
    return _exp_entropy(torch.linalg.eigvalsh(matrix))


def _exp_entropy(eigenvalues: Tensor) -> float:
    return float(torch.special.entr(eigenvalues.clamp_min(0)).sum().exp())


def _vendi_scale(score: float, n: int, of: int) -> tuple[float, float, float]:
    """ψ = (1/V − 1/n) / (1 − 1/n), or its logarithm, on which the score hardly depends on n, and dV/dψ or dV/d(ln ψ).

    Of a few images with little in common V is n − Σ cos²/2 over ordered pairs, to second order, and ψ half the mean
    squared cosine of a pair; of many it is 1/V. Of fewer than 6 images in all (`of`) ψ is itself: it comes too near to 0.
    From 16 on the second order weighs 0.8, for what the third gives back: found by Monte Carlo over features
    8 to 192 wide with and without a common direction, where the error is then within 15 % of the true one.
    """
    psi = (1 / score - 1 / n) / (1 - 1 / n)
    if of < 6:
        return psi, -(score**2) * (1 - 1 / n), 1.0
    return math.log(max(psi, 1e-12)), -score * (1 - score / n), 1.0 if of < 16 else 0.8


def _vendi_variance(features: Features) -> float:
    """Of the influence of each image, less the part of two images at once, which that counts twice.

    With M = QΛQᵀ the second moment of the unit vectors u and y = Qᵀu, the entropy's derivative by the weight of one is
    a = −Σ yᵢ² ln λᵢ but for a constant, and by those of two 1 − zᵀLz, zᵢ = yᵢyᵢ', Lᵢⱼ = (ln λᵢ − ln λⱼ) / (λᵢ − λⱼ); of its
    exponential, that and aa'. Pairs are of neighbours in a random order.
    """
    values, vectors = torch.linalg.eigh(_sums(features).second / len(features))
    values = values.clamp_min(values.max() * 1e-12)
    logarithms = values.log()
    gap = values[:, None] - values
    slopes = torch.where(gap.abs() > 1e-6 * values, (logarithms[:, None] - logarithms) / gap, 1 / values)
    entropy, count = torch.special.entr(values).sum(), len(features)
    influence, of_pairs = torch.empty(2, count, dtype=torch.float64)  # at once: what each block keeps scatters the heap
    order, start = torch.randperm(count, generator=torch.Generator().manual_seed(0)), 0
    for part in order.tensor_split(-(-count // BLOCK)):
        here, start = slice(start, start + len(part)), start + len(part)
        y = _unit(features[part]) @ vectors
        influence[here] = a = -y.square() @ logarithms - entropy
        z = y * y.roll(1, 0)
        of_pairs[here] = 1 - ((z @ slopes) * z).sum(1) + a * a.roll(1)
    first = float(influence.var()) / count
    second = float(of_pairs.square().mean()) / (2 * count**2)
    return float(entropy.exp()) ** 2 * max(first - second, first / 2)


def pairwise_distance(features: Features) -> float:
    """Mean cosine distance, 0 to 2, between two different ones of (N, D), N at least 2; unbiased in N."""
    n, total = len(features), torch.zeros(features.shape[1], dtype=torch.float64)
    for part in blocks(features):
        total += _unit(part).sum(0)
    return float((n * n - total.square().sum()) / (n * (n - 1)))


def _pairwise_variance(features: Features) -> float:
    """Of the mean cosine of each image with the others, less the part of two images at once, which that counts twice."""
    n, sums = len(features), _sums(features)
    mean = sums.first / n
    cosines = of_each(features, lambda part: _unit(part) @ mean)
    first = 4 * float(cosines.var()) / n
    pairs = (sums.second / n).square().sum() - 2 * cosines.square().mean() + mean.square().sum() ** 2
    return max(first - 2 * float(pairs) / n**2, first / 2)


@dataclass(frozen=True)
class Diversity:
    """A score of the images of one class, of which the metric is the mean over classes.

    Attributes:
        name: of the metric.
        score: of features (N, D), N at least 2.
        scale: of `standard_errors.of_classes`.
        variance: of the score of many images.
    """

    name: str
    score: Callable[[Features], float]
    scale: standard_errors.Scale
    variance: Callable[[Features], float]

    def error(self, classes: Sequence[tuple[Features, Hashable]]) -> float | None:
        """Its standard error; `classes` as in `standard_errors.of_classes`."""
        return standard_errors.of_classes(classes, self.score, self.scale, self._variance_of_many)

    def _variance_of_many(self, features: Features) -> float | None:
        many = max(_MANY, _MANY_A_FEATURE * features.shape[1])
        return self.variance(features) if len(features) >= many else None


DIVERSITIES = (
    Diversity("vendi_score", vendi_score, _vendi_scale, _vendi_variance),
    Diversity("pairwise_distance", pairwise_distance, standard_errors.as_it_is, _pairwise_variance),
)


def mean_over_classes(score: Callable[[Features], float], features: Features, labels: Sequence[Any]) -> float | None:
    """Mean of `score` over the classes that have two images or more; None where there is none."""
    classes = [index for index in standard_errors.indices_of(labels).values() if len(index) > 1]
    return sum(score(rows_of(features, index)) for index in classes) / len(classes) if classes else None
