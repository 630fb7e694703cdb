"""Metrics of the images of one setting, and of the same without each group of seeds in turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guidegen.errors import UsageError
from guidegen.evaluate.cache import FeatureCache, Features
from guidegen.evaluate.distances import FrechetDistance, KernelDistance
from guidegen.evaluate.diversity import DIVERSITIES, mean_over_classes
from guidegen.evaluate.features import (
    EvaluationClassifier,
    Pixels,
    Reader,
    bundled_size,
    open_evaluation_classifier,
    open_features,
    read_rows_with,
)
from guidegen.evaluate.measuring import open_reference
from guidegen.evaluate.metrics import METRICS
from guidegen.evaluate.neighbourhoods import Neighbourhoods
from guidegen.evaluate.reference import Reference, subject_of
from guidegen.models.weight_files import Access
from guidegen.runs.images import read_drawn
from guidegen.runs.schema import Row
from guidegen.spec.axes import describe
from guidegen.tune.model import jackknife_error
from guidegen.tune.rounds import Evaluation
from guidegen.tune.space import Setting

CALLS = "nfe"
"""The metric that is the cost: network calls behind an image."""
BETTER = {metric.name: metric.better for metric in METRICS} | {CALLS: -1}
"""Metric -> +1 where more is better, -1 where less is."""
_OF_REFERENCE = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
_OF_CLASSIFIER = ("accuracy", "confidence")
_GROUPS = 24
_BATCH = 64
_BY_SEED = 12
"""From so many seeds on, a group is of whole seeds, whose images share their noise across labels."""
_LEAST_IMAGES = 2 * _GROUPS


@dataclass(frozen=True)
class _Images:
    """Images of one setting; `features` are empty where no metric reads them, `found` NaN where a label is not known."""

    features: Tensor
    labels: list[Any]
    calls: Tensor
    probability: Tensor
    correct: Tensor

    def __getitem__(self, index: Tensor) -> _Images:
        labels = [self.labels[i] for i in index.tolist()]
        return _Images(self.features[index], labels, self.calls[index], self.probability[index], self.correct[index])


class Measurer:
    """Measures settings by some metrics.

    Args:
        folder: the run directory.
        metrics: their names.
        reader: makes the features; None where no metric reads them.
        reference: what to measure against; None likewise.
        classifier: of accuracy and confidence; None where neither is asked for.
        on_note: called with what is to be known of a setting.
    """

    def __init__(
        self,
        folder: Path,
        metrics: Collection[str],
        reader: Reader | None,
        reference: Reference | None,
        classifier: EvaluationClassifier | None,
        on_note: Callable[[str], None],
    ):
        self._folder, self._reader, self._classifier, self._on_note = folder, reader, classifier, on_note
        self._metrics: dict[str, Callable[[_Images], float]] = {name: _PLAIN[name] for name in metrics if name in _PLAIN}
        if reference is not None:
            against = _against(reference.features, metrics)
            self._metrics |= {name: against[name] for name in metrics if name in against}
        self._metrics = {name: self._metrics[name] for name in metrics}
        self.width = 0 if reference is None else reference.features.shape[1]
        """Of the features that are compared with a reference."""

    def __call__(self, setting: Setting, axes: Sequence[str], seeds: int, rows: Sequence[Row]) -> Evaluation:
        """The metrics of a setting's images, in the order of their seeds.

        Raises:
            UsageError: images that are not finite, or a metric that cannot be measured.
            CorruptImageError: one is not the image that was drawn.
        """
        bad = sum(row["status"] != "ok" for row in rows)
        if bad:
            raise UsageError(
                f"At {describe(axes, setting)} {bad} of {len(rows)} images came out non-finite, and settings are compared "
                "at equal numbers of images: narrow the range, or try --dtype fp32."
            )
        images = self._read(setting, axes, rows)
        without = [torch.from_numpy(np.flatnonzero(~group)) for group in _groups(rows, seeds)]
        values = {name: metric(images) for name, metric in self._metrics.items()}
        replicates = {name: [metric(images[index]) for index in without] for name, metric in self._metrics.items()}
        if lacks := [name for name, value in values.items() if not np.isfinite([value, *replicates[name]]).all()]:
            raise UsageError(f"{lacks[0]} cannot be measured at {describe(axes, setting)}, of {len(rows)} images.")
        errors = {name: jackknife_error(np.array(some)) for name, some in replicates.items()}
        if "accuracy" in errors:
            errors["accuracy"] = max(errors["accuracy"], _least_error(values["accuracy"], len(rows)))
        return Evaluation(setting, seeds, len(rows), values, errors, replicates)

    def _read(self, setting: Setting, axes: Sequence[str], rows: Sequence[Row]) -> _Images:
        labels, nan = [subject_of(row) for row in rows], torch.full((len(rows),), torch.nan)
        features, probability, correct = torch.zeros(len(rows), 0), nan, nan
        if self._reader is not None:
            features, pixels = self._outputs(self._reader, rows)
            distinct = len(set(pixels))
            if distinct < len(rows):
                self._on_note(
                    f"warning: at {describe(axes, setting)} only {distinct} of {len(rows)} images differ: distances, recall "
                    "and coverage come out worse there than of as many different images"
                )
        if self._classifier is not None:
            logits, _ = self._outputs(self._classifier.reader, rows)
            probability, correct = self._classifier.read(logits, labels)
        return _Images(features, labels, torch.tensor([float(row["nfe"]) for row in rows]), probability, correct)

    def _outputs(self, reader: Reader, rows: Sequence[Row]) -> tuple[Tensor, list[bytes]]:
        """What a network makes of images (N, D), and a hash of the pixels of each."""

        def read(some: Sequence[Row]) -> Iterator[Pixels]:
            return (np.asarray(read_drawn(self._folder, row).convert("RGB")) for row in some)

        cache, files = FeatureCache(self._folder / "features", reader.identity), [row["sha256"] for row in rows]
        read_rows_with(reader, cache, rows, _BATCH, lambda _: None, read)
        return cache.stored(files)[:], cache.pixels(files)


def least_seeds(metrics: Collection[str], per_seed: int) -> int:
    """The fewest seeds that can be measured: images for all groups, and of each label still two without one of them."""
    within = 4 if {"vendi_score", "pairwise_distance"} & set(metrics) else 1
    return max(within, -(-_LEAST_IMAGES // per_seed))


def needs_features(metrics: Collection[str]) -> bool:
    """Whether any of the metrics is of features."""
    return any(name not in (*_OF_CLASSIFIER, CALLS) for name in metrics)


def needs_reference(metrics: Collection[str]) -> bool:
    """Whether any of the metrics compares with real images."""
    return any(name in _OF_REFERENCE for name in metrics)


def needs_classifier(metrics: Collection[str]) -> bool:
    """Whether any of the metrics is of the evaluation classifier."""
    return any(name in _OF_CLASSIFIER for name in metrics)


def _against(reference: Tensor, metrics: Collection[str]) -> dict[str, Callable[[_Images], float]]:
    """The metrics that compare with the features of a reference."""
    found: dict[str, Callable[[_Images], float]] = {}
    if "frechet_distance" in metrics:
        frechet = FrechetDistance(reference)
        found["frechet_distance"] = lambda images: frechet.of_few(images.features)
    if "kernel_distance" in metrics:
        kernel = KernelDistance(reference)
        found["kernel_distance"] = lambda images: kernel(images.features)
    names = {"precision", "recall", "density", "coverage"} & set(metrics)
    if names:
        neighbourhoods = Neighbourhoods(reference)
        found |= {name: partial(lambda name, images: neighbourhoods(images.features)[name], name) for name in names}
    return found


def _least_error(share: float, images: int) -> float:
    """Of a share that may be 0 or 1, which says little of few images: half of Agresti & Coull's (1998)."""
    centre = (share * images + 2) / (images + 4)
    return 0.5 * float(np.sqrt(centre * (1 - centre) / (images + 4)))


