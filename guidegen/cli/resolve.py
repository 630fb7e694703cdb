"""Flags become a job: all that is known of `sample` and `sweep` before any weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from guidegen.cli import console, options
from guidegen.cli.asked import (
    asked_classifier_weights,
    asked_gradient,
    asked_guidance,
    asked_guide_weights,
    asked_seeds,
    asked_shard,
    asked_weights,
    check_numbers,
    check_sweep,
)
from guidegen.cli.axes import parse_axes, parse_by, vary
from guidegen.cli.flags import Flags
from guidegen.cli.output import Output, parse_output
from guidegen.errors import UsageError
from guidegen.models.checkpoint import AnyClassifier, Checkpoint, ClassifierInfo
from guidegen.models.classifiers.info import label_texts
from guidegen.models.labels import Labels
from guidegen.report import grid
from guidegen.sampling.autoguidance import BUNDLED_GUIDE, NAME_ONE, GuideModel, open_guide
from guidegen.spec.cell import Cell, Variant, digest, fingerprint
from guidegen.spec.composition import has_weights, label_parts, prompt_parts, single_labels
from guidegen.spec.names import describe
from guidegen.spec.parse import parse_weights
from guidegen.spec.plan import Cells, Plan, make_cells
from guidegen.spec.settings import Settings
from guidegen.spec.shard import Shard

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Job:
    """All that is known before any weights are read.

    Attributes:
        flags: as given.
        checkpoint: what will be drawn from.
        classifier: the classifier that guides, or several; None in modes without one.
        guide: the guiding model that the checkpoint is weighed against; None without autoguidance.
        name_of: the name of a cell's label.
        plan: what the run is to hold.
        shard: which part of it this process draws; None for all.
        cells: what this process draws.
        looks: the settings of each variant of the plan, and a diffusers scheduler with its timesteps set.
        device: where to draw.
        settings: all but the hashes of the weights; what all variants have in common.
        pages: the grid of a sweep, where this process draws it.
        output: where it goes.
    """

    flags: Flags
    checkpoint: Checkpoint
    classifier: AnyClassifier | None
    guide: GuideModel | None
    name_of: Callable[[Cell], str]
    plan: Plan
    shard: Shard | None
    cells: Cells
    looks: dict[Variant, tuple[Settings, Any]]
    device: torch.device
    settings: Settings
    pages: grid.Layout | None
    output: Output

    @property
    def title(self) -> str:
        """The line at the top of the grid."""
        return grid.title_of(asdict(self.settings), [axis for axis, _ in self.plan.by])

    def by_variant(self, cells: Cells) -> Iterator[tuple[Settings, Any, Cells]]:
        """The cells of each variant that has any, with its settings and its scheduler."""
        for variant, some in cells.by_variant():
            yield *self.looks[variant], some

    @property
    def facts(self) -> dict[str, Any]:
        """What a file of the whole plan carries: a picture names its cells, the others the lists they come from."""
        about = {"settings": asdict(self.settings)}
        if self.output.is_file and self.output.one_image:
            return about | {"cells": [cell.as_json() for cell in self.cells]}
        return about | {"plan": self.plan.as_json()}


def plan_job(flags: Flags) -> Job:
    """Checks the flags against the checkpoint and plans the cells, the grid and the output.

    Raises:
        UsageError: something that cannot be served; nothing was written.
        CheckpointError: a checkpoint that cannot be opened.
    """
    wcs, wgs = asked_classifier_weights(flags), asked_guide_weights(flags)
    seeds = asked_seeds(flags)
    check_sweep(flags)
    check_numbers(flags)
    axes = parse_by(flags.by or [])
    own_weights = [w for axis in axes for w in axis.weights or ()]
    output = parse_output(flags.out)
    needs_null = any(w != 1 for w in own_weights or parse_weights("0" if flags.w is None else flags.w))
    checkpoint, classifier, guide = _open(flags, needs_null=needs_null)
    known = checkpoint.known(classifier)
    prompts = _prompts(flags, checkpoint, classifier)
    labels = _labels(flags, checkpoint, classifier, known, prompts)
    mixed = any(isinstance(label, str) for label in labels) or any(map(has_weights, prompts or ()))
    if flags.negative_prompt is not None and prompts and not mixed and flags.mode in ("none", "autoguidance"):
        raise UsageError(
            f"--negative-prompt is what the null condition says, and --mode {flags.mode} draws a prompt without it."
        )
    ws = list(dict.fromkeys(own_weights)) or asked_weights(flags, mixed)
    mode = (
        "cfg" if flags.mode == "autoguidance" else flags.mode
    )  # labels with weights are asked against none in mode autoguidance too
    if mixed and (reason := checkpoint.refusal(mode, classifier is not None, needs_null=True)):
        raise UsageError(f"Labels with weights cannot be served: {reason}.")
    if flags.mode == "none":
        ws = [0.0 if labels == [None] and prompts is None else 1.0]
    if guide:
        needs_null = mixed or flags.mode == "classifier" or (flags.mode != "autoguidance" and 0 in ws)
        guide.check_labels(single_labels(labels), checkpoint, needs_null)
    from guidegen.sampling.device import pick_device  # torch, from here on
    from guidegen.sampling.networks import check_networks

    check_networks(checkpoint, classifier, guide)
    device = pick_device(flags.device)

    def look(flags: Flags) -> tuple[Settings, Any]:
        return _look(flags, checkpoint, classifier, guide, prompts, device)

    own_scheduler = checkpoint.scheduler_config.get("_class_name", "DDPMScheduler")
    varied = vary(flags, axes, look, own_scheduler, checkpoint.steps)
    _check_different(varied.looks)
    columns, rows = parse_axes(flags.columns), parse_axes(flags.rows)
    plan = Plan(
        labels, seeds, ws, tuple(wcs), prompts, flags.sweep, tuple(wgs), varied.by, varied.own_weights, columns, rows
    )
    shard = asked_shard(flags, output)
    if flags.sweep:
        grid.check_count(plan.samples * plan.each)
    cells = plan.cells(shard)
    if not flags.sweep and len(cells) > 1 and output.one_image:
        raise UsageError(
            f"-o {flags.out} holds one image, and this is {len(cells):,}: use a directory, .npz, or sweep for a grid."
        )

    def name_of(cell: Cell) -> str:
        if cell.mixture is None:
            return "" if cell.label is None else known.name(cell.label)
        return ", ".join(f"{known.name(label) or label}:{weight:g}" for label, weight in label_parts(cell.mixture))

    job = Job(
        flags, checkpoint, classifier, guide, name_of, plan, shard, cells, varied.looks, device, varied.base, None, output
    )
    pages = _pages(job) if flags.sweep else None
    if flags.dtype == "fp16" and device.type == "cpu" and not flags.quiet:
        console.note(
            "note: fp16 on a CPU is slower than bf16, about a thousand times where the CPU has no fp16 arithmetic of its "
            "own. --dtype bf16 is as fast as fp32 or faster."
        )
    return replace(job, pages=None if shard else pages, output=output.named(_run_name(job)))


def _pages(job: Job) -> grid.Layout:
    """The grid of the whole plan, which also a shard checks.

    Raises:
        UsageError: it does not fit.
    """
    whole = job.plan.cells() if job.shard else job.cells
    facts = [{**cell.fields(), "label_name": job.name_of(cell), **dict(cell.variant)} for cell in whole]
    pages = grid.layout(facts, job.checkpoint.size, job.plan.columns, title=job.title, rows=job.plan.rows)
    if job.output.one_image:
        job.output.check_grid(len(pages.pages), pages.size(), len(job.cells))
    return pages


def _run_name(job: Job) -> str:
    """The default name of its run directory: the same flags give the same one."""
    flags, plan, checkpoint = job.flags, job.plan, job.checkpoint
    drawn = replace(plan, columns=(), rows=()).as_json()  # in another grid they are the same images
    names = list(dict.fromkeys(map(job.name_of, make_cells(plan.labels, plan.seeds[:1], plan.weights[:1]))))
    refs = (
        checkpoint.ref,
        checkpoint.revision,
        job.classifier and job.classifier.ref,
        *([job.guide.ref] if job.guide else []),
    )
    command = "sweep" if flags.sweep else "sample"
    return f"{checkpoint.name}-{command}-{flags.mode}-{fingerprint(asdict(job.settings), *refs, drawn, names)}"


def _look(
    flags: Flags,
    checkpoint: Checkpoint,
    classifier: AnyClassifier | None,
    guide: GuideModel | None,
    prompts: list[str] | None,
    device: torch.device,
) -> tuple[Settings, Any]:
    """The settings that the flags mean, but for the hashes of the weights, and the scheduler.

    Raises:
        UsageError: a scheduler or steps that cannot be.
    """
    from guidegen.sampling.cost import plan_guidance, plan_scheduler
    from guidegen.sampling.device import pick_dtype

    check_numbers(flags)
    steps = flags.steps or checkpoint.steps
    scheduler = plan_scheduler(checkpoint, flags.scheduler, steps, flags.eta)
    settings = Settings(
        mode=flags.mode,
        model=checkpoint.name,
        model_sha256="",
        scheduler=type(scheduler).__name__,
        steps=steps,
        eta=flags.eta,
        dtype=pick_dtype(flags.dtype, device),
        null_label=checkpoint.null_label,
        size=list(checkpoint.size),
        negative_prompt=flags.negative_prompt,
        classifier=classifier.name if classifier else None,
        classifier_input=classifier.input if classifier else None,
        classifier_gradient=asked_gradient(flags, classifier),
        classifier_texts=_texts(flags, checkpoint, classifier, prompts),
        config_sha256=digest(
            checkpoint.configs,
            checkpoint.scheduler_config,
            checkpoint.index.get("force_zeros_for_empty_prompt"),
            classifier and classifier.config,
            classifier and classifier.preprocessor,
            *([guide.checkpoint.configs] if guide and guide.checkpoint else []),
        ),
        interval=flags.interval,
        w_schedule=flags.w_schedule,
        **asked_guidance(flags),
        guide_model=guide.name if guide else None,
    )
    plan_guidance(settings, scheduler)
    return settings, scheduler


def _check_different(looks: Mapping[Variant, tuple[Settings, Any]]) -> None:
    """Refuses two variants that are the same at every step, such as two intervals between the same two noise levels."""
    from guidegen.sampling.cost import plan_guidance

    seen: dict[Any, Variant] = {}
    for variant, (settings, scheduler) in looks.items():
        _, schedule = plan_guidance(settings, scheduler)
        look = digest(asdict(replace(settings, interval=None, w_schedule=None))), schedule
        if (other := seen.setdefault(look, variant)) != variant:
            raise UsageError(
                f"--by: {describe(*zip(*other, strict=True))} and {describe(*zip(*variant, strict=True))} are the same "
                f"at each of these {settings.steps} steps: leave one out."
            )


def say_what_it_takes(job: Job) -> None:
    """`--dry-run`: cells, network calls, bytes and pixels, on standard output."""
    from guidegen.sampling.cost import cost

    channels, height, width = job.checkpoint.image_shape
    sizes = [job.pages.size(i) for i in range(len(job.pages.pages))] if job.pages else []
    count = len(job.cells)
    costs = [
        (some, cost(some.groups(), settings, scheduler, job.checkpoint, job.classifier))
        for settings, scheduler, some in job.by_variant(job.cells)
    ]
    nfe = sum(cost for _, cost in costs)
    variants = [{**dict(some[0].variant), "cells": len(some), "nfe": cost} for some, cost in costs if some[0].variant]
    facts = {
        "cells": count,
        "nfe": nfe,
        "bytes": count * channels * height * width,
        "grid_pixels": sum(w * h for w, h in sizes),
        "grid_pages": len(sizes),
        "out": str(job.output.path),
    } | ({"variants": variants} if variants else {})
    if job.flags.json_rows:
        console.result(json.dumps(facts))
        return
    console.result(f"{count:,} images of {width}x{height}, {facts['bytes']:,} bytes of pixels before compression")
    console.result(f"{nfe:,} network calls (NFE), {nfe / max(1, count):g} an image on average")
    for some, calls in costs if variants else ():
        what = describe(*zip(*some[0].variant, strict=True))
        console.result(f"  {what}: {len(some):,} images, {calls:,} calls, {calls / len(some):g} an image")
    if sizes:
        console.result(f"grid of {facts['grid_pixels']:,} pixels: {', '.join(f'{w}x{h}' for w, h in sizes)}")
    console.result(f"into {job.output.path}")


def _open(flags: Flags, needs_null: bool = True) -> tuple[Checkpoint, AnyClassifier | None, GuideModel | None]:
    """The checkpoint, the classifier and the guiding model, if any; refuses a mode that cannot be served."""
    size = options.parse_size(flags.size)
    checkpoint = options.find_checkpoint(flags.model, flags.null_label, size, flags.access)
    classifier = None
    if flags.mode in ("classifier", "both"):
        classifier = options.find_classifier(flags.classifier, checkpoint, flags.classifier_input, flags.access)
    elif any((flags.classifier, flags.classifier_input, flags.classifier_gradient)):
        raise UsageError(
            "--classifier, --classifier-input and --classifier-gradient are for the modes classifier and both, "
            f"not {flags.mode}."
        )
    needs_null = needs_null or flags.classifier_gradient == "detached"
    reason = checkpoint.refusal(flags.mode, classifier is not None, needs_null)
    if reason and not (flags.mode == "autoguidance" and flags.guide_model):
        raise UsageError(f"--mode {flags.mode} cannot be served: {reason}.")
    for part, _ in classifier.parts if classifier else ():
        if part.input == "noisy" and not part.custom:
            _check_noisy(part, checkpoint)
    return checkpoint, classifier, _open_guide(flags, checkpoint, size)


def _open_guide(flags: Flags, checkpoint: Checkpoint, size: tuple[int, int] | None) -> GuideModel | None:
    """The guiding model that is named, or the one in the checkpoint's folder; None where none is asked for."""
    if flags.mode != "autoguidance" and flags.guide_model is None and flags.w_guide is None:
        return None
    if flags.guide_model is None and checkpoint.guiding_folder is None:
        raise UsageError(f"--w-guide needs a guiding model, and there is none beside the model. {NAME_ONE}.")
    return open_guide(flags.guide_model or BUNDLED_GUIDE, checkpoint, size, flags.access)


