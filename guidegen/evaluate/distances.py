"""Distances between the features of drawn and of real images; both are torchmetrics'."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from guidegen.evaluate import standard_errors

_KERNEL_SUBSET_SIZE = 1000
_KERNEL_DRAWS = 20_000


class FrechetDistance:
    """‖μ₁−μ₂‖² + Tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) between Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        reference: features (M, D) to measure against.
    """

    def __init__(self, reference: Tensor):
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._metric = FrechetInceptionDistance(_Given(reference.shape[1]), reset_real_features=False)
        self._metric.update(reference.double(), real=True)
        values, vectors = torch.linalg.eigh(torch.cov(reference.double().T))
        self._mean, self._root = reference.double().mean(0), vectors * values.clamp_min(0).sqrt() @ vectors.T

    def __call__(self, features: Tensor) -> float:
        """The distance of features (N, D), N at least 2; not negative but for rounding."""
        self._metric.reset()
        self._metric.update(features.double(), real=False)
        return float(self._metric.compute())

    def of_subsamples(self, features: Tensor, subsamples: Sequence[Tensor]) -> list[float]:
        """The distance of each subsample of features (N, D).

        The trace of the root is the sum of the singular values of X₁Σ₂^½ over (n − 1)^½, X₁ centred: those of the smaller
        side, where torchmetrics takes eigenvalues of a D x D matrix each time.
        """
        features = features.double()
        rotated = features @ self._root
        found = []
        for index in subsamples:
            x, y = features[index], rotated[index]
            mean, count = x.mean(0), len(index) - 1
            y = y - y.mean(0)
            roots = torch.linalg.eigvalsh(y.T @ y if y.shape[1] < len(y) else y @ y.T).clamp_min(0).sqrt()
            traces = ((x - mean).square().sum() - 2 * roots.sum() * count**0.5) / count + self._root.square().sum()
            found.append(float((mean - self._mean).square().sum() + traces))
        return found


class KernelDistance:
    """Squared maximum mean discrepancy under (x·y/D + 1)³ (Bińkowski et al. 2018, arXiv 1801.01401, section 4).

    It is unbiased, so unlike the Fréchet distance it may be compared between sample sizes, and it
    may come out slightly negative. A mean over random subsets of equal size, as in the paper.

    Args:
        reference: features (M, D) to measure against.
    """

    def __init__(self, reference: Tensor):
        self._reference = reference.double()

    def __call__(self, features: Tensor) -> float:
        """The distance of features (N, D), N at least 2."""
        return self._over_subsets(features)[0]

    def measure(self, features: Tensor, subsamples: Sequence[Tensor]) -> tuple[float, float | None]:
        """The distance, and its standard error; with it that of the random subsets, where one is not all images."""
        value, of_subsets = self._over_subsets(features)
        error = standard_errors.of_subsamples(self._of_subsamples(features.double(), subsamples))
        return value, None if error is None else (error**2 + of_subsets**2) ** 0.5

    def _over_subsets(self, features: Tensor) -> tuple[float, float]:
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(_KERNEL_SUBSET_SIZE, len(features), len(self._reference))
        subsets = min(100, _KERNEL_DRAWS // size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps features in memory; ours are there anyway
            metric = KernelInceptionDistance(_Given(features.shape[1]), subsets=subsets, subset_size=size)
        metric.update(self._reference, real=True)
        metric.update(features.double(), real=False)
        # its subsets come from torch's generator, which is ours to leave alone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mean, deviation = metric.compute()
        return float(mean), float(deviation) / subsets**0.5 if size < len(features) else 0.0

    def _of_subsamples(self, features: Tensor, subsamples: Sequence[Tensor]) -> list[float]:
        """The distance of each subsample to the whole reference, but for what is the same in all."""
        if not subsamples:
            return []
        chosen = torch.zeros(len(features), len(subsamples), dtype=torch.float64)
        for i, index in enumerate(subsamples):
            chosen[index, i] = 1
        within = torch.zeros(len(subsamples), dtype=torch.float64)
        across = torch.zeros_like(within)
        for part, mine in zip(blocks(features), blocks(chosen), strict=True):
            diagonal = (part.square().sum(1) / part.shape[1] + 1) ** 3
            within += (mine * (_kernel(part, features) @ chosen - mine * diagonal[:, None])).sum(0)
            across += mine.T @ _kernel(part, self._reference).mean(1)
        count = chosen.sum(0)
        return (within / (count * (count - 1)) - 2 * across / count).tolist()  # type: ignore[no-any-return]


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


class _Given(torch.nn.Module):
    """torchmetrics asks for a network that makes features of images; ours are made already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def blocks(x: Tensor) -> tuple[Tensor, ...]:
    """(N, ...) in parts, so that a matrix of distances to them fits into memory."""
    return torch.split(x, 1024)
