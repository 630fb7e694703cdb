"""The noise-aware classifier of the bundled checkpoint: its photographs, loss and calibration.

It is trained on every class of the data first, then on the classes of the checkpoint, of which some photographs are
held back to calibrate it. So few photographs would be learnt by heart, so each is seen shifted by up to an eighth of its
side (He et al. 2016, 1512.03385, section 4.2) and in slightly other colours; half of them, when the classes of the
checkpoint are trained, with a part of another (CutMix, Yun et al. 2019, 1905.04899). What it learns more to guide with is
in `guidegen.zoo.guiding`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from guidegen.zoo.autoencoder import encode
from guidegen.zoo.batches import Batches, drawn_by, load_images
from guidegen.zoo.loop import train

CLASSIFIER: dict[str, Any] = {
    "block_out_channels": (48, 96, 128, 192),
    "down_block_types": ("DownBlock2D",) * 4,
    "layers_per_block": 1,
}
LATENT_CLASSIFIER: dict[str, Any] = {
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "layers_per_block": 1,
}
REPEATS = 4  # how often a photograph of the checkpoint's labels stands among all
HELD_OUT = 0.1  # share of those photographs that calibrate


def random_colours(images: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], brightness, contrast and saturation of each changed by up to `most`."""
    draws = torch.rand((3, len(images), 1, 1, 1), **drawn_by(generator)) * 2 * most - most
    brightness, contrast, saturation = draws.to(images.device)
    grey = images.mean(1, keepdim=True)
    images = grey + (1 + saturation) * (images - grey)
    mean = grey.mean((2, 3), keepdim=True)
    return (mean + brightness + (1 + contrast) * (images - mean)).clamp(-1, 1)


