"""Quality and diversity of generated images, from features: numbers in, numbers out.

Fréchet and kernel distance are torchmetrics'. The rest are a few lines on distances between features,
each with its source; the tests hold them to definitions written out separately.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guidegen.errors import UsageError
from guidegen.evaluate import standard_errors

PRECISION_NEIGHBOURS = 3
COVERAGE_NEIGHBOURS = 5
MIN_IMAGES = COVERAGE_NEIGHBOURS + 1
_KERNEL_SUBSET_SIZE = 1000
_KERNEL_DRAWS = 20_000
_NEAREST = 64  # that are kept of each image, to find its nearest ones in any half or quarter among


@dataclass(frozen=True)
class Metric:
    """What a metric is called and which way is better.

    Attributes:
        name: its key in a row.
        title: for people.
        better: -1 where less is better, +1 where more is.
    """

    name: str
    title: str
    better: int


METRICS = (
    Metric("frechet_distance", "Fréchet distance", -1),
    Metric("kernel_distance", "Kernel distance", -1),
    Metric("precision", "Precision", 1),
    Metric("recall", "Recall", 1),
    Metric("density", "Density", 1),
    Metric("coverage", "Coverage", 1),
    Metric("accuracy", "Label accuracy", 1),
    Metric("confidence", "Label confidence", 1),
    Metric("vendi_score", "Vendi score", 1),
    Metric("pairwise_distance", "Pairwise distance", 1),
)


def title_of(metric: Metric, inception: bool) -> str:
    """The metric's name; only with Inception's features is it FID or KID."""
    return (
        {"frechet_distance": "FID", "kernel_distance": "KID"}.get(metric.name, metric.title) if inception else metric.title
    )


def require(package: str, what: str) -> None:
    """Raises UsageError if an optional package is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UsageError(f'{what} needs {package}, which is not installed: pip install "guidegen[evaluate]"')


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
        for part, mine in zip(_parts(features), _parts(chosen), strict=True):
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


class Neighbourhoods:
    """Precision, recall, density and coverage: who lies within the balls of whose nearest neighbours.

    Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991, equations 1 and 2), 3 neighbours.
    Density and coverage: Naeem et al. 2020 (arXiv 2002.09797, equations 4 and 5), 5 neighbours.

    Args:
        reference: features (M, D) to measure against, M at least `MIN_IMAGES`.
    """

    def __init__(self, reference: Tensor):
        self._reference = reference
        radii = neighbour_distances(reference, (PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS))
        self._precision_radius, self._coverage_radius = radii.unbind(1)

    def __call__(self, features: Tensor) -> dict[str, float]:
        """The four of features (N, D), N at least `MIN_IMAGES`; all but density are within [0, 1]."""
        return {name: value for name, (value, _) in self.measure(features, [None] * len(features), ()).items()}

    def measure(
        self, features: Tensor, labels: Sequence[Any], subsamples: Sequence[Tensor]
    ) -> dict[str, tuple[float, float | None]]:
        """The four, each with its standard error.

        Args:
            features: (N, D), N at least `MIN_IMAGES`.
            labels: of the images.
            subsamples: what the error of recall comes from; without any it has none.
        """
        own_radius = neighbour_distances(features, (PRECISION_NEIGHBOURS,))[:, 0]
        radii = _radii_of_subsamples(features, subsamples)
        count, points = len(features), len(self._reference)
        precise = torch.zeros(count, dtype=torch.bool)
        inside_of, alone = torch.zeros(2, count, dtype=torch.int64)
        names = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))
        covers, sets, recalled = [], [], torch.zeros(1 + len(subsamples), dtype=torch.int64)
        for part, precision_radius, coverage_radius in zip(
            *map(_parts, (self._reference, self._precision_radius, self._coverage_radius)), strict=True
        ):
            distance = _distances(part, features)  # (m, N)
            precise |= (distance <= precision_radius[:, None]).any(0)
            inside = distance <= coverage_radius[:, None]
            inside_of += inside.sum(0)
            covers.append(inside.sum(1))
            alone += inside[covers[-1] == 1].sum(0)
            sets.append(torch.where(inside, names, 0).sum(1))
            recalled[0] += (distance <= own_radius).any(1).sum()
            for i, (index, radius) in enumerate(zip(subsamples, radii, strict=True), 1):
                recalled[i] += (distance[:, index] <= radius).any(1).sum()
        covered = torch.cat(covers)
        recall, *of_subsamples = (recalled.double() / points).tolist()
        error = partial(standard_errors.of_mean, labels=labels, images=range(count))
        return {
            "precision": (float(precise.double().mean()), error(precise.double())),
            "recall": (recall, standard_errors.of_subsamples(of_subsamples)),
            "density": (int(inside_of.sum()) / (COVERAGE_NEIGHBOURS * count), error(inside_of / COVERAGE_NEIGHBOURS)),
            "coverage": (
                float((covered > 0).double().mean()),
                standard_errors.of_union(covered, alone, torch.cat(sets), labels),
            ),
        }


