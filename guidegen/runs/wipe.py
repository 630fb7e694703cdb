"""Starting over: what earlier commands made in a run directory goes, and nothing else does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from guidegen.errors import OutputError, UsageError
from guidegen.runs.files import find_temporary, unlink_if_abandoned
from guidegen.runs.locks import clear_locks
from guidegen.runs.manifest import Manifests
from guidegen.runs.ours import is_ours
from guidegen.runs.schema import read_run

_MADE = re.compile(
    r"manifest.*\.jsonl|grid(-[1-9]\d*)?\.png|metrics\.jsonl|(curves|tune)\.(svg|png)|tune\.(json|db)|report\.html"
)
_BY_NAME = re.compile(r"manifest(\.\d+-of-\d+)?\.jsonl|tune\.db-(journal|wal|shm)")
_EXPORT = re.compile(r"(.+,)?w-?\d[\d.e+-]*(_[cg]-?\d[\d.e+-]*)*(-\d{5,}\.tar|\.npz)")
_IMAGE = re.compile(r"\d{6,}\.png")
_FEATURES = re.compile(r"[0-9a-f]{16}(\.npz|-[0-9a-f]{16}\.npy)")


def clear_leftovers(folder: Path, files: Collection[str] | None = None) -> None:
    """Deletes the temporary files that dead processes left, of some files, relative to `folder`, or of all."""
    for target, part in list(find_temporary(folder)):
        if files is None or target in files:
            unlink_if_abandoned(part)


def wipe(folder: Path) -> None:
    """Deletes what guidegen made in a run directory, but for run.json and the lock of the run itself.

    run.json comes last, with what replaces it: while it is there, the same command can start over again.
    """
    images = _images_of(folder)
    for name in list(_made(folder)):
        (folder / name).unlink(missing_ok=True)
    _wipe_below(folder / "features", lambda path: _FEATURES.fullmatch(path.name) is not None)
    _wipe_below(
        folder / "images",
        lambda path: _IMAGE.fullmatch(path.name) is not None and (str(path.relative_to(folder)) in images or is_ours(path)),
    )
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
            entry.name in exports
            or _BY_NAME.fullmatch(entry.name)
            or ((_MADE.fullmatch(entry.name) or _EXPORT.fullmatch(entry.name)) and is_ours(Path(entry.path)))
        ):
            yield entry.name


def _images_of(folder: Path) -> Collection[str]:
    """The images that the manifests name."""
    with suppress(UsageError, OutputError):
        return Manifests(folder).offsets().keys()
    return ()


def _wipe_below(top: Path, is_made: Callable[[Path], bool]) -> None:
    """Deletes the files that guidegen made, and then the directories that are empty."""
    if top.is_symlink():
        return
    for parent, _, files in os.walk(top, topdown=False):
        for name in files:
            if is_made(path := Path(parent) / name):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or a link
            os.rmdir(parent)
