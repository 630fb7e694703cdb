"""Opening classifiers and image models of any kind, and loading the classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from guidegen.arguments import instance, one_of
from guidegen.errors import CheckpointError, UsageError
from guidegen.models.classifiers.info import AnyClassifier, ClassifierInfo, Classifiers, ImageModel, Source
from guidegen.models.configs import read_config
from guidegen.models.discovery import subclasses_in
from guidegen.models.hub import locate
from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.python_file import split_python_ref

if TYPE_CHECKING:
    import torch


def open_classifier(
    ref: str | Path, input: str | None = None, weights: bool = False, access: Access = DEFAULT_ACCESS
) -> ClassifierInfo:
    """Opens a classifier without its weights.

    Args:
        ref: folder or hub id of a `NoisyClassifier`, of a transformers image classifier, or of a
            CLIP-like model, or `path/to/file.py:NAME` of a `guidegen.ClassifierModel`.
        input: noisy or denoised; None for the input that the classifier was trained on.
        weights: also download the weights of a hub id.
        access: how it may be read.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for custom code.
        UsageError: it does not take that input.
        ValueError: `input` is something else.
    """
    one_of("input", input, (None, "noisy", "denoised"))
    found = _open(str(ref), "a classifier", [kind for kind in _kinds() if issubclass(kind, ClassifierInfo)], input, access)
    assert isinstance(found, ClassifierInfo)
    if weights:
        found.download(access)
    return found


def open_classifiers(
    weighted: Sequence[tuple[str, float]], input: str | None = None, access: Access = DEFAULT_ACCESS
) -> AnyClassifier:
    """`open_classifier` of each, with its weight; one of weight 1 is itself.

    Args:
        weighted: the reference and the weight of each.
        input: for those that take it; the others keep the input that they were trained on.
        access: as in `open_classifier`.

    Raises:
        CheckpointError, UnsafeError: as `open_classifier` does.
        UsageError: none of them takes that input, or one is named twice.
    """
    parts: list[tuple[ClassifierInfo, float]] = []
    refusals: list[UsageError] = []
    for ref, weight in weighted:
        try:
            part = open_classifier(ref, input, access=access)
        except UsageError as refusal:
            refusals.append(refusal)
            part = open_classifier(ref, access=access)
        if part.identity in [other.identity for other, _ in parts]:
            raise UsageError(f"--classifier {ref} is named twice: name it once, with the sum of the weights.")
        parts.append((part, weight))
    if len(refusals) == len(parts):
        raise refusals[0]
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else Classifiers(tuple(parts))


def open_image_model(ref: str | Path, weights: bool = False, access: Access = DEFAULT_ACCESS) -> ImageModel:
    """Opens a model that makes features of denoised images: a classifier, or an image model of transformers or timm.

    Args:
        ref: as in `open_classifier`.
        weights: also download the weights of a hub id.
        access: how it may be read.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for custom code.
    """
    found = _open(str(ref), "an image model", _kinds(), "denoised", access)
    if weights:
        found.download(access)
    return found


def load_classifier(
    classifier: ClassifierInfo,
    device: torch.device | str,
    access: Access = DEFAULT_ACCESS,
    texts: Sequence[str] = (),
    autocast: torch.dtype | None = None,
) -> torch.nn.Module:
    """The classifier with fp32 weights, in eval mode, on `device`.

    For noisy input a module from x_t (B, C, H, W) and timesteps (B,) to logits (B, K); for denoised input from images
    (B, C, H, W) in [-1, 1] to logits (B, K).

    Args:
        classifier: the opened classifier.
        device: to load it to.
        access: how it may be read.
        texts: what a zero-shot classifier distinguishes, one column each.
        autocast: a `NoisyClassifier` keeps its weights for calls under autocast to that dtype, see `cast_weights`.

    Raises:
        CheckpointError: the weights do not load.
    """
    import torch

    instance("classifier", classifier, ClassifierInfo, "what open_classifier returns")
    one_of("autocast", autocast, (None, torch.float16, torch.bfloat16))
    return classifier.load(device, access, texts, autocast)


@cache
def _kinds() -> list[type[ImageModel]]:
    """Every kind; classifiers first, since most of them are image models of transformers too."""
    found = subclasses_in("guidegen.models.classifiers.kinds", ImageModel)  # type: ignore[type-abstract]
    return sorted(found, key=lambda kind: not issubclass(kind, ClassifierInfo))


def _open(ref: str, what: str, kinds: Sequence[type[ImageModel]], input: str | None, access: Access) -> ImageModel:
    source = _locate(ref, what, access)
    kind = next((kind for kind in kinds if kind.matches(source)), None)
    if kind is None:
        found = source.config.get("_class_name") or source.architectures or "no class"
        *some, last = (kind.expected for kind in kinds if kind.expected is not None)
        raise CheckpointError(
            f"{source.folder} is not {what}: config.json says {found}, where {', '.join(some)} or {last} is needed."
        )
    return kind.open(source, input)


def _locate(ref: str, what: str, access: Access) -> Source:
    if python_ref := split_python_ref(ref):
        return Source(ref, python_ref[0].parent, None, {})
    folder, revision = locate(ref, access.offline)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not {what}: config.json is missing.")
    return Source(ref, folder, revision, read_config(folder / "config.json"))
