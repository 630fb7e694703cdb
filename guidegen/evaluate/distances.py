"""Distances between the features of drawn and of real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from guidegen.evaluate import standard_errors
from guidegen.evaluate.cache import Features
from guidegen.evaluate.moments import Moments, Sums, square_root, trace_of_root
from guidegen.evaluate.standard_errors import Subsamples

_FEWEST = 4  # images of a quarter of a sample
_IMAGES_A_FEATURE = 4.5  # so that the covariance of a quarter of them is not near to singular
_SPLITS = 4  # for the part of a variance that is of second order
_KERNEL_SUBSET_SIZE = 1000
_KERNEL_DRAWS = 20_000
BLOCK = 1024
"""Images of which a matrix of distances to as many others fits into memory."""


class FrechetDistance:
    """‖μ₁−μ₂‖² + Tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) between Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        reference: features (M, D) to measure against, or the moments of them.
    """

    def __init__(self, reference: Tensor | Moments):
        self.reference = reference if isinstance(reference, Moments) else Moments.of(reference)
        self._root = square_root(self.reference.covariance)

    def __call__(self, features: Features) -> float:
        """The distance of features (N, D), N at least 2; not negative but for rounding."""
        return self.of_moments(Moments.of(features))

    def of_moments(self, moments: Moments) -> float:
        """The distance of a Gaussian. The trace of (Σ₁Σ₂)^½ is that of the symmetric (Σ₂^½ Σ₁ Σ₂^½)^½."""
        cross = trace_of_root(self._root @ moments.covariance @ self._root)
        traces = moments.covariance.trace() + self.reference.covariance.trace() - 2 * cross
        return float((moments.mean - self.reference.mean).square().sum() + traces)

    def of_few(self, features: Tensor) -> float:
        """The same, faster, of features (N, D) that are fewer than they are wide, or not many more.

        The trace of the root is the sum of the singular values of X₁Σ₂^½ over (N − 1)^½, X₁ centred: of the smaller side.
        """
        x = features.double()
        return self._of_rotated(x, x @ self._root)

    def _of_rotated(self, x: Tensor, rotated: Tensor) -> float:
        mean, count = x.mean(0), len(x) - 1
        y = rotated - rotated.mean(0)
        roots = torch.linalg.eigvalsh(y.T @ y if y.shape[1] < len(y) else y @ y.T).clamp_min(0).sqrt()
        traces = ((x - mean).square().sum() - 2 * roots.sum() * count**0.5) / count + self._root.square().sum()
        return float((mean - self.reference.mean).square().sum() + traces)

    def of_subsamples(self, features: Features, subsamples: Subsamples) -> list[float]:
        """The distance of each subsample of features (N, D)."""
        everything = features[:].double()
        rotated = everything @ self._root
        chosen = map(subsamples.members_of, range(len(subsamples)))
        return [self._of_rotated(everything[some], rotated[some]) for some in chosen]

    def measure(self, features: Features, labels: Sequence[Any], splits: int) -> tuple[float, float | None]:
        """The distance of features (N, D) and its standard error; without splits there is none.

        Of many images the error is that of the influence of each, which takes one pass, less what that
        counts twice; of fewer, where a quarter's covariance is singular, of `splits` whole splits.
        """
        moments = Moments.of(features)
        value = self.of_moments(moments)
        if not splits or len(features) < standard_errors.LEAST * _FEWEST:
            return value, None
        if len(features) < _IMAGES_A_FEATURE * features.shape[1]:
            parts = standard_errors.subsamples(labels, splits)
            return value, standard_errors.of_subsamples(self.of_subsamples(features, parts))
        influence = self.influence(features, moments)
        first = standard_errors.of_mean(influence, labels, range(len(features)))
        if first is None:
            return value, None
        second = self._second_order(features, influence, labels, min(splits, _SPLITS))
        return value, max(first**2 - second, first**2 / 2) ** 0.5

    def influence(self, features: Features, moments: Moments) -> Tensor:
        """The derivative of the distance by the weight of each image (N,), but for a constant.

        With A = I − Σ₂^½ (Σ₂^½ Σ₁ Σ₂^½)^−½ Σ₂^½ it is 2(μ₁ − μ₂)·(x − μ₁) + (x − μ₁)ᵀ A (x − μ₁).
        """
        values, vectors = torch.linalg.eigh(self._root @ moments.covariance @ self._root)
        inverse = torch.where(values > values.max() * 1e-12, values.clamp_min(1e-300).rsqrt(), 0)
        transport = self._root @ (vectors * inverse @ vectors.T) @ self._root

        def of_block(part: Tensor) -> Tensor:
            x = part.double() - moments.mean
            linear = 2 * x @ (moments.mean - self.reference.mean)
            quadratic: Tensor = x.square().sum(1) - ((x @ transport) * x).sum(1)
            return linear + quadratic

        return of_each(features, of_block)

    def _second_order(self, features: Features, influence: Tensor, labels: Sequence[Any], splits: int) -> float:
        """The part of the variance that comes from two images at once, which the variance of the influence counts twice.

        An eighth of the variance, between the quarters of a split, of their distance less their mean influence.
        """
        variances = []
        for quarters in standard_errors.quarters(labels, splits):
            rest = []
            for index in quarters:
                sums = Sums(features.shape[1], self.reference.mean)
                for chosen in torch.split(index.sort().values, 4096):
                    sums.update(features[chosen])
                rest.append(self.of_moments(sums.moments()) - float(influence[index].mean()))
            variances.append(float(torch.tensor(rest, dtype=torch.float64).var()))
        return sum(variances) / len(variances) / 8


class KernelDistance:
    """Squared maximum mean discrepancy under (x·y/D + 1)³ (Bińkowski et al. 2018, arXiv 1801.01401, section 4).

    It is unbiased, so unlike the Fréchet distance it may be compared between sample sizes, and it
    may come out slightly negative. A mean over random subsets of equal size, as in the paper; of each by torchmetrics.

    Args:
        reference: features (M, D) to measure against.
    """

    def __init__(self, reference: Tensor):
        self._reference = reference

    def __call__(self, features: Features) -> float:
        """The distance of features (N, D), N at least 2."""
        return self._over_subsets(features)[0]

    def measure(self, features: Features, subsamples: Subsamples) -> tuple[float, float | None]:
        """The distance, and its standard error; with it that of the random subsets, where one is not all images."""
        value, of_subsets = self._over_subsets(features)
        error = standard_errors.of_subsamples(self._of_subsamples(features, subsamples))
        return value, None if error is None else (error**2 + of_subsets**2) ** 0.5

    def _over_subsets(self, features: Features) -> tuple[float, float]:
        from torchmetrics.image.kid import poly_mmd

        size = min(_KERNEL_SUBSET_SIZE, len(features), len(self._reference))
        subsets = min(100, _KERNEL_DRAWS // size)
        generator, values = torch.Generator().manual_seed(0), []
        for _ in range(subsets):
            chosen = (x[torch.randperm(len(x), generator=generator)[:size]].double() for x in (self._reference, features))
            values.append(float(poly_mmd(*chosen)))
        found = torch.tensor(values, dtype=torch.float64)
        error = float(found.std(correction=0)) / subsets**0.5 if size < len(features) else 0.0
        return float(found.mean()), error

    def _of_subsamples(self, features: Features, subsamples: Subsamples) -> list[float]:
        """The distance of each subsample to the whole reference, but for what is the same in all."""
        if not len(subsamples):
            return []
        within, across, count = torch.zeros(3, len(subsamples), dtype=torch.float64)
        for start in range(0, len(features), BLOCK):
            x = features[start : start + BLOCK].double()
            mine = subsamples.members(slice(start, start + BLOCK)).double()
            diagonal = (x.square().sum(1) / x.shape[1] + 1) ** 3
            within += (mine * (_kernel(x, x) @ mine - mine * diagonal[:, None])).sum(0)
            for after in range(start + BLOCK, len(features), BLOCK):  # each of these pairs stands for two
                theirs = subsamples.members(slice(after, after + BLOCK)).double()
                within += 2 * (mine * (_kernel(x, features[after : after + BLOCK]) @ theirs)).sum(0)
            across += mine.T @ sum(_kernel(x, other).sum(1) for other in blocks(self._reference)) / len(self._reference)
            count += mine.sum(0)
        return (within / (count * (count - 1)) - 2 * across / count).tolist()  # type: ignore[no-any-return]


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def blocks(x: Features, size: int = BLOCK) -> Iterator[Tensor]:
    """(N, ...) in parts, so that a matrix of distances to them fits into memory."""
    return (x[start : start + size] for start in range(0, len(x), size))


def of_each(features: Features, of_block: Callable[[Tensor], Tensor]) -> Tensor:
    """A figure of each of (N, D), (N,) in fp64, from those of (n, D).

    In one array from the start: what is kept of each block scatters the heap.
    """
    found = torch.empty(len(features), dtype=torch.float64)
    for start, part in zip(range(0, len(features), BLOCK), blocks(features), strict=True):
        found[start : start + BLOCK] = of_block(part)
    return found
