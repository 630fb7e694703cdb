"""Images as PNG, with the text that makes them again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from guidegen.runs.schema import dumps
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONGEST_PLAIN_TEXT = 10_000
_LONGEST_PACKED_TEXT = 1 << 20
"""Bytes: Pillow opens no image whose packed text is longer, as it may be a decompression bomb."""


def image_metadata(
    settings: Settings, cell: Cell, label_name: str, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All that makes the image again, but for where, in what batch and in which sweep it was drawn.

    Args:
        settings: of the image.
        cell: which image.
        label_name: of its label.
        about: what run.json says of all its images: the options that name the networks, and what w is.
    """
    own = {"settings": asdict(settings), "cell": replace(cell, variant=()).as_json(), "label_name": label_name}
    return own | {key: value for key, value in (about or {}).items() if value is not None}


def parameters_line(metadata: Mapping[str, Any], width: int, height: int) -> str:
    """The text that the AUTOMATIC1111 web interface writes and image browsers parse."""
    settings, cell = metadata["settings"], metadata["cell"]
    fields = {
        "Steps": settings["steps"],
        "Sampler": settings["scheduler"],
        "CFG scale": cell["w"],
        "Seed": cell["seed"],
        "Size": f"{width}x{height}",
        "Model hash": settings["model_sha256"][:10],
        "Model": settings["model"],
        "Guidance mode": settings["mode"],
    }
    prompt = cell["prompt"] or metadata["label_name"] or ("" if cell["label"] is None else f"label {cell['label']}")
    if settings["negative_prompt"]:
        prompt += f"\nNegative prompt: {settings['negative_prompt']}"
    return f"{prompt}\n" + ", ".join(f"{key}: {value}" for key, value in fields.items())


def encode_png(image: NDArray[Any], metadata: Mapping[str, Any]) -> bytes:
    """PNG of a uint8 (H, W, 3) or (H, W, 1) image with its metadata as iTXt and tEXt."""
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=png_text(metadata, parameters_line(metadata, *picture.size)))
    return buffer.getvalue()


def png_text(metadata: Mapping[str, Any], parameters: str | None = None) -> Any:
    """PNG text chunks: `guidegen` (JSON) and, for single images, `parameters`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    text = dumps(metadata, sort_keys=True)
    info.add_itxt("guidegen", text, zip=_LONGEST_PLAIN_TEXT < len(text.encode()) <= _LONGEST_PACKED_TEXT)
    if parameters is not None:
        info.add_text("parameters", parameters.encode(errors="replace").decode())  # of half a surrogate pair, a "?"
    return info
