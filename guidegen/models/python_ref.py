"""Custom networks: what guidegen needs to know to draw from one, or to be guided by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from guidegen.errors import GuidegenError, UsageError
from guidegen.schema import convert

if TYPE_CHECKING:
    import torch

    from guidegen.scores.interfaces import Denoiser

LARGEST_EDGE = 1 << 14
"""Pixels of the longest edge of an image."""
MOST_LABELS = 1_000_000
_LONGEST_NAME = 4096
_HALF = re.compile(r"[\ud800-\udfff]")  # of a surrogate pair: no file can hold it
_LABEL = re.compile(r"0|[1-9][0-9]{0,8}")
Edge = Annotated[int, Meta(ge=1, le=LARGEST_EDGE)]
Channels = Annotated[int, Meta(ge=1, le=1 << 16)]
Steps = Annotated[int, Meta(ge=1, le=1_000_000)]


@dataclass(frozen=True)
class Model:
    """A custom diffusion model, for `--model path/to/file.py:NAME`.

    Attributes:
        load: from a device to a denoiser there: `(x_t (B, C, H, W), t (), labels (B,)) -> prediction
            (B, C, H, W)`, all fp32, with the attribute `prediction_type` (epsilon, sample,
            v_prediction or flow). Label -1 asks for the unconditional prediction. A denoiser of
            latents also has `decode(latents) -> images (B, 3, H, W) in [-1, 1]`.
        shape: (C, H, W) of what it draws.
        scheduler: config of a diffusers scheduler, `_class_name` included: the noise schedule it
            was trained on. With one of EDM or a variance exploding SDE (EDMEulerScheduler, ScoreSdeVeScheduler)
            t is sigma, x_t is x_0 + sigma eps, and the denoiser predicts "sample".
        labels: id -> name; empty for an unconditional model.
        has_null: whether it answers label -1.
        steps: the number of steps to take by default.
        image_size: (height, width) of the images, where `decode` changes it.
        version: what distinguishes these weights from others, such as their sha256; a run goes on only with
            the same file and version.

    Raises:
        UsageError: a field is of another type or out of range; it is named.
    """

    load: Callable[[torch.device], Denoiser]
    shape: tuple[int, int, int]
    scheduler: Mapping[str, Any]
    labels: Mapping[int, str] = field(default_factory=dict)
    has_null: bool = True
    steps: int = 50
    image_size: tuple[int, int] | None = None
    version: str = ""

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"shape": tuple[Channels, Edge, Edge], "scheduler": dict[str, Any], "has_null": bool}
        _check(self, kinds | {"steps": Steps, "image_size": tuple[Edge, Edge] | None, "version": str})


@dataclass(frozen=True)
class ClassifierModel:
    """A custom classifier, for `--classifier path/to/file.py:NAME`.

    Attributes:
        load: from a device to a module there: `(x_t, t) -> logits (B, K)` for noisy input,
            `images (B, C, H, W) in [-1, 1] -> logits (B, K)` for denoised input.
        labels: id -> name, in the order of the columns.
        input: noisy or denoised.
        version: as in `Model`.

    Raises:
        UsageError: as `Model` does.
    """

    load: Callable[[torch.device], Any]
    labels: Mapping[int, str]
    input: str = "noisy"
    version: str = ""

    def __post_init__(self) -> None:
        _check(self, {"input": Literal["noisy", "denoised"], "version": str})
        if not self.labels:
            raise UsageError("ClassifierModel: labels is empty; it should name the label of each column.")


def _check(custom: Model | ClassifierModel, kinds: Mapping[str, Any]) -> None:
    """Makes the fields what their types say, or says which cannot be."""
    name = type(custom).__name__
    if not callable(custom.load):
        raise UsageError(f"{name}: load should be a function from a device, found {type(custom.load).__name__}.")
    for key, kind in kinds.items():
        value = getattr(custom, key)
        plain = dict(value) if isinstance(value, Mapping) else value
        object.__setattr__(custom, key, convert(plain, kind, f"{name}: {key}", UsageError))
    object.__setattr__(custom, "labels", label_names(custom.labels, f"{name}: labels", UsageError))


def label_names(value: Any, where: object, error: type[GuidegenError]) -> dict[int, str]:
    """id -> name of labels, from a mapping whose ids are numbers, or texts as JSON has them, in its order.

    Args:
        value: that mapping.
        where: names it in the message.
        error: raised for anything else.

    Raises:
        error: no such mapping, too long, or names that are long or no valid Unicode.
    """
    if not isinstance(value, Mapping):
        raise error(f"{where} should map ids to names, found {type(value).__name__}.")
    if len(value) > MOST_LABELS:
        raise error(f"{where} has {len(value):,} labels; guidegen takes {MOST_LABELS:,}.")
    names: dict[int, str] = {}
    for label, name in value.items():
        number = int(label) if isinstance(label, str) and _LABEL.fullmatch(label) else label
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise error(f"{where} should map ids, whole numbers, to names; found the id {str(label)[:40]!r}.")
        if number in names:
            raise error(f"{where} has the id {number} twice.")
        if not isinstance(name, str):
            raise error(f"{where} should map ids to names; that of {number} is {type(name).__name__}, no text.")
        if len(name) > _LONGEST_NAME or _HALF.search(name):
            what = "too long" if len(name) > _LONGEST_NAME else "not valid Unicode"
            raise error(f"{where}: the name of label {number} is {what}.")
        names[number] = name
    return names
