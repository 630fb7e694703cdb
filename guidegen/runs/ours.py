"""Which files guidegen made, by what is in them: no other is overwritten or deleted."""

from __future__ import annotations

import re
import sqlite3
import tarfile
import zipfile
from contextlib import closing
from pathlib import Path

from guidegen.errors import UsageError
from guidegen.runs.schema import loads, parse_row

_HEAD = 1 << 16
_LARGEST_ROW = 16 << 20
_MARKS = {
    ".png": re.compile(rb"\A\x89PNG.*?(iTXtguidegen\0|tEXtSoftware\0guidegen)", re.DOTALL),
    ".html": re.compile(rb'<meta name="generator" content="guidegen '),
    ".htm": re.compile(rb'<meta name="generator" content="guidegen '),
    ".svg": re.compile(rb"<dc:title>guidegen</dc:title>"),
}


def refuse_foreign(path: Path, force: bool = False, flag: str = "-o") -> None:
    """Raises UsageError where a file is to be written over one that guidegen did not make and that is not empty.

    Args:
        path: the file to write.
        force: write it all the same.
        flag: of the command, that names the file.
    """
    if force or not path.exists() or (path.is_file() and is_ours(path)):
        return
    if not path.is_file():
        raise UsageError(f"{flag} {path}: it is there and is no regular file.")
    raise UsageError(f"{flag} {path}: guidegen did not make the file that is there. --force overwrites it.")


def is_ours(path: Path) -> bool:
    """Whether guidegen made a file, or it is empty; False where it cannot be read."""
    try:
        if not path.stat().st_size:
            return True
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return "guidegen.npy" in archive.namelist()
        if path.suffix == ".tar":
            return _is_our_tar(path)
        with path.open("rb") as file:
            if path.suffix == ".db":
                return _is_our_study(path)
            if path.suffix == ".json":
                return bool({"axes", "metrics", "samples"} <= loads(file.read()).keys())
            if path.suffix == ".jsonl":
                line = file.readline(_LARGEST_ROW)
                return parse_row(line) is not None or "metrics" in loads(line)
            mark = _MARKS.get(path.suffix)
            return mark is not None and mark.search(file.read(_HEAD)) is not None
    except (OSError, ValueError, TypeError, AttributeError, sqlite3.Error, zipfile.BadZipFile, tarfile.TarError):
        return False


def _is_our_study(path: Path) -> bool:
    """Whether it is the database of a search."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        return database.execute("SELECT 1 FROM studies WHERE study_name = 'guidegen'").fetchone() is not None


def _is_our_tar(path: Path) -> bool:
    """Whether its first sample has a row of a run, as `merge` writes them."""
    with tarfile.open(path, "r:") as samples:
        members = [member for _, member in zip(range(4), samples, strict=False) if member.name.endswith(".json")]
        file = samples.extractfile(members[0]) if members else None
        return file is not None and parse_row(file.read(_LARGEST_ROW) + b"\n") is not None
