"""Small files in the user's cache: in `GUIDEGEN_CACHE`, or where the system has it; nothing is kept where that is empty."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_folder(kind: str) -> Path | None:
    """Where files of a kind are kept; None where they are not."""
    asked = os.environ.get("GUIDEGEN_CACHE")
    if asked is not None:
        return Path(asked) / kind if asked.strip() else None
    try:
        home = Path.home()
    except RuntimeError:  # a user without one
        return None
    if sys.platform == "darwin":
        usual = home / "Library" / "Caches"
    elif sys.platform == "win32":
        usual = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return usual / "guidegen" / kind


def keep(place: Path, data: bytes) -> None:
    """Writes all of a file or nothing; a folder that cannot be written keeps nothing."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=place.parent, suffix=".part")
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(part, place)
        except BaseException:
            os.unlink(part)
            raise
