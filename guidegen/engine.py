"""From cells to files: opens the networks, draws batch by batch, writes into the run."""

from __future__ import annotations

import gc
import os
import queue
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from guidegen.checkpoints import Access, AnyClassifier, Checkpoint, ClassifierInfo
from guidegen.checkpoints.classifiers import SEPARATOR
from guidegen.checkpoints.files import DEFAULT_ACCESS
from guidegen.checkpoints.guides import GuideModel
from guidegen.checkpoints.labels import Labels
from guidegen.errors import CheckpointError, GuidegenError, UsageError, first_line, is_out_of_memory
from guidegen.own import own_sha256
from guidegen.plan import FILE_SHA256, Cell, Settings, digest, mode_weights
from guidegen.run import Row, Run
from guidegen.sampling import sample, to_uint8, try_out
from guidegen.schedulers import levels_after, make_scheduler, noise_levels, takes_eta, without_clip
from guidegen.scores.diffusion import PREDICTION_TYPES, PredictionType
from guidegen.scores.guidance import (
    FREE,
    NULL,
    Classifier,
    Cost,
    Denoiser,
    Guide,
    Mixture,
    Weights,
    calls_per_step,
    cost_with,
)
from guidegen.scores.methods import METHODS, Method, find_method
from guidegen.scores.rows import FixedDenoiser, fixed_classifier
from guidegen.scores.schedule import Pace, make_pace

DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
Condition = Callable[[Sequence[Cell]], tuple[Denoiser, list[Mixture]]]
"""From the cells of a batch to the denoiser that draws them and the labels it knows them by."""


@dataclass
class Tally:
    """Network calls that were made, counted while drawing: fewer than those behind the images, which share some."""

    made: int = 0


