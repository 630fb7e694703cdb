"""Which cells of a run are the same image, so that each image is drawn once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from guidegen.sampling.setup import Setup
from guidegen.spec.cell import Cell, Variant
from guidegen.spec.plan import Cells, finder


class EqualImages:
    """Groups the cells to draw by `Setup.image_key`, also across variants.

    Args:
        cells: all that is to be drawn; they are not gone through one by one where they are `Cells`.
        setups: of each of their variants.
    """

    def __init__(self, cells: Sequence[Cell], setups: Mapping[Variant, Setup]):
        self._find = finder(cells)
        groups: dict[Hashable, list[Cell]] = {}
        for cell in _of_one_seed(cells):
            groups.setdefault(setups[cell.variant].image_key(cell), []).append(cell)
        self._groups = {cell.folder: group for group in groups.values() if len(group) > 1 for cell in group}

    def first(self, cells: Sequence[Cell]) -> Sequence[Cell]:
        """Those of the cells that no equal one comes before among all that is to be drawn."""
        return [cell for cell in cells if next(self._equal(cell)) == cell] if self._groups else cells

    def group(self, cell: Cell) -> list[Cell]:
        """The cells that are the image of this one, itself included."""
        return list(self._equal(cell))

    def _equal(self, cell: Cell) -> Iterator[Cell]:
        group = self._groups.get(cell.folder)
        if group is None:
            yield cell
            return
        for other in group:
            of_seed = replace(other, seed=cell.seed)
            if of_seed == cell or self._find(of_seed.file) is not None:
                yield of_seed


def _of_one_seed(cells: Sequence[Cell]) -> Iterable[Cell]:
    """The cells that differ in more than the seed, each with the seed 0."""
    if isinstance(cells, Cells):
        return cells.of_one_seed()
    return dict.fromkeys(replace(cell, seed=0) for cell in cells)