def neighbour_distances(features: Tensor, ranks: Sequence[int]) -> Tensor:
    """Distances (N, len(ranks)) of each of (N, D) to its nearest other ones of these ranks, 1 the nearest."""
    found = []
    for part in _parts(features):
        nearest = _distances(part, features).topk(max(ranks) + 1, largest=False).values  # itself comes first, at 0
        found.append(nearest[:, list(ranks)])
    return torch.cat(found)


def _radii_of_subsamples(features: Tensor, subsamples: Sequence[Tensor]) -> list[Tensor]:
    """Distance of each image of each subsample to its third nearest other one there, (n,) a subsample.

    Found among the nearest ones in the whole, and for the few that have too few of them there, anew.
    """
    if not subsamples:
        return []
    kept = min(_NEAREST, len(features))
    found = [_distances(part, features).topk(kept, largest=False) for part in _parts(features)]
    nearest, where = torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])
    radii = []
    for index in subsamples:
        chosen = torch.zeros(len(features), dtype=torch.bool)
        chosen[index] = True
        rank = chosen[where[index]].cumsum(1)  # itself is the first
        radius = nearest[index].gather(1, (rank <= PRECISION_NEIGHBOURS).sum(1, keepdim=True).clamp_max(kept - 1))[:, 0]
        short = rank[:, -1] <= PRECISION_NEIGHBOURS
        if short.any():
            radius[short] = _distances(features[index[short]], features[index]).kthvalue(PRECISION_NEIGHBOURS + 1).values
        radii.append(radius)
    return radii


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, 1024)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double())  # in double, as it goes by way of a matrix product


