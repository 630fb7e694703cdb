"""`guidegen presets`: published checkpoints, what they were sampled with, and the figure that came of it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from guidegen.cli import console, options
from guidegen.errors import UsageError, quoted
from guidegen.models.presets import PRESETS, Preset

_TITLES = ("preset", "checkpoint", "guided by", "w", "steps", "published", "source")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("presets", help="List published checkpoints that convert knows, with their settings and figures.")(_presets)


def _presets(
    query: Annotated[str, typer.Argument(metavar="[QUERY]", help="A part of a preset's or a file's name.")] = "",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    wanted = query.strip().casefold()
    found = [p for p in PRESETS if any(wanted in (each or "").casefold() for each in (p.name, p.file, p.guide))]
    if not found:
        raise UsageError(f"No preset or published file like {quoted(query)}. `guidegen presets` lists all {len(PRESETS)}.")
    if as_json:
        for preset in found:
            console.result(json.dumps({"type": "preset"} | asdict(preset), ensure_ascii=False))
    elif not sys.stdout.isatty():
        console.result("\n".join("\t".join(_cells(preset)) for preset in found))
    else:
        _table(found)


def _cells(p: Preset) -> tuple[str, ...]:
    options = f" {p.scheduler_opt}" if p.scheduler_opt else ""
    return (p.name, p.file, p.guide or "-", f"{p.w:g}", f"{p.steps}{options}", p.figure or "-", p.source)


def _table(found: list[Preset]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in _TITLES:
        table.add_column(title, style="bold" if title == "preset" else None, overflow="fold")
    for preset in found:
        table.add_row(*map(console.clean, _cells(preset)))
    Console(highlight=False, markup=False).print(table)
