"""Features of a run's images on disk, in parts that are written once and read row by row."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from guidegen.runs.files import refuse_links, write_atomically

_PART = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.npy")
_HEAD = 1 << 12


@dataclass(frozen=True)
class Stored:
    """Features (N, D) that lie in parts on disk: what is indexed is read, and memory holds no more than that.

    Attributes:
        parts: (n, D) each, fp32; memory-mapped while they are read.
        part: (N,) in which of them each row is.
        row: (N,) its number there.
        columns: of the parts.
    """

    parts: Sequence[_Part]
    part: NDArray[np.int32]
    row: NDArray[np.int32]
    columns: slice = field(default_factory=lambda: slice(None))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return len(self.row), len(range(self.parts[0].width)[self.columns])

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: Any) -> Tensor:
        """fp32 (n, D) of a slice, or of a list or tensor of indices."""
        index = index.numpy() if isinstance(index, Tensor) else index
        part, row = self.part[index], self.row[index]
        found = np.empty((len(row), self.shape[1]), np.float32)
        for i in np.unique(part):
            mine = part == i
            found[mine] = self.parts[i].read(row[mine], self.columns)
        return torch.from_numpy(found)

    def of(self, index: Sequence[int]) -> Stored:
        """Some of the rows."""
        chosen = np.asarray(index, np.int64)
        return Stored(self.parts, self.part[chosen], self.row[chosen], self.columns)

    def layer(self, columns: slice) -> Stored:
        """Some of the columns."""
        return Stored(self.parts, self.part, self.row, columns)


@dataclass(frozen=True)
class _Part:
    """A file of records: the sha256 of an image file, a hash of its pixels, its features."""

    path: Path
    dtype: np.dtype[Any]
    count: int
    offset: int

    @property
    def width(self) -> int:
        return int(self.dtype["features"].shape[0])

    def _mapped(self) -> Any:
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.count,))

    def read(self, rows: NDArray[Any], columns: slice) -> Any:
        return self._mapped()["features"][rows, columns]  # the map ends with the statement

    def keys(self) -> tuple[NDArray[np.void], NDArray[np.void]]:
        records = self._mapped()
        return np.array(records["file"]), np.array(records["pixels"])


Features = Tensor | Stored
"""(N, D), in memory or on disk."""


def rows_of(features: Features, index: Sequence[int]) -> Features:
    """Some of the rows; of features on disk they stay there."""
    return features.of(index) if isinstance(features, Stored) else features[index]


class FeatureCache:
    """What one network makes of a run's images, in `RUN/features/ID-PART.npy`.

    Each part is whole or not there and never changed, so several processes, the shards of one run and the machines
    of one file system may add to it; parts that are copied from another place are found.

    Args:
        folder: RUN/features.
        identity: of the network.
    """

    def __init__(self, folder: Path, identity: str):
        self._folder, self._identity = folder, identity[:16]
        self._parts: list[_Part] = []
        self._files, self._pixels = np.empty(0, "V32"), np.empty(0, "V16")  # sorted by file
        self._at = np.empty((0, 2), np.int32)  # part and row of each
        for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
            name = _PART.fullmatch(path.name)
            if name and name[1] == self._identity and (part := _open_part(path)):
                self._add(part)

    def missing(self, files: Sequence[str]) -> list[int]:
        """The indices of files, by their sha256, that are not in it; of equal ones that of the first."""
        found = self._find(files)
        new = {file: i for i, file in reversed(list(enumerate(files))) if found[i] < 0}
        return sorted(new.values())

    def _find(self, files: Sequence[str]) -> NDArray[np.int64]:
        """Where each stands, -1 for what is not in it."""
        keys = np.frombuffer(bytes.fromhex("".join(files)), "V32")
        at = np.searchsorted(self._files, keys, "right") - 1  # of several that of the newest part
        there = np.zeros(len(keys), bool) if not len(self._files) else (at >= 0) & (self._files[at] == keys)
        return np.where(there, at, -1)

    def write(self, made: Mapping[str, tuple[str, NDArray[np.float32]]]) -> None:
        """A new part.

        Args:
            made: sha256 of an image's file -> a hash of its pixels, 32 hex digits, and its features (D,).
        """
        width = len(next(iter(made.values()))[1])
        records = np.zeros(len(made), np.dtype([("file", "V32"), ("pixels", "V16"), ("features", "<f4", (width,))]))
        records["file"] = [np.void(bytes.fromhex(key)) for key in made]
        records["pixels"] = [np.void(bytes.fromhex(pixels)) for pixels, _ in made.values()]
        records["features"] = np.stack([features for _, features in made.values()])
        buffer = io.BytesIO()
        npy.write_array(buffer, records, allow_pickle=False)
        name = hashlib.sha256("".join(made).encode()).hexdigest()[:16]
        path = self._folder / f"{self._identity}-{name}.npy"
        refuse_links(self._folder.parent, path)
        write_atomically(path, buffer.getvalue())
        part = _open_part(path)
        assert part is not None
        self._add(part)

    def stored(self, files: Sequence[str]) -> Stored:
        """The features of images, by the sha256 of their files, all of which are here."""
        at = self._at[self._find(files)]
        return Stored(self._parts, at[:, 0], at[:, 1])

    def pixels(self, files: Sequence[str]) -> list[bytes]:
        """A hash of the pixels of images, likewise."""
        found: list[bytes] = self._pixels[self._find(files)].tolist()
        return found

    def _add(self, part: _Part) -> None:
        if self._parts and part.width != self._parts[0].width:
            return
        files, pixels = part.keys()
        at = np.stack([np.full(len(files), len(self._parts)), np.arange(len(files))], 1)
        files = np.concatenate([self._files, files])
        order = np.argsort(files, kind="stable")
        self._files, self._pixels = files[order], np.concatenate([self._pixels, pixels])[order]
        self._at = np.concatenate([self._at, at.astype(np.int32)])[order]
        self._parts.append(part)


def _open_part(path: Path) -> _Part | None:
    """A part as it was written, its numbers finite; None for what is none, whose images are read again."""
    try:
        with path.open("rb") as file:
            if npy.read_magic(file) != (1, 0):
                return None
            shape, fortran, dtype = npy.read_array_header_1_0(file, _HEAD)
            offset = file.tell()
        fields = {name: (some.kind, some.itemsize) for name, (some, *_) in (dtype.fields or {}).items()}
        if dtype.hasobject or fortran or len(shape) != 1 or fields.keys() != {"file", "pixels", "features"}:
            return None
        if fields["file"] != ("V", 32) or fields["pixels"] != ("V", 16) or dtype["features"].base != np.float32:
            return None
        if len(dtype["features"].shape) != 1 or path.stat().st_size != offset + shape[0] * dtype.itemsize or not shape[0]:
            return None
        part = _Part(path, dtype, shape[0], offset)
        for start in range(0, part.count, 4096):
            if not np.isfinite(part.read(np.arange(start, min(part.count, start + 4096)), slice(None))).all():
                return None
        return part
    except (OSError, ValueError, KeyError, TypeError):
        return None
