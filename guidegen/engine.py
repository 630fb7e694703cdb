"""From cells to files: opens the networks, draws batch by batch, writes into the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from guidegen.checkpoints import Checkpoint, ClassifierInfo
from guidegen.errors import CheckpointError, UsageError
from guidegen.plan import Cell, batches, mode_weights
from guidegen.run import Row, Run
from guidegen.sampling import make_scheduler, sample, takes_eta, to_uint8
from guidegen.scores.diffusion import PREDICTION_TYPES
from guidegen.scores.guidance import NULL, Classifier, Denoiser, Guide, calls_per_step

DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Painter:
    """Everything that stays the same from batch to batch.

    Attributes:
        denoiser: the network.
        classifier: the classifier's gradient; None in modes without one.
        scheduler: a diffusers scheduler.
        shape: (C, H, W).
        mode: cfg, classifier, both or none.
        steps: steps of the scheduler.
        eta: DDIM's eta; None for the default.
        device: where the networks are.
    """

    denoiser: Denoiser
    classifier: Classifier | None
    scheduler: Any
    shape: tuple[int, int, int]
    mode: str
    steps: int
    eta: float | None
    device: torch.device

    def paint(self, cells: Sequence[Cell], on_step: Callable[[], None] | None = None) -> tuple[torch.Tensor, list[int]]:
        """Images (B, C, H, W) fp32 of the cells, and the network calls spent on each."""
        weights = [mode_weights(self.mode, cell) for cell in cells]
        guide = Guide(
            self.denoiser,
            [NULL if cell.label is None else cell.label for cell in cells],
            [w for w, _ in weights],
            [w for _, w in weights],
            self.classifier,
            self.device,
        )
        seeds = [cell.seed for cell in cells]
        images = sample(guide, self.scheduler, seeds, self.shape, self.steps, self.eta, self.device, on_step)
        evaluations = len(self.scheduler.timesteps)
        return images, [calls * evaluations for calls in guide.calls]


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise UsageError(f"--device {name}: choose auto, cuda, cuda:1, mps or cpu.")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--device {name}: not usable here: {first}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is fp16 autocast on CUDA and fp32 elsewhere."""
    if name != "auto":
        return name
    return "fp16" if device.type == "cuda" else "fp32"


def pick_batch_size(name: str, device: torch.device) -> int:
    """`auto` is 64 on CUDA and 16 elsewhere; a batch that is out of memory is halved."""
    return int(name) if name != "auto" else 64 if device.type == "cuda" else 16


def open_painter(
    checkpoint: Checkpoint,
    classifier: ClassifierInfo | None,
    mode: str,
    scheduler: Any,
    steps: int,
    eta: float | None,
    dtype: str,
    device: torch.device,
    allow_pickle: bool = False,
    compile_networks: bool = False,
) -> Painter:
    """Loads the weights. Raises CheckpointError where they do not load."""
    from guidegen.checkpoints.loading import load_classifier, load_unet
    from guidegen.scores.classifier import DenoisedScore, NoisyScore
    from guidegen.scores.denoiser import UNetDenoiser

    autocast = DTYPES[dtype]
    kind = next((kind for kind in PREDICTION_TYPES if kind == checkpoint.prediction_type), None)
    if kind is None:
        raise CheckpointError(f"{checkpoint.ref}: unknown prediction type {checkpoint.prediction_type!r}.")
    denoiser = UNetDenoiser(
        load_unet(checkpoint, device, allow_pickle),
        kind,
        checkpoint.null_label,
        autocast,
    )
    if compile_networks:
        denoiser.unet = torch.compile(denoiser.unet)  # type: ignore[assignment]
    score: Classifier | None = None
    if classifier is not None:
        network: Any = load_classifier(classifier, device, allow_pickle)
        if compile_networks:
            network = torch.compile(network)
        columns = classifier.columns(checkpoint.labels if checkpoint.class_conditional else classifier.labels)
        if classifier.input == "noisy":
            score = NoisyScore(network, columns, autocast)
        else:
            score = DenoisedScore(network, columns, denoiser, autocast)
    return Painter(denoiser, score, scheduler, checkpoint.shape, mode, steps, eta, device)


def plan_scheduler(checkpoint: Checkpoint, name: str | None, steps: int, eta: float | None) -> Any:
    """The scheduler with its timesteps set, before any weights are read.

    Raises:
        UsageError: no such scheduler, or one that does not take these steps or eta.
    """
    scheduler = make_scheduler(checkpoint.scheduler_config, name)
    if eta is not None and not takes_eta(scheduler):
        raise UsageError(f"--eta is for ddim; {type(scheduler).__name__} has none.")
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"--steps {steps}: {type(scheduler).__name__} refuses: {error}") from error
    return scheduler


def cost(cells: Sequence[Cell], mode: str, scheduler: Any, classifier: ClassifierInfo | None) -> int:
    """Network calls that the cells will take (NFE): of the denoiser and of the classifier."""
    each = classifier.gradient_calls if classifier else 0
    return sum(calls_per_step(*mode_weights(mode, cell), each) for cell in cells) * len(scheduler.timesteps)


def draw(
    painter: Painter,
    cells: Sequence[Cell],
    run: Run,
    name_of: Callable[[int | None], str],
    batch_size: int,
    on_step: Callable[[int], None] | None = None,
    between: Callable[[], None] | None = None,
) -> Iterator[tuple[Cell, Row]]:
    """Draws and saves the cells, yielding each with its row as soon as its image is on disk.

    A batch that is out of memory is halved. A non-finite image becomes a row, never a file.

    Args:
        painter: the networks.
        cells: what to draw.
        run: where it goes.
        name_of: label id -> name.
        batch_size: cells at once.
        on_step: called with the number of cells of the batch after each step.
        between: called between batches; what it raises ends the drawing with all before it saved.
    """
    todo = list(batches(cells, batch_size))
    while todo:
        if between:
            between()
        batch = todo.pop(0)
        step = partial(on_step, len(batch)) if on_step else None
        try:
            images, calls = painter.paint(batch, step)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            todo[:0] = [batch[:half], batch[half:]]
            torch.cuda.empty_cache()
            continue
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pixels = to_uint8(images).numpy()
        for cell, image, good, nfe in zip(batch, pixels, finite, calls, strict=True):
            yield cell, run.write(cell, image if good else None, name_of(cell.label), nfe)
