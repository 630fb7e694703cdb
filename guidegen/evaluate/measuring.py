"""Images against a reference: one row of metrics for each w and each other axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from guidegen.errors import UsageError
from guidegen.evaluate import protocols, scores
from guidegen.evaluate.cache import FeatureCache
from guidegen.evaluate.features import EvaluationClassifier, Pixels, Reader, read_rows_with
from guidegen.evaluate.measure import Drawn, images_digest
from guidegen.evaluate.metrics import Figures, Measured, Meter, figure
from guidegen.evaluate.neighbourhoods import MIN_IMAGES
from guidegen.evaluate.published import PublishedReader
from guidegen.evaluate.reference import Reference, open_source, read_reference, saved_reference, subject_of
from guidegen.evaluate.standard_errors import indices_of
from guidegen.runs.schema import Row
from guidegen.spec.axes import describe
from guidegen.spec.shard import Shard

OnImage = Callable[[int], None]


def open_reference(
    path: Path,
    wanted: Collection[Any] | None,
    names: Mapping[int, str],
    size: tuple[int, int],
    resize: str | None,
    reader: Reader,
    correct: Callable[[Pixels, list[Any]], list[bool]] | None,
    batch: int,
    on_image: OnImage,
    only_labelled: bool = False,
) -> Reference:
    """What `--reference` names: saved features, or those of its images.

    Args:
        path: of it.
        wanted: labels to keep; None keeps all.
        names: label id -> name, which its labels may be instead of ids.
        size, resize, reader, correct, batch, on_image: as `read_reference` takes them.
        only_labelled: refuses images without labels.

    Raises:
        UsageError: as `saved_reference` and `read_reference`, or fewer than `MIN_IMAGES` images.
    """
    reference = saved_reference(path, reader, wanted, size)
    if reference is None:
        source = open_source(path, {name.casefold(): label for label, name in names.items() if name})
        if only_labelled and not source.labelled:
            raise UsageError(f"--reference-labels: {path} has no labels.")
        reference = read_reference(source, wanted, size, resize, reader, correct, batch, on_image)
    if len(reference.features) < MIN_IMAGES:
        raise UsageError(
            f"--reference {reference.source} has {len(reference.features)} images, and the metrics need {MIN_IMAGES} "
            "at least."
        )
    return reference


def read_features(
    drawn: Drawn, readers: Sequence[Reader], batch: int, on_image: OnImage, shard: Shard | None = None
) -> list[FeatureCache]:
    """What each network makes of the images, or of those of one shard, kept in the run.

    Args:
        drawn: the images.
        readers: the networks.
        batch: images read at once.
        on_image: called with the number of images that were read.
        shard: which of them; None for all.
    """
    rows = drawn.rows[shard.index :: shard.count] if shard else drawn.rows
    caches = [FeatureCache(drawn.features, reader.identity) for reader in readers]
    for reader, cache in zip(readers, caches, strict=True):
        read_rows_with(reader, cache, rows, batch, on_image, drawn.read)
    return caches


def _groups(drawn: Drawn, fewest: int = MIN_IMAGES) -> Iterator[tuple[tuple[Any, ...], Sequence[Row]]]:
    groups = drawn.groups()
    for key, rows in groups.items():
        if len(rows) < fewest:
            where = f" at {describe(drawn.axes, key)}" if key else ""
            raise UsageError(
                f"{drawn.folder} has {len(rows)} images{where}, and the metrics need {fewest} at least: "
                "draw more seeds or labels."
            )
    yield from groups.items()


def measure_run(
    drawn: Drawn,
    reader: Reader,
    reference: Reference,
    meter: Meter,
    classifier: EvaluationClassifier | None,
    splits: int,
    batch: int,
    on_image: OnImage,
) -> list[dict[str, Any]]:
    """Rows of metrics, one for each group of the run, in the order of w.

    Args:
        drawn: the run.
        reader: makes the features.
        reference: what to measure against.
        meter: made of the reference.
        classifier: None leaves out accuracy and confidence.
        splits: random splits for the standard errors of distances and recall; 0: no standard errors.
        batch: images read at once.
        on_image: called with the number of images that were read.

    Raises:
        UsageError: a group of fewer than `MIN_IMAGES` images.
    """
    groups = list(_groups(drawn))
    (features,) = read_features(drawn, [reader], batch, on_image)
    logits = read_features(drawn, [classifier.reader], batch, on_image)[0] if classifier else None
    found = []
    for key, rows in groups:
        files, labels = _files(rows)
        probability = correct = torch.full((len(rows),), torch.nan)
        if classifier is not None and logits is not None:
            probability, correct = classifier.read(logits.stored(files)[:], labels)
        hashes = features.pixels(files)
        figures = meter.measure(Measured(features.stored(files), hashes, labels, probability, correct), splits)
        about = {
            "features": _about(reader) | {"width": meter.width, "inception": reader.inception},
            "judge": classifier and _about(classifier.reader) | {"accuracy_on_reference": reference.accuracy},
            "reference": {"source": reference.source, "images": meter.count, "sha256": reference.identity},
        }
        found.append(_row(drawn, key, files, labels, hashes, figures, splits) | about)
    return found


def measure_protocol(
    drawn: Drawn,
    protocol: protocols.Protocol,
    readers: Sequence[PublishedReader],
    target: protocols.Target,
    splits: int,
    batch: int,
    on_image: OnImage,
    extrapolate: bool = False,
) -> list[dict[str, Any]]:
    """Rows of a protocol's metrics, one for each group of the run, in the order of w.

    Args:
        drawn: the images.
        protocol: how to measure.
        readers: the protocol's networks.
        target: what to measure against.
        splits: 0: no standard errors.
        batch: images read at once.
        on_image: called with the number of images that were read.
        extrapolate: also the Fréchet distances at infinitely many images.

    Raises:
        UsageError: a group of fewer images than the protocol can measure.
    """
    groups = list(_groups(drawn, protocol.fewest))
    caches = read_features(drawn, readers, batch, on_image)
    found = []
    for key, rows in groups:
        files, labels = _files(rows)
        stored = [cache.stored(files) for cache in caches]
        figures = protocols.measure_group(protocol, target, readers, stored, labels, splits, drawn.in_order)
        if extrapolate:
            layers = protocols.layers_of(readers, stored)
            for layer, distance in target.distances.items():
                value, error = scores.extrapolated(distance, layers[layer], labels, splits > 0) or (None, None)
                figures[f"{protocols.LAYER_METRICS[layer]}_extrapolated"] = figure(value, error, len(rows))
        hashes = caches[0].pixels(files)
        width, first = stored[0].shape[1], readers[0]
        about = {
            "features": _about(first) | {"width": width, "inception": first.inception},
            "judge": None,
            "reference": {"source": target.source, "images": target.count or target.images, "sha256": target.identity},
            "protocol": protocols.about(protocol, target, readers)
            | {"images": len(rows), "rounding": drawn.rounding, "order": "as they come" if drawn.in_order else "shuffled"},
        }
        found.append(_row(drawn, key, files, labels, hashes, figures, splits) | about)
    return found


def per_class(drawn: Drawn, caches: Sequence[FeatureCache], meter: Meter) -> list[dict[str, Any]]:
    """Distances within and to the reference for each label of each group: of few images, so only between equal numbers.

    Args:
        drawn: the run.
        caches: of the features, one.
        meter: made of the reference.
    """
    found = []
    for key, rows in _groups(drawn):
        files, labels = _files(rows)
        of_label = indices_of(labels)
        of_label.pop(None, None)
        for label, indices in sorted(of_label.items(), key=lambda item: str(item[0])):
            mine = [files[i] for i in indices]
            nan = torch.full((len(mine),), torch.nan)
            images = Measured(caches[0].stored(mine), caches[0].pixels(mine), [label] * len(mine), nan, nan)
            figures = meter.measure(images, 0)
            found.append(dict(zip(drawn.axes, key, strict=True)) | {"label": label, "images": len(mine), "metrics": figures})
    return found


def _row(
    drawn: Drawn,
    key: Sequence[Any],
    files: Sequence[str],
    labels: Sequence[Any],
    hashes: Sequence[bytes],
    figures: Figures,
    splits: int,
) -> dict[str, Any]:
    return {
        "mode": drawn.mode,
        **dict(zip(drawn.axes, key, strict=True)),
        "images": len(files),
        "labels": drawn.label_sampling(labels),
        "distinct": len(set(hashes)),
        "metrics": figures,
        "spread": "standard error over images, the reference held fixed" if splits else None,
        "images_sha256": images_digest(files),
    }


def _about(reader: Reader) -> dict[str, Any]:
    return {"name": reader.name, "sha256": reader.weights}


def _files(rows: Sequence[Row]) -> tuple[list[str], list[Any]]:
    """The sha256 of each image and what it should show."""
    both = [(row["sha256"], subject_of(row)) for row in rows]
    return [file for file, _ in both], [label for _, label in both]
