"""Real images to measure against: a folder, an .npz, a .parquet, another run, or saved features of one of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guidegen.errors import UsageError, first_line
from guidegen.evaluate import arrays
from guidegen.evaluate.features import Pixels, Reader, iterate, read_image
from guidegen.runs.files import write_atomically
from guidegen.runs.images import decode, read_drawn
from guidegen.runs.manifest import read_rows
from guidegen.runs.schema import Row
from guidegen.schema import LARGEST_TEXT
from guidegen.schema import decode as decode_json
from guidegen.spec.cell import digest

FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_DIGITS = 19  # of a label
Labelled = Iterator[tuple[Pixels, Any]]


@dataclass(frozen=True)
class Reference:
    """Features of real images.

    Attributes:
        source: a name for them, and how they were resized.
        identity: of the images and of the network that read them.
        features: fp32 (M, D).
        labels: the labels that were kept; None where the source has none, or all were kept.
        accuracy: of the evaluation classifier on them; None without labels or without a classifier.
    """

    source: str
    identity: str
    features: Tensor
    labels: list[Any] | None
    accuracy: float | None = None


@dataclass(frozen=True)
class Source:
    """Images on disk, not read yet.

    Attributes:
        name: to show.
        labelled: whether its images have labels.
        count: how many there are, of all labels.
        images: yields uint8 (H, W, 3) and the label, None where it has none, of those with the given labels.
    """

    name: str
    labelled: bool
    count: int
    images: Callable[[Collection[Any] | None], Labelled]


def open_source(path: Path, names: Mapping[str, int]) -> Source:
    """Opens a reference of any kind.

    Args:
        path: folder of images, .npz (`arr_0` uint8 NHWC and perhaps labels `arr_1`), .parquet (`image`
            encoded, perhaps `label`), or a run directory.
        names: label names of the run, lower case, which sub-folders may have.

    Raises:
        UsageError: it is none of these.
    """
    if path.is_dir():
        return _run_source(path) if (path / "run.json").is_file() else _folder_source(path, names)
    if not path.is_file():
        raise UsageError(f"--reference {path} is not a regular file.")
    if path.suffix == ".npz":
        return _npz_source(path)
    if path.suffix == ".parquet":
        return _parquet_source(path)
    raise UsageError(f"--reference {path}: give a folder of images, an .npz, a .parquet or a run directory.")


def read_reference(
    source: Source,
    wanted: Collection[Any] | None,
    size: tuple[int, int],
    resize: str | None,
    reader: Reader,
    correct: Callable[[Pixels, list[Any]], list[bool]] | None,
    batch: int,
    on_image: Callable[[int], None],
) -> Reference:
    """Features of the images of `source`, a batch in memory at a time.

    Args:
        source: of the images.
        wanted: labels to keep; None keeps all.
        size: (height, width) of the run's images.
        resize: Pillow filter for images of another size, after a centre crop to the run's proportions; None refuses them.
        reader: makes the features.
        correct: whether each image (B, H, W, 3) is classified as its label; None without an evaluation classifier.
        batch: images at once.
        on_image: called with the number of images that were read.

    Raises:
        UsageError: images of another size without `resize`, or none with these labels.
    """
    seen = hashlib.sha256()
    made, right = [], []
    images = ((fit(image, size, resize), label) for image, label in source.images(wanted if source.labelled else None))
    for pixels, labels in iterate(images, batch):
        seen.update(pixels.tobytes())
        made.append(torch.from_numpy(reader(pixels)))
        if not made[-1].isfinite().all():
            raise UsageError(f"--reference {source.name}: what {reader.name} makes of its images is not finite.")
        if correct is not None and source.labelled:
            right += correct(pixels, labels)
        on_image(len(labels))
    if not made:
        kept = f" with the labels {', '.join(map(str, list(wanted or ())[:5]))}" if source.labelled and wanted else ""
        raise UsageError(f"--reference {source.name} holds no images{kept}.")
    about = source.name + (f", resized with {resize}" if resize else "")
    identity = digest(seen.hexdigest(), reader.identity)
    labels_kept = sorted(wanted, key=str) if source.labelled and wanted is not None else None
    return Reference(about, identity, torch.cat(made), labels_kept, sum(right) / len(right) if right else None)


def subject_of(row: Row) -> Any:
    """What an image of a run should show: its label, else its prompt."""
    return row["prompt"] if row["label"] is None else row["label"]


def fit(image: Pixels, size: tuple[int, int], resize: str | None) -> Pixels:
    """`image` at (height, width) `size`, cropped at its centre to those proportions first.

    Raises:
        UsageError: it has another size and `resize` is None.
    """
    high, wide = image.shape[:2]
    if (high, wide) == size:
        return image
    if resize is None:
        raise UsageError(
            f"The reference has images of {wide}x{high} and the run of {size[1]}x{size[0]}. "
            f"Give --resize with a filter ({', '.join(FILTERS)}) to bring them to the run's size."
        )
    from PIL import Image

    scale = min(high / size[0], wide / size[1])
    down, across = size[0] * scale, size[1] * scale
    left, top = (wide - across) / 2, (high - down) / 2
    box = (left, top, left + across, top + down)
    small = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling[resize.upper()], box)
    return np.asarray(small)


def save_reference(path: Path, reference: Reference, reader: Reader, size: tuple[int, int]) -> None:
    """Features, and the `mu` and `sigma` that other tools read, as one .npz."""
    features = reference.features.numpy()
    about = {
        "reader": reader.identity,
        "reader_name": reader.name,
        "source": reference.source,
        "identity": reference.identity,
        "labels": reference.labels,
        "accuracy": reference.accuracy,
        "size": list(size),
    }
    buffer = io.BytesIO()
    wide = features.astype(np.float64)
    np.savez(
        buffer, features=features, mu=wide.mean(0), sigma=np.cov(wide, rowvar=False), guidegen=np.array(json.dumps(about))
    )
    write_atomically(path, buffer.getvalue())


@dataclass(frozen=True)
class _About:
    """What `save_reference` writes beside the features."""

    reader: str
    reader_name: str
    source: str
    identity: str
    size: tuple[int, int]
    labels: list[int | str] | None = None
    accuracy: float | None = None


def saved_reference(path: Path, reader: Reader, wanted: Collection[Any] | None, size: tuple[int, int]) -> Reference | None:
    """What `save_reference` wrote, or None if `path` is something else.

    Raises:
        UsageError: it was saved with other features, for other labels or another size, or is damaged.
        UnsafeError: it holds pickled objects.
    """
    if not is_saved(path):
        return None
    with _opened(path) as archive:
        about = decode_json(str(arrays.read(archive, "guidegen", LARGEST_TEXT)).encode(), _About, path, UsageError)
        features = arrays.read(archive, "features")
    if about.reader != reader.identity:
        raise UsageError(f"{path} holds features of {about.reader_name}, not these of {reader.name}: save it again.")
    if about.size != size:
        high, wide = about.size
        raise UsageError(f"{path} was saved for images of {wide}x{high}, and the run has {size[1]}x{size[0]}.")
    if about.labels is not None and wanted is not None and set(about.labels) != set(wanted):
        raise UsageError(
            f"{path} was saved for {len(about.labels)} labels, which are not the {len(wanted)} of the run: save it again, "
            "or use it as it is with --reference-labels all."
        )
    if features.ndim != 2 or features.dtype != np.float32 or not np.isfinite(features).all():
        raise UsageError(f"{path} holds no features (float32, two-dimensional and finite): save it again.")
    return Reference(about.source, about.identity, torch.from_numpy(features), about.labels, about.accuracy)


def first_image(path: Path) -> Pixels | None:
    """The first image of a reference; None where it holds features already.

    Raises:
        UsageError: it is nothing that can be measured against.
    """
    if is_saved(path):
        return None
    for image, _ in open_source(path, {}).images(None):
        return image
    raise UsageError(f"--reference {path} holds no images.")


def _opened(path: Path) -> AbstractContextManager[zipfile.ZipFile]:
    return arrays.opened(path, f"--reference {path}", UsageError)


def is_saved(path: Path) -> bool:
    """Whether `save_reference` wrote it."""
    if path.suffix != ".npz" or path.is_dir():
        return False
    with _opened(path) as archive:
        return {"features", "guidegen"} <= {*arrays.names(archive)}


def _folder_source(folder: Path, names: Mapping[str, int]) -> Source:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())
    if not paths:
        raise UsageError(f"--reference {folder}: there are no images in that folder.")

    def label_of(path: Path) -> int | None:
        parent = path.parent.name if path.parent != folder else ""
        return int(parent) if parent.isdecimal() and len(parent) < _DIGITS else names.get(parent.casefold())

    labelled = any(label_of(path) is not None for path in paths)

    def images(wanted: Collection[Any] | None) -> Labelled:
        for path in paths:
            if wanted is None or label_of(path) in wanted:
                yield read_image(path), label_of(path)

    return Source(folder.name, labelled, len(paths), images)


def _run_source(folder: Path) -> Source:
    rows = [row for row in read_rows(folder) if row["status"] == "ok"]

    def images(wanted: Collection[Any] | None) -> Labelled:
        for row in rows:
            if wanted is None or subject_of(row) in wanted:
                yield np.asarray(read_drawn(folder, row).convert("RGB")), subject_of(row)

    return Source(folder.name, any(subject_of(row) is not None for row in rows), len(rows), images)


def _npz_source(path: Path) -> Source:
    with _opened(path) as archive:
        found = arrays.names(archive)
        if "arr_0" not in found:
            raise UsageError(f"--reference {path} has no arr_0 (uint8 images), found {', '.join(found[:4])}.")
        with arrays.member(archive, "arr_0") as (_, shape, kind, fortran):
            if len(shape) != 4 or shape[3] not in (1, 3) or kind != np.uint8 or fortran or not 0 < prod(shape[1:]) < 1 << 28:
                raise UsageError(f"--reference {path}: arr_0 should be uint8 (N, H, W, 3), found {kind} {shape}.")
        count = shape[0]
        labels = _labels(arrays.read(archive, "arr_1"), count, path) if "arr_1" in found else None

    def images(wanted: Collection[Any] | None) -> Labelled:
        with _opened(path) as archive, arrays.member(archive, "arr_0") as (file, shape, *_):
            for i in range(shape[0]):  # image by image: it may be large
                image = np.frombuffer(file.read(prod(shape[1:])), np.uint8).reshape(shape[1:])
                label = labels[i] if labels else None
                if wanted is None or label in wanted:
                    yield np.broadcast_to(image, (*image.shape[:2], 3)), label

    return Source(path.name, labels is not None and any(label is not None for label in labels), count, images)


def _labels(array: NDArray[Any], count: int, path: Path) -> list[Any]:
    """A label for each image, None for -1: from numbers (N,), text (N,) or one-hot rows (N, K)."""
    what = f"--reference {path}: arr_1 should be one label for each of the {count} images"
    plain = array.reshape(count) if array.shape == (count, 1) else array
    if plain.ndim == 2 and plain.dtype.kind in "biuf" and len(plain) == count:
        if not (((plain == 0) | (plain == 1)).all() and (plain.sum(1) == 1).all()):
            raise UsageError(f"{what}, found {array.dtype} {array.shape} that is not one-hot.")
        plain = plain.argmax(1)
    if plain.shape != (count,) or plain.dtype.kind not in "iufU":
        raise UsageError(f"{what}, found {array.dtype} {array.shape}.")
    return [_label(value, what) for value in plain.tolist()]


def _label(value: Any, what: str) -> Any:
    """An id, a text, or None for none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value < 2**63 or value != int(value):
        raise UsageError(f"{what}, found {value!r} among them.")
    return None if value == -1 else int(value)


