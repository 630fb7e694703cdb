"""`guidegen ls`: the runs below a folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.cli import console, options
from guidegen.cli.lines import print_line
from guidegen.errors import UsageError
from guidegen.report import grid
from guidegen.runs.manifest import Manifests
from guidegen.runs.schema import read_plans, read_run

UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("ls", help="List runs: settings, finished images, size and age.")(_ls)


def _ls(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder to search for runs.")] = Path("guidegen-runs"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; runs are made in guidegen-runs unless -o names another one.")
    found = []
    for run in find_runs(folder):
        try:
            found.append((run, describe_run(run)))
        except UsageError as error:
            console.note(f"note: {run} is left out: {error}")
    found.sort(key=lambda each: each[1]["modified"])
    if as_json:
        for run, fields in found:
            print_line("run", run, run, fields)
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        for run, fields in found:
            console.result("\t".join((str(run), *_texts(fields))))


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories in a folder, itself included; links are not followed, and runs hold no other runs."""
    for path, folders, files in os.walk(folder):
        if "run.json" in files:
            folders.clear()
            yield Path(path)
        folders.sort()


def describe_run(run: Path) -> dict[str, Any]:
    """What a run is and how far it got.

    Raises:
        UsageError: its run.json or a manifest cannot be read.
    """
    about = read_run(run)
    plans = read_plans(run, about)
    sizes = [path.stat() for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        "settings": grid.title_of(about["settings"], [axis for plan in plans for axis, _ in plan.by]),
        "images": len(Manifests(run).offsets()),
        "planned": sum(plan.samples * plan.each for plan in plans),
        "bytes": sum(each.st_size for each in sizes),
        "modified": max(each.st_mtime for each in sizes),
    }


def _texts(fields: dict[str, Any]) -> tuple[str, ...]:
    size = f"{fields['bytes'] / 1e6:,.1f} MB"
    return fields["settings"], f"{fields['images']:,} of {fields['planned']:,}", size, _age(fields["modified"])


def _age(modified: float) -> str:
    seconds = max(0.0, time.time() - modified)
    unit, length = next((each for each in UNITS if seconds >= each[1]), UNITS[-1])
    count = int(seconds // length)
    return f"{count} {unit}{'s' * (count != 1)} ago"


def _print_table(found: list[tuple[Path, dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, right in (("run", False), ("settings", False), ("images", True), ("size", True), ("age", True)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for run, fields in found:
        table.add_row(*(console.clean(text) for text in (str(run), *_texts(fields))))
    Console(highlight=False, markup=False).print(table)
