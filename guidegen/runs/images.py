"""Images of a run, read back: inside its directory, whole, and the ones that were drawn; or refused, whatever lies there."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.errors import GuidegenError, IncompleteError
from guidegen.runs.manifest import Manifests
from guidegen.schema import read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_FILE = 1 << 30
"""Bytes of an image file that is read."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LISTED = 5


class CorruptImageError(IncompleteError):
    """An image of a run that is not the one of its row."""


def read_drawn(run: Path, row: Mapping[str, Any]) -> Image:
    """The image of a row, decoded.

    Args:
        run: the run directory.
        row: of its manifest, of an image that was finished.

    Raises:
        CorruptImageError: it is outside of the run, no regular file, another file than was drawn, or no image
            of the row's size.
    """
    data = read_drawn_bytes(run, row)
    shape = row.get("shape")
    picture = decode(data, run / row["file"], CorruptImageError, ["PNG"])
    if shape is not None and ([*picture.size[::-1]] != list(shape[:2]) or picture.mode != MODES.get(shape[2])):
        raise CorruptImageError(
            f"{run / row['file']} is {picture.mode} of {picture.width}x{picture.height}, its row says {shape}."
        )
    return picture


def read_drawn_bytes(run: Path, row: Mapping[str, Any]) -> bytes:
    """The file of a row, with the hash that it was written with; else as `read_drawn`."""
    path = run / row["file"]
    if not is_inside(run, row["file"]):
        raise CorruptImageError(f"{path} is outside of the run.")
    data = read_bytes(path, CorruptImageError, LARGEST_FILE)
    if row.get("sha256") is not None and hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise CorruptImageError(f"{path} has changed since it was drawn.")
    return data


def decode(data: bytes, name: object, error: type[GuidegenError], formats: list[str] | None = None) -> Image:
    """An encoded image, its pixels read.

    Raises:
        error: it is none, it is cut short, or it would unpack into more pixels than Pillow takes for a picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=formats)
            picture.load()
    except MemoryError:
        raise
    except Exception as problem:  # what Pillow's decoders raise is of all kinds: OSError, SyntaxError, struct.error ...
        unknown = isinstance(problem, UnidentifiedImageError)  # whose words name an object in memory
        reason = f"of no kind that Pillow knows, {len(data):,} bytes" if unknown else str(problem)
        raise error(
            f"{name} cannot be read as an image: {reason.splitlines()[0] if reason else type(problem).__name__}."
        ) from None
    return picture


def is_inside(run: Path, file: str) -> bool:
    """Whether a file of a run is inside of it, links followed."""
    try:
        return (run / file).resolve().is_relative_to(run.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, a null byte
        return False


def invalid_rows(run: Path) -> list[str]:
    """Lines of the manifests that are no rows, such as of files outside of the run; not the torn last ones of a crash."""
    return [
        f"{path}: line {i} is no row of a manifest."
        for path, numbers in Manifests(run).invalid_lines().items()
        for i in (numbers if _ends(path) else numbers[:-1])
    ]


def _ends(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def refusal(reasons: Sequence[str], images: int, rest: str) -> CorruptImageError:
    """The error that ends a command which left out corrupt images.

    Args:
        reasons: what is wrong with each.
        images: how many there were in all.
        rest: what was made of the others.
    """
    shown = " ".join(dict.fromkeys(reasons[:_LISTED]))
    more = f" And {len(reasons) - _LISTED} more." if len(reasons) > _LISTED else ""
    return CorruptImageError(f"{len(reasons)} of {images} images are missing or corrupt; {rest.rstrip('.')}.\n{shown}{more}")