def _parquet_source(path: Path) -> Source:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(f"--reference {path} needs pyarrow, which is not installed: pip install pyarrow") from error

    @contextmanager
    def readable() -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, OverflowError) as error:
            raise UsageError(f"--reference {path} cannot be read as .parquet: {first_line(error)}") from error

    with readable():
        file = pq.ParquetFile(path)
        schema, count = file.schema_arrow, file.metadata.num_rows
    if "image" not in schema.names:
        raise UsageError(f"--reference {path} has no column image, found {', '.join(schema.names[:6])}.")
    labelled = "label" in schema.names

    def rows() -> Iterator[tuple[Any, Any]]:
        with readable():
            for part in pq.ParquetFile(path).iter_batches(256, columns=["image", "label"] if labelled else ["image"]):
                for row in part.to_pylist():
                    yield row["image"], row.get("label")

    def images(wanted: Collection[Any] | None) -> Labelled:
        for i, (image, value) in enumerate(rows()):
            label = _label(value, f"--reference {path}: label should be an id or a text")
            if wanted is None or label in wanted:
                raw = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(raw, bytes):
                    raise UsageError(f"--reference {path}: image {i} is not encoded bytes, found {type(raw).__name__}.")
                yield np.asarray(decode(raw, f"--reference {path}: image {i}", UsageError).convert("RGB")), label

    return Source(path.name, labelled, count, images)


def check_writable(path: Path, suffix: str = ".npz") -> None:
    """Raises UsageError if `--save-reference` could not be written at the end of a long measurement."""
    parent = path.resolve().parent
    if path.suffix != suffix or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--save-reference {path}: name an {suffix} file in a folder that is there.")
