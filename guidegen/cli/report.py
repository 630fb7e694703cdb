"""`guidegen report`: runs as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guidegen.cli import console, options
from guidegen.cli.command import flags_of
from guidegen.cli.lines import print_made
from guidegen.errors import UsageError
from guidegen.runs.images import refusal
from guidegen.runs.ours import refuse_foreign

if TYPE_CHECKING:
    from guidegen.evaluate.measure import Drawn


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "report",
        help="Make one HTML file of runs, with a slider for w. Missing or corrupt images are left out, and the exit code is "
        "then 3.",
    )(_command)


def _command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; two are shown side by side.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="HTML", help="The file to write.", rich_help_panel=options._OUTPUT)
    ] = Path("report.html"),
    max_size: Annotated[
        float,
        typer.Option(
            "--max-size",
            metavar="MB",
            min=0,
            help="Above this size the file links to the images instead of containing them.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = 30.0,
    thumbnail: Annotated[
        int,
        typer.Option(
            "--thumbnail",
            metavar="PIXELS",
            min=16,
            help="Longest side of the images in the file.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = 256,
    open_it: Annotated[
        bool, typer.Option("--open", help="Open the file in the browser.", rich_help_panel=options._OUTPUT)
    ] = False,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    write_report(runs, out, max_size, thumbnail, quiet, open_it, as_json, force)


def _show(path: Path, quiet: bool) -> None:
    """Opens the file in the browser; only notes it if there is none."""
    import webbrowser

    try:
        opened = webbrowser.open(path.resolve().as_uri())
    except (webbrowser.Error, OSError):
        opened = False
    if not opened and not quiet:
        console.note(f"note: no browser was found to open {path}")


def write_report(
    runs: Sequence[Path],
    out: Path,
    max_size: float = 30.0,
    thumbnail: int = 256,
    quiet: bool = False,
    open_it: bool = False,
    as_json: bool = False,
    force: bool = False,
) -> None:
    """Writes the page and prints its path; notes its size on standard error.

    Raises:
        UsageError: no run, or a file of another kind.
        CorruptImageError: images are missing or corrupt; the page of the others is written.
    """
    from guidegen.cli.metrics_table import notes_on_few
    from guidegen.evaluate.measure import open_drawn, read_metrics
    from guidegen.report.page import build_page
    from guidegen.runs.files import write_atomically

    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {out}: a report is written as .html.")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"-o {out}: no such folder.")
    refuse_foreign(out, force)
    drawn = [open_drawn(run, check_hashes=False) for run in runs]
    pairs, warnings = [], []
    for run in drawn:
        rows, stale = read_metrics(run)
        pairs.append((run, rows))
        warnings += notes_on_few([(run, rows)]) if rows else []
        warnings += [f"{run.folder} is not complete: {lack}" for lack in run.missing]
        if stale:
            warnings.append(f"{run.folder}: {stale} rows of metrics are of other images and are left out; evaluate it again")
    corrupt = [reason for run in drawn for reason in run.corrupt]
    page, inside, unread = build_page(pairs, out, int(max_size * 1e6), thumbnail, warnings, _per_run())
    corrupt += unread
    data = page.encode()
    write_atomically(out, data)
    print_made("report", out, runs[0] if len(runs) == 1 else None, as_json)
    if open_it:
        _show(out, quiet)
    if not quiet:
        _note(drawn, warnings, len(data), inside, max_size)
    if corrupt:
        images = sum(len(run.rows) for run in drawn)
        raise refusal(corrupt, images, f"{out} shows the others")


def _per_run() -> set[str]:
    """The options that say which images of a run are drawn, or what becomes of them: not those of one image."""
    from guidegen.cli.afterwards import Afterwards
    from guidegen.cli.flags import Draw, Messages, Output, SampleOptions, SweepOptions
    from guidegen.cli.tune import SearchOptions

    axes = flags_of(SweepOptions) - flags_of(SampleOptions)
    return (flags_of(Draw, Output, Messages, Afterwards, SearchOptions) | axes) - {"mode"}


def _note(drawn: Sequence[Drawn], warnings: Sequence[str], size: int, inside: bool, max_size: float) -> None:
    for warning in warnings:
        console.note(warning if warning.startswith(("warning: ", "note: ")) else f"warning: {warning}")
    count = sum(len(run.rows) for run in drawn)
    where = "inside it" if inside else f"linked, as they exceed --max-size {max_size:g}"
    console.note(f"{size / 1e6:.1f} MB, {count:,} images {where}")
