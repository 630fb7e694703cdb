"""The picture of a run: one axis across, the others down, both named, drawn from the files."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from guidegen.errors import UsageError
from guidegen.runs.images import CorruptImageError, read_drawn
from guidegen.spec import limits
from guidegen.spec.axes import CELL_AXES, axis_of, named, value_name
from guidegen.spec.plan import batches
from guidegen.spec.settings import MODE_NAMES

MAX_PIXELS = 100_000_000
_NOT_AXES = (
    "file",
    "mode",
    "label_name",
    "mixture",
    "prompt_index",
    "variant",
    "nfe",
    "sha256",
    "shape",
    "status",
    "dtype",
    "caption",
    "folder",
)
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
        heads: values -> name, along the axes across.
        column_axes: the axes across.
        row_axes: the axes down that have a name at the left.
        tile: (width, height) of one image in the grid.
        pitch: from one column to the next.
        left: width of the names of the rows.
        top: height of the title and the names of the columns.
        pages: rows of each page.
    """

    title: str
    heads: dict[tuple[Any, ...], str]
    column_axes: tuple[str, ...]
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


def check_count(cells: int) -> None:
    """Raises UsageError for a sweep whose grid would be past `limits.GRID_CELLS`."""
    if cells > limits.GRID_CELLS:
        raise UsageError(
            f"A sweep of {cells:,} images: its grid holds {limits.GRID_CELLS:,} at most. Draw fewer seeds, labels or "
            "weights, or one weight at a time with `guidegen sample`, which makes no grid."
        )


