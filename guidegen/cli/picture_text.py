"""What an image, an .npz or a run says of how it was drawn."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from guidegen.cli.output import EXIF_IFD, PACKED, USER_COMMENT, carried_by_npz, unpack
from guidegen.errors import UsageError
from guidegen.runs.schema import loads, read_run
from guidegen.schema import LARGEST_TEXT

_FORMATS = ("PNG", "WEBP", "JPEG")
_CHARSET = 8  # bytes before the text of an EXIF comment
_DEEPEST = 8  # folders between an image and its run.json


class PictureText(NamedTuple):
    """What stands in a file.

    Attributes:
        ours: the JSON of guidegen, not yet checked; None where there is none.
        parameters: the text of the AUTOMATIC1111 web interface; None where there is none.
    """

    ours: Any = None
    parameters: str | None = None


def read_text(path: Path) -> PictureText:
    """The text of a run directory, its run.json, a PNG, WebP or JPEG, or an .npz.

    No image is decoded: of an image, only what stands before its pixels is read.

    Raises:
        UsageError: no such file, or it says nothing.
    """
    if path.is_dir() or path.name == "run.json":
        return PictureText(read_run(path if path.is_dir() else path.parent))
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Give an image, an .npz or a run directory.")
    try:
        found = PictureText(carried_by_npz(path)) if path.suffix.lower() == ".npz" else _image_text(path)
    except Exception:  # whatever Pillow, numpy, zipfile and zlib raise at what is none of ours
        found = PictureText()
    if found == PictureText():
        raise UsageError(f"{path} does not say how it was drawn: its text holds no settings.")
    return found


def run_of(path: Path) -> dict[str, Any] | None:
    """run.json of the run in whose folder a file stands; None where it stands in none."""
    for folder in [*path.resolve().parents][:_DEEPEST]:
        if (folder / "run.json").is_file():
            return read_run(folder)
    return None


def _image_text(path: Path) -> PictureText:
    from PIL import Image

    with warnings.catch_warnings(), Image.open(path, formats=_FORMATS) as image:
        warnings.simplefilter("ignore")  # a large grid is no bomb
        if image.format == "PNG":
            return _png_text(image.info)
        comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    comment = comment.encode() if isinstance(comment, str) else bytes(comment)[:LARGEST_TEXT]
    text = comment[_CHARSET:]
    if text.startswith(PACKED):
        return PictureText(loads(unpack(base64.b64decode(text.removeprefix(PACKED)), LARGEST_TEXT)))
    encoding = "utf-16-be" if comment.startswith(b"UNICODE") else "utf-8"
    return PictureText(parameters=text.decode(encoding, "replace") or None)


def _png_text(info: Mapping[Any, Any]) -> PictureText:
    ours, parameters = info.get("guidegen"), info.get("parameters")
    return PictureText(loads(ours) if isinstance(ours, str) else None, parameters if isinstance(parameters, str) else None)
