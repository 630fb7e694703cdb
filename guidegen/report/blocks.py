"""How the rows and columns of a grid go onto pages: as one block, or as several where one would be a long strip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guidegen.spec.plan import batches

MAX_PIXELS = 100_000_000
GAP, MARGIN = 4, 12
_LONG = 16
"""Rows or columns up to which a strip stays whole."""

Key = tuple[Any, ...]
"""Values along the axes of the rows, or of the columns."""


@dataclass(frozen=True)
class Block:
    """Some rows of some columns on a page, with their names; `x` and `y` are its upper left corner."""

    x: int
    y: int
    columns: list[Key]
    rows: list[Key]


@dataclass(frozen=True)
class Sizes:
    """Pixels of the parts of a block.

    Attributes:
        tile: (width, height) of one image.
        pitch: from one column to the next.
        left: width of the names of the rows.
        heads: height of the names of the columns.
        heading: height of the name of a group of rows; 0 where there are no groups.
    """

    tile: tuple[int, int]
    pitch: int
    left: int
    heads: int
    heading: int

    def width(self, columns: int) -> int:
        """Of a block of so many columns."""
        return self.left + columns * self.pitch

    def tops(self, rows: Sequence[Key]) -> list[int]:
        """Where the images of each row begin, below the top of their block."""
        tops, y = [], self.heads
        for i, key in enumerate(rows):
            y += self.heading if i == 0 or rows[i - 1][:-1] != key[:-1] else 0
            tops.append(y)
            y += self.tile[1] + GAP
        return tops

    def height(self, rows: Sequence[Key]) -> int:
        """Of a block of these rows."""
        return self.tops(rows)[-1] + self.tile[1] + GAP


def arrange(
    rows: Sequence[Key], columns: Sequence[Key], sizes: Sizes, title_height: Callable[[int], int]
) -> list[list[Block]]:
    """The blocks of each page.

    Args:
        rows: in their order.
        columns: in their order.
        sizes: of the parts.
        title_height: height of the title above blocks of that width.

    Returns:
        The pages, each of `MAX_PIXELS` at most; none if not even a row fits.
    """
    width, height = sizes.width(len(columns)), sizes.height(rows)
    if len(columns) > _LONG and width > 2 * height:
        return _stacked(rows, columns, sizes, title_height)
    beside = round(math.sqrt(height / width)) if len(rows) > _LONG and height > 2 * width else 1
    beside = max(1, min(beside, math.isqrt(MAX_PIXELS) // width))
    most = _room(beside * width, title_height)
    if sizes.height(rows[:1]) > most:
        return []
    room = min(most, max(-(-height // beside), sizes.height(rows[:1]))) if beside > 1 else most
    parts = _parts(rows, sizes, room)
    while len(parts) > beside and room < most:
        room = min(most, room + sizes.tile[1] + GAP)
        parts = _parts(rows, sizes, room)
    beside = min(beside, len(parts))
    return [
        [Block(i * width, title_height(beside * width), list(columns), part) for i, part in enumerate(page)]
        for page in batches(parts, beside)
    ]


def _stacked(
    rows: Sequence[Key], columns: Sequence[Key], sizes: Sizes, title_height: Callable[[int], int]
) -> list[list[Block]]:
    """Some of the columns below the others."""
    bands = max(2, round(math.sqrt(sizes.width(len(columns)) / sizes.height(rows))))
    each = -(-len(columns) // bands)
    top, room = title_height(sizes.width(each)), _room(sizes.width(each), title_height)
    if sizes.height(rows[:1]) > room:
        return []
    pages: list[list[Block]] = [[]]
    y = 0
    for band in batches(list(columns), each):
        for part in _parts(rows, sizes, room):
            height = sizes.height(part)
            if y + height > room:
                pages.append([])
                y = 0
            pages[-1].append(Block(0, top + y, band, part))
            y += height + MARGIN
    return pages


def _room(width: int, title_height: Callable[[int], int]) -> int:
    """Pixels that the blocks of a page may be high."""
    return MAX_PIXELS // (width + MARGIN) - title_height(width) - MARGIN


def _parts(rows: Sequence[Key], sizes: Sizes, room: int) -> list[list[Key]]:
    """The rows in parts that are not higher than that; a group that fits into one is not cut."""
    step = sizes.tile[1] + GAP
    groups: list[list[Key]] = []
    for key in rows:
        if groups and sizes.heading and groups[-1][-1][:-1] == key[:-1]:
            groups[-1].append(key)
        else:
            groups.append([key])
    parts: list[list[Key]] = []
    left = 0
    for group in groups:
        needed = sizes.heading + len(group) * step
        if needed > left and needed <= room - sizes.heads:
            parts.append([])
            left = room - sizes.heads
        for i, key in enumerate(group):
            needed = step + (sizes.heading if i == 0 or not parts[-1] else 0)
            if not parts or needed > left:
                parts.append([])
                left, needed = room - sizes.heads, step + sizes.heading
            parts[-1].append(key)
            left -= needed
    return parts
