"""A metric over settings, from values at a few of them: a Gaussian process whose noise is known and shared.

All settings are drawn from the same seeds (common random numbers), so that the errors of two values are alike and
their difference is less noisy than either. The covariance of the errors is taken from delete-a-group jackknife
values of the same groups of seeds; libraries of Gaussian processes take a variance for each value at most.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_PATHS = 1000
_SCALES = np.geomspace(0.1, 100, 7)
"""Variances of the curve, in those of the values of the first round."""
_LENGTHS = {1: np.geomspace(0.25, 4, 7), 2: np.geomspace(0.25, 3, 5), 3: np.geomspace(0.3, 2, 3)}
"""Lengths over which it changes, by the number of axes; those have a width of 1."""
_LEAST_WEIGHT = 0.01
"""Of a variance and lengths, against the likeliest: those below it are left out."""
_LEAST_UNIT = 1e-3
_ACROSS = 0.5
"""Correlation of the curves of two combinations of categories."""
_LEVEL = 100.0
"""Variance of the mean level: any."""


@dataclass(frozen=True)
class Points:
    """Settings as the model sees them.

    Attributes:
        x: (m, d) along the numeric axes, each scaled to 0 to 1.
        arm: (m,) which combination of categories.
    """

    x: Array
    arm: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arm)


@dataclass(frozen=True)
class Beliefs:
    """How likely the variances and lengths of the process are.

    Attributes:
        unit: standard deviation of the values of the first round, which the variances are multiples of.
        likelihood: log, of each of them (h,).
    """

    unit: float
    likelihood: Array


@dataclass(frozen=True)
class Posterior:
    """What is known of the curve at some settings.

    Attributes:
        mean: (c,) less is better.
        spread: (c,) standard deviations.
        paths: (p, c) curves that agree with the values.
        beliefs: what the values say of how fast curves of this kind change, for the next round.
    """

    mean: Array
    spread: Array
    paths: Array
    beliefs: Beliefs

    @property
    def best(self) -> int:
        """Index of the least mean."""
        return int(self.mean.argmin())

    @property
    def minima(self) -> NDArray[np.int64]:
        """Where each path is least (p,)."""
        found: NDArray[np.int64] = self.paths.argmin(1)
        return found

    @property
    def loss(self) -> float:
        """Root mean square of what the best by the mean loses against the best of each path."""
        return float(np.sqrt(np.square(self.paths[:, self.best] - self.paths.min(1)).mean()))

    def ties(self, level: float = 0.95) -> NDArray[np.bool_]:
        """Which are not worse than the best at that level (c,), one by one."""
        worse = self.paths - self.paths[:, [self.best]]
        return np.quantile(worse, (1 - level) / 2, axis=0) <= 0


def jackknife_error(replicates: Array) -> float:
    """Standard error from delete-a-group values (G,)."""
    return float(np.sqrt(replicates.var() * (len(replicates) - 1)))


def error_covariance(points: Points, errors: Array, replicates: Array) -> Array:
    """Covariance (m, m) of the errors of m values.

    Variances are drawn half-way to their median; correlations fall off with the distance of settings, as fast as is most
    likely: the matrix of the jackknife itself has too few degrees of freedom to invert.

    Args:
        points: of the values.
        errors: (m,) standard errors.
        replicates: (m, G) delete-a-group values, of the same groups of seeds at each setting.
    """
    if not errors.max() > 0:
        return np.zeros((len(points), len(points)))
    logs = np.log(np.maximum(errors, 0.03 * errors.max()))
    scale = np.exp((logs + np.median(logs)) / 2)
    distance = np.square(points.x[:, None] - points.x).sum(2)
    same = points.arm[:, None] == points.arm
    across = (0.0, 0.4, 0.7, 0.9) if not same.all() else (1.0,)
    grid = np.array(list(itertools.product((0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0), np.geomspace(0.05, 6, 9), across)))
    loose, length, between = (column[:, None, None] for column in grid.T)
    found = (1 - loose) * np.exp(-distance / 2 / length**2) * np.where(same, 1.0, between)
    found += loose * np.eye(len(points))
    likelihood = _likelihood(found, replicates)
    covariance: Array = found[likelihood.argmax()] * scale[:, None] * scale
    return covariance


def _likelihood(correlations: Array, replicates: Array) -> Array:
    """Log likelihood of each matrix of correlations (h, m, m); where nothing varies, of independence alone."""
    deviations = replicates - replicates.mean(1, keepdims=True)
    squares = np.square(deviations).sum(1)
    varies = squares > 1e-20 * max(1e-300, float(squares.max()))
    if varies.sum() < 2:
        return np.asarray(-np.abs(correlations).sum((1, 2)))
    unit = deviations[varies] / np.sqrt(squares[varies])[:, None]
    root = np.linalg.cholesky(correlations[:, varies][:, :, varies] + 1e-9 * np.eye(varies.sum()))
    whitened = np.linalg.solve(root, np.broadcast_to(unit, (len(root), *unit.shape)))
    return np.asarray(-2 * np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1) - np.square(whitened).sum((1, 2)))


def posterior(points: Points, values: Array, errors: Array, at: Points, before: Beliefs | None = None) -> Posterior:
    """The curve at settings `at`, from values (m,) with errors of covariance (m, m); less is better.

    A Gaussian process of unknown level; its variance and lengths are averaged over by their likelihood.

    Args:
        points: of the values.
        values: (m,).
        errors: (m, m).
        at: where it is asked for.
        before: of the round before, of the same axes.
    """
    unit = max(float(values.std()), float(np.sqrt(np.diag(errors).mean())), 1e-12)
    if before is not None and before.unit < _LEAST_UNIT * unit:
        before = None  # nothing varied then
    unit = before.unit if before else unit
    level = values.mean()
    y, noise = (values - level) / unit, errors / unit**2 + 1e-8 * np.eye(len(values))
    dimensions = points.x.shape[1]
    lengths = np.array(list(itertools.product(_LENGTHS[max(1, min(3, dimensions))], repeat=dimensions)))
    variances = np.repeat(_SCALES, len(lengths))[:, None, None]
    lengths = np.tile(lengths, (len(_SCALES), 1))
    root = np.linalg.cholesky(variances * _kernel(points, points, lengths) + _LEVEL + noise)
    whitened = np.linalg.solve(root, np.broadcast_to(y[:, None], (len(root), len(y), 1)))
    likelihood = -np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1) - np.square(whitened).sum((1, 2)) / 2
    likelihood += before.likelihood if before else 0.0
    weight = np.exp(likelihood - likelihood.max())
    kept = weight > _LEAST_WEIGHT
    cross = np.linalg.solve(root[kept], variances[kept] * _kernel(points, at, lengths[kept]) + _LEVEL)
    across = cross.transpose(0, 2, 1)
    mean = (across @ whitened[kept])[:, :, 0]
    covariance = variances[kept] * _kernel(at, at, lengths[kept]) + _LEVEL - across @ cross
    draws = np.linalg.cholesky(covariance + 1e-6 * variances[kept] * np.eye(len(at)))
    random = np.random.default_rng(0)
    counts = random.multinomial(_PATHS, weight[kept] / weight[kept].sum())
    paths = [m + random.standard_normal((n, len(at))) @ d.T for m, d, n in zip(mean, draws, counts, strict=True)]
    found = np.concatenate(paths) * unit + level
    return Posterior(found.mean(0), found.std(0), found, Beliefs(unit, likelihood))


def _kernel(a: Points, b: Points, lengths: Array) -> Array:
    """Correlation (h, m, c) of the curve between settings, for each of some lengths (h, d)."""
    scaled = np.einsum("hd,mcd->hmc", 1 / np.square(lengths), np.square(a.x[:, None] - b.x))
    r = np.sqrt(5 * scaled)
    found: Array = (1 + r + r * r / 3) * np.exp(-r) * np.where(a.arm[:, None] == b.arm, 1.0, _ACROSS)
    return found