def _check_noisy(classifier: ClassifierInfo, checkpoint: Checkpoint) -> None:
    """A noise-aware classifier reads the very x_t that the network draws."""
    channels = classifier.config.get("in_channels", 3)
    if channels != checkpoint.shape[0]:
        raise UsageError(
            f"--classifier {classifier.ref} reads {channels} channels, and the model draws {checkpoint.shape[0]}"
            f"{' (latents)' if checkpoint.latent else ''}: it was made for another. --classifier-input denoised may do."
        )


def _prompts(flags: Flags, checkpoint: Checkpoint, classifier: AnyClassifier | None) -> list[str] | None:
    """The texts that are asked for; None where none is needed."""
    zero_shot = classifier is not None and classifier.zero_shot
    model_reads = checkpoint.reads_prompts and flags.mode != "classifier"
    if not (model_reads or zero_shot):
        given = "--prompt" if flags.prompt else "--negative-prompt" if flags.negative_prompt is not None else None
        if given and not checkpoint.reads_prompts:
            raise UsageError(f"{given}: neither the model nor a classifier reads text. Give --label.")
        if flags.prompt:
            raise UsageError("--prompt: in mode classifier the model draws without one; --mode both uses the prompt too.")
        return None
    if flags.prompt:
        return options.read_prompts(flags.prompt)
    has_labels = checkpoint.class_conditional or (classifier is not None and classifier.takes_labels)
    if (model_reads and flags.mode != "none") or (zero_shot and not has_labels):
        instead = "takes text, not labels: give" if flags.label else f"needs, in mode {flags.mode},"
        part = "model" if model_reads else "classifier"
        raise UsageError(f'The {part} {instead} --prompt, such as --prompt "a red fox in snow".')
    return None


