"""Published ways to measure, by name: which network, which preprocessing, which reference, which numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from guidegen.errors import UsageError
from guidegen.evaluate import scores
from guidegen.evaluate.cache import Stored
from guidegen.evaluate.distances import FrechetDistance
from guidegen.evaluate.metrics import Figures, figure
from guidegen.evaluate.moments import Moments
from guidegen.evaluate.neighbourhoods import MIN_IMAGES, Neighbourhoods, subsamples
from guidegen.evaluate.published import PublishedReader, open_clip, open_dinov2, open_inception
from guidegen.evaluate.statistics import Statistics
from guidegen.models.weight_files import Access


@dataclass(frozen=True)
class Protocol:
    """A published way to measure.

    Attributes:
        name: of `--protocol`.
        about: whose numbers these are.
        networks: inception, dinov2, clip.
        resizing: of what Inception reads, a key of `published.RESIZING`.
        required: layers that a file of statistics must have.
        layers: those that a Fréchet distance is of.
        score: images of each split of the Inception Score; 0: ten splits of shuffled images; None: no score.
        neighbours: whether precision and recall are of it, which need the images of the reference.
        made_with: the tools whose reference files fit.
        any_size: whether its images may be of several sizes.
        fewest: images that it can measure.
    """

    name: str
    about: str
    networks: tuple[str, ...] = ("inception",)
    resizing: str = "tensorflow"
    required: tuple[str, ...] = ("pool",)
    layers: tuple[str, ...] = ("pool",)
    score: int | None = None
    neighbours: bool = False
    made_with: str = ""
    any_size: bool = False
    fewest: int = MIN_IMAGES


PROTOCOLS = {
    one.name: one
    for one in (
        Protocol(
            "adm",
            "guided-diffusion's suite (Dhariwal & Nichol 2021)",
            required=("pool", "spatial"),
            layers=("pool", "spatial"),
            score=5000,
            neighbours=True,
            made_with="VIRTUAL_*.npz of guided-diffusion",
        ),
        Protocol(
            "edm2",
            "calculate_metrics.py of EDM2 (Karras et al. 2024)",
            networks=("inception", "dinov2"),
            layers=("pool", "dinov2"),
            made_with=".pkl of EDM2, or .npz of EDM",
        ),
        Protocol("fidelity", "torch-fidelity", score=0, made_with="mu and sigma, such as those of *_in256_stats.npz"),
        Protocol("pytorch-fid", "pytorch-fid", resizing="pytorch-fid", made_with="mu and sigma of pytorch-fid"),
        Protocol(
            "clean-fid",
            "clean-fid, mode clean (Parmar et al. 2022)",
            resizing="clean-fid",
            made_with="mu and sigma of clean-fid",
            any_size=True,
        ),
        Protocol(
            "cmmd",
            "CMMD (Jayasumana et al. 2024)",
            networks=("clip",),
            required=(),
            layers=(),
            made_with="images",
            any_size=True,
            fewest=2,
        ),
    )
}

LAYER_METRICS = {"pool": "frechet_distance", "spatial": "spatial_frechet_distance", "dinov2": "dinov2_frechet_distance"}


def open_networks(
    protocol: Protocol, inception: Path | None, vit: str | None, device: torch.device, access: Access
) -> list[PublishedReader]:
    """The networks of a protocol.

    Args:
        protocol: which.
        inception: file of Inception's weights; None for the published ones.
        vit: DINOv2 or CLIP, a folder or hub id; None for the published ones.
        device: to load them to.
        access: how weights may be read.

    Raises:
        CheckpointError, UsageError, UnsafeError: as the networks are opened.
    """
    opened: dict[str, Callable[[], PublishedReader]] = {
        "inception": lambda: open_inception(inception, device, access, protocol.resizing, "spatial" in protocol.layers),
        "dinov2": lambda: open_dinov2(vit, device, access),
        "clip": lambda: open_clip(vit, device, access),
    }
    return [opened[name]() for name in protocol.networks]


@dataclass(frozen=True)
class Target:
    """What a protocol measures against.

    Attributes:
        source: a name for it.
        identity: of the file or of the images, and of the networks for these.
        distances: by layer.
        statistics: where the moments are from.
        count: images that the moments are of; None where the file does not say.
        neighbourhoods: of the reference's images; None without.
        images: how many those are.
        clip: the distance of CLIP's features; None elsewhere.
        sizes: (height, width) of the images that were read; none of a file of statistics.
    """

    source: str
    identity: str
    distances: Mapping[str, FrechetDistance]
    statistics: str
    count: int | None
    neighbourhoods: Neighbourhoods | None = None
    images: int = 0
    clip: scores.ClipDistance | None = None
    moments: Mapping[str, Moments] = field(default_factory=dict)
    sizes: frozenset[tuple[int, int]] = frozenset()


def check_kind(protocol: Protocol | None, path: Path, found: Statistics | None, inception: bool) -> None:
    """Refuses a reference that the numbers are not to be measured against.

    Args:
        protocol: None for the free form.
        path: of the reference.
        found: its statistics, where it has some.
        inception: of the free form, whether its features are Inception's.

    Raises:
        UsageError: with the flag that is right for it.
    """
    where = f"--reference {path}"
    if protocol is None:
        if found is None or (found.has_images and found.kind == "npz" and not inception):
            return
        if found.kind == "pkl":
            raise UsageError(f"{where} has statistics of EDM2: --protocol edm2 measures against them.")
        if "spatial" in found.moments:
            raise UsageError(f"{where} has statistics of a whole data set: --protocol adm measures against them.")
        raise UsageError(
            f"{where} has mu and sigma{', which would go unused' if found.has_images else ' alone'}: --protocol fidelity "
            "measures against them, or pytorch-fid, clean-fid or edm2, whichever made the file."
        )
    if found is None:
        return
    right = "edm2" if found.kind == "pkl" else "adm" if "spatial" in found.moments else "fidelity"
    if missing := [layer for layer in protocol.required if layer not in found.moments] or (
        [""] if not protocol.layers else []
    ):
        what = {"spatial": "no mu_s and sigma_s", "pool": "no statistics of Inception"}.get(missing[0], "statistics alone")
        raise UsageError(
            f"{where} has {what}, and --protocol {protocol.name} needs {protocol.made_with}: --protocol {right}."
        )
    if found.kind == "pkl" and protocol.name != "edm2":
        raise UsageError(f"{where} has statistics of EDM2: --protocol edm2 measures against them.")
    if protocol.neighbours and not found.has_images:
        raise UsageError(
            f"{where} has no images (arr_0), which precision and recall are measured against: --protocol fidelity."
        )


def measure_group(
    protocol: Protocol,
    target: Target,
    readers: Sequence[PublishedReader],
    features: Sequence[Stored],
    labels: Sequence[Any],
    splits: int,
    in_order: bool,
) -> Figures:
    """The figures of some images.

    Args:
        protocol: which figures.
        target: what to measure against.
        readers: the protocol's networks.
        features: (N, D) of each network.
        labels: of the images.
        splits: for the standard errors; 0: none.
        in_order: whether the splits of the Inception Score are of the images as they come; else they are shuffled first.
    """
    found: Figures = {}
    layers = layers_of(readers, features)
    count = len(labels)
    for layer, distance in target.distances.items():
        value, error = distance.measure(layers[layer], labels, splits)
        found[LAYER_METRICS[layer]] = figure(value, error, count)
    if protocol.score is not None:
        head = readers[0].head
        assert head is not None
        value, error = scores.inception_score(layers["pool"], head, protocol.score, not in_order)
        found["class_score"] = figure(value, error if splits else None, count)
    if target.neighbourhoods is not None:
        measured = target.neighbourhoods.measure(layers["pool"], labels, subsamples(labels, splits))
        found |= {name: figure(*measured[name], count) for name in ("precision", "recall")}
    if target.clip is not None:
        value, error = target.clip.measure(layers["clip"], labels, splits)
        found["clip_distance"] = figure(value, error, count)
    return found


def layers_of(readers: Sequence[PublishedReader], features: Sequence[Stored]) -> dict[str, Stored]:
    """The features of each layer, of all networks."""
    return {
        name: made.layer(columns)
        for reader, made in zip(readers, features, strict=True)
        for name, columns in reader.layers.items()
    }


def about(protocol: Protocol, target: Target, readers: Sequence[PublishedReader]) -> dict[str, Any]:
    """What a row says of how it was measured."""
    return {
        "name": protocol.name,
        "as": protocol.about,
        "networks": [
            {"name": one.name, "sha256": one.weights, "published": one.inception, "preprocessing": one.preprocessing}
            for one in readers
        ],
        "statistics": target.statistics,
        "statistics_images": target.count,
        "neighbour_images": target.images or None,
    }
