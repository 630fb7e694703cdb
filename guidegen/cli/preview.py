"""`--preview`: what was drawn, in the terminal itself, by kitty's protocol, sixels or half blocks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guidegen.cli import console
from guidegen.errors import UsageError
from guidegen.report import grid
from guidegen.runs.images import CorruptImageError, read_drawn
from guidegen.runs.schema import Row

_ROWS = 24  # of the terminal, for a single image
_ENLARGE_TO = 512


def check_preview() -> None:
    """Raises UsageError if the library that speaks to terminals is not installed."""
    from importlib.util import find_spec

    if find_spec("textual_image") is None:
        raise UsageError("--preview needs textual-image, which is not installed: pip install textual-image")


def preview(folder: Path, rows: Sequence[Row], title: str) -> None:
    """Shows the image, or the first page of the grid, on standard error; nothing unless both streams are a terminal."""
    err = console.stderr()
    good = [row for row in rows if row["status"] == "ok"]
    if not (err.is_terminal and sys.stdout.isatty() and good):
        return
    logging.getLogger("textual_image").setLevel(logging.ERROR)
    try:
        picture = _picture(folder, good, title)
    except CorruptImageError as error:
        console.note(f"note: no preview: {error}")
        return
    height = min(_ROWS, max(4, err.height - 4)) if len(good) == 1 else "auto"
    try:
        from textual_image.renderable import Image  # asks the terminal what it can show

        err.print(Image(picture, "auto", height))
    except Exception as error:  # whatever a terminal may answer: the images are drawn and kept all the same
        console.note(f"note: this terminal cannot show the preview: {type(error).__name__}: {error}")


def _picture(folder: Path, rows: Sequence[Row], title: str) -> Any:
    from PIL import Image

    if len(rows) > 1:
        return grid.draw(folder, rows, grid.layout(rows, rows[0]["shape"][:2], title=title), 0)
    picture = read_drawn(folder, rows[0]).convert("RGB")
    times = max(1, _ENLARGE_TO // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
