"""What a protocol measures against: read from a file of statistics or made of images, and saved as such a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from guidegen.errors import UsageError
from guidegen.evaluate import arrays
from guidegen.evaluate.distances import FrechetDistance
from guidegen.evaluate.features import Pixels, iterate
from guidegen.evaluate.moments import Sums
from guidegen.evaluate.neighbourhoods import Neighbourhoods, squared_distances_fp16
from guidegen.evaluate.protocols import Protocol, Target, check_kind
from guidegen.evaluate.published import PublishedReader
from guidegen.evaluate.reference import fit, open_source
from guidegen.evaluate.scores import ClipDistance
from guidegen.evaluate.statistics import Statistics, read_statistics, write_statistics
from guidegen.spec.cell import digest


def read_target(
    path: Path,
    protocol: Protocol,
    readers: Sequence[PublishedReader],
    size: tuple[int, int],
    resize: str | None,
    batch: int,
    on_image: Callable[[int], None],
) -> Target:
    """The reference of a protocol: all of its images, whatever their labels, each resized by the protocol alone.

    Args:
        path: a file of statistics, or images of any kind.
        protocol: how to measure.
        readers: its networks.
        size: (height, width) of the images that are measured.
        resize: brings its images to that size first; None leaves them as they are.
        batch: images at once.
        on_image: called with the number of images that were read.

    Raises:
        UsageError: a file of another kind, images of several sizes where the protocol takes one, or too few.
    """
    found = read_statistics(path)
    check_kind(protocol, path, found, False)
    if found is not None:
        _check_networks(found, readers)
    pool = _saved_pool(found) if protocol.neighbours else None
    sums: Mapping[str, Sums] = {}
    kept, seen, sizes = pool, "", frozenset[tuple[int, int]]()
    if found is None or (protocol.neighbours and pool is None):
        sums, kept, seen, sizes = _read_images(path, protocol, readers, size, resize, batch, on_image)
    moments = found.moments if found else {name: one.moments() for name, one in sums.items()}
    distances = {layer: FrechetDistance(moments[layer]) for layer in protocol.layers if layer in moments}
    identity = found.identity if found else digest(seen, *(reader.identity for reader in readers))
    count = min((one.count for one in moments.values() if one.count), default=None)
    return Target(
        path.name,
        identity,
        distances,
        f"of the file ({', '.join(moments)})" if found else f"of its {count} images" if count else "none",
        count,
        Neighbourhoods(kept, squared_distances_fp16) if protocol.neighbours and kept is not None else None,
        len(kept) if kept is not None else 0,
        ClipDistance(kept) if "clip" in protocol.networks and kept is not None else None,
        moments,
        sizes,
    )


def needs_images(path: Path, protocol: Protocol) -> bool:
    """Whether `read_target` reads images of a reference, and not only its statistics."""
    found = read_statistics(path)
    return found is None or (protocol.neighbours and _saved_pool(found) is None)


def _check_networks(found: Statistics, readers: Sequence[PublishedReader]) -> None:
    """Refuses statistics that guidegen made with other weights or another preprocessing."""
    for reader in readers:
        weights, preprocessing = found.networks.get(reader.name, (reader.weights, reader.preprocessing))
        if (weights, preprocessing) != (reader.weights, reader.preprocessing):
            raise UsageError(
                f"--reference {found.path} was made with {reader.name} {str(weights)[:8]}, {preprocessing}, and this is "
                f"{str(reader.weights)[:8]}, {reader.preprocessing}: name the protocol and weights that made it."
            )


def save_target(
    path: Path,
    target: Target,
    protocol: Protocol,
    readers: Sequence[PublishedReader],
    reference: Path,
    size: tuple[int, int],
    resize: str | None,
) -> None:
    """Writes the statistics of a target as other tools read them: .pkl as EDM2, .npz as the others.

    Args:
        path: of the file.
        target: what `read_target` made of `reference`.
        protocol, readers, size, resize: as `read_target` took them.
        reference: whose images go into the file where precision and recall need them.

    Raises:
        UsageError: a .pkl of another protocol than edm2, or there are no statistics.
    """
    if (path.suffix == ".pkl") != (protocol.name == "edm2") or not target.moments:
        raise UsageError(f"--save-reference {path}: --protocol edm2 saves a .pkl, the others of mu and sigma an .npz.")
    networks = {reader.name: (reader.weights, reader.preprocessing) for reader in readers}
    about = {"protocol": protocol.name, "source": target.source, "networks": networks}
    if target.neighbourhoods is None:
        write_statistics(path, target.moments, about)
        return
    images = (_fitted(image, size, resize) for image, _ in open_source(reference, {}).images(None))
    write_statistics(path, target.moments, about, target.neighbourhoods.reference.numpy(), images)


def _fitted(image: Pixels, size: tuple[int, int], resize: str | None) -> Pixels:
    return image if resize is None else fit(image, size, resize)


def _saved_pool(found: Statistics | None) -> Tensor | None:
    if found is None or found.kind != "npz":
        return None
    with arrays.opened(found.path, f"--reference {found.path}", UsageError) as archive:
        return torch.from_numpy(arrays.read(archive, "pool").copy()) if "pool" in arrays.names(archive) else None


def _read_images(
    path: Path,
    protocol: Protocol,
    readers: Sequence[PublishedReader],
    size: tuple[int, int],
    resize: str | None,
    batch: int,
    on_image: Callable[[int], None],
) -> tuple[Mapping[str, Sums], Tensor | None, str, frozenset[tuple[int, int]]]:
    """Sums by layer; features for the neighbours and for CMMD; a hash of the images; their sizes."""
    source, seen = open_source(path, {}), hashlib.sha256()
    sums: dict[str, Sums] = {}
    kept: list[Tensor] = []
    sizes: set[tuple[int, int]] = set()
    images = ((_fitted(image, size, resize), label) for image, label in source.images(None))
    for pixels, labels in iterate(images, batch):
        seen.update(pixels.tobytes())
        sizes.add(pixels.shape[1:3])
        if len(sizes) > 1 and not protocol.any_size:
            found = " and of ".join(f"{wide}x{high}" for high, wide in sorted(sizes))
            raise UsageError(
                f"--reference {source.name} has images of {found}, and --protocol {protocol.name} takes one size: give "
                "--resize with a filter to bring them to the run's."
            )
        for reader in readers:
            made = torch.from_numpy(reader(pixels))
            if not made.isfinite().all():
                raise UsageError(f"--reference {source.name}: what {reader.name} makes of its images is not finite.")
            for name, columns in reader.layers.items():
                if name in protocol.layers:
                    part = made[:, columns]
                    sums.setdefault(name, Sums(part.shape[1], part[0].double())).update(part)
            if protocol.neighbours or "clip" in protocol.networks:
                kept.append(made[:, next(iter(reader.layers.values()))])
        on_image(len(labels))
    count = next((one.count for one in sums.values()), sum(map(len, kept)))
    if count < protocol.fewest:
        raise UsageError(f"--reference {source.name} has {count} images, and the metrics need {protocol.fewest} at least.")
    return sums, torch.cat(kept) if kept else None, seen.hexdigest(), frozenset(sizes)