def _mean_known(values: Tensor) -> float:
    return float(values[values.isfinite()].double().mean())


def _within(score: Callable[[Features], float]) -> Callable[[_Images], float]:
    def measure(images: _Images) -> float:
        found = mean_over_classes(score, images.features, images.labels)
        return float("nan") if found is None else found

    return measure


_PLAIN: Mapping[str, Callable[[_Images], float]] = {
    "accuracy": lambda images: _mean_known(images.correct),
    "confidence": lambda images: _mean_known(images.probability),
    **{diversity.name: _within(diversity.score) for diversity in DIVERSITIES},
    CALLS: lambda images: float(images.calls.double().mean()),
}


def _groups(rows: Sequence[Row], seeds: int) -> list[Any]:
    """Masks (n,) of the groups that are left out, the same at every setting: of whole seeds where there are enough."""
    index = np.arange(len(rows))
    seed, subject = index % seeds, index // seeds  # cells come subject by subject
    groups = min(_GROUPS, seeds) if seeds >= _BY_SEED else min(_GROUPS, len(rows))
    group = seed % groups if seeds >= _BY_SEED else (seed + subject) % groups
    return [mask for i in range(groups) if (mask := group == i).any()]


@dataclass(frozen=True)
class Networks:
    """What measures.

    Attributes:
        features: `bundled`, or as `--features` names them.
        judge: the evaluation classifier likewise.
        device: where to.
        access: how weights may be read.
    """

    features: str
    judge: str
    device: torch.device
    access: Access


