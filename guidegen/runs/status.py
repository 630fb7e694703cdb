"""What a run directory lacks of what it is to hold, and what it has beyond it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from guidegen.runs.files import file_sha256
from guidegen.runs.manifest import Manifests
from guidegen.runs.schema import Row
from guidegen.spec.cell import Cell
from guidegen.spec.plan import finder


class State(NamedTuple):
    """What a run directory lacks of its plan, and what it has beyond it; files relative to it, in the plan's order.

    Attributes:
        missing: no row, or no image.
        corrupt: an image that is not the one of its row.
        nonfinite: drawn, and recorded as not finite.
        extra: images that the plan does not name.
        invalid: manifests with lines that are no rows, and how many; their images are missing unless drawn again.
    """

    missing: list[str]
    corrupt: list[str]
    nonfinite: list[str]
    extra: list[str]
    invalid: list[str]

    @property
    def complete(self) -> bool:
        """Whether it holds all that it is to hold, and no other images."""
        return not (self.missing or self.corrupt or self.nonfinite or self.extra)


def check(folder: Path, cells: Sequence[Cell], hashes: bool = True) -> State:
    """Compares a run directory with what it is to hold.

    Args:
        folder: the directory.
        cells: what it is to hold.
        hashes: also read every image and compare it with the hash in its row.
    """
    manifests = Manifests(folder)
    offsets = manifests.offsets()
    state = State([], [], [], [], manifests.invalid())
    planned = finder(cells)
    state.extra.extend(sorted(file for file in _images(folder) if planned(file) is None))
    for cell in cells:
        file = cell.file
        row = manifests.read(offsets[file]) if file in offsets else None
        if row and row["status"] != "ok":
            state.nonfinite.append(file)
        elif row is None or not (folder / file).is_file():
            state.missing.append(file)
        elif not is_of(row, cell) or not is_intact(folder, row, hashes):
            state.corrupt.append(file)
    return state


def _images(folder: Path) -> Iterator[str]:
    """All files below images/ that are not hidden."""
    for parent, _, names in os.walk(folder / "images"):
        at = Path(parent).relative_to(folder)
        yield from (str(at / name) for name in names if not name.startswith("."))


def is_of(row: Row, cell: Cell) -> bool:
    """Whether the row of an image agrees with its cell."""
    names = ("w", "label", "prompt", "seed", "w_classifier", "w_guide", "mixture")
    return all(row.get(name) == getattr(cell, name) for name in names)


def is_intact(folder: Path, row: Row, hashes: bool = True) -> bool:
    """Whether the image of a row is there; with `hashes`, whether it also is the one that was drawn."""
    path: Path = folder / row["file"]
    return file_sha256(path) == row["sha256"] if hashes else path.is_file()
