"""Starting over: what earlier commands made in a run directory goes, and nothing else does."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from guidegen.errors import UsageError
from guidegen.runs.files import find_temporary, unlink_if_abandoned
from guidegen.runs.locks import clear_locks
from guidegen.runs.schema import parse_row, read_run

_MADE = re.compile(r"manifest.*\.jsonl|grid(-[1-9]\d*)?\.png|metrics\.jsonl|curves\.(svg|png)|report\.html")
_EXPORT = re.compile(r"(.+,)?w-?\d[\d.e+-]*(_[cg]-?\d[\d.e+-]*)*(-\d{5,}\.tar|\.npz)")
_LARGEST_ROW = 16 << 20
_IMAGE = re.compile(r"\d{6,}\.png")
_FEATURES = re.compile(r"[0-9a-f]{16}\.npz")


def clear_leftovers(folder: Path, files: Collection[str] | None = None) -> None:
    """Deletes the temporary files that dead processes left, of some files, relative to `folder`, or of all."""
    for target, part in list(find_temporary(folder)):
        if files is None or target in files:
            unlink_if_abandoned(part)


def wipe(folder: Path) -> None:
    """Deletes what guidegen made in a run directory, but for run.json and the lock of the run itself.

    run.json comes last, with what replaces it: while it is there, the same command can start over again.
    """
    for name in _made(folder):
        (folder / name).unlink(missing_ok=True)
    _wipe_below(folder / "features", _FEATURES)
    _wipe_below(folder / "images", _IMAGE)
    clear_leftovers(folder)
    clear_locks(folder)


def remove(folder: Path) -> None:
    """Deletes a run directory; what guidegen did not make in it stays."""
    wipe(folder)
    for name in ("run.json", ".run.json.lock", ".lock"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()


def _made(folder: Path) -> Iterator[str]:
    """The files in the directory itself that guidegen made: by name, by what run.json says, or by what is in them."""
    exports: Collection[str] = ()
    with suppress(UsageError):  # damaged: the contents decide
        exports = read_run(folder).get("exports", ())
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir(follow_symlinks=False) and (
            _MADE.fullmatch(entry.name) or entry.name in exports or (_EXPORT.fullmatch(entry.name) and _is_ours(entry.path))
        ):
            yield entry.name


def _is_ours(path: str) -> bool:
    """Whether a file carries rows of a run, as `merge` writes them into an .npz and, one a sample, into a .tar."""
    try:
        if path.endswith(".npz"):
            with zipfile.ZipFile(path) as archive:
                return {"guidegen.npy", "guidegen_rows.npy"} <= set(archive.namelist())
        with tarfile.open(path, "r:") as samples:
            members = [member for _, member in zip(range(4), samples, strict=False) if member.name.endswith(".json")]
            file = samples.extractfile(members[0]) if members else None
            return file is not None and parse_row(file.read(_LARGEST_ROW) + b"\n") is not None
    except (OSError, ValueError, zipfile.BadZipFile, tarfile.TarError):
        return False


def _wipe_below(top: Path, names: re.Pattern[str]) -> None:
    """Deletes the files of such names, and then the directories that are empty."""
    if top.is_symlink():
        return
    for parent, _, files in os.walk(top, topdown=False):
        for name in files:
            if names.fullmatch(name):
                (Path(parent) / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or a link
            os.rmdir(parent)
