"""Features of a run's images on disk, in parts that are written once and read row by row."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
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
    part: NDArray[np.int64]
    row: NDArray[np.int64]
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

    def read(self, rows: NDArray[np.int64], columns: slice) -> Any:
        return self._mapped()["features"][rows, columns]  # the map ends with the statement

    def keys(self) -> list[tuple[str, str]]:
        records = self._mapped()
        return [(a.hex(), b.hex()) for a, b in zip(records["file"].tolist(), records["pixels"].tolist(), strict=True)]


Features = Tensor | Stored
"""(N, D), in memory or on disk."""


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
        self._places: dict[str, tuple[int, int]] = {}
        self.pixels: dict[str, str] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
            name = _PART.fullmatch(path.name)
            if name and name[1] == self._identity and (part := _open_part(path)):
                self._add(part)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._places

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

    def stored(self, files: Iterable[str]) -> Stored:
        """The features of images, by the sha256 of their files, all of which are here."""
        places = np.array([self._places[file] for file in files], np.int64).reshape(-1, 2)
        return Stored(self._parts, places[:, 0], places[:, 1])

    def _add(self, part: _Part) -> None:
        if self._parts and part.width != self._parts[0].width:
            return
        for row, (file, pixels) in enumerate(part.keys()):
            self._places[file] = len(self._parts), row
            self.pixels[file] = pixels
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
