"""Networks of your own: what guidegen needs to know to draw from one, or to be guided by one."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.arguments import instance, one_of, several, whole
from guidegen.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from guidegen.scores.guidance import Denoiser


@dataclass(frozen=True)
class Model:
    """A diffusion model of your own, for `--model path/to/file.py:NAME`.

    Attributes:
        load: from a device to a denoiser there: `(x_t (B, C, H, W), t (), labels (B,)) -> prediction
            (B, C, H, W)`, all fp32, with the attribute `prediction_type` (epsilon, sample,
            v_prediction or flow). Label -1 asks for the unconditional prediction. A denoiser of
            latents also has `decode(latents) -> images (B, 3, H, W) in [-1, 1]`.
        shape: (C, H, W) of what it draws.
        scheduler: config of a diffusers scheduler, `_class_name` included: the noise schedule it
            was trained on.
        labels: id -> name; empty for an unconditional model.
        has_null: whether it answers label -1.
        steps: the number of steps to take unless told.
        image_size: (height, width) of the images, where `decode` changes it.
        version: what tells these weights from others, such as their sha256; a run goes on only with
            the same file and version.
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
        _check_load(self.load)
        for side in several("shape", self.shape, 3, "of C, H and W"):
            whole("shape", side, 1)
        instance("scheduler", self.scheduler, Mapping, "the config of a scheduler as a mapping")
        _check_labels(self.labels)
        whole("steps", self.steps, 1)
        for side in () if self.image_size is None else several("image_size", self.image_size, 2, "of height and width"):
            whole("image_size", side, 1)


@dataclass(frozen=True)
class ClassifierModel:
    """A classifier of your own, for `--classifier path/to/file.py:NAME`.

    Attributes:
        load: from a device to a module there: `(x_t, t) -> logits (B, K)` for noisy input,
            `images (B, C, H, W) in [-1, 1] -> logits (B, K)` for denoised input.
        labels: id -> name, in the order of the columns.
        input: noisy or denoised.
        version: as in `Model`.
    """

    load: Callable[[torch.device], Any]
    labels: Mapping[int, str]
    input: str = "noisy"
    version: str = ""

    def __post_init__(self) -> None:
        _check_load(self.load)
        _check_labels(self.labels)
        several("labels", self.labels)
        one_of("input", self.input, ("noisy", "denoised"))


def _check_load(load: Any) -> None:
    if not callable(load):
        raise TypeError(f"load takes a function of a device, found {load!r}.")


def _check_labels(labels: Any) -> None:
    instance("labels", labels, Mapping, "a mapping of ids to names")
    for label, name in labels.items():
        whole("labels", label)
        instance("labels", name, str, "names that are text")


def split_own(ref: str) -> tuple[Path, str] | None:
    """(file, name) of `path/to/file.py:NAME`; None for anything else."""
    path, _, name = ref.rpartition(":")
    return (Path(path).expanduser(), name) if path.endswith(".py") and name.isidentifier() else None


def read_own(file: Path, name: str, kind: type) -> Any:
    """The object `name` of a Python file, an instance of `kind`. The file is run: it is yours, and was named by its path.

    Raises:
        CheckpointError: no such file or name, or it is something else.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file) if file.is_file() else None
    if spec is None or spec.loader is None:
        raise CheckpointError(f"No Python file at {file}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        what = "is not there" if found is None else f"is a {type(found).__name__}"
        raise CheckpointError(f"{file}:{name} {what}; it should be a guidegen.{kind.__name__}.")
    return found


def own_sha256(ref: str, version: str = "") -> str:
    """Identity of something of one's own: its file and what it says of its weights."""
    file, name = split_own(ref) or (Path(ref), "")
    return hashlib.sha256(file.read_bytes() + f":{name}:{version}".encode()).hexdigest()