def random_boxes(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Masks (B, 1, S, S), each true in a box whose share of the area is uniform, its centre anywhere."""
    side = size * torch.rand(batch, 1, **drawn_by(generator)).sqrt()
    pixels = torch.arange(size, device=generator.device) + 0.5
    down, right = ((pixels - size * torch.rand(batch, 1, **drawn_by(generator))).abs() < side / 2 for _ in range(2))
    return (down[:, :, None] & right[:, None, :])[:, None]


def columns_by_label(classes: Sequence[int]) -> Tensor:
    """For each label up to the largest, its place among `classes`; -1 where it has none."""
    columns = torch.full((max(classes) + 1,), -1)
    columns[torch.tensor(classes)] = torch.arange(len(classes))
    return columns


class LabelledBatches(Batches):
    """Batches for a classifier.

    Args:
        images, labels, batch, seed, device: as in `Batches`.
        classes: the label of each column.
        cutmix: share of the images that get a box of the next one.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch: int, seed: int, device: str, classes: Sequence[int], cutmix: float = 0.0
    ):
        super().__init__(images, labels, batch, seed, device, shift=images.shape[-1] // 8)
        self.columns = columns_by_label(classes).to(device)[self.labels]
        self.count, self.cutmix = len(classes), cutmix

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """x_t, t and the probabilities (B, K) to learn, of one step."""
        x0, t, eps, index, generator = self.drawn(step)
        if not self.latent:
            x0 = random_colours(x0, 0.2, generator)
        target = nn.functional.one_hot(self.columns[index], self.count).float()
        if self.cutmix:
            mask = random_boxes(len(x0), x0.shape[-1], generator)
            mask &= (torch.rand(len(x0), **drawn_by(generator)) < self.cutmix)[:, None, None, None]
            x0 = torch.where(mask, x0.roll(1, 0), x0)
            target = torch.lerp(target, target.roll(1, 0), mask.float().mean((2, 3)))
        return self.noised(x0, t, eps), t, target


def classifier_loss(batches: LabelledBatches, columns: Sequence[int]) -> Callable[[nn.Module, int], Tensor]:
    """Cross-entropy of noised images over some columns of the network, which are those of `batches`."""
    chosen = torch.tensor(columns, device=batches.device)

    def loss(model: nn.Module, step: int) -> Tensor:
        x_t, t, target = batches(step)
        return nn.functional.cross_entropy(model(x_t, t).float()[:, chosen], target)

    return loss


def with_columns(network: Any, columns: Sequence[int], names: dict[str, str]) -> Any:
    """A classifier of some columns of another, with these names."""
    return _with_head(network, lambda head: head[torch.tensor(columns)], id2label=names).eval()


def with_negative_class(network: Any) -> Any:
    """The classifier with one more logit, which is 0 to begin with."""
    more = {"negative_class": True, "logit_scales": None}
    return _with_head(network, lambda head: torch.cat([head, torch.zeros_like(head[:1])]), **more)


def _with_head(network: Any, change: Callable[[Tensor], Tensor], **config: Any) -> Any:
    """The classifier with a changed head, and with that in its config."""
    state = network.state_dict()
    for name in ("head.weight", "head.bias"):
        state[name] = change(state[name])
    kept = {name: value for name, value in network.config.items() if not name.startswith("_")}
    made = type(network)(**kept | config)  # from_config would leave out what was a default
    made.load_state_dict(state)
    return made


def split_off(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a share of each label and of the others, at random."""
    draw, off = torch.Generator().manual_seed(seed), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        (there,) = torch.where(labels == label)
        off[there[torch.randperm(len(there), generator=draw)[: round(share * len(there))]]] = True
    return torch.where(off)[0], torch.where(~off)[0]


@torch.no_grad()
def logits_at(network: Any, batches: LabelledBatches, t: int, draw: torch.Generator) -> Tensor:
    """Logits (N, K) of all photographs of `batches` at timestep t, for its K labels; each has noise of its own."""
    parts = []
    for first in range(0, len(batches.labels), 250):
        x0 = batches.plain(first, first + 250)
        level = torch.full((len(x0),), t, device=x0.device)
        x_t = batches.noised(x0, level, torch.randn(x0.shape, generator=draw).to(x0.device))
        parts.append(network(x_t, level)[:, : batches.count].float().cpu())
    return torch.cat(parts)


def fit_logit_scales(network: Any, batches: LabelledBatches, levels: int = 21, draws: int = 2) -> list[float]:
    """The scale of the logits with the smallest cross-entropy at each noise level, on photographs not trained on.

    Where there is next to nothing to know, a classifier that does not say so has gradients of noise, which guidance
    multiplies by sigma/alpha.
    """
    generator = torch.Generator().manual_seed(batches.seed)
    grid, target, scales = torch.linspace(0, 2, 81), batches.columns.cpu().repeat(draws), []
    for t in torch.linspace(0, 999, levels).round().long().tolist():
        logits = torch.cat([logits_at(network, batches, t, generator) for _ in range(draws)])
        losses = torch.stack([nn.functional.cross_entropy(scale * logits, target) for scale in grid])
        scales.append(round(grid[losses.argmin()].item(), 3))
    return scales


def make_classifier(images: Tensor, names: dict[str, str]) -> Any:
    """An untrained classifier of images as `Batches` takes them."""
    from guidegen.models.classifiers.noisy import NoisyClassifier

    config = CLASSIFIER if images.dtype == torch.uint8 else LATENT_CLASSIFIER
    return NoisyClassifier(sample_size=images.shape[-1], in_channels=images.shape[-3], id2label=names, **config)


@dataclass(frozen=True)
class Training:
    """What the phases of a classifier share.

    Attributes:
        data: folder with train*.parquet and labels.json.
        out: where the state of each phase goes.
        ids: the labels of the classifier, in ascending order.
        size: height and width of the images.
        batch: images of half a step.
        seed: of weights, noise and order.
        compile_model: whether to compile the network.
        autoencoder: the classifier then reads noised latents, not noised images.
    """

    data: Path
    out: Path
    ids: list[int]
    size: int
    batch: int
    seed: int
    compile_model: bool = False
    autoencoder: Any = None

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def photographs(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Those of some labels as `Batches` takes them, and their labels."""
        images, labels = load_images(self.data, "train", ids, self.size)
        return self.encoded(images), labels

    def encoded(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) as `Batches` takes them."""
        return images if self.autoencoder is None else encode(self.autoencoder, images)

    def batches(
        self, images: Tensor, labels: Tensor, classes: Sequence[int], cutmix: float = 0.0, number: int = 0
    ) -> LabelledBatches:
        """Batches of the phase of that number."""
        return LabelledBatches(images, labels, self.batch, self.seed + number, self.device, classes, cutmix)

    def phase(self, name: str, network: Any, loss: Callable[[nn.Module, int], Tensor], images: int, **settings: Any) -> None:
        """Trains the network on so many `images`; settings are those of `train`."""
        state, steps = self.out / f"{name}.state", images // (2 * self.batch)
        train(network, loss, state, steps, self.batch, decay=0.05, compile_model=self.compile_model, draws=2, **settings)

    @cached_property
    def split(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Photographs of `ids` and their labels: those that calibrate, and the others."""
        images, labels = self.photographs(self.ids)
        held_out, rest = split_off(labels, HELD_OUT, self.seed)
        return (images[held_out], labels[held_out]), (images[rest], labels[rest])

    def calibrate(self, network: Any) -> None:
        """Fits the scales of the logits to photographs that were not trained on."""
        held_out, _ = self.split
        network.calibrate([1.0, 1.0])
        network.calibrate(fit_logit_scales(network, self.batches(*held_out, self.ids)))


def train_classifier(training: Training, names: dict[str, str], images: tuple[int, int]) -> Any:
    """The classifier of the labels with these `names`, after so many `images` of all labels and so many of its own."""
    known, chosen = json.loads((training.data / "labels.json").read_text()), training.ids
    every = sorted(map(int, known))
    others, (_, ours) = [label for label in every if label not in chosen], training.split
    torch.manual_seed(training.seed)
    network = make_classifier(ours[0], {str(i): known[str(i)] for i in every}).to(training.device)

    def phase(
        name: str, parts: list[tuple[Tensor, Tensor]], ids: list[int], images: int, cutmix: float, fall: float
    ) -> None:
        pool, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        typer.echo(f"{name}: {len(pool)} photographs of {len(ids)} labels")
        loss = classifier_loss(training.batches(pool, labels, ids, cutmix), [every.index(label) for label in ids])
        training.phase(name, network, loss, images, peak=2e-3, fall=fall)

    phase("pretraining", [training.photographs(others), *[ours] * REPEATS] if others else [ours], every, images[0], 0.0, 0.0)
    phase("classifier", [ours], chosen, images[1], cutmix=0.5, fall=1.0)
    network = with_columns(network, [every.index(label) for label in chosen], names).to(training.device)
    training.calibrate(network)
    return network
