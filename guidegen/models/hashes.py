"""Hashes of weight files, kept so that shards and resumed runs do not read gigabytes again.

One small file for each list of files. A file is taken to be the same while its inode, size and times are.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from guidegen.errors import GuidegenError
from guidegen.models.user_cache import cache_folder, keep
from guidegen.schema import decode, read_bytes

_SETTLED = 2.0
"""Seconds after which a file that changes again has another time, on file systems with coarse clocks."""
_State = tuple[int, int, int, int]


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What is kept of a list of files: what they were, and the hash over them."""

    states: list[_State]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def sha256_of(files: Sequence[Path]) -> str:
    """sha256 over some files, one after the other; read only where they have changed since it was kept."""
    folder = cache_folder("hashes")
    if folder is None:
        return read_sha256(files)
    paths = "\0".join(str(path.resolve()) for path in files)
    place = folder / f"{hashlib.sha256(os.fsencode(paths)).hexdigest()}.json"
    before = list(map(_state, files))
    with suppress(GuidegenError):  # none yet, or damaged
        kept = decode(read_bytes(place, GuidegenError, 1 << 20), _Kept, place, GuidegenError)
        if kept.states == before:
            return kept.sha256
    digest = read_sha256(files)
    newest = max((time_ns for state in before for time_ns in state[2:]), default=0)
    if before == list(map(_state, files)) and time.time() - newest / 1e9 > _SETTLED:
        keep(place, msgspec.json.encode(_Kept(before, digest)))
    return digest


def read_sha256(files: Sequence[Path]) -> str:
    """sha256 over some files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _state(path: Path) -> _State:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