def _texts(
    flags: Flags, checkpoint: Checkpoint, classifier: AnyClassifier | None, prompts: list[str] | None
) -> list[str] | None:
    """What a zero-shot classifier tells apart: the prompts and the null text, or the names of all labels."""
    if classifier is None or not classifier.zero_shot:
        return None
    if prompts is None:
        return label_texts(checkpoint.known(classifier))
    return list(
        dict.fromkeys([*(text for prompt in prompts for text, _ in prompt_parts(prompt)), flags.negative_prompt or ""])
    )


def _labels(
    flags: Flags,
    checkpoint: Checkpoint,
    classifier: AnyClassifier | None,
    known: Labels,
    prompts: list[str] | None,
) -> list[int | str] | list[None]:
    """Label ids and mixtures of them that are asked for; [None] where none is needed."""
    if not flags.label:
        if not _needs_label(flags.mode, checkpoint, classifier, prompts):
            return [None]
        first = next(iter(known), 0)
        example = f'"{known.name(first)}"' if len(known) and known.name(first) else first
        raise UsageError(f"--mode {flags.mode} needs --label, such as --label {example}. `guidegen labels` lists them.")
    if not len(known):
        takes = "it takes prompts: --prompt" if checkpoint.reads_prompts else "the model is unconditional, it takes none"
        raise UsageError(f"--label: {takes}.")
    ids = options.resolve_labels(flags.label, known)
    for part, _ in classifier.parts if classifier else ():
        knows = part.columns(known) if prompts is None or part.takes_labels else single_labels(ids)
        if missing := [i for i in single_labels(ids) if i not in knows]:
            raise UsageError(f"--label {missing[0]} {known.name(missing[0])}: the classifier {part.ref} does not know it.")
    return ids


def _needs_label(mode: str, checkpoint: Checkpoint, classifier: AnyClassifier | None, prompts: list[str] | None) -> bool:
    if classifier is not None and classifier.takes_labels:
        return True
    if not checkpoint.class_conditional:
        return False
    if mode == "none":
        return not checkpoint.has_null
    return mode != "classifier" or prompts is None
