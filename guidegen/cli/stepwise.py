"""`--stepwise DIR`: the denoised estimate at each step of sampling, as one strip for each image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.errors import UsageError
from guidegen.runs.files import write_atomically
from guidegen.spec.cell import Cell

if TYPE_CHECKING:
    from torch import Tensor

MOST_IMAGES = 16
_SIDE, _GAP = 96, 4


def check_stepwise(folder: str, images: int) -> None:
    """Raises UsageError where the strips of so many images cannot be written there."""
    if images > MOST_IMAGES:
        raise UsageError(f"--stepwise keeps each step of {MOST_IMAGES} images at most, and these are {images:,}.")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"--stepwise {folder} is a file; name a folder.")


class Strips:
    """Collects the estimates of each image, and writes its strip after the last step.

    Args:
        folder: where to; made if it is not there.
        steps: how many estimates an image has.
    """

    def __init__(self, folder: Path, steps: int):
        self.folder, self._steps = folder, steps
        self._frames: dict[Cell, list[Any]] = {}

    def __call__(self, cells: Sequence[Cell], index: int, estimates: Tensor) -> None:
        """Takes the estimates (B, C, H, W) of one step, counted from 0; a batch that is drawn again starts over."""
        from guidegen.sampling.loop import to_uint8

        for cell, frame in zip(cells, to_uint8(estimates).cpu().numpy(), strict=True):
            frames = self._frames.setdefault(cell, [])
            del frames[index:]
            frames.append(frame)
            if index == self._steps - 1:
                self._write(cell, self._frames.pop(cell))

    def _write(self, cell: Cell, frames: Sequence[Any]) -> None:
        from PIL import Image

        height, width = frames[0].shape[:2]
        scale = max(1, round(_SIDE / max(height, width)))
        step = width * scale + _GAP
        strip = Image.new("RGB", (len(frames) * step - _GAP, height * scale), (255, 255, 255))
        for i, frame in enumerate(frames):
            picture = Image.fromarray(frame.squeeze()).convert("RGB")
            strip.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (i * step, 0))
        buffer = io.BytesIO()
        strip.save(buffer, "PNG")
        self.folder.mkdir(parents=True, exist_ok=True)
        name = cell.file.removeprefix("images/").replace("/", "_")
        write_atomically(self.folder / name, buffer.getvalue())
