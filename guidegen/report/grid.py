"""The picture of a run: one axis across, the others down, both named, drawn from the files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from guidegen.errors import UsageError
from guidegen.report.blocks import GAP, MARGIN, MAX_PIXELS, Block, Key, Sizes, arrange
from guidegen.report.lettering import LINE, drawable, fold, font, one_line, shorten_all, width_of, wrap
from guidegen.runs.images import CorruptImageError, read_drawn
from guidegen.spec import limits
from guidegen.spec.axes import CELL_AXES, axis_of, named, value_name
from guidegen.spec.settings import MODE_NAMES

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
_ENLARGED = 96  # pixels of small images, about
_NAME_WIDTH, _ROW_LINES = 200, 3  # pixels and lines of the name of a row
_LEAST_HEAD, _LEAST_CAPTION = 72, 116  # pixels for the name and the caption of a column, however small its images
_LEAST_PAGE = 360
_LEAST_GROUP, _MOST_GROUP = 240, 600  # pixels for the name of a group
_MOST_LINES = 5  # of a name that would not differ from another in fewer
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (200, 200, 200)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """Where everything goes; made from the cells alone, before anything is drawn.

    Attributes:
        title: what stands at the top, with the axes that do not vary.
        heads: values along the axes across -> name.
        names: values along the axes down -> name at the left.
        headings: those but the innermost -> name above the rows of a group; empty where there is one axis down.
        column_axes: the axes across.
        row_axes: the axes down, outermost first.
        sizes: of the parts of a block.
        pages: blocks of each page.
    """

    title: str
    heads: dict[Key, str]
    names: dict[Key, str]
    headings: dict[Key, str]
    column_axes: tuple[str, ...]
    row_axes: tuple[str, ...]
    sizes: Sizes
    pages: list[list[Block]]

    def size(self, page: int = 0) -> tuple[int, int]:
        """Width and height of a page in pixels."""
        width = max(block.x + self.sizes.width(len(block.columns)) for blocks in self.pages for block in blocks)
        height = max(block.y + self.sizes.height(block.rows) for block in self.pages[page])
        return max(width, _LEAST_PAGE) + MARGIN, height + MARGIN

    def positions(self, page: int = 0) -> dict[tuple[Key, Key], tuple[int, int]]:
        """(row, column) -> upper left corner of its image, of a page."""
        return {
            (row, column): (block.x + self.sizes.left + i * self.sizes.pitch, block.y + top)
            for block in self.pages[page]
            for row, top in zip(block.rows, self.sizes.tops(block.rows), strict=True)
            for i, column in enumerate(block.columns)
        }


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
    scale = scale or max(1, round(_ENLARGED / max(shape)))
    tile = (shape[1] * scale, shape[0] * scale)
    column_axes, row_axes, title_axes = _choose_axes(cells, columns, rows, tile)
    title = " · ".join((one_line(title), *(_axis_name(axis, cells[0]) for axis in title_axes)))
    down, across = _keys(cells, row_axes), _keys(cells, column_axes)
    head_width = max(tile[0], _LEAST_HEAD)
    heads = _captioned(_names(across, column_axes, head_width, 2), cells, column_axes, max(tile[0], _LEAST_CAPTION))
    pitch = max(tile[0], *map(width_of, heads.values())) + GAP
    names = _names(down, row_axes[-1:], _NAME_WIDTH, max(1, min(_ROW_LINES, tile[1] // LINE)))
    name_width = max(map(width_of, names.values()))
    left = 2 * MARGIN + name_width if name_width else MARGIN
    headings: dict[Key, str] = {}
    if len(row_axes) > 1:
        left = max(left, _LEAST_GROUP - len(heads) * pitch)
        width = min(left + len(heads) * pitch, _MOST_GROUP) - 2 * MARGIN
        groups = {key[:-1]: cell for key, cell in reversed(down.items())}
        headings = {key: fold(name, width) for key, name in _names(groups, row_axes[:-1], width, 1, ", ").items()}
    sizes = Sizes(tile, pitch, left, MARGIN + _height(heads.values()), _height(headings.values()) + 8 if headings else 0)
    pages = arrange(list(down), list(across), sizes, partial(_title_height, title))
    if not pages:
        raise _too_wide(len(heads), tile)
    return Layout(title, heads, names, headings, column_axes, row_axes, sizes, pages)


def _choose_axes(
    cells: Sequence[Row], columns: Sequence[str], rows: Sequence[str], tile: tuple[int, int]
) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """The axes across, those down, and those that the title names as all cells have one value along them."""
    axes = axes_of(cells)
    column_axes = check_axes("--columns", columns, axes) or _across(cells, axes)
    if twice := [axis for axis in check_axes("--rows", rows, axes) if axis in column_axes]:
        raise UsageError(f"{axis_of(twice[0]).title} cannot be across (--columns) and down (--rows) at once.")
    varying = {axis for axis in axes if len({_value(cell, axis) for cell in cells}) > 1}
    seeds = len({cell.get("seed") for cell in cells})
    apart = "label" in varying and len({(_value(cell, "label"), cell.get("seed")) for cell in cells}) == seeds
    contact_sheet = not (columns or varying.intersection(column_axes) or "seed" in rows or apart)
    if contact_sheet and "seed" in varying and 2 * seeds * tile[0] * tile[1] < MAX_PIXELS:
        column_axes = ("seed",)
    elif len(column_axes) > 1:
        column_axes = tuple(axis for axis in column_axes if axis in varying) or column_axes[:1]
    across = len({tuple(_value(cell, axis) for axis in column_axes) for cell in cells})
    if across * tile[0] * tile[1] > MAX_PIXELS:  # before a million columns get their names
        raise _too_wide(across, tile)
    subject = "label" if all(cell.get("prompt") is None for cell in cells) else "prompt"  # named even where it has one value
    order = list(dict.fromkeys((*rows, *sorted(axes, key=lambda axis: axis_of(axis).down))))
    down = [axis for axis in order if axis not in column_axes]
    row_axes = tuple(axis for axis in down if axis == subject or axis in varying) or ("seed",)
    if column_axes == ("seed",) and not varying.intersection(row_axes):
        row_axes = ()  # a contact sheet of one subject
    title_axes = [axis for axis in order if axis not in (*row_axes, *column_axes) and cells[0].get(axis) is not None]
    return column_axes, row_axes, title_axes


def _title_height(title: str, width: int) -> int:
    """Above blocks of that width."""
    return MARGIN + len(wrap(title, max(width, _LEAST_PAGE) - MARGIN)) * LINE + MARGIN // 2


def _height(names: Iterable[str]) -> int:
    """Of the name of the most lines."""
    return max(name.count("\n") + 1 for name in names) * LINE


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


def _keys(cells: Sequence[Row], axes: Sequence[str]) -> dict[Key, Row]:
    """Values along the axes -> a cell: numbers in their order, all else in the order in which it was asked for."""
    first: dict[Key, Row] = {}
    for cell in cells:
        first.setdefault(tuple(_value(cell, axis) for axis in axes), cell)
    orders = [_order(axis, [key[i] for key in first]) for i, axis in enumerate(axes)]
    keys = sorted(first, key=lambda key: tuple(order[value] for order, value in zip(orders, key, strict=True)))
    return {key: first[key] for key in keys}


def _names(found: Mapping[Key, Row], axes: Sequence[str], width: int, lines: int, between: str = "\n") -> dict[Key, str]:
    """Key -> name along the axes, of each at most so many lines of that width, or as few more as keep names different."""
    full = {key: [_axis_name(axis, cell) if _is_shown(axis, cell) else "" for axis in axes] for key, cell in found.items()}
    different = len(set(map(tuple, full.values())))
    while True:
        short = [shorten_all(dict.fromkeys(parts), width, lines) for parts in zip(*full.values(), strict=True)]
        names = {
            key: between.join(filter(None, (some[part] for some, part in zip(short, parts, strict=True))))
            for key, parts in full.items()
        }
        if len(set(names.values())) == different or lines >= _MOST_LINES:
            return names
        lines += 1


def _is_shown(axis: str, cell: Row) -> bool:
    """Not along an axis that other runs have and this one has not."""
    return axis in ("label", "prompt") or cell.get(axis) is not None


def _captioned(heads: Mapping[Key, str], cells: Sequence[Row], axes: Sequence[str], width: int) -> dict[Key, str]:
    """The names of columns with the caption that all cells of one have."""
    captions: dict[Key, set[str]] = {}
    for cell in cells:
        captions.setdefault(tuple(_value(cell, axis) for axis in axes), set()).add(cell.get("caption") or "")
    return {
        key: "\n".join((name, *(fold(caption, width) for caption in captions[key]))).rstrip()
        if len(captions[key]) == 1
        else name
        for key, name in heads.items()
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
    _draw_names(pen, plan, page)
    positions = plan.positions(page)
    empty = dict(positions)
    for row in rows:
        key = tuple(_value(row, axis) for axis in plan.row_axes), tuple(_value(row, axis) for axis in plan.column_axes)
        if key not in positions or row["status"] != "ok":
            continue
        try:
            image = read_drawn(Path(row.get("folder") or folder), row)
        except CorruptImageError as error:
            on_corrupt(str(error))
            continue
        sheet.paste(image.convert("RGB").resize(plan.sizes.tile, Image.Resampling.NEAREST), positions[key])
        empty.pop(key, None)
    for box in empty.values():
        end = (box[0] + plan.sizes.tile[0] - 1, box[1] + plan.sizes.tile[1] - 1)
        pen.rectangle((*box, *end), outline=_FAINT)
        pen.line((*box, *end), fill=_FAINT)
    return sheet


def _draw_names(pen: Any, plan: Layout, page: int) -> None:
    """The title, and the names of the columns, groups and rows of each block."""
    sizes, tile = plan.sizes, plan.sizes.tile

    def write(x: int, y: int, text: str, anchor: str) -> None:
        pen.text((x, y), drawable(text), _INK, font(), anchor=anchor)

    for i, line in enumerate(wrap(plan.title, plan.size(page)[0] - 2 * MARGIN)):
        write(MARGIN, MARGIN + i * LINE, line, "la")
    for block in plan.pages[page]:
        for i, column in enumerate(block.columns):
            x = block.x + sizes.left + i * sizes.pitch + tile[0] // 2
            for above, line in enumerate(reversed(plan.heads[column].split("\n"))):
                write(x, block.y + sizes.heads - 8 - above * LINE, line, "ms")
        group = None
        for key, top in zip(block.rows, sizes.tops(block.rows), strict=True):
            if sizes.heading and key[:-1] != group:
                group = key[:-1]
                lines = plan.headings[group].split("\n")
                for above, line in enumerate(reversed(lines)):
                    write(block.x + MARGIN, block.y + top - 8 - above * LINE, line, "ls")
            lines = plan.names[key].split("\n")
            for i, line in enumerate(lines):
                middle = block.y + top + tile[1] // 2 + (2 * i - len(lines) + 1) * LINE // 2
                write(block.x + sizes.left - MARGIN, middle, line, "rm")


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
        return "no prompt" if value is None else one_line(value)
    if axis == "label":
        return (one_line(cell.get("label_name") or "") or f"label {value}") if value is not None else "no label"
    return one_line(named(axis, value))