def layout(
    cells: Sequence[Row],
    shape: Sequence[int],
    columns: Sequence[str] = (),
    scale: int | None = None,
    title: str = "",
    rows: Sequence[str] = (),
) -> Layout:
    """Plans the grid.

    Args:
        cells: mappings with `w`, `label`, `label_name`, `seed` and perhaps others of `CELL_AXES` and axes of `--by`; a
            `caption` that all of a column have stands under its name.
        shape: (height, width) of one image.
        columns: the axes across; of several, those combinations that there are. None given: w; where it is one
            number, the first axis of `--by`; where each value of such an axis has a w of its own, both.
        scale: whole enlargement; None makes small images about 96 pixels wide.
        title: the line at the top, which the grid is made wide enough for; axes that do not vary join it.
        rows: the axes down, outermost first; those that are not named follow.

    Raises:
        UsageError: no such axis, a single row is past the limit of pixels, or there is nothing to draw.
    """
    if not cells:
        raise UsageError("There are no images to draw a grid of.")
    axes = axes_of(cells)
    column_axes = check_axes("--columns", columns, axes) or _across(cells, axes)
    if twice := [axis for axis in check_axes("--rows", rows, axes) if axis in column_axes]:
        raise UsageError(f"{axis_of(twice[0]).title} cannot be across (--columns) and down (--rows) at once.")
    height, width = shape
    scale = scale or max(1, round(96 / max(height, width)))
    tile = (width * scale, height * scale)
    across = len({tuple(_value(cell, axis) for axis in column_axes) for cell in cells})
    if across * tile[0] * tile[1] > MAX_PIXELS:  # before a million columns get their names
        raise _too_wide(across, tile)
    subject = "label" if all(cell.get("prompt") is None for cell in cells) else "prompt"  # named even where it has one value
    order = list(dict.fromkeys((*rows, *sorted(axes, key=lambda axis: axis_of(axis).down))))
    varying = {axis for axis in axes if len({_value(cell, axis) for cell in cells}) > 1}
    down = [axis for axis in order if axis not in column_axes]
    row_axes = tuple(axis for axis in down if axis == subject or axis in varying) or ("seed",)
    if len(column_axes) > 1:
        column_axes = tuple(axis for axis in column_axes if axis in varying) or column_axes[:1]
    unnamed = [axis for axis in order if axis not in (*row_axes, *column_axes) and cells[0].get(axis) is not None]
    title = " · ".join((_one_line(title), *(_axis_name(axis, cells[0]) for axis in unnamed)))
    down_names, heads = _names(cells, row_axes), _captioned(_names(cells, column_axes, "\n"), cells, column_axes)
    left = _MARGIN * 2 + max(map(_text_width, down_names.values()))
    pitch = max(tile[0], *(_text_width(line) + _GAP for name in heads.values() for line in name.split("\n"))) + _GAP
    left = max(left, _MARGIN + _text_width(title) - len(heads) * pitch)
    top = _MARGIN + 2 * (_FONT + 8) + max(name.count("\n") for name in heads.values()) * (_FONT + 4)
    page_rows = (MAX_PIXELS // (left + len(heads) * pitch + _MARGIN) - top - _MARGIN) // (tile[1] + _GAP)
    if page_rows < 1:
        raise _too_wide(len(heads), tile)
    return Layout(title, heads, column_axes, row_axes, tile, pitch, left, top, list(batches(list(down_names), page_rows)))


def _too_wide(columns: int, tile: tuple[int, int]) -> UsageError:
    return UsageError(
        f"A grid of {columns:,} columns of {tile[0]}x{tile[1]} pixels is past {MAX_PIXELS // 10**6} megapixels: "
        "draw fewer weights, or put another axis across with --columns."
    )


def axes_of(cells: Sequence[Row]) -> list[str]:
    """The axes of these cells: those that every run has, and whatever else `--by` or several runs brought in."""
    others = dict.fromkeys(key for cell in cells for key in cell if key not in (*CELL_AXES, *_NOT_AXES))
    return [axis for axis in (*CELL_AXES, *others) if any(axis in cell for cell in cells)]


def check_axes(flag: str, given: Sequence[str], axes: Sequence[str]) -> tuple[str, ...]:
    """The axes that a flag names.

    Raises:
        UsageError: one that there is not, or one twice.
    """
    if unknown := [axis for axis in given if axis not in axes]:
        raise UsageError(f"{flag} {unknown[0]!r}: choose of {', '.join(axis.replace('_', '-') for axis in axes)}.")
    if len(set(given)) < len(given):
        raise UsageError(f"{flag} {','.join(given)}: one axis stands there twice.")
    return tuple(given)


def _across(cells: Sequence[Row], axes: Sequence[str]) -> tuple[str, ...]:
    """w, or what varies in its stead; before it the runs, or the axes whose values have a w each."""
    if any("run" in cell for cell in cells):
        by = [axis for axis in axes if axis not in (*CELL_AXES, "run")]
        return ("run", *by, *(axis for axis in ("w_classifier", "w_guide", "w") if axis in axes))
    by = [axis for axis in axes if axis not in CELL_AXES and len({cell.get(axis) for cell in cells}) > 1]
    if by and len({cell["w"] for cell in cells}) == 1:
        return (by[0],)
    return (*(axis for axis in by if _binds_w(axis, cells)), "w")


def _binds_w(axis: str, cells: Sequence[Row]) -> bool:
    """Whether each value along an axis has one w."""
    pairs = {(cell.get(axis), cell["w"]) for cell in cells}
    return len(pairs) == len({value for value, _ in pairs})


def _names(cells: Sequence[Row], axes: Sequence[str], between: str = ", ") -> dict[tuple[Any, ...], str]:
    """Values along the axes -> name: numbers in their order, all else in the order in which it was asked for."""
    first: dict[tuple[Any, ...], Row] = {}
    for cell in cells:
        first.setdefault(tuple(_value(cell, axis) for axis in axes), cell)
    orders = [_order(axis, [key[i] for key in first]) for i, axis in enumerate(axes)]
    keys = sorted(first, key=lambda key: tuple(order[value] for order, value in zip(orders, key, strict=True)))
    shown = {key: [axis for axis in axes if _is_shown(axis, first[key])] for key in keys}
    return {key: between.join(_axis_name(axis, first[key]) for axis in shown[key]) for key in keys}


def _is_shown(axis: str, cell: Row) -> bool:
    """Not along an axis that other runs have and this one has not."""
    return axis in ("label", "prompt") or cell.get(axis) is not None


def _captioned(
    heads: Mapping[tuple[Any, ...], str], cells: Sequence[Row], axes: Sequence[str]
) -> dict[tuple[Any, ...], str]:
    """The names of columns with the caption that all cells of one have."""
    captions: dict[tuple[Any, ...], set[str]] = {}
    for cell in cells:
        captions.setdefault(tuple(_value(cell, axis) for axis in axes), set()).add(cell.get("caption") or "")
    return {
        key: "\n".join((name, *captions[key])).rstrip() if len(captions[key]) == 1 else name for key, name in heads.items()
    }


def _order(axis: str, values: Sequence[Any]) -> dict[Any, Any]:
    if axis != "label" and all(isinstance(value, int | float | None) for value in values):
        return {value: (value is not None, value or 0) for value in values}
    return {value: index for index, value in enumerate(dict.fromkeys(values))}


def draw(
    folder: Path, rows: Sequence[Row], plan: Layout, page: int, on_corrupt: Callable[[str], None] = lambda reason: None
) -> Any:
    """One page as a Pillow image; cells whose image is missing, corrupt or failed stay crossed out.

    Args:
        folder: the run directory; a row with a `folder` is of that run.
        rows: of the images.
        plan: where they go.
        page: which part of it.
        on_corrupt: called with what is wrong with an image that is not the one that was drawn.
    """
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", plan.size(page), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = _font()
    pen.text((_MARGIN, _MARGIN), _drawable(plan.title), _INK, font)
    step_x, step_y = plan.pitch, plan.tile[1] + _GAP
    column = {values: i for i, values in enumerate(plan.heads)}
    for values, i in column.items():
        x = plan.left + i * step_x + plan.tile[0] // 2
        for above, line in enumerate(reversed(_drawable(plan.heads[values]).split("\n"))):
            pen.text((x, plan.top - 8 - above * (_FONT + 4)), line, _INK, font, anchor="ms")
    row_of = {key: y for y, key in enumerate(plan.pages[page])}
    empty = {(x, y) for x in column.values() for y in row_of.values()}
    named = set()
    for row in rows:
        key = tuple(_value(row, axis) for axis in plan.row_axes)
        if key not in row_of:
            continue
        x, y = column[tuple(_value(row, axis) for axis in plan.column_axes)], row_of[key]
        corner = (plan.left + x * step_x, plan.top + y * step_y)
        if key not in named:
            named.add(key)
            middle = corner[1] + plan.tile[1] // 2
            pen.text((plan.left - _MARGIN, middle), _drawable(_cell_name(plan.row_axes, row)), _INK, font, anchor="rm")
        if row["status"] != "ok":
            continue
        try:
            image = read_drawn(Path(row.get("folder") or folder), row)
        except CorruptImageError as error:
            on_corrupt(str(error))
            continue
        sheet.paste(image.convert("RGB").resize(plan.tile, Image.Resampling.NEAREST), corner)
        empty.discard((x, y))
    for x, y in empty:
        box = (plan.left + x * step_x, plan.top + y * step_y)
        end = (box[0] + plan.tile[0] - 1, box[1] + plan.tile[1] - 1)
        pen.rectangle((*box, *end), outline=_FAINT)
        pen.line((*box, *end), fill=_FAINT)
    return sheet


def title_of(settings: Mapping[str, Any], axes: Collection[str] = ()) -> str:
    """The line at the top of a grid: what was drawn with what, but for the axes, which are named elsewhere."""
    words = [settings["model"]] * ("model" not in axes)
    if "mode" not in axes:
        against = f" against {settings['guide_model']}" if settings.get("guide_model") and "guide_model" not in axes else ""
        words.append(f"{MODE_NAMES[settings['mode']]}{against}")
    given = ("guidance", "interval", "w_schedule")
    words += [named(name, settings[name]) for name in given if settings.get(name) is not None and name not in axes]
    how = [value_name("scheduler", settings["scheduler"])] * ("scheduler" not in axes)
    how += [f"{settings['steps']} steps"] * ("steps" not in axes)
    return " · ".join((*words, *([", ".join(how)] if how else [])))


def page_names(count: int) -> list[str]:
    """grid.png, or grid-1.png, grid-2.png ... where there are several pages."""
    return ["grid.png"] if count == 1 else [f"grid-{i}.png" for i in range(1, count + 1)]


def _value(cell: Row, axis: str) -> Any:
    return (axis == "label" and cell.get("mixture")) or cell.get(axis)


def _axis_name(axis: str, cell: Row) -> str:
    value = cell.get(axis)
    if axis == "prompt":
        return "no prompt" if value is None else _shortened(value)
    if axis == "label":
        return (_shortened(cell.get("label_name") or "") or f"label {value}") if value is not None else "no label"
    return _one_line(named(axis, value))


def _shortened(text: str) -> str:
    """At most `_LONGEST_NAME` letters in one line, cut between words where there are any."""
    short = textwrap.shorten(text, _LONGEST_NAME, placeholder=" …")
    return f"{text.strip()[: _LONGEST_NAME - 1]}…" if short in ("…", " …") and len(text) > 1 else short


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell_name(axes: Sequence[str], cell: Row) -> str:
    return ", ".join(_axis_name(axis, cell) for axis in axes)


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(_FONT)


def _text_width(text: str) -> int:
    return int(_font().getlength(_drawable(text))) + 1 if text else 0


def _drawable(text: str) -> str:
    """Without accents, which Pillow's own font does not have, and what is no letter at all."""
    return "".join(
        letter
        for letter in unicodedata.normalize("NFD", text)
        if letter == "\n" or not (unicodedata.combining(letter) or unicodedata.category(letter) in ("Cc", "Cf", "Cs"))
    )