@dataclass(frozen=True)
class Opened:
    """Networks and reference, as far as the metrics need them."""

    reader: Reader | None
    reference: Reference | None
    classifier: EvaluationClassifier | None

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers depend on beside the images."""
        return {
            "features": self.reader and self.reader.identity[:16],
            "judge": self.classifier and self.classifier.reader.identity[:16],
            "reference": self.reference and f"{self.reference.source} {self.reference.identity[:16]}",
        }

    def measurer(self, folder: Path, metrics: Collection[str], on_note: Callable[[str], None]) -> Measurer:
        """What measures the run's images; `on_note` as `Measurer` has it."""
        return Measurer(folder, metrics, self.reader, self.reference, self.classifier, on_note)

    def notes(self, metrics: Collection[str], guided: Collection[str]) -> list[str]:
        """What makes the metrics wrong: a reference that is small, networks (their sha256 are given) that guided."""
        found = []
        if self.reference is not None:
            count, width = self.reference.features.shape
            if count <= width and "frechet_distance" in metrics:
                found.append(
                    f"warning: {count} reference images are too few for a covariance of {width} features: the Fréchet "
                    "distance is too large, not by the same at all settings, so that another may look best. Give more."
                )
        if self.classifier is not None and self.classifier.reader.weights in guided:
            found.append(
                "warning: the evaluation classifier also guides, so that accuracy and confidence reward that: name another "
                "one with --judge ID|DIR"
            )
        if self.reader is not None and self.reader.weights in guided:
            found.append("warning: the features are those of the classifier that guides; see --features")
        return found


def open_networks(
    metrics: Collection[str],
    networks: Networks,
    size: tuple[int, int],
    names: Mapping[int, str],
    subjects: Collection[Any] | None,
    reference: Path | None,
    resize: str | None,
) -> Opened:
    """Opens what the metrics need.

    Args:
        metrics: their names.
        networks: that are asked for.
        size: (height, width) of the images.
        names: label id -> name, of what is drawn.
        subjects: labels or prompts of the reference to keep; None for all.
        reference: real images.
        resize: filter for a reference of another size.

    Raises:
        UsageError: a metric that cannot be measured with these.
        CheckpointError: a network that cannot be opened.
    """
    reader = found = classifier = None
    if needs_features(metrics):
        reader = open_features(networks.features, networks.device, networks.access)
        reader.check_size(size)
    if needs_classifier(metrics):
        can_read = networks.judge != "bundled" or size == bundled_size()
        if names and can_read:
            classifier = open_evaluation_classifier(networks.judge, names, networks.device, networks.access)
        if classifier is None:
            raise UsageError(
                "accuracy and confidence need an evaluation classifier that knows these labels: --judge ID|DIR."
            )
    if reader is not None and needs_reference(metrics) and reference is not None:
        wanted = set(subjects) if subjects else None
        found = open_reference(reference, wanted, names, size, resize, reader, None, _BATCH, lambda _: None)
    return Opened(reader, found, classifier)
