"""The picture of a run: one axis across, the others down, both named, drawn from the files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from guidegen.errors import UsageError
from guidegen.plan import batches

MAX_PIXELS = 100_000_000
AXES = ("w", "label", "prompt", "seed", "w_classifier", "w_guide")
_WEIGHTS = {"w_classifier": "classifier w", "w_guide": "guide w"}
_LONGEST_NAME = 48  # letters of a prompt
_GAP = 4
_FONT = 16
_MARGIN = 12
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (200, 200, 200)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """Where everything goes; made from the cells alone, before anything is drawn.

    Attributes:
        title: the line at the top, with the axes that do not vary.
        heads: value -> name along the axis across.
        column_axis: the axis across.
        row_axes: the axes down that have a name at the left.
        tile: (width, height) of one image in the grid.
        pitch: from one column to the next.
        left: width of the names of the rows.
        top: height of the title and the names of the columns.
        pages: rows of each page.
    """

    title: str
    heads: dict[Any, str]
    column_axis: str
    row_axes: tuple[str, ...]
    tile: tuple[int, int]
    pitch: int
    left: int
    top: int
    pages: list[list[tuple[Any, ...]]]

    def size(self, page: int = 0) -> tuple[int, int]:
        """Width and height of a page in pixels."""
        width = self.left + len(self.heads) * self.pitch + _MARGIN
        return width, self.top + len(self.pages[page]) * (self.tile[1] + _GAP) + _MARGIN


def layout(
    cells: Sequence[Row], shape: Sequence[int], column_axis: str = "w", scale: int | None = None, title: str = ""
) -> Layout:
    """Plans the grid.

    Args:
        cells: mappings with `w`, `label`, `label_name`, `seed` and perhaps `w_classifier` and `w_guide`.
        shape: (height, width) of one image.
        column_axis: one of `AXES`.
        scale: whole enlargement; None makes small images about 96 pixels wide.
        title: the line at the top, which the grid is made wide enough for; axes that do not vary join it.

    Raises:
        UsageError: a single row is past the limit of pixels, or there is nothing to draw.
    """
    if not cells:
        raise UsageError("There are no images to draw a grid of.")
    if column_axis not in AXES:
        raise UsageError(f"--columns {column_axis!r}: choose one of {', '.join(AXES)}.")
    height, width = shape
    scale = scale or max(1, round(96 / max(height, width)))
    tile = (width * scale, height * scale)
    named = "label" if all(cell.get("prompt") is None for cell in cells) else "prompt"  # the axis that is told even alone
    down = [axis for axis in ("prompt", "label", "w_classifier", "w_guide", "w", "seed") if axis != column_axis]
    constant = [axis for axis in down if len({_value(cell, axis) for cell in cells}) == 1]
    row_axes = tuple(axis for axis in down if axis == named or axis not in constant) or ("seed",)
    untold = (_axis_name(axis, cells[0]) for axis in constant if axis not in row_axes and cells[0].get(axis) is not None)
    title = " · ".join((title, *untold))
    first: dict[tuple[Any, ...], Row] = {}  # rows in the order in which they were asked for
    for cell in cells:
        first.setdefault(tuple(_value(cell, axis) for axis in row_axes), cell)
    rows = _as_asked(list(first)) if row_axes[0] in ("prompt", "label") else sorted(first)
    names = [_row_name(row_axes, first[row]) for row in rows]
    left = _MARGIN * 2 + max(_text_width(name) for name in names)
    names_across = {_value(cell, column_axis): _axis_name(column_axis, cell) for cell in cells}
    columns = list(names_across) if column_axis == "prompt" else sorted(names_across)
    heads = {value: names_across[value] for value in columns}
    pitch = max(tile[0], *(_text_width(name) for name in heads.values())) + _GAP
    left = max(left, _MARGIN + _text_width(title) - len(columns) * pitch)
    top = _MARGIN + 2 * (_FONT + 8)
    page_rows = (MAX_PIXELS // (left + len(columns) * pitch + _MARGIN) - top - _MARGIN) // (tile[1] + _GAP)
    if page_rows < 1:
        raise UsageError(
            f"A grid of {len(columns)} columns of {tile[0]}x{tile[1]} pixels is past {MAX_PIXELS // 10**6} megapixels: "
            "draw fewer weights, or put another axis across with `guidegen grid --columns`."
        )
    return Layout(title, heads, column_axis, row_axes, tile, pitch, left, top, list(batches(rows, page_rows)))


def draw(folder: Path, rows: Sequence[Row], plan: Layout, page: int) -> Any:
    """One page as a Pillow image; cells whose image is missing or failed stay crossed out."""
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", plan.size(page), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = _font()
    pen.text((_MARGIN, _MARGIN), plan.title, _INK, font)
    step_x, step_y = plan.pitch, plan.tile[1] + _GAP
    column = {value: i for i, value in enumerate(plan.heads)}
    for value, i in column.items():
        x = plan.left + i * step_x + plan.tile[0] // 2
        pen.text((x, plan.top - 8), plan.heads[value], _INK, font, anchor="ms")
    place = {key: y for y, key in enumerate(plan.pages[page])}
    empty = {(x, y) for x in column.values() for y in place.values()}
    named = set()
    for row in rows:
        key = tuple(_value(row, axis) for axis in plan.row_axes)
        if key not in place:
            continue
        x, y = column[_value(row, plan.column_axis)], place[key]
        corner = (plan.left + x * step_x, plan.top + y * step_y)
        if key not in named:
            named.add(key)
            middle = corner[1] + plan.tile[1] // 2
            pen.text((plan.left - _MARGIN, middle), _row_name(plan.row_axes, row), _INK, font, anchor="rm")
        if row["status"] != "ok":
            continue
        try:
            with Image.open(folder / row["file"]) as image:
                tile = image.convert("RGB").resize(plan.tile, Image.Resampling.NEAREST)
        except OSError:  # gone or damaged: it stays crossed out
            continue
        sheet.paste(tile, corner)
        empty.discard((x, y))
    for x, y in empty:
        box = (plan.left + x * step_x, plan.top + y * step_y)
        end = (box[0] + plan.tile[0] - 1, box[1] + plan.tile[1] - 1)
        pen.rectangle((*box, *end), outline=_FAINT)
        pen.line((*box, *end), fill=_FAINT)
    return sheet


def title_of(settings: Mapping[str, Any]) -> str:
    """The line at the top of a grid: what was drawn with what."""
    kind = {
        "cfg": "classifier-free guidance",
        "classifier": "classifier guidance",
        "both": "classifier-free and classifier guidance",
        "none": "no guidance",
        "auto": "autoguidance",
    }[settings["mode"]]
    if guide := settings.get("guide_model"):
        kind += f" against {guide}"
    scheduler = settings["scheduler"].removesuffix("Scheduler")
    return f"{settings['model']} · {kind} · {scheduler}, {settings['steps']} steps"


def page_names(count: int) -> list[str]:
    """grid.png, or grid-1.png, grid-2.png ... where there are several pages."""
    return ["grid.png"] if count == 1 else [f"grid-{i}.png" for i in range(1, count + 1)]


def _as_asked(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Prompts or labels in the order in which they were asked for, the rest of each sorted."""
    order = {first: i for i, first in enumerate(dict.fromkeys(row[0] for row in rows))}
    return sorted(rows, key=lambda row: (order[row[0]], row[1:]))


def _value(cell: Row, axis: str) -> Any:
    value = cell.get(axis)
    return -1 if value is None else value


def _axis_name(axis: str, cell: Row) -> str:
    value = _value(cell, axis)
    if axis == "prompt":
        return "no prompt" if value == -1 else textwrap.shorten(value, _LONGEST_NAME, placeholder=" …")
    if axis == "label":
        return (cell.get("label_name") or f"label {value}") if value != -1 else "no label"
    return f"seed {value}" if axis == "seed" else f"{_WEIGHTS.get(axis, axis)} = {value:g}"


def _row_name(axes: Sequence[str], cell: Row) -> str:
    return ", ".join(_axis_name(axis, cell) for axis in axes)


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(_FONT)


def _text_width(text: str) -> int:
    return int(_font().getlength(text)) + 1 if text else 0
