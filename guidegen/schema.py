"""The border to what is read back from disk: bytes become checked values, or an error that says what is wrong with them.

Types are those of msgspec: dataclasses, `Annotated[int, Meta(ge=0)]`, unions and so on; fields that a
type does not name are ignored, so that newer files stay readable.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from guidegen.errors import GuidegenError

T = TypeVar("T")
LARGEST_TEXT = 64 << 20
"""Bytes of the largest JSON or text file that is read whole."""


def read_bytes(path: Path, error: type[GuidegenError], limit: int = LARGEST_TEXT) -> bytes:
    """The whole of a regular file: nothing that waits (a FIFO), has no end (/dev/zero) or does not fit.

    Args:
        path: of the file; a symbolic link is followed.
        error: raised for anything else.
        limit: in bytes.

    Raises:
        error: not there, no regular file, unreadable, or larger than `limit`.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path} is not a regular file.")
            data = file.read(limit + 1)
    except IsADirectoryError:
        raise error(f"{path} is a directory; a file is expected there.") from None
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the path
        raise error(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}.") from None
    if len(data) > limit:
        raise error(f"{path} has more than {limit:,} bytes, which is too much for what it should hold.")
    return data


def decode(data: bytes, kind: type[T], where: object, error: type[GuidegenError]) -> T:
    """JSON as a value of `kind`. NaN and infinity are not JSON.

    Args:
        data: UTF-8.
        kind: the type that it should be.
        where: names the data in the message.
        error: raised for anything else.

    Raises:
        error: not JSON, nested too deeply, or something else than `kind`.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as problem:
        raise error(f"{where} {_wrong(problem)}") from None


def convert(value: Any, kind: type[T], where: object, error: type[GuidegenError]) -> T:
    """A decoded value as one of `kind`; else as `decode`."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as problem:
        raise error(f"{where} {_wrong(problem)}") from None


def _wrong(problem: Exception) -> str:
    """What is wrong, after the name of the data: `is not valid: ...`."""
    if isinstance(problem, RecursionError):
        return "is nested too deeply."
    if isinstance(problem, msgspec.ValidationError):
        what, _, path = str(problem).replace("`", "").partition(" - at ")
        at = f" at {path.removeprefix('$.')}" if path else ""
        return f"is not valid: {what[:1].lower()}{what[1:]}{at}."
    return f"is not valid JSON: {str(problem).strip() or type(problem).__name__}."
