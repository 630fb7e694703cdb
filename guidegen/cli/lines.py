"""The lines of `--json`: one object each, with its `type`, an absolute `path` and the `run` that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from guidegen.cli import console
from guidegen.runs.schema import Row, dumps


def print_line(kind: str, path: Path | None, run: Path | None, fields: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Prints one line.

    Args:
        kind: its `type`, such as grid, metrics, report or file.
        path: what was made or checked; None where there is no such file.
        run: the run directory that it is of; None where it is of none, or of several.
        fields: the rest of it.
    """
    about = {"type": kind, "path": _absolute(path), "run": _absolute(run)}
    console.result(dumps(about | dict(fields) | about))  # whatever a file of somebody's has under these names


def print_image(row: Row, run: Path | None, file: Path | None = None) -> None:
    """Prints the row of an image, under the keys that it has in the manifest.

    Args:
        row: of the manifest.
        run: the directory of the image; None where it went into one file.
        file: that one file.
    """
    path = file if run is None else run / row["file"]
    print_line("image", path if row["status"] == "ok" else None, run, row)


def print_made(kind: str, path: Path, run: Path | None, as_json: bool) -> None:
    """Prints the path of what was made, as a line of `--json` or as it is."""
    if as_json:
        print_line(kind, path, run)
    else:
        console.result(str(path))


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