@dataclass(frozen=True)
class Painter:
    """Everything that stays the same from batch to batch.

    Attributes:
        condition: the network, and how it is told what to draw.
        decode: from what the network draws to images; None where it draws images.
        classifier: the classifier's gradient; None in modes without one.
        target: a cell's labels as the classifier counts them.
        scheduler: a diffusers scheduler.
        shape: (C, H, W) of what the network draws.
        mode: cfg, classifier, both, none or auto.
        steps: steps of the scheduler.
        eta: DDIM's eta; None for the default.
        device: where the networks are.
        is_cut: whether a prompt has more tokens than the model reads; None where there are no prompts.
        in_fp32: loads the same networks for calls without autocast, once; None where there is no autocast.
        drop_fp32: forgets those networks; whether there were any.
        fixed_rows: rows of each network call, so that bits do not depend on the batch; None for as many as there are.
        clip: bound of the denoised estimate of each prediction, before guidance; None where the scheduler sees to it.
        method: how predictions are combined, its options filled in.
        pace: how strongly at each step; None for the same at all.
        weak: the weaker network, told what to draw like `condition`; None without autoguidance.
    """

    condition: Condition
    decode: Callable[[torch.Tensor], torch.Tensor] | None
    classifier: Classifier | None
    target: Callable[[Cell], Mixture]
    scheduler: Any
    shape: tuple[int, int, int]
    mode: str
    steps: int
    eta: float | None
    device: torch.device
    is_cut: Callable[[str], bool] | None = None
    in_fp32: Callable[[], Painter] | None = None
    fixed_rows: int | None = None
    clip: float | None = None
    method: Method = METHODS["cfg"]
    pace: Pace | None = None
    weak: Condition | None = None
    drop_fp32: Callable[[], bool] | None = None

    def paint(
        self, cells: Sequence[Cell], on_step: Callable[[], None] | None = None, tally: Tally | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Images (B, C, H, W) fp32 of the cells, and the network calls behind each."""
        weights = [mode_weights(self.mode, cell) for cell in cells]
        denoiser, labels = self.condition(cells)
        classifier, weak = self.classifier, self.weak(cells)[0] if self.weak else None
        if self.fixed_rows is not None:
            denoiser = FixedDenoiser(denoiser, self.fixed_rows)
            weak = weak and FixedDenoiser(weak, self.fixed_rows)
            classifier = classifier and fixed_classifier(classifier, self.fixed_rows)
        seeds = [cell.seed for cell in cells]
        guide = Guide(
            denoiser,
            labels,
            [w for w, _, _ in weights],
            [w for _, w, _ in weights],
            classifier,
            self.device,
            [self.target(cell) for cell in cells],
            seeds,
            weak=weak,
            w_guide=[w for _, _, w in weights],
            steps=len(self.scheduler.timesteps),
            clip=self.clip,
            method=self.method,
            pace=self.pace.weights if self.pace else None,
        )
        drawn = sample(guide, self.scheduler, seeds, self.shape, self.steps, self.eta, self.device, on_step)
        if tally is not None:
            tally.made += guide.made
        return self._decoded(drawn), guide.calls

    @torch.no_grad()
    def _decoded(self, drawn: torch.Tensor) -> torch.Tensor:
        return self.decode(drawn) if self.decode else drawn


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; each process of torchrun or srun gets a CUDA device of its own.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            place = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID", "")
            return torch.device(f"cuda:{int(place) % torch.cuda.device_count()}" if place.isdecimal() else "cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise UsageError(f"--device {name}: choose auto, cuda, cuda:1, mps or cpu.")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not usable here: {first_line(error)}") from error
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
    classifier: AnyClassifier | None,
    scheduler: Any,
    settings: Settings,
    device: torch.device,
    access: Access = DEFAULT_ACCESS,
    compile_networks: bool = False,
    fixed_rows: int | None = None,
    guide: GuideModel | None = None,
) -> Painter:
    """Loads the weights. Raises CheckpointError where they do not load."""
    painters = open_painters(checkpoint, classifier, settings, device, access, compile_networks, fixed_rows, guide)
    return painters(settings, scheduler)


def open_painters(
    checkpoint: Checkpoint,
    classifier: AnyClassifier | None,
    settings: Settings,
    device: torch.device,
    access: Access = DEFAULT_ACCESS,
    compile_networks: bool = False,
    fixed_rows: int | None = None,
    guide: GuideModel | None = None,
) -> Callable[[Settings, Any], Painter]:
    """Loads the weights once; from settings that need the same networks, and a scheduler, to their painter.

    Raises:
        CheckpointError: the weights do not load.
    """
    kind = next((kind for kind in PREDICTION_TYPES if kind == checkpoint.prediction_type), None)
    if kind is None:
        raise CheckpointError(f"{checkpoint.ref}: unknown prediction type {checkpoint.prediction_type!r}.")
    autocast = DTYPES[settings.dtype]
    open_networks = partial(
        _open_networks,
        kind=kind,
        negative_prompt=settings.negative_prompt,
        device=device,
        access=access,
        compile_networks=compile_networks,
        autocast=autocast,
    )
    networks = open_networks(checkpoint, guide=guide)
    weak = networks.weak
    if guide is not None and guide.checkpoint is not None and not guide.shares:
        weak = open_networks(guide.checkpoint, decodes=False).condition
    score = None
    if classifier is not None:
        score = _open_score(classifier, checkpoint, settings, device, access, compile_networks, networks)

    @cache
    def painters_in_fp32() -> Callable[[Settings, Any], Painter]:
        exact = replace(settings, dtype="fp32")
        return open_painters(checkpoint, classifier, exact, device, access, compile_networks, fixed_rows, guide)

    def drop_fp32() -> bool:
        loaded = painters_in_fp32.cache_info().currsize > 0
        painters_in_fp32.cache_clear()
        return loaded

    def painter_for(settings: Settings, scheduler: Any) -> Painter:
        def in_fp32() -> Painter:
            return painters_in_fp32()(replace(settings, dtype="fp32"), scheduler)

        method, pace = plan_guidance(settings, scheduler)
        walker, clip = scheduler, None
        if classifier is not None:
            walker, clip = without_clip(scheduler)
            walker.set_timesteps(settings.steps)
        return Painter(
            networks.condition,
            networks.decode,
            score,
            _target(classifier, checkpoint, settings),
            walker,
            checkpoint.shape,
            settings.mode,
            settings.steps,
            settings.eta,
            device,
            networks.is_cut,
            in_fp32=None if autocast is None else in_fp32,
            drop_fp32=None if autocast is None else drop_fp32,
            fixed_rows=fixed_rows,
            clip=clip,
            method=method,
            pace=pace,
            weak=weak,
        )

    return painter_for


class _Networks(NamedTuple):
    """A checkpoint's networks: those of `Painter`, and a denoiser that is asked for nothing but the null condition.

    `weak` is a weaker network that reads labels and prompts as the network does.
    """

    condition: Condition
    null_denoiser: Denoiser
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_cut: Callable[[str], bool] | None = None
    weak: Condition | None = None


def _open_networks(
    checkpoint: Checkpoint,
    kind: PredictionType,
    negative_prompt: str | None,
    device: torch.device,
    access: Access,
    compile_networks: bool,
    autocast: torch.dtype | None,
    guide: GuideModel | None = None,
    decodes: bool = True,
) -> _Networks:
    """Loads the networks, for autocast to that dtype."""
    from guidegen.checkpoints.loading import load_part
    from guidegen.checkpoints.own_networks import OwnDenoiser
    from guidegen.scores.denoiser import DiTDenoiser, TextDenoiser, UNetDenoiser, latent_decoder

    if checkpoint.own is not None:
        own = OwnDenoiser(checkpoint, checkpoint.own, kind, device)
        return _Networks(partial(_by_label, own), own, own.decode)
    network = _network(checkpoint, device, access, autocast)
    weak = _weak_network(guide, network, device, access, autocast)
    compiled: Any = torch.compile(network) if compile_networks else network
    weak_compiled: Any = torch.compile(weak) if compile_networks and weak is not None else weak
    latent = checkpoint.kind.latent and decodes
    decode = latent_decoder(load_part(checkpoint, "vae", device, access)) if latent else None
    if checkpoint.kind.text:
        from guidegen.checkpoints.text import PromptEncoder

        encoder = PromptEncoder(checkpoint, network, negative_prompt, device, access)

        def by_prompt(net: Any, cells: Sequence[Cell]) -> tuple[Denoiser, list[Mixture]]:
            texts = list(dict.fromkeys(text for cell in cells for text, _ in cell.prompt_parts if text is not None))
            place: dict[str | None, int] = {None: NULL} | {text: i for i, text in enumerate(texts)}
            labels = [tuple((place[text], weight) for text, weight in cell.prompt_parts) for cell in cells]
            return TextDenoiser(net, kind, encoder(texts), autocast), labels

        null_denoiser = TextDenoiser(compiled, kind, encoder([]), autocast)
        weaker = partial(by_prompt, weak_compiled) if weak_compiled is not None else None
        return _Networks(partial(by_prompt, compiled), null_denoiser, decode, encoder.is_cut, weaker)
    cls = DiTDenoiser if checkpoint.kind.network == "transformer" else UNetDenoiser
    denoiser = cls(compiled, kind, checkpoint.null_label, autocast)
    null = guide.checkpoint.null_label if guide and guide.checkpoint else checkpoint.null_label
    weaker = None if weak_compiled is None else partial(_by_label, cls(weak_compiled, kind, null, autocast))
    return _Networks(partial(_by_label, denoiser), denoiser, decode, weak=weaker)


def _network(checkpoint: Checkpoint, device: torch.device, access: Access, weights: torch.dtype | None) -> Any:
    from guidegen.checkpoints.loading import load_network

    network: Any = load_network(checkpoint, device, access, weights)
    if checkpoint.kind.network == "unet" and device.type in ("cpu", "cuda"):
        return network.to(memory_format=torch.channels_last)  # what convolutions run fastest in
    return network


def _weak_network(
    guide: GuideModel | None, network: Any, device: torch.device, access: Access, weights: torch.dtype | None
) -> Any:
    """The network of a guide that shares all else with the model; None where there is no such guide."""
    if guide is None or not guide.shares:
        return None
    if guide.weakening is not None:
        from guidegen.checkpoints.weaken import weakened

        return weakened(network, guide.weakening, guide.layers)
    return _network(guide.checkpoint, device, access, weights) if guide.checkpoint else None


def check_networks(checkpoint: Checkpoint, classifier: AnyClassifier | None, guide: GuideModel | None) -> None:
    """Refuses, before any weights are read, configs that make no network, and layers that it does not have.

    Raises:
        CheckpointError: a config makes no network.
        UsageError: it has none of the layers that `--guide-model` names.
    """
    from guidegen.checkpoints.loading import check_configs, empty_network
    from guidegen.checkpoints.weaken import pick_layers

    check_configs(checkpoint, [part for part, _ in classifier.parts] if classifier else ())
    if guide is not None and guide.checkpoint is not None:
        check_configs(guide.checkpoint)
    if guide is not None and guide.weakening is not None:
        pick_layers(empty_network(checkpoint), guide.weakening, guide.layers)


def _by_label(denoiser: Denoiser, cells: Sequence[Cell]) -> tuple[Denoiser, list[Mixture]]:
    return denoiser, [_label_ids(cell) for cell in cells]


def _label_ids(cell: Cell) -> Mixture:
    return tuple((NULL if label is None else int(label), weight) for label, weight in cell.label_parts)


def _target(classifier: AnyClassifier | None, checkpoint: Checkpoint, settings: Settings) -> Callable[[Cell], Mixture]:
    """From a cell to its labels as the classifier counts them; several count as `SummedScore` does."""
    if classifier is None:
        return _label_ids
    known = checkpoint.known(classifier)
    count, targets = len(classifier.parts), [(_own_target(part, known, settings), own) for part, own in classifier.parts]
    return lambda cell: tuple(
        (label * count + i, own * weight) for i, (target, own) in enumerate(targets) for label, weight in target(cell)
    )


def _own_target(classifier: ClassifierInfo, known: Labels, settings: Settings) -> Callable[[Cell], Mixture]:
    """From a cell to its labels as one classifier counts them: a zero-shot one counts texts."""
    if not classifier.zero_shot:
        return _label_ids
    place: dict[Any, int] = {text: i for i, text in enumerate(settings.classifier_texts or ())}
    place |= classifier.columns(known)  # label ids are no texts
    return lambda cell: tuple((place["" if part is None else part], weight) for part, weight in cell.targets)


def _columns(classifier: ClassifierInfo, known: Labels, settings: Settings) -> dict[int, int]:
    if classifier.zero_shot:
        return {i: i for i in range(len(settings.classifier_texts or ()))}
    return classifier.columns(known)


def _open_score(
    classifier: AnyClassifier,
    checkpoint: Checkpoint,
    settings: Settings,
    device: torch.device,
    access: Access,
    compile_networks: bool,
    networks: _Networks,
) -> Classifier:
    """Loads the classifiers: their gradient at what the networks draw."""
    from guidegen.scores.classifier import SummedScore

    known = checkpoint.known(classifier)
    parts = [part for part, _ in classifier.parts]
    scores = [_open_own_score(part, known, settings, device, access, compile_networks, networks) for part in parts]
    return scores[0] if len(scores) == 1 else SummedScore(scores)


def _open_own_score(
    classifier: ClassifierInfo,
    known: Labels,
    settings: Settings,
    device: torch.device,
    access: Access,
    compile_networks: bool,
    networks: _Networks,
) -> Classifier:
    """`_open_score` of one classifier."""
    from guidegen.checkpoints.loading import load_classifier
    from guidegen.scores.classifier import CheapScore, DenoisedScore, NoisyScore

    autocast = DTYPES[settings.dtype]
    network: Any = load_classifier(classifier, device, access, settings.classifier_texts or (), autocast)
    if compile_networks:
        network = torch.compile(network)
    columns = _columns(classifier, known, settings)
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
        UsageError: no such scheduler, one that does not fit the checkpoint, or that does not take these steps or eta.
    """
    scheduler = make_scheduler(checkpoint.scheduler_config, name)
    if eta is not None and not takes_eta(scheduler):
        raise UsageError(f"--eta is for ddim; {type(scheduler).__name__} has none.")
    try_out(scheduler, steps, eta)
    return scheduler


def plan_guidance(settings: Settings, scheduler: Any) -> tuple[Method, Pace]:
    """The method with its options filled in, and how strongly it acts at each step of the scheduler.

    Raises:
        UsageError: no such method, option, interval or schedule, or a method that is not exact with this scheduler.
    """
    given = {name: str(value) for name, value in (settings.guidance_options or {}).items() if name != FILE_SHA256}
    ref, file = settings.guidance or "cfg", (settings.guidance_options or {}).get(FILE_SHA256)
    method, options = find_method(ref, given)
    if file is not None and file != own_sha256(ref):
        raise UsageError(f"--guidance {ref}: the file was changed while it was in use.")
    after = levels_after(scheduler) if method.gain is not None and not settings.eta else None
    if method.gain is not None and after is None:
        found = f"--eta {settings.eta:g}" if settings.eta else type(scheduler).__name__
        raise UsageError(
            f"--guidance {method.name}: renoises with the unguided prediction, which is exact only for "
            f"--scheduler ddim with --eta 0 and --scheduler euler; this is {found}."
        )
    pace = make_pace(noise_levels(scheduler), settings.interval, settings.w_schedule, method, after)
    return replace(method, combine=partial(method.combine, **options)) if options else method, pace


def what_counts(settings: Settings, scheduler: Any, cell: Cell) -> Hashable:
    """What decides the image of a cell: equal for two settings that draw the same one at its weights."""
    _, pace = plan_guidance(settings, scheduler)
    weights = Weights(*mode_weights(settings.mode, cell))
    steps = tuple(pace.weights(index, weights) for index in range(len(scheduler.timesteps)))
    idle = all(step.w in (0, 1) and step.w_classifier == 0 and step.w_guide == 1 for step in steps)
    plain: dict[str, Any] = {"interval": None, "w_schedule": None}  # the steps tell
    plain |= {"guidance": None, "guidance_options": None} if idle else {}
    return digest(asdict(replace(settings, **plain))), steps


def cost(
    groups: Iterable[tuple[Cell, int]],
    settings: Settings,
    scheduler: Any,
    checkpoint: Checkpoint,
    classifier: AnyClassifier | None,
) -> int:
    """Network calls behind cells (NFE), of the denoiser and of the classifiers; a sweep shares some of them.

    Args:
        groups: one of the cells that differ in nothing but the seed, and how many these are.
        settings: of all of them.
        scheduler: with its timesteps set.
        checkpoint: what draws.
        classifier: what guides; None in modes without one.
    """
    method, pace = plan_guidance(settings, scheduler)
    each = cost_with(method, _cost_of_gradient(settings))

    @cache
    def calls(weights: Weights, labels: Mixture, targets: Mixture) -> int:
        steps = range(len(scheduler.timesteps))
        return sum(calls_per_step(pace.weights(index, weights), each, labels, targets) for index in steps)

    def numbered(parts: Sequence[tuple[Any, float]], count: int = 1, place: int = 0) -> Mixture:
        return tuple((i * count + place, weight) for i, (_, weight) in enumerate(parts))

    judges = [part for part, _ in classifier.parts] if classifier else []

    def asked(cell: Cell) -> tuple[Mixture, Mixture]:
        labels = cell.prompt_parts if checkpoint.kind.text else cell.label_parts
        own = [cell.targets if part.zero_shot else cell.label_parts for part in judges]
        targets = [target for i, parts in enumerate(own) for target in numbered(parts, len(own), i)]
        return numbered(labels), tuple(targets)

    return sum(count * calls(Weights(*mode_weights(settings.mode, cell)), *asked(cell)) for cell, count in groups)


def plain_cost(count: int, settings: Settings, scheduler: Any) -> int:
    """Network calls of a loop over `count` cells that skips none and shares none."""
    w, w_classifier = settings.mode in ("cfg", "both"), settings.mode in ("classifier", "both")
    weights = Weights(2.0 * w or 1.0 * (settings.mode == "auto"), 2.0 * w_classifier, 2.0 if settings.guide_model else 1.0)
    cost = _cost_of_gradient(settings)
    calls = calls_per_step(weights, cost, targets=tuple((i, 1.0) for i in range(1 + len(cost.others))))
    return calls * count * len(scheduler.timesteps)


def _cost_of_gradient(settings: Settings) -> Cost:
    from guidegen.scores.classifier import CheapScore, DenoisedScore, NoisyScore, summed_cost

    if settings.classifier is None:
        return FREE
    denoised = CheapScore if settings.classifier_gradient == "cheap" else DenoisedScore
    inputs = (settings.classifier_input or "noisy").split(SEPARATOR)
    return summed_cost([denoised.cost if each == "denoised" else NoisyScore.cost for each in inputs])


def draw(
    painter: Painter,
    cells: Sequence[Cell],
    run: Run,
    name_of: Callable[[Cell], str],
    batch_size: int,
    on_step: Callable[[int], None] | None = None,
    between: Callable[[], None] | None = None,
    tally: Tally | None = None,
) -> Generator[tuple[Cell, Row], None, None]:
    """Draws and saves the cells, yielding each with its row once its image is on disk.

    Images are saved while the next batch is drawn. A batch that is out of memory is halved, and so are all
    after it; the calls of a single image are split in the end. A non-finite image is drawn again in fp32
    where it was not and memory allows, and else becomes a row, never a file. Cells whose label weighs nothing
    are one image for each seed, which is drawn once. Whatever ends the drawing, the rows of all that was
    saved come before it. Who leaves it half-way closes it (`contextlib.closing`) before the run.

    Args:
        painter: the networks.
        cells: what to draw.
        run: where it goes.
        name_of: the name of a cell's label.
        batch_size: cells at once.
        on_step: called with the number of cells of the batch after each step.
        between: called between batches; what it raises ends the drawing with all before it saved.
        tally: counts the network calls.
    """
    tally = tally or Tally()
    brush = _Brush(painter, batch_size, on_step, tally)
    first, twins = _unguided_twins(cells, painter.mode)
    start = 0
    with _Writer(run, name_of) as writer:
        try:
            while start < len(first):
                if between:
                    between()
                batch = first[start : start + brush.size]
                same = [[cell, *twins.get(cell, ())] for cell in batch]
                finished = brush.paint(batch, [len(group) for group in same])
                if finished is None:
                    continue
                start += len(batch)
                writer.put([_Job(group, *one) for group, one in zip(same, finished, strict=True)])
                yield from writer.written()
                writer.raise_error()
        except GeneratorExit:  # nobody takes rows any more
            raise
        except BaseException:
            writer.stop()
            yield from writer.written()
            raise
        writer.stop()
        yield from writer.written()
        writer.raise_error()


def _unguided_twins(cells: Sequence[Cell], mode: str) -> tuple[Sequence[Cell], dict[Cell, list[Cell]]]:
    """The cells to draw, and for some of them those that are the same image.

    They are those whose label and classifier weigh nothing, of the same seed and, against a weaker
    model without a label, of the same weight.
    """
    first: dict[Hashable, Cell] = {}
    twins: dict[Cell, list[Cell]] = {}
    for cell in cells:
        w, w_classifier, w_guide = mode_weights(mode, cell)
        if (w, w_classifier) == (0.0, 0.0) and first.setdefault((cell.seed, w_guide), cell) != cell:
            twins.setdefault(first[cell.seed, w_guide], []).append(cell)
    again = {twin for group in twins.values() for twin in group}
    return ([cell for cell in cells if cell not in again] if again else cells), twins


class _Finished(NamedTuple):
    """An image (H, W, C) uint8, None where it is not finite; its network calls; its dtype if not the run's."""

    pixels: Any
    calls: int
    dtype: str | None = None


@dataclass
class _Brush:
    """Paints batches of what fits into memory, and counts."""

    painter: Painter
    size: int
    on_step: Callable[[int], None] | None
    tally: Tally
    split: bool = False
    no_room: bool = False

    def paint(self, cells: Sequence[Cell], counts: Sequence[int]) -> list[_Finished] | None:
        """The images of a batch, each of which stands for so many cells; None if it has to be tried again, as a smaller one.

        Raises:
            GuidegenError: not even a single image fits into memory.
        """
        step = partial(self.on_step, sum(counts)) if self.on_step else None
        painted = self._try(self.painter, cells, self.split, step)
        if isinstance(painted, str):
            self._shrink(len(cells), painted)
            return None
        made = [_Finished(pixels, calls) for pixels, calls in painted]
        if any(one.pixels is None for one in made) and (exact := self._exact()) is not None:
            self._again(exact, cells, made)
        return made

    def _exact(self) -> Painter | None:
        """The networks in fp32; None where there are none, or no room for them beside those that draw."""
        if self.painter.in_fp32 is None or self.no_room:
            return None
        try:
            return self.painter.in_fp32()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self.no_room = True  # known without reading all the weights for each batch
        _free_memory(self.painter.device)
        return None

    def _again(self, painter: Painter, cells: Sequence[Cell], made: list[_Finished]) -> None:
        """Draws what is not finite once more, in fp32; an image that does not fit so stays as it is."""
        bad = [i for i, one in enumerate(made) if one.pixels is None]
        size, split = len(bad), False
        while bad:
            some = bad[:size]
            painted = self._try(painter, [cells[i] for i in some], split)
            if not isinstance(painted, str):
                for i, (pixels, calls) in zip(some, painted, strict=True):
                    made[i] = _Finished(pixels, made[i].calls + calls, "fp32")
            elif len(some) > 1:
                size = len(some) // 2
                continue
            elif painter.fixed_rows is None and not split:
                split = True
                continue
            bad = bad[size:]

    def _try(
        self, painter: Painter, cells: Sequence[Cell], split: bool, step: Callable[[], None] | None = None
    ) -> list[tuple[Any, int]] | str:
        """Pixels (None where not finite) and network calls of each cell; what the device said where memory is short."""
        try:
            return self._pixels(replace(painter, fixed_rows=1) if split else painter, cells, step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = first_line(error)
        _free_memory(painter.device)  # not before the block is left: the traceback holds the tensors of the batch
        return said

    def _pixels(self, painter: Painter, cells: Sequence[Cell], step: Callable[[], None] | None) -> list[tuple[Any, int]]:
        images, calls = painter.paint(cells, step, self.tally)
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pixels = to_uint8(images).numpy()
        return [(image if good else None, n) for image, good, n in zip(pixels, finite, calls, strict=True)]

    def _shrink(self, cells: int, said: str) -> None:
        """Half the batch, or, of a single image, one network row at a time; an error where that is all."""
        painter = self.painter
        if painter.in_fp32 and painter.drop_fp32 and painter.drop_fp32():  # room that nothing draws in now
            _free_memory(painter.device)
        elif painter.fixed_rows is not None and painter.fixed_rows > 1:
            raise GuidegenError(
                f"{painter.fixed_rows} rows do not fit into the memory of {painter.device}: with --deterministic, "
                f"give a smaller --batch-size. ({said})"
            )
        elif cells > 1:
            self.size = min(self.size, cells // 2)
        elif painter.fixed_rows is None and not self.split:
            self.split = True
        else:
            raise GuidegenError(f"Not even one image at a time fits into the memory of {painter.device}. ({said})")


def _free_memory(device: torch.device) -> None:
    """Gives back to the device what no tensor holds any more."""
    gc.collect()  # tensors in cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class _Job(NamedTuple):
    cells: list[Cell]
    pixels: Any
    calls: int
    dtype: str | None


class _Writer:
    """Saves images in a thread of its own, in order, two batches behind the drawing at most.

    What goes wrong there is raised here, when the next batch is handed over or all is. Leaving the block
    waits for what was handed over, also when the drawing ended in an error or a signal.
    """

    def __init__(self, run: Run, name_of: Callable[[Cell], str]):
        self._run, self._name_of = run, name_of
        self._jobs: queue.Queue[list[_Job] | None] = queue.Queue(maxsize=1)
        self._rows: queue.SimpleQueue[tuple[Cell, Row]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="guidegen-writer", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def put(self, jobs: list[_Job]) -> None:
        """Hands over a batch, waiting while two are on their way."""
        self.raise_error()
        self._jobs.put(jobs)

    def written(self) -> Iterator[tuple[Cell, Row]]:
        """The rows that were written since the last call."""
        while not self._rows.empty():
            yield self._rows.get()

    def stop(self) -> None:
        """Waits until all that was handed over is written, or has failed."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def raise_error(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (jobs := self._jobs.get()) is not None:
            try:
                for job in jobs if self._error is None else ():
                    for cell in job.cells:
                        row = self._run.write(cell, job.pixels, self._name_of(cell), job.calls, job.dtype)
                        self._rows.put((cell, row))
            except BaseException as error:
                self._error = error