def vendi_score(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K/N, K cosine similarity (Friedman & Dieng 2023, arXiv 2210.02410).

    From 1 (all alike) to N (nothing in common) for features (N, D). It grows with N as long as new images bring
    something new: compare scores of equal N only (section 4 there; the value at N is a biased
    estimate of that of the distribution, and too small). Of uᵀu/N, whose eigenvalues other than 0 are the same, where D < N.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    small = unit.T @ unit if unit.shape[1] < len(unit) else unit @ unit.T
    eigenvalues = torch.linalg.eigvalsh(small / len(unit)).clamp_min(0)
    return float(torch.special.entr(eigenvalues).sum().exp())


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


def pairwise_distance(features: Tensor) -> float:
    """Mean cosine distance, 0 to 2, between two different ones of (N, D), N at least 2; unbiased in N."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    n = len(unit)
    return float((n * n - unit.sum(0).square().sum()) / (n * (n - 1)))


def mean_over_classes(score: Callable[[Tensor], float], features: Tensor, labels: Sequence[Any]) -> float | None:
    """Mean of `score` over the classes that have two images or more; None where there is none."""
    scores = [score(features[index]) for index in by_class(labels).values() if len(index) > 1]
    return sum(scores) / len(scores) if scores else None


def by_class(labels: Sequence[Any]) -> dict[Any, list[int]]:
    """label -> its indices."""
    found: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        found.setdefault(label, []).append(i)
    return found


@dataclass(frozen=True)
class Measured:
    """Images as the networks see them.

    Attributes:
        features: (N, D).
        hashes: of each image; equal ones are one image, drawn for several labels (as at w = 0).
        labels: what each was meant to show: an id, a prompt, or None.
        probability: of the intended label under the judge (N,); NaN where the judge does not know it.
        correct: whether the judge's likeliest label is the intended one (N,); NaN likewise.
    """

    features: Tensor
    hashes: list[str]
    labels: list[Any]
    probability: Tensor
    correct: Tensor

    def __getitem__(self, index: list[int]) -> Measured:
        return Measured(
            self.features[index],
            [self.hashes[i] for i in index],
            [self.labels[i] for i in index],
            self.probability[index],
            self.correct[index],
        )

    def distinct(self) -> Measured:
        """Each image once."""
        return self[list({one: i for i, one in reversed(list(enumerate(self.hashes)))}.values())]


Figures = dict[str, dict[str, Any] | None]


class Meter:
    """All metrics against one reference.

    Args:
        reference: features (M, D), M at least `MIN_IMAGES`.
    """

    def __init__(self, reference: Tensor):
        require("torchmetrics", "Measuring distances between features")
        self.count, self.width = reference.shape
        self._frechet, self._kernel = FrechetDistance(reference), KernelDistance(reference)
        self._neighbourhoods = Neighbourhoods(reference)

    def measure(self, images: Measured, halves: int) -> Figures:
        """Every metric's `value`, standard error `spread` and number of `images`; None where there is nothing to measure.

        Distances, precision to coverage: of the distinct images. The rest: of all that have a label; those
        within classes also say `per_class`, the fewest and the most images of a class.

        Args:
            images: of one w.
            halves: random splits into halves and quarters behind the errors of distances and recall; 0: no errors at all.
        """
        found = self._against_reference(images.distinct(), halves) | _of_labels(images) | _within_classes(images, halves > 0)
        if not halves:
            found = {name: figure and {**figure, "spread": None} for name, figure in found.items()}
        return found

    def _against_reference(self, images: Measured, halves: int) -> Figures:
        features, count = images.features, len(images.labels)
        if count < MIN_IMAGES:
            return dict.fromkeys(("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"))
        enough = count >= standard_errors.LEAST * (PRECISION_NEIGHBOURS + 1)  # a quarter has neighbours
        subsamples = standard_errors.subsamples(images.labels, halves) if enough else []
        error = standard_errors.of_subsamples(self._frechet.of_subsamples(features, subsamples))
        found = {
            "frechet_distance": (self._frechet(features), error),
            "kernel_distance": self._kernel.measure(features, subsamples),
            **self._neighbourhoods.measure(features, images.labels, subsamples),
        }
        return {name: _figure(value, spread, count) for name, (value, spread) in found.items()}


def _figure(value: float | None, spread: float | None, images: int) -> dict[str, Any] | None:
    if value is None or not math.isfinite(value):
        return None
    return {"value": value, "spread": spread if spread is not None and math.isfinite(spread) else None, "images": images}


def _of_labels(images: Measured) -> Figures:
    judged = images[images.probability.isfinite().nonzero()[:, 0].tolist()]
    found: Figures = {"accuracy": None, "confidence": None}
    if judged.labels:
        for name, values in (("accuracy", judged.correct), ("confidence", judged.probability)):
            error = standard_errors.of_mean(values, judged.labels, judged.hashes)
            found[name] = _figure(float(values.mean()), error, len(values))
    return found


def _within_classes(images: Measured, errors: bool) -> Figures:
    classes = [index for index in by_class(images.labels).values() if len(index) > 1]
    sizes = [len(index) for index in classes]
    parts = [(images.features[index], frozenset(images.hashes[i] for i in index)) for index in classes if errors]
    found: Figures = {}
    for name, score, scale in (
        ("vendi_score", vendi_score, _vendi_scale),
        ("pairwise_distance", pairwise_distance, standard_errors.as_it_is),
    ):
        value = mean_over_classes(score, images.features, images.labels)
        error = standard_errors.of_classes(parts, score, scale)
        figure = _figure(value, error, sum(sizes))
        found[name] = figure and figure | {"per_class": [min(sizes), max(sizes)]}
    return found
