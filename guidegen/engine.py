"""From cells to files: opens the networks, draws batch by batch, writes into the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from guidegen.checkpoints import Access, Checkpoint, ClassifierInfo
from guidegen.checkpoints.files import DEFAULT_ACCESS
from guidegen.errors import CheckpointError, GuidegenError, UsageError
from guidegen.plan import Cell, Settings, mode_weights
from guidegen.run import Row, Run
from guidegen.sampling import make_scheduler, sample, takes_eta, to_uint8
from guidegen.scores.diffusion import PREDICTION_TYPES, PredictionType
from guidegen.scores.guidance import NULL, Classifier, Denoiser, Guide, calls_per_step

DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
Condition = Callable[[Sequence[Cell]], tuple[Denoiser, list[int]]]
"""From the cells of a batch to the denoiser that draws them and the labels it knows them by."""


@dataclass(frozen=True)
class Painter:
    """Everything that stays the same from batch to batch.

    Attributes:
        condition: the network, and how it is told what to draw.
        decode: from what the network draws to images; None where it draws images.
        classifier: the classifier's gradient; None in modes without one.
        target: a cell's label as the classifier counts it.
        scheduler: a diffusers scheduler.
        shape: (C, H, W) of what the network draws.
        mode: cfg, classifier, both or none.
        steps: steps of the scheduler.
        eta: DDIM's eta; None for the default.
        device: where the networks are.
        is_cut: whether a prompt has more tokens than the model reads; None where there are no prompts.
    """

    condition: Condition
    decode: Callable[[torch.Tensor], torch.Tensor] | None
    classifier: Classifier | None
    target: Callable[[Cell], int]
    scheduler: Any
    shape: tuple[int, int, int]
    mode: str
    steps: int
    eta: float | None
    device: torch.device
    is_cut: Callable[[str], bool] | None = None

    def paint(self, cells: Sequence[Cell], on_step: Callable[[], None] | None = None) -> tuple[torch.Tensor, list[int]]:
        """Images (B, C, H, W) fp32 of the cells, and the network calls spent on each."""
        weights = [mode_weights(self.mode, cell) for cell in cells]
        denoiser, labels = self.condition(cells)
        guide = Guide(
            denoiser,
            labels,
            [w for w, _ in weights],
            [w for _, w in weights],
            self.classifier,
            self.device,
            [self.target(cell) for cell in cells],
        )
        seeds = [cell.seed for cell in cells]
        drawn = sample(guide, self.scheduler, seeds, self.shape, self.steps, self.eta, self.device, on_step)
        evaluations = len(self.scheduler.timesteps)
        return self._decoded(drawn), [calls * evaluations for calls in guide.calls]

    @torch.no_grad()
    def _decoded(self, drawn: torch.Tensor) -> torch.Tensor:
        return self.decode(drawn) if self.decode else drawn


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


def pick_batch_size(name: str, device: torch.device, shape: tuple[int, int, int]) -> int:
    """`auto` is 64 on CUDA and 16 elsewhere for what is up to 64x64, fewer for what is larger.

    It is where drawing starts: a batch that is out of memory is halved until it fits.
    """
    if name != "auto":
        return int(name)
    most = 64 if device.type == "cuda" else 16
    return max(1, min(most, most * 64 * 64 // (shape[1] * shape[2])))


def open_painter(
    checkpoint: Checkpoint,
    classifier: ClassifierInfo | None,
    scheduler: Any,
    settings: Settings,
    device: torch.device,
    access: Access = DEFAULT_ACCESS,
    compile_networks: bool = False,
) -> Painter:
    """Loads the weights. Raises CheckpointError where they do not load."""
    autocast = DTYPES[settings.dtype]
    kind = next((kind for kind in PREDICTION_TYPES if kind == checkpoint.prediction_type), None)
    if kind is None:
        raise CheckpointError(f"{checkpoint.ref}: unknown prediction type {checkpoint.prediction_type!r}.")
    networks = _open_networks(checkpoint, kind, settings.negative_prompt, device, autocast, access, compile_networks)
    score: Classifier | None = None
    if classifier is not None:
        score = _open_score(classifier, checkpoint, settings, networks, device, access, compile_networks)
    return Painter(
        networks.condition,
        networks.decode,
        score,
        _target(classifier, checkpoint, settings),
        scheduler,
        checkpoint.shape,
        settings.mode,
        settings.steps,
        settings.eta,
        device,
        networks.is_cut,
    )


class _Networks(NamedTuple):
    """A checkpoint's networks: those of `Painter`, and a denoiser that is asked for nothing but the null condition."""

    condition: Condition
    null_denoiser: Denoiser
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_cut: Callable[[str], bool] | None = None


