"""Mean and covariance of features, as sums that grow with each batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guidegen.evaluate.cache import Features


@dataclass(frozen=True)
class Moments:
    """A Gaussian fitted to features.

    Attributes:
        mean: (D,) in fp64.
        covariance: (D, D) in fp64, unbiased.
        count: how many features it is of; None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @staticmethod
    def of(features: Features) -> Moments:
        """Of features (N, D), N at least 2; read in blocks."""
        return Sums.of(features).moments()


class Sums:
    """Count, sum (D,) and sum of outer products (D, D) of features in fp64, about a point near their mean.

    Args:
        width: D.
        origin: (D,), subtracted first, so that no digits are lost; sums of one origin may be added.
    """

    def __init__(self, width: int, origin: Tensor | None = None):
        self.count = 0
        self.origin = torch.zeros(width, dtype=torch.float64) if origin is None else origin
        self.first, self.second = torch.zeros_like(self.origin), torch.zeros(width, width, dtype=torch.float64)

    @staticmethod
    def of(features: Features, origin: Tensor | None = None) -> Sums:
        """Of features (N, D)."""
        sums = Sums(features.shape[1], features[:1].double()[0] if origin is None else origin)
        for start in range(0, len(features), 4096):
            sums.update(features[start : start + 4096])
        return sums

    def update(self, features: Tensor) -> None:
        """Adds features (B, D)."""
        x = features.double() - self.origin
        self.count += len(x)
        self.first += x.sum(0)
        self.second.addmm_(x.T, x)

    def __add__(self, other: Sums) -> Sums:
        found = Sums(len(self.origin), self.origin)
        found.count, found.first = self.count + other.count, self.first + other.first
        found.second = self.second + other.second
        return found

    def moments(self) -> Moments:
        """Of what was added, two features at least."""
        mean = self.first / self.count
        covariance = (self.second - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Moments(mean + self.origin, covariance, self.count)


def square_root(symmetric: Tensor) -> Tensor:
    """Of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(symmetric)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root


def trace_of_root(symmetric: Tensor) -> float:
    """Of a positive semi-definite matrix."""
    return float(torch.linalg.eigvalsh(symmetric).clamp_min(0).sqrt().sum())
