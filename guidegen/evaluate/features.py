"""Networks that turn images into features or logits, and the cache of their output in a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from guidegen.errors import UsageError
from guidegen.evaluate.cache import FeatureCache
from guidegen.models.classifiers.info import ClassifierInfo, ImageModel
from guidegen.models.classifiers.opening import open_classifier, open_image_model
from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.runs.images import LARGEST_FILE, decode
from guidegen.runs.schema import Row
from guidegen.schema import read_bytes
from guidegen.spec.cell import digest
from guidegen.spec.plan import batches
from guidegen.zoo import BUNDLED

BUNDLED_CLASSIFIER = BUNDLED / "classifier"
Pixels = NDArray[np.uint8]
_PART_BYTES, _PART_ROWS = 32 << 20, 8192


@dataclass(frozen=True)
class Reader:
    """A frozen network that reads images.

    Attributes:
        name: to show.
        identity: of network, weights, preprocessing and layer, 64 hex digits: equal ones give equal numbers.
        network: uint8 images (B, 3, H, W) to features or logits (B, D), fp32.
        size: (height, width) that it reads; None where it resizes what it gets.
        weights: sha256 of its weights; None where they have none on disk.
        inception: whether its weights are those of published numbers: only then are distances called FID, KID and so on.
    """

    name: str
    identity: str
    network: Callable[[Tensor], Tensor]
    size: tuple[int, int] | None = None
    weights: str | None = None
    inception: bool = False

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UsageError if it makes no features of images of (height, width) `size`."""
        if self.size is not None and self.size != size:
            raise UsageError(
                f"The {self.name} reads images of {self.size[1]}x{self.size[0]}, and these are {size[1]}x{size[0]}: "
                "name an image model with --features ID|DIR."
            )

    @torch.no_grad()
    def __call__(self, images: Pixels) -> NDArray[np.float32]:
        """fp32 (B, D) of uint8 images (B, H, W, 3).

        Raises:
            UsageError: images of a size that the network does not read.
        """
        if self.size is not None and images.shape[1:3] != self.size:
            raise UsageError(
                f"{self.name} reads images of {self.size[1]}x{self.size[0]}, and these have "
                f"{images.shape[2]}x{images.shape[1]}: name another network with --features or --judge."
            )
        found = self.network(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
        return np.asarray(found.float().cpu().numpy(), np.float32)


def open_features(ref: str, device: torch.device, access: Access = DEFAULT_ACCESS) -> Reader:
    """The features that `--features` names: `bundled`, or a folder or hub id.

    Of a classifier they are what its last linear layer reads; of any other transformers model, its
    pooled output. A timm folder is read by timm where that is installed.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for custom code, or has only pickled weights.
        UsageError: a package that it needs is not installed.
    """
    model = open_image_model(_path_of(ref), True, access)
    weights = model.sha256(access)
    identity = digest("features", weights, model.config, model.preprocessor)
    return Reader(
        _name_of(ref), identity, _on_device(model.load_features(device, access), device, model), model.size, weights
    )


@dataclass(frozen=True)
class EvaluationClassifier:
    """The classifier that measures whether an image shows its label.

    Attributes:
        reader: its logits.
        columns: label id of a run -> column of the logits; of the labels that it knows.
    """

    reader: Reader
    columns: Mapping[Any, int]

    def correct(self, pixels: Pixels, labels: list[Any]) -> list[bool]:
        """Whether each image (B, H, W, 3) is classified as its label; of those whose label it knows."""
        best = self.reader(pixels).argmax(1).tolist()
        return [column == self.columns[label] for column, label in zip(best, labels, strict=True) if label in self.columns]

    def read(self, logits: Tensor, labels: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Probability of each intended label, and whether it is the most likely one (N,); NaN where it is not known."""
        column = torch.tensor([self.columns.get(label, -1) for label in labels])
        known, index = column >= 0, column.clamp_min(0)
        nan = torch.full((len(column),), torch.nan)
        probability = logits.softmax(1).gather(1, index[:, None])[:, 0]
        correct = (logits.argmax(1) == index).float()
        return torch.where(known, probability, nan), torch.where(known, correct, nan)


def open_evaluation_classifier(
    ref: str, names: Mapping[int, str], device: torch.device, access: Access = DEFAULT_ACCESS
) -> EvaluationClassifier | None:
    """The classifier that `--judge` names, for labels with these names; None if it knows none of them.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for custom code, or has only pickled weights.
        UsageError: it has no labels.
    """
    info = open_classifier(_path_of(ref), "denoised", True, access)
    if not info.takes_labels:
        raise UsageError(f"--judge {ref} distinguishes any text. Name a classifier that has labels.")
    weights = info.sha256(access)
    identity = digest("logits", weights, info.config, info.preprocessor)
    network = _on_device(info.load(device, access), device, info)
    columns = match_columns(info, names)
    return EvaluationClassifier(Reader(_name_of(ref), identity, network, info.size, weights), columns) if columns else None


def match_columns(info: ClassifierInfo, names: Mapping[int, str]) -> dict[int, int]:
    """Label id of a run -> column of a classifier's logits: by name where both have names, else by id.

    A run keeps the first synonym of each name; where two labels of the classifier share it, the id decides.
    """
    column = {label: i for i, label in enumerate(info.ids)}
    named = any(info.labels.names.values())
    found = {}
    for label, name in names.items():
        if not (name and named):
            match = label if label in column else None
        else:
            same = [i for i in info.labels if info.labels.name(i).casefold() == name.casefold()]
            match = label if label in same else same[0] if len(same) == 1 else None
        if match is not None:
            found[label] = column[match]
    return found


def bundled_size() -> tuple[int, int] | None:
    """(height, width) of the images that the bundled classifier reads."""
    return open_classifier(BUNDLED_CLASSIFIER).size


def read_rows_with(
    reader: Reader,
    cache: FeatureCache,
    rows: Sequence[Row],
    batch: int,
    on_image: Callable[[int], None],
    read: Callable[[Sequence[Row]], Iterable[Pixels]],
) -> None:
    """Puts the output of `reader` for images into `cache`, of those that are not in it yet, each read once.

    Memory holds one batch of images and one part of the cache, which is on disk as soon as it is full. The hash of the
    pixels that it keeps identifies equal images, whose files differ, since they name the label.

    Args:
        reader: the network.
        cache: of that network.
        rows: of the images.
        batch: images at once.
        on_image: called with the number of images that are done.
        read: the pixels of some rows.

    Raises:
        CorruptImageError: an image is not the one that was drawn.
        UsageError: what the reader makes of one is not finite.
    """
    todo = cache.missing([row["sha256"] for row in rows])
    on_image(len(rows) - len(todo))
    made: dict[str, tuple[str, NDArray[np.float32]]] = {}
    kept: NDArray[np.float32] | None = None
    try:
        for some in batches(todo, batch):
            part = [rows[i] for i in some]
            pixels = list(read(part))
            values = reader(np.stack(pixels))
            if not np.isfinite(values).all():
                raise UsageError(f"What {reader.name} makes of {part[0]['file']} or those after it is not finite.")
            most = max(1, min(_PART_BYTES // values[0].nbytes, _PART_ROWS))
            if kept is None:  # one array for all batches: what each allocates for itself scatters the heap
                kept = np.empty((min(most, len(todo)) + batch, values.shape[1]), np.float32)
            mine = kept[len(made) : len(made) + len(part)]
            mine[:] = values
            files = (row["sha256"] for row in part)
            made.update(zip(files, zip(map(_pixel_hash, pixels), mine, strict=True), strict=True))
            on_image(len(part))
            if len(made) >= most:
                cache.write(made)
                made = {}
    finally:
        if made:
            cache.write(made)


def read_image(path: Path) -> Pixels:
    """An image file as uint8 (H, W, 3).

    Raises:
        UsageError: it is none.
    """
    return np.asarray(decode(read_bytes(path, UsageError, LARGEST_FILE), path, UsageError).convert("RGB"))


def _pixel_hash(image: Pixels) -> str:
    return hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()[:32]


def _path_of(ref: str) -> str:
    return str(BUNDLED_CLASSIFIER) if ref == "bundled" else ref


def _name_of(ref: str) -> str:
    path = Path(ref).expanduser()
    return "bundled classifier" if ref == "bundled" else path.resolve().name if path.is_dir() else ref


def _on_device(network: nn.Module, device: torch.device, model: ImageModel) -> Callable[[Tensor], Tensor]:
    network, grey = network.to(device).eval(), model.channels == 1

    def read(pixels: Tensor) -> Tensor:
        images = pixels.to(device).float() / 127.5 - 1
        return network(images[:, :1] if grey else images)  # type: ignore[no-any-return]

    return read


def iterate(images: Iterable[tuple[Pixels, Any]], batch: int) -> Iterator[tuple[Pixels, list[Any]]]:
    """Images one by one -> stacks (B, H, W, 3) of one size each, and their labels."""
    stack: list[Pixels] = []
    labels: list[Any] = []
    for image, label in images:
        if stack and (len(stack) == batch or image.shape != stack[0].shape):
            yield np.stack(stack), labels
            stack, labels = [], []
        stack.append(image)
        labels.append(label)
    if stack:
        yield np.stack(stack), labels
