"""Quality and diversity of generated images, from features: numbers in, numbers out.

Fréchet and kernel distance are torchmetrics'. The rest are a few lines on distances between features,
each with its source; the tests hold them to definitions written out separately.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guidegen.errors import UsageError

PRECISION_NEIGHBOURS = 3
COVERAGE_NEIGHBOURS = 5
MIN_IMAGES = COVERAGE_NEIGHBOURS + 1
_KERNEL_SUBSET_SIZE = 1000
_KERNEL_DRAWS = 20_000


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

    def __call__(self, features: Tensor) -> float:
        """The distance of features (N, D), N at least 2; not negative but for rounding."""
        self._metric.reset()
        self._metric.update(features.double(), real=False)
        return float(self._metric.compute())


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
            return float(metric.compute()[0])


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
        own_radius = neighbour_distances(features, (PRECISION_NEIGHBOURS,))[:, 0]
        precise = within = 0
        recalled = torch.zeros(len(self._reference), dtype=torch.bool)
        covered = torch.zeros(len(self._reference), dtype=torch.bool)
        for part, radius in zip(_parts(features), _parts(own_radius), strict=True):
            distance = _distances(self._reference, part)  # (M, b)
            precise += int((distance <= self._precision_radius[:, None]).any(0).sum())
            inside = distance <= self._coverage_radius[:, None]
            within += int(inside.sum())
            covered |= inside.any(1)
            recalled |= (distance <= radius).any(1)
        return {
            "precision": precise / len(features),
            "recall": float(recalled.double().mean()),
            "density": within / (COVERAGE_NEIGHBOURS * len(features)),
            "coverage": float(covered.double().mean()),
        }


def neighbour_distances(features: Tensor, ranks: Sequence[int]) -> Tensor:
    """Distances (N, len(ranks)) of each of (N, D) to its nearest other ones of these ranks, 1 the nearest."""
    found = []
    for part in _parts(features):
        nearest = _distances(part, features).topk(max(ranks) + 1, largest=False).values  # itself comes first, at 0
        found.append(nearest[:, list(ranks)])
    return torch.cat(found)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, 1024)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double())  # in double, as it goes by way of a matrix product


def vendi_score(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K/N, K cosine similarity (Friedman & Dieng 2023, arXiv 2210.02410).

    From 1 (all alike) to N (nothing in common) for features (N, D).
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp_min(0)
    return float(torch.special.entr(eigenvalues).sum().exp())


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


def half_samples(labels: Sequence[Any], count: int) -> Iterator[list[int]]:
    """Random halves of the images, each with half of every class (one more or less), drawn from seed 0.

    The standard deviation of a mean over halves drawn without replacement is the standard error of the
    mean over all: ((1 − ½) · 2/N)^½ σ (Shao & Wu 1989, the delete-d jackknife at d = N/2). The usual
    bootstrap draws with replacement, and a picture that is its own neighbour spoils recall and kernels.
    """
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        shuffled = []
        for index in by_class(labels).values():
            shuffled += [index[j] for j in torch.randperm(len(index), generator=generator).tolist()]
        yield shuffled[i % 2 :: 2]


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
        """Every metric's `value`, `spread` and number of `images`; None where there is nothing to measure it on.

        Distances, precision to coverage: of the distinct images. The rest: of all that have a label.

        Args:
            images: of one w.
            halves: random halves that the spread is taken over; below 2 there is none.
        """
        distinct = images.distinct()
        judged = images[images.probability.isfinite().nonzero()[:, 0].tolist()]
        paired = images[[i for index in by_class(images.labels).values() if len(index) > 1 for i in index]]
        return (
            _figures(distinct, self._against_reference, halves)
            | _figures(judged, _of_labels, halves)
            | _figures(paired, _within_classes, halves)
        )

    def _against_reference(self, images: Measured) -> dict[str, float | None]:
        if len(images.labels) < MIN_IMAGES:
            return dict.fromkeys(("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"))
        return {
            "frechet_distance": self._frechet(images.features),
            "kernel_distance": self._kernel(images.features),
            **self._neighbourhoods(images.features),
        }


def _of_labels(images: Measured) -> dict[str, float | None]:
    if not images.labels:
        return {"accuracy": None, "confidence": None}
    return {"accuracy": float(images.correct.mean()), "confidence": float(images.probability.mean())}


def _within_classes(images: Measured) -> dict[str, float | None]:
    return {
        "vendi_score": mean_over_classes(vendi_score, images.features, images.labels),
        "pairwise_distance": mean_over_classes(pairwise_distance, images.features, images.labels),
    }


def _figures(images: Measured, values: Callable[[Measured], dict[str, float | None]], halves: int) -> Figures:
    drawn = [values(images[index]) for index in half_samples(images.labels, halves)] if images.labels else []
    found: Figures = {}
    for name, value in values(images).items():
        some = [half for one in drawn if (half := one[name]) is not None]
        spread = float(torch.tensor(some, dtype=torch.float64).std()) if len(some) > 1 else None
        found[name] = None if value is None else {"value": value, "spread": spread, "images": len(images.labels)}
    return found
