"""The manifests of a run: one row a finished image, appended, read back without holding them in memory."""

from __future__ import annotations

import os
import stat
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, overload

from guidegen.errors import OutputError, UsageError
from guidegen.runs.files import file_sha256
from guidegen.runs.schema import Row, parse_row
from guidegen.spec.axes import axis_value
from guidegen.spec.shard import Shard

_LONGEST_ROW = 16 << 20  # bytes; what is longer is no row, and is skipped without being held
_HASHES_KEPT = 1024


def manifest_name(shard: Shard | None) -> str:
    """The manifest of a run, or of one of its shards."""
    return f"manifest.{shard}.jsonl" if shard else "manifest.jsonl"


class Rows(Sequence[Row]):
    """Rows of some files of a run, in their order, read from the manifests when asked for.

    Eight bytes a row in memory, however long the run.

    Args:
        folder: a run directory.
        files: the files, relative to `folder`; each has a row. None for all that have one.
        shard: as in `Manifests`.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None, shard: Shard | None = None):
        self._manifests = Manifests(folder, shard)
        offsets = self._manifests.offsets()
        self._at = array("q", offsets.values() if files is None else (offsets[file] for file in files))
        self._rest: Row = {}

    def of(self, indices: Iterable[int]) -> Rows:
        """Some of them."""
        return self._copy(array("q", (self._at[i] for i in indices)), self._rest)

    def with_axes(self, settings: Mapping[str, Any], axes: Iterable[str]) -> Rows:
        """The same, each as `with_axes` completes it."""
        return self._copy(self._at, {axis: axis_value(axis, settings) for axis in axes})

    def _copy(self, at: array[int], rest: Row) -> Rows:
        found = copy(self)
        found._at, found._rest = at, rest
        return found

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[Row]:
        return (self._rest | row for row in self._manifests.read_each(self._at))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return self._copy(self._at[index], self._rest)
        return next(iter(self._copy(array("q", [self._at[index]]), self._rest)))


class Manifests:
    """Every manifest*.jsonl of a run as if they were one file, as long as they are now: an offset counts into it.

    Args:
        folder: a run directory.
        shard: leaves out the manifests of the shards beside this one, which grow and hold none of its images.

    Raises:
        UsageError: one of them is no regular file.
    """

    def __init__(self, folder: Path, shard: Shard | None = None):
        beside = set(folder.glob(f"manifest.*-of-{shard.count}.jsonl")) - {folder / manifest_name(shard)} if shard else set()
        self._folder, self._paths = folder, sorted(set(folder.glob("manifest*.jsonl")) - beside)
        sizes = [_size(path) for path in self._paths]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._hashes: OrderedDict[str, str | None] = OrderedDict()

    def offsets(self) -> dict[str, int]:
        """file -> the offset of its row; the last one where there are several, torn and invalid ones left out."""
        found: dict[str, int] = {}
        for path in self._paths:
            for offset, row in self.rows_of(path):
                if row and (row["file"] not in found or self._supersedes(row, self.read(found[row["file"]]))):
                    found[row["file"]] = offset
        return found

    def _supersedes(self, row: Row, before: Row) -> bool:
        """Whether a later row stands for its file: unless just the earlier one has the hash of what is there."""
        if before["sha256"] == row["sha256"]:
            return True
        there = self._sha256(row["file"])
        return bool(there == row["sha256"] or there != before["sha256"])

    def _sha256(self, file: str) -> str | None:
        """That of an image, read once for rows that contradict each other one after the other."""
        if file not in self._hashes:
            self._hashes[file] = file_sha256(self._folder / file)
            if len(self._hashes) > _HASHES_KEPT:
                self._hashes.popitem(last=False)
        return self._hashes[file]

    def rows_of(self, path: Path) -> Iterator[tuple[int, Row | None]]:
        """The offset and the row of each line of one manifest; None for a torn or invalid one."""
        which = self._paths.index(path)
        offset, end = self._starts[which : which + 2]
        with path.open("rb") as file:
            for size, line in _lines(file):
                if offset + size > end:
                    return
                yield offset, parse_row(line)
                offset += size

    def read(self, offset: int) -> Row:
        """The row at an offset."""
        return next(self.read_each([offset]))

    def read_each(self, offsets: Iterable[int]) -> Iterator[Row]:
        """The row at each of the offsets."""
        for which, some in groupby(offsets, lambda offset: bisect_right(self._starts, offset) - 1):
            with self._paths[which].open("rb") as file:
                for offset in some:
                    file.seek(offset - self._starts[which])
                    row = parse_row(file.readline(_LONGEST_ROW))
                    if row is None:
                        raise OutputError(
                            f"{self._paths[which]} has changed while it was read. Try again when nobody writes it."
                        )
                    yield row

    def invalid_lines(self) -> dict[Path, list[int]]:
        """For each manifest that has lines which are no rows, their numbers from 1; a torn last one is among them."""
        found = {path: [i for i, (_, row) in enumerate(self.rows_of(path), 1) if row is None] for path in self._paths}
        return {path: numbers for path, numbers in found.items() if numbers}

    def invalid(self) -> list[str]:
        """The same in words: how many in each manifest, and where the first is."""
        return [
            f"{path.name}: {len(numbers)} {'line' if len(numbers) == 1 else 'lines'}, the first is line {numbers[0]}"
            for path, numbers in self.invalid_lines().items()
        ]


def _size(path: Path) -> int:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise UsageError(f"{path} is not a regular file.")
    return about.st_size


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The length of each line and the line; nothing of one that is too long for a row."""
    while line := file.readline(_LONGEST_ROW):
        size = len(line)
        if size == _LONGEST_ROW and not line.endswith(b"\n"):
            while more := file.readline(_LONGEST_ROW):
                size += len(more)
                if more.endswith(b"\n"):
                    break
            line = b""
        yield size, line


def read_rows(folder: Path) -> list[Row]:
    """Rows of every manifest*.jsonl, torn ones dropped; the last row of a file wins."""
    return list(Rows(folder))


def with_axes(rows: Iterable[Row], settings: Mapping[str, Any], axes: Iterable[str]) -> list[Row]:
    """The rows, each with its value along all of these axes: of `--by` or else what the run's settings say."""
    rest = {axis: axis_value(axis, settings) for axis in axes}
    return [rest | row for row in rows]
