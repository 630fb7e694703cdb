"""The rows of `guidegen evaluate` as a table or as JSON, and notes on what may not be compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from guidegen.cli import console
from guidegen.cli.lines import print_line
from guidegen.spec.axes import describe, value_name

if TYPE_CHECKING:
    from rich.console import Console

    from guidegen.evaluate.features import Reader
    from guidegen.evaluate.measure import Drawn
    from guidegen.evaluate.reference import Reference

    Pairs = Sequence[tuple[Drawn, Sequence[dict[str, Any]]]]

_GAP = 2  # between columns of a table
_WIDEST = 18  # column of a turned table


def notes_on_few(pairs: Pairs) -> list[str]:
    """Warnings and notes where the numbers of images make metrics biased or incomparable.

    Args:
        pairs: each run with its rows of metrics.
    """
    from guidegen.evaluate.measure import key_of
    from guidegen.evaluate.standard_errors import LEAST

    notes: list[str] = []
    measured = [(describe(run.axes, key_of(row, run.axes)), row) for run, rows in pairs for row in rows]
    rows = [row for _, row in measured]
    width = rows[0]["features"]["width"]
    counts = [row["distinct"] for row in rows]
    real = rows[0]["reference"]["images"]
    if min(*counts, real) <= width:
        what = f"{min(counts)} images at a weight" if min(counts) <= width else f"{real} reference images"
        notes.append(
            f"warning: {what} are too few for a covariance of {width} features: the Fréchet distance is too large, and may "
            "be compared only between equal numbers of images. The kernel distance has no such bias."
        )
    for where, row in measured:
        if row["distinct"] < row["images"]:
            notes.append(
                f"warning: {row['mode']}, {where}: only {row['distinct']} of {row['images']} images differ (a seed "
                "without its label is one image); distances, precision, recall, density and coverage are of those"
            )
    if len(set(counts)) > 1:
        notes.append("warning: the numbers of images differ, and Fréchet distance, recall and coverage depend on them")
    vendi = [row["metrics"].get("vendi_score") or {} for row in rows]
    per_class = [figure["per_class"] for figure in vendi if "per_class" in figure]
    if len({n for some in per_class for n in some}) > 1:
        low, high = min(low for low, _ in per_class), max(high for _, high in per_class)
        notes.append(
            f"warning: the Vendi score is of {low} to {high} images a label, which is the most that it can be: it grows "
            "with their number, and may be compared between equal ones only"
        )
    if per_class and min(low for low, _ in per_class) < LEAST:
        notes.append(
            f"note: Vendi score and pairwise distance have a standard error from {LEAST} images of each label on, and here "
            f"some have {min(low for low, _ in per_class)}"
        )
    return notes


def print_metrics(pairs: Pairs, about: str, json_rows: bool, quiet: bool) -> None:
    """Prints the rows on standard output: JSON, columns of text, or a table on a terminal.

    Args:
        pairs: each run with its rows of metrics.
        about: a line that describes the numbers, for standard error.
        json_rows: whether to print one JSON object per row.
        quiet: whether to leave that line out.
    """
    from guidegen.evaluate.metrics import shown_metrics, titles_of

    if json_rows:
        for run, rows in pairs:
            for row in rows:
                print_line("metrics", run.folder / "metrics.jsonl", run.folder, row)
        return
    runs, every_row = [run for run, _ in pairs], [row for _, rows in pairs for row in rows]
    axes = list(dict.fromkeys(axis for run in runs for axis in run.axes))
    head = ["run" if len({run.mode for run in runs}) < len(runs) else "mode", *axes, "images"]
    metrics = shown_metrics(every_row)
    lines = []
    for run, rows in pairs:
        name = run.folder.name if head[0] == "run" else run.mode
        for row in rows:
            figures = [_figure(row["metrics"].get(metric.name), row["images"]) for metric in metrics]
            lines.append([name, *(_value(axis, row.get(axis)) for axis in axes), f"{row['images']:,}", *figures])
    titles = titles_of(metrics, every_row)
    if not quiet:
        console.note(about)
    if not sys.stdout.isatty():
        plain = {metric.title for metric in metrics}
        short = [metric.name if title in plain else title for metric, title in zip(metrics, titles, strict=True)]
        short = [text.replace(" ", "_").lower() for text in short]
        table = [[*head, *short], *lines]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        for line in table:
            console.result("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console

    print_table([[*head, *titles], *lines], Console(highlight=False, markup=False))


def print_table(lines: Sequence[Sequence[str]], terminal: Console) -> None:
    """Prints a table; where it is wider than the terminal, turned, in blocks of as many columns as fit.

    Args:
        lines: the head and the rows.
        terminal: where to.
    """
    from rich.table import Table

    cells = [[console.clean(text.replace("±", " ±")) for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    turned = sum(widths) + _GAP * (len(widths) - 1) > terminal.width
    blocks, widest = [cells], None
    if turned:
        first = max(map(len, cells[0]))
        widest = min(_WIDEST, max(len(text) for line in cells[1:] for text in line[1:]))  # names of runs are folded
        each = max(1, (terminal.width - first) // (widest + _GAP))
        blocks = [
            [list(line) for line in zip(cells[0], *cells[1:][start : start + each], strict=True)]
            for start in range(0, len(cells) - 1, each)
        ]
    for i, block in enumerate(blocks):
        table: Any = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 1))
        for n, title in enumerate(block[0]):
            if turned and n == 0:
                table.add_column(title, style="bold", no_wrap=True)
            else:
                table.add_column(title, justify="right", overflow="fold", max_width=widest)
        for line in block[1:]:
            table.add_row(*line)
        if i:
            terminal.print()
        terminal.print(table)


def about_free(rows: Sequence[dict[str, Any]], reader: Reader, reference: Reference) -> str:
    """The line that describes the numbers of the free form."""
    about = f"{reader.name} features, {len(reference.features):,} reference images of {reference.source}"
    if reference.accuracy is not None:
        about += f", {reference.accuracy:.1%} of which the evaluation classifier classifies correctly"
    vendi = [figure for row in rows if (figure := row["metrics"]["vendi_score"])]
    if sizes := sorted({n for figure in vendi for n in figure["per_class"]}):
        many = " to ".join(map(str, sorted({sizes[0], sizes[-1]})))
        about += f"; Vendi score of {many} images a label, the most that it can be"
    return about


def _figure(found: dict[str, Any] | None, images: int) -> str:
    """`12.3±0.4`, with the number of images where it is not that of the row."""
    if found is None:
        return "-"
    spread = "" if found["spread"] is None else f"±{found['spread']:.2g}"
    count = "" if found["images"] == images else f"({found['images']:,})"
    return f"{found['value']:.4g}{spread}{count}"


def _value(axis: str, value: Any) -> str:
    return "-" if value is None else value_name(axis, value)
