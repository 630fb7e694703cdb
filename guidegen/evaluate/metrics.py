"""Quality and diversity of generated images, from features: which metrics there are, and all of them at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from guidegen.errors import UsageError
from guidegen.evaluate import standard_errors
from guidegen.evaluate.cache import Features, rows_of
from guidegen.evaluate.distances import FrechetDistance, KernelDistance
from guidegen.evaluate.diversity import DIVERSITIES, mean_over_classes
from guidegen.evaluate.neighbourhoods import MIN_IMAGES, Neighbourhoods, subsamples


@dataclass(frozen=True)
class Metric:
    """What a metric is called and which way is better.

    Attributes:
        name: its key in a row.
        title: to show.
        better: -1 where less is better, +1 where more is.
    """

    name: str
    title: str
    better: int

    @property
    def short(self) -> str:
        """The title where there is little room."""
        words = [word for word in self.title.split() if word not in ("Label", "distance", "score")]
        return " ".join(words).capitalize()


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


PUBLISHED_METRICS = (
    Metric("spatial_frechet_distance", "Spatial Fréchet distance", -1),
    Metric("dinov2_frechet_distance", "DINOv2 Fréchet distance", -1),
    Metric("clip_distance", "CLIP distance", -1),
    *(
        Metric(f"{name}_extrapolated", f"{title}, extrapolated", -1)
        for name, title in (
            ("frechet_distance", "Fréchet distance"),
            ("spatial_frechet_distance", "Spatial Fréchet distance"),
            ("dinov2_frechet_distance", "DINOv2 Fréchet distance"),
        )
    ),
    Metric("class_score", "Class score", 1),
)
"""Those of protocols alone."""
_TITLES = {
    "Inception-v3": {
        "frechet_distance": "FID",
        "kernel_distance": "KID",
        "spatial_frechet_distance": "sFID",
        "frechet_distance_extrapolated": "FID∞",
        "spatial_frechet_distance_extrapolated": "sFID∞",
        "class_score": "Inception Score",
    },
    "DINOv2": {"dinov2_frechet_distance": "FD-DINOv2", "dinov2_frechet_distance_extrapolated": "FD-DINOv2∞"},
    "CLIP": {"clip_distance": "CMMD"},
}


def title_of(metric: Metric, inception: bool) -> str:
    """The metric's name; only with Inception's features is it FID or KID."""
    return _TITLES["Inception-v3"].get(metric.name, metric.title) if inception else metric.title


def titles_of(metrics: Sequence[Metric], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics' names: the published ones only where all of the rows are of networks with the published weights."""
    titles = {}
    for metric in metrics:
        mine = [row for row in rows if row["metrics"].get(metric.name)]
        network = next((name for name, titles in _TITLES.items() if metric.name in titles), None)
        published = network is not None and all(network in _published(row) for row in mine)
        titles[metric.name] = _TITLES[network][metric.name] if network and published and mine else metric.title
    return list(titles.values())


def _published(row: Mapping[str, Any]) -> list[str]:
    """The networks of a row that have the published weights."""
    if row.get("protocol"):
        return [one["name"] for one in row["protocol"]["networks"] if one["published"]]
    return ["Inception-v3"] if row["features"]["inception"] else []


def shown_metrics(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """Those that some of the rows have."""
    return [metric for metric in (*METRICS, *PUBLISHED_METRICS) if any(row["metrics"].get(metric.name) for row in rows)]


def require(package: str, what: str) -> None:
    """Raises UsageError if an optional package is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UsageError(f"{what} needs {package}, which is not installed: pip install {package.replace('_', '-')}")


@dataclass(frozen=True)
class Measured:
    """Images as the networks see them.

    Attributes:
        features: (N, D), in memory or on disk.
        hashes: of each image; equal ones are one image, drawn for several labels (as at w = 0).
        labels: what each was meant to show: an id, a prompt, or None.
        probability: of the intended label under the evaluation classifier (N,); NaN where it does not know the label.
        correct: whether the most likely label is the intended one (N,); NaN likewise.
    """

    features: Features
    hashes: list[Any]
    labels: list[Any]
    probability: Tensor
    correct: Tensor

    def __getitem__(self, index: list[int]) -> Measured:
        return Measured(
            rows_of(self.features, index),
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

    def measure(self, images: Measured, splits: int) -> Figures:
        """Every metric's `value`, standard error `spread` and number of `images`; None where there is nothing to measure.

        Distances, precision to coverage: of the distinct images. The rest: of all that have a label; those
        within classes also say `per_class`, the fewest and the most images of a class.

        Args:
            images: of one w.
            splits: random splits for the standard errors of distances and recall; 0: no standard errors.
        """
        found = self._against_reference(images.distinct(), splits) | _of_labels(images) | _within_classes(images, splits > 0)
        if not splits:
            found = {name: one and {**one, "spread": None} for name, one in found.items()}
        return found

    def _against_reference(self, images: Measured, splits: int) -> Figures:
        features, count = images.features, len(images.labels)
        if count < MIN_IMAGES:
            return dict.fromkeys(("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"))
        some = subsamples(images.labels, splits)
        found = {
            "frechet_distance": self._frechet.measure(features, images.labels, splits),
            "kernel_distance": self._kernel.measure(features, some),
            **self._neighbourhoods.measure(features, images.labels, some),
        }
        return {name: figure(value, spread, count) for name, (value, spread) in found.items()}


def figure(value: float | None, spread: float | None, images: int) -> dict[str, Any] | None:
    """A value with its standard error and number of images; None for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return {"value": value, "spread": spread if spread is not None and math.isfinite(spread) else None, "images": images}


def _of_labels(images: Measured) -> Figures:
    known = images[images.probability.isfinite().nonzero()[:, 0].tolist()]
    found: Figures = {"accuracy": None, "confidence": None}
    if known.labels:
        for name, values in (("accuracy", known.correct), ("confidence", known.probability)):
            error = standard_errors.of_mean(values, known.labels, known.hashes)
            found[name] = figure(float(values.mean()), error, len(values))
    return found


def _within_classes(images: Measured, errors: bool) -> Figures:
    classes = [images[index] for index in standard_errors.indices_of(images.labels).values() if len(index) > 1]
    sizes = [len(one.labels) for one in classes]
    parts = [(one.features, frozenset(one.hashes)) for one in classes]
    found: Figures = {}
    for diversity in DIVERSITIES:
        value = mean_over_classes(diversity.score, images.features, images.labels)
        one = figure(value, diversity.error(parts) if errors else None, sum(sizes))
        found[diversity.name] = one and one | {"per_class": [min(sizes), max(sizes)]}
    return found