def _open_networks(
    checkpoint: Checkpoint,
    kind: PredictionType,
    negative_prompt: str | None,
    device: torch.device,
    autocast: torch.dtype | None,
    access: Access,
    compile_networks: bool,
) -> _Networks:
    from guidegen.checkpoints.loading import load_network, load_part
    from guidegen.scores.denoiser import DiTDenoiser, TextDenoiser, UNetDenoiser, latent_decoder

    if checkpoint.own is not None:
        own = checkpoint.own.load(device)
        if own.prediction_type != kind:
            raise CheckpointError(
                f"{checkpoint.ref}: the denoiser predicts {own.prediction_type}, and its scheduler's config says {kind}."
            )
        return _Networks(partial(_by_label, own), own, getattr(own, "decode", None))
    network: Any = load_network(checkpoint, device, access)
    compiled: Any = torch.compile(network) if compile_networks else network
    decode = latent_decoder(load_part(checkpoint, "vae", device, access)) if checkpoint.kind.latent else None
    if checkpoint.kind.text:
        from guidegen.checkpoints.text import PromptEncoder

        encoder = PromptEncoder(checkpoint, network, negative_prompt, device, access)

        def by_prompt(cells: Sequence[Cell]) -> tuple[Denoiser, list[int]]:
            prompts = list(dict.fromkeys(cell.prompt for cell in cells if cell.prompt is not None))
            place = {prompt: i for i, prompt in enumerate(prompts)}
            labels = [NULL if cell.prompt is None else place[cell.prompt] for cell in cells]
            return TextDenoiser(compiled, kind, encoder(prompts), autocast), labels

        return _Networks(by_prompt, TextDenoiser(compiled, kind, encoder([]), autocast), decode, encoder.is_cut)
    cls = DiTDenoiser if checkpoint.kind.network == "transformer" else UNetDenoiser
    denoiser = cls(compiled, kind, checkpoint.null_label, autocast)
    return _Networks(partial(_by_label, denoiser), denoiser, decode)


def _by_label(denoiser: Denoiser, cells: Sequence[Cell]) -> tuple[Denoiser, list[int]]:
    return denoiser, [NULL if cell.label is None else cell.label for cell in cells]


def _target(classifier: ClassifierInfo | None, checkpoint: Checkpoint, settings: Settings) -> Callable[[Cell], int]:
    """From a cell to its label as the classifier counts it: a zero-shot one counts texts."""
    if classifier is None or not classifier.zero_shot:
        return lambda cell: NULL if cell.label is None else cell.label
    text_place = {text: i for i, text in enumerate(settings.classifier_texts or ())}
    label_place = classifier.columns(checkpoint.labels)

    def target(cell: Cell) -> int:
        return label_place[cell.label] if cell.prompt is None and cell.label is not None else text_place[cell.prompt or ""]

    return target


def _columns(classifier: ClassifierInfo, checkpoint: Checkpoint, settings: Settings) -> dict[int, int]:
    if classifier.zero_shot:
        return {i: i for i in range(len(settings.classifier_texts or ()))}
    return classifier.columns(checkpoint.labels if checkpoint.class_conditional else classifier.labels)


def _open_score(
    classifier: ClassifierInfo,
    checkpoint: Checkpoint,
    settings: Settings,
    networks: _Networks,
    device: torch.device,
    access: Access,
    compile_networks: bool,
) -> Classifier:
    """The classifier's gradient with respect to what the network draws."""
    from guidegen.checkpoints.loading import load_classifier
    from guidegen.scores.classifier import CheapScore, DenoisedScore, NoisyScore

    autocast = DTYPES[settings.dtype]
    network: Any = load_classifier(classifier, device, access, settings.classifier_texts or ())
    if compile_networks:
        network = torch.compile(network)
    columns = _columns(classifier, checkpoint, settings)
    if classifier.input == "noisy":
        return NoisyScore(network, columns, autocast)
    decode, denoiser = networks.decode, networks.null_denoiser
    judge = network if decode is None else (lambda x0: network(decode(x0)))
    if settings.classifier_gradient == "cheap":
        return CheapScore(judge, columns, denoiser.prediction_type, autocast)
    return DenoisedScore(judge, columns, denoiser, autocast)


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


def cost(cells: Sequence[Cell], settings: Settings, scheduler: Any) -> int:
    """Network calls that the cells will take (NFE): of the denoiser and of the classifier."""
    from guidegen.scores.classifier import CheapScore, DenoisedScore, NoisyScore

    scores: dict[str | None, Any] = {"exact": DenoisedScore, "cheap": CheapScore, None: NoisyScore}
    each = scores[settings.classifier_gradient].cost
    return sum(calls_per_step(*mode_weights(settings.mode, cell), each) for cell in cells) * len(scheduler.timesteps)


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

    A batch that is out of memory is halved, and so are all after it. A non-finite image becomes a row, never a file.

    Args:
        painter: the networks.
        cells: what to draw.
        run: where it goes.
        name_of: label id -> name.
        batch_size: cells at once.
        on_step: called with the number of cells of the batch after each step.
        between: called between batches; what it raises ends the drawing with all before it saved.
    """
    start, size = 0, batch_size
    while start < len(cells):
        if between:
            between()
        batch = cells[start : start + size]
        step = partial(on_step, len(batch)) if on_step else None
        try:
            images, calls = painter.paint(batch, step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise GuidegenError(f"Not even one image at a time fits into the memory of {painter.device}.") from error
            size = len(batch) // 2
            if painter.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        start += len(batch)
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pixels = to_uint8(images).numpy()
        for cell, image, good, nfe in zip(batch, pixels, finite, calls, strict=True):
            yield cell, run.write(cell, image if good else None, name_of(cell.label), nfe)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory; only CUDA has a class of error for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("DefaultCPUAllocator", "MPS backend out of memory")
    )
