"""Arrays of untrusted .npz files: no larger than their file can hold, and never pickled objects."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from guidegen.errors import GuidegenError, UnsafeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGEST = 1 << 32
"""Bytes of the largest array that is read whole."""
_HIGHEST_RATIO = 1100  # deflate packs no better


@contextmanager
def opened(path: Path, what: str, error: type[GuidegenError]) -> Iterator[zipfile.ZipFile]:
    """The archive of an .npz; whatever goes wrong while it is read is `error`.

    Args:
        path: of a file.
        what: names it in messages.
        error: raised for what is no .npz.
    """
    if not path.is_file():
        raise error(f"{what} is not a regular file.")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (GuidegenError, MemoryError):
        raise
    except Exception as problem:  # zipfile, zlib, struct and numpy raise different errors for damaged data
        words = str(problem).strip() or type(problem).__name__
        raise error(f"{what} cannot be read as .npz: {words.splitlines()[0]}") from None


def names(archive: zipfile.ZipFile) -> list[str]:
    """Of the arrays in it."""
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


@contextmanager
def member(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
    """An array as a file at its first byte, with its shape, type and whether it is in Fortran's order.

    Raises:
        UnsafeError: it holds pickled objects.
        ValueError: it is damaged, or as large as its file cannot be.
    """
    from numpy.lib import format as npy

    about = archive.getinfo(f"{name}.npy")
    if about.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is not compressed as numpy does it")
    if about.file_size > _HIGHEST_RATIO * (about.compress_size + 1):
        raise ValueError(f"{name} claims {about.file_size:,} bytes, from {about.compress_size:,} compressed ones")
    with archive.open(about) as file:
        version = npy.read_magic(file)
        shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
        if dtype.hasobject:
            raise UnsafeError(f"{archive.filename}: {name} holds pickled objects, which could run code. Save plain numbers.")
        left = about.file_size - file.tell()
        if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != left:
            raise ValueError(f"{name} claims to be {dtype} {shape}, and its file has {left:,} bytes")
        yield file, shape, dtype, fortran


def read(archive: zipfile.ZipFile, name: str, limit: int = LARGEST) -> NDArray[Any]:
    """A whole array.

    Raises:
        UnsafeError, ValueError: as `member`; or it has more than `limit` bytes.
    """
    import numpy as np

    with member(archive, name) as (file, shape, dtype, fortran):
        size = prod(shape) * dtype.itemsize
        if size > limit:
            raise ValueError(f"{name} has {size:,} bytes, which is too much for what it should hold")
        data = bytearray()
        while len(data) < size and (part := file.read(min(1 << 20, size - len(data)))):  # no more than is there
            data += part
        if len(data) < size:
            raise ValueError(f"{name} is cut short")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
