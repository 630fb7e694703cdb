"""How long network calls took in earlier runs on this machine, so that `--dry-run` can say how long others will take."""

from __future__ import annotations

import math
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from guidegen.errors import GuidegenError
from guidegen.models.user_cache import cache_folder, keep
from guidegen.schema import decode, read_bytes
from guidegen.spec.cell import digest
from guidegen.spec.settings import Settings

_Rows = Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]{0,6}$")]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """Seconds a network call by the images of a batch, of one kind of call on one device."""

    seconds: dict[_Rows, _Seconds]


class Stopwatch:
    """Seconds a network call, from the end of the first step on, which is slow for reasons of its own."""

    def __init__(self) -> None:
        self._steps, self._began = 0, 0.0

    def step(self) -> None:
        """A step of a batch has ended."""
        self._steps += 1
        if self._steps == 1:
            self._began = time.monotonic()

    def seconds(self, calls: int) -> float | None:
        """Of each of the calls that all steps made, which have all ended; None where there was one step."""
        if self._steps < 2 or not calls:
            return None
        return (time.monotonic() - self._began) / (calls * (1 - 1 / self._steps))


def keep_seconds(settings: Settings, device: torch.device, compiled: bool, batch: int, seconds: float) -> None:
    """Keeps what a call took, in place of what was known for batches of as many images."""
    if place := _place(settings, device, compiled):
        keep(place, msgspec.json.encode(_Kept({**_kept(place), str(batch): seconds})))


def known_seconds(settings: Settings, device: torch.device, compiled: bool, batch: int) -> tuple[float, int] | None:
    """Seconds a call in the batches nearest to this size, and their size; None where none were drawn here."""
    kept = _kept(place) if (place := _place(settings, device, compiled)) else {}
    if not kept:
        return None
    nearest = min(map(int, kept), key=lambda size: abs(math.log(size / batch)))
    return kept[str(nearest)], nearest


def _place(settings: Settings, device: torch.device, compiled: bool) -> Path | None:
    """The file of calls of this kind on this device."""
    folder = cache_folder("timings")
    if folder is None:
        return None
    on_cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_cuda else f"{device.type} of {platform.node()}"
    what = (settings.mode, settings.dtype, settings.size, settings.classifier_gradient, settings.guide_model)
    kind = digest(settings.model, settings.config_sha256, *what, where, torch.get_num_threads(), compiled)
    return folder / f"{kind}.json"


def _kept(place: Path) -> dict[_Rows, _Seconds]:
    with suppress(GuidegenError):  # none yet, or damaged
        return decode(read_bytes(place, GuidegenError, 1 << 20), _Kept, place, GuidegenError).seconds
    return {}
