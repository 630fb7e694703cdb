"""What `sample` and `sweep` do: flags become a job, and the job is carried out."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen import __version__, grid, limits
from guidegen.checkpoints import Access, AnyClassifier, Checkpoint, ClassifierInfo
from guidegen.checkpoints.classifiers import SEPARATOR, label_texts
from guidegen.checkpoints.files import weights_sha256
from guidegen.checkpoints.guides import BUNDLED_GUIDE, NAME_ONE, GuideModel, open_guide
from guidegen.checkpoints.labels import Labels
from guidegen.cli import console, options
from guidegen.cli.axes import parse_axes, parse_by, vary
from guidegen.cli.output import Output, already_there, export, parse_output
from guidegen.errors import IncompleteError, StoppedError, UsageError
from guidegen.mixture import has_weights, label_parts, prompt_parts, single_labels
from guidegen.naming import describe, named
from guidegen.own import own_sha256, split_own
from guidegen.parse import LARGEST_SEED, Seeds, parse_seeds, parse_weight, parse_weights
from guidegen.plan import (
    FILE_SHA256,
    Cell,
    Cells,
    Plan,
    Settings,
    Shard,
    Variant,
    digest,
    fingerprint,
    make_cells,
    parse_shard,
)
from guidegen.run import Row, Rows, Run, encode_row, png_text, remove, write_atomically

if TYPE_CHECKING:
    import torch

    from guidegen.engine import Painter


_LISTED = 20
"""Failed images that are named one by one."""


@dataclass(frozen=True)
class Flags:
    """The command line as it was given; the names are those of the flags."""

    sweep: bool
    mode: str
    w: str | None
    w_classifier: str | None
    w_guide: str | None
    label: list[str] | None
    prompt: list[str] | None
    negative_prompt: str | None
    num: int | None
    seed: int | None
    seeds: str | None
    model: str | None
    classifier: list[str] | None
    classifier_input: str | None
    classifier_gradient: str | None
    guide_model: str | None
    null_label: int | None
    variant: str | None
    size: str | None
    offline: bool
    allow_pickle: bool
    guidance: str | None
    guidance_opt: list[str] | None
    interval: str | None
    w_schedule: str | None
    steps: int | None
    scheduler: str | None
    eta: float | None
    dtype: str
    device: str
    batch_size: str
    deterministic: bool
    compile_networks: bool
    out: str | None
    shard: str | None
    by: list[str] | None
    columns: str | None
    rows: str | None
    overwrite: bool
    dry_run: bool
    json_rows: bool
    quiet: bool
    verbose: bool

    @property
    def access(self) -> Access:
        """How checkpoints may be read."""
        return Access(self.offline, self.allow_pickle, self.variant)


@dataclass(frozen=True)
class Job:
    """All that is known before any weights are read.

    Attributes:
        flags: as given.
        checkpoint: what will be drawn from.
        judge: the classifier that guides, or several; None in modes without one.
        guide: the weaker model that the checkpoint is weighed against; None without autoguidance.
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
    judge: AnyClassifier | None
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
    wcs, wgs = _classifier_weights(flags), _guide_weights(flags)
    seeds = _seeds(flags)
    _check_sweep(flags)
    _check_numbers(flags)
    axes = parse_by(flags.by or [])
    own_weights = [w for axis in axes for w in axis.weights or ()]
    output = parse_output(flags.out)
    needs_null = any(w != 1 for w in own_weights or parse_weights("0" if flags.w is None else flags.w))
    checkpoint, judge, guide = _open(flags, needs_null=needs_null)
    known = checkpoint.known(judge)
    prompts = _prompts(flags, checkpoint, judge)
    labels = _labels(flags, checkpoint, judge, known, prompts)
    mixed = any(isinstance(label, str) for label in labels) or any(map(has_weights, prompts or ()))
    if flags.negative_prompt is not None and prompts and not mixed and flags.mode in ("none", "auto"):
        raise UsageError(
            f"--negative-prompt is what the null condition says, and --mode {flags.mode} draws a prompt without it."
        )
    ws = list(dict.fromkeys(own_weights)) or _weights(flags, mixed)
    mode = "cfg" if flags.mode == "auto" else flags.mode  # labels with weights are asked against none in mode auto too
    if mixed and (reason := checkpoint.refusal(mode, judge is not None, needs_null=True)):
        raise UsageError(f"Labels with weights cannot be served: {reason}.")
    if flags.mode == "none":
        ws = [0.0 if labels == [None] and prompts is None else 1.0]
    if guide:
        needs_null = mixed or flags.mode == "classifier" or (flags.mode != "auto" and 0 in ws)
        guide.check_labels(single_labels(labels), checkpoint, needs_null)
    from guidegen import engine  # torch, from here on

    engine.check_networks(checkpoint, judge, guide)
    device = engine.pick_device(flags.device)

    def look(flags: Flags) -> tuple[Settings, Any]:
        return _look(flags, checkpoint, judge, guide, prompts, device)

    own_scheduler = checkpoint.scheduler_config.get("_class_name", "DDPMScheduler")
    varied = vary(flags, axes, look, own_scheduler, checkpoint.steps)
    _check_different(varied.looks)
    columns, rows = parse_axes(flags.columns), parse_axes(flags.rows)
    plan = Plan(
        labels, seeds, ws, tuple(wcs), prompts, flags.sweep, tuple(wgs), varied.by, varied.own_weights, columns, rows
    )
    shard = _shard(flags, output)
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

    job = Job(flags, checkpoint, judge, guide, name_of, plan, shard, cells, varied.looks, device, varied.base, None, output)
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
    refs = (checkpoint.ref, checkpoint.revision, job.judge and job.judge.ref, *([job.guide.ref] if job.guide else []))
    command = "sweep" if flags.sweep else "sample"
    return f"{checkpoint.name}-{command}-{flags.mode}-{fingerprint(asdict(job.settings), *refs, drawn, names)}"


def _look(
    flags: Flags,
    checkpoint: Checkpoint,
    judge: AnyClassifier | None,
    guide: GuideModel | None,
    prompts: list[str] | None,
    device: torch.device,
) -> tuple[Settings, Any]:
    """The settings that the flags mean, but for the hashes of the weights, and the scheduler.

    Raises:
        UsageError: a scheduler or steps that cannot be.
    """
    from guidegen import engine

    _check_numbers(flags)
    steps = flags.steps or checkpoint.steps
    scheduler = engine.plan_scheduler(checkpoint, flags.scheduler, steps, flags.eta)
    settings = Settings(
        mode=flags.mode,
        model=checkpoint.name,
        model_sha256="",
        scheduler=type(scheduler).__name__,
        steps=steps,
        eta=flags.eta,
        dtype=engine.pick_dtype(flags.dtype, device),
        null_label=checkpoint.null_label,
        size=list(checkpoint.size),
        negative_prompt=flags.negative_prompt,
        classifier=judge.name if judge else None,
        classifier_input=judge.input if judge else None,
        classifier_gradient=_gradient(flags, judge),
        classifier_texts=_texts(flags, checkpoint, judge, prompts),
        config_sha256=digest(
            checkpoint.configs,
            checkpoint.scheduler_config,
            checkpoint.index.get("force_zeros_for_empty_prompt"),
            judge and judge.config,
            judge and judge.preprocessor,
            *([guide.checkpoint.configs] if guide and guide.checkpoint else []),
        ),
        interval=flags.interval,
        w_schedule=flags.w_schedule,
        **_guidance(flags),
        guide_model=guide.name if guide else None,
    )
    engine.plan_guidance(settings, scheduler)
    return settings, scheduler


def _check_different(looks: Mapping[Variant, tuple[Settings, Any]]) -> None:
    """Refuses two variants that are the same at every step, such as two intervals between the same two noise levels."""
    from guidegen import engine

    seen: dict[Any, Variant] = {}
    for variant, (settings, scheduler) in looks.items():
        _, pace = engine.plan_guidance(settings, scheduler)
        look = digest(asdict(replace(settings, interval=None, w_schedule=None))), pace
        if (other := seen.setdefault(look, variant)) != variant:
            raise UsageError(
                f"--by: {describe(*zip(*other, strict=True))} and {describe(*zip(*variant, strict=True))} are the same "
                f"at each of these {settings.steps} steps: leave one out."
            )


def _check_sweep(flags: Flags) -> None:
    if flags.sweep:
        return
    given = {"--by": flags.by, "--columns": flags.columns, "--rows": flags.rows}
    if flag := next((flag for flag, value in given.items() if value), None):
        raise UsageError(f"{flag} is for sweep; sample draws at one setting.")


def say_what_it_takes(job: Job) -> None:
    """`--dry-run`: cells, network calls, bytes and pixels, on standard output."""
    from guidegen import engine

    channels, height, width = job.checkpoint.image_shape
    sizes = [job.pages.size(i) for i in range(len(job.pages.pages))] if job.pages else []
    count = len(job.cells)
    costs = [
        (some, engine.cost(some.groups(), settings, scheduler, job.checkpoint, job.judge))
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
    for some, cost in costs if variants else ():
        what = describe(*zip(*some[0].variant, strict=True))
        console.result(f"  {what}: {len(some):,} images, {cost:,} calls, {cost / len(some):g} an image")
    if sizes:
        console.result(f"grid of {facts['grid_pixels']:,} pixels: {', '.join(f'{w}x{h}' for w, h in sizes)}")
    console.result(f"into {job.output.path}")


def carry_out(job: Job) -> None:
    """Draws what is not there yet, makes the grid or the file, and prints the path.

    Raises:
        GuidegenError: as the exit codes say; what was finished is on disk.
    """
    job = _with_weights(job)
    if job.output.is_file and (there := already_there(job.output, job.facts, job.flags.overwrite)):
        for line in map(_line, there) if job.flags.json_rows else [str(job.output.path)]:
            console.result(line)
        if failures := find_failures(there):
            raise failures
        return
    if job.output.to_stdout and sys.stdout.isatty():
        raise UsageError("-o - writes PNG bytes, and standard output is a terminal: redirect it to a file or a pipe.")
    if not job.flags.quiet:
        for lack in job.checkpoint.missing:
            console.note(f"note: {job.checkpoint.ref} has no {lack}")
        known = job.checkpoint.known(job.judge)
        for part, _ in job.judge.parts if job.judge else ():
            if part.labels is not known and part.renumbers(known):
                console.note(f"note: {part.ref} has other label ids; its labels are matched by name")
    folder = job.output.folder or Path(tempfile.mkdtemp(prefix="guidegen-"))
    try:
        about = _about(job)
        variants = {variant: settings for variant, (settings, _) in job.looks.items()}
        run_of = partial(Run, folder, job.settings, about, job.flags.overwrite, job.plan, job.shard)
        with Signals() as signals, run_of(variants) as run:
            rows = _draw(job, run, signals)
            made = _finish(job, folder, rows)
            failures = find_failures(rows)
            if job.output.is_file:
                remove(folder)
    except StoppedError as stopped:
        again = shlex.join(["guidegen", *(word for word in sys.argv[1:] if word != "--overwrite")])
        kept = "nothing was kept" if job.output.to_stdout else "the finished images are on disk"
        raise StoppedError(f"{stopped}; {kept}. To go on: {again}", stopped.code - 128) from None
    finally:
        if job.output.to_stdout:
            shutil.rmtree(folder, ignore_errors=True)
    if made and not job.flags.json_rows:
        console.result(str(made))
    if failures:
        raise failures


def _with_weights(job: Job) -> Job:
    """Downloads the weights if they are on the hub, checks that they are whole, and hashes them."""
    from guidegen.checkpoints.loading import check_weights

    checkpoint, guide, access = job.checkpoint, job.guide, job.flags.access
    judges = [part for part, _ in job.judge.parts] if job.judge else []
    checkpoint.download(access)
    for judge in judges:
        judge.download(access)
    if guide:
        guide.download(access)
    parts = list(checkpoint.part_folders.values()) + (guide.folders if guide else [])
    for folder in parts + [part.folder for part in judges if part.own is None]:
        check_weights(folder, access)
    hashes: dict[str, Any] = {
        "model_sha256": _sha256(checkpoint, access),
        "classifier_sha256": SEPARATOR.join(_sha256(part, access) for part in judges) or None,
        "guide_model_sha256": _guide_sha256(guide, access),
    }
    looks = {variant: (replace(settings, **hashes), scheduler) for variant, (settings, scheduler) in job.looks.items()}
    settings = replace(job.settings, **hashes)
    return replace(job, settings=settings, looks=looks)


def _guide_sha256(guide: GuideModel | None, access: Access) -> str | None:
    if guide is None or guide.checkpoint is None:
        return None
    return str(guide.checkpoint.config["sha256"]) if guide.checkpoint.own else weights_sha256(guide.folders, access)


def _sha256(part: Checkpoint | ClassifierInfo, access: Access) -> str:
    """Identity of the weights; a network of one's own says its own."""
    if part.own is not None:
        return str(part.config["sha256"])
    return weights_sha256(part.part_folders.values() if isinstance(part, Checkpoint) else [part.folder], access)


def _draw(job: Job, run: Run, signals: Signals) -> Rows:
    """Draws the cells that are not finished; rows of all."""
    from guidegen import engine

    flags = job.flags
    kept = run.finished(job.cells)
    places = sorted(place for cell in kept if (place := job.cells.find(cell.file)) is not None)
    todo = job.cells.without(places)
    show_rows = flags.json_rows and not job.output.to_stdout
    for row in run.rows([job.cells[place] for place in places]) if show_rows else ():
        console.result(_line(row))
    if flags.verbose:
        console.note(
            f"{len(kept)} images kept, {len(todo)} to draw in {job.settings.dtype} on {job.device}, into {run.folder}"
        )
    if todo:
        size, fixed = engine.pick_batch_size(flags.batch_size, job.device, job.checkpoint.image_shape), flags.deterministic
        painters = engine.open_painters(
            job.checkpoint,
            job.judge,
            job.settings,
            job.device,
            flags.access,
            flags.compile_networks,
            size if fixed else None,
            job.guide,
        )
        parts = [(painters(settings, scheduler), some) for settings, scheduler, some in job.by_variant(todo)]
        if not flags.quiet:
            _tell_cut_prompts(parts[0][0], job.plan.prompts or ())
            _tell_alike(job)
        tally = engine.Tally()
        steps = sum(len(some) * len(painter.scheduler.timesteps) for painter, some in parts)
        with console.progress(steps, len(todo), flags.quiet) as bar:

            def on_step(cells: int) -> None:
                bar.step(cells)
                signals.check(signal.SIGINT)

            windows = ((painter, window) for painter, some in parts for window in some.windows(limits.WINDOW))
            for painter, some in windows:
                with closing(engine.draw(painter, some, run, job.name_of, size, on_step, signals.check, tally)) as drawn:
                    for _, row in drawn:
                        bar.image()
                        if show_rows:
                            console.result(_line(row))
        if flags.sweep and not (flags.quiet or flags.json_rows):
            _tell_cost(job, todo, tally.made)
    return run.rows(job.cells)


def _tell_alike(job: Job) -> None:
    """Says at which weights axes of `--by` make no difference, such as the method where nothing is guided."""
    from guidegen import engine

    places: dict[float, list[Any]] = {}
    for variant, (settings, scheduler) in job.looks.items():
        for w in job.plan.weights_of(variant):
            cell = Cell(None, 0, w, job.plan.classifier_weights[-1], w_guide=job.plan.guide_weights[-1])
            places.setdefault(w, []).append(engine.what_counts(settings, scheduler, cell))
    if alike := [f"{w:g}" for w, found in places.items() if len(set(found)) < len(found)]:
        console.note(f"note: at w = {', '.join(alike)} variants draw the same images, as guidance adds nothing there")


def _tell_cost(job: Job, todo: Cells, made: int) -> None:
    """What a sweep spent, and what it saved against a loop that makes every call for every image."""
    from guidegen import engine

    images = len(todo)
    plain = sum(engine.plain_cost(len(some), settings, scheduler) for settings, scheduler, some in job.by_variant(todo))
    share = f"{abs(plain - made):,} ({abs(plain - made) / plain:.0%})"
    saved = f"{share} fewer than" if made <= plain else f"{share} more than"
    console.note(f"{made:,} network calls for {images:,} images, {saved} one image at a time without skipping any")


def _tell_cut_prompts(painter: Painter, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if painter.is_cut and any(painter.is_cut(text) for text, _ in prompt_parts(prompt)):
            console.note(f"note: {prompt[:40]!r}... has more tokens than the model reads; its end is left out")


def _finish(job: Job, folder: Path, rows: Rows) -> Path | None:
    """Draws the grid, makes the one file if one was asked for; returns the path to print."""
    output = job.output
    if job.shard is not None:
        return folder
    made = folder / rows[0]["file"] if len(rows) == 1 and rows[0]["status"] == "ok" else folder
    if job.pages:
        made = draw_grid(folder, rows, job.pages, job.facts)[0]
    if not output.is_file and not output.to_stdout:
        return made
    exported = any(row["status"] == "ok" for row in rows)
    if exported:
        export(folder, rows, made, job.facts, output)
    return output.path if output.is_file and exported else None


def draw_grid(
    folder: Path,
    rows: Sequence[Row],
    pages: grid.Layout,
    plan: dict[str, Any],
    out: Path | None = None,
    on_corrupt: Callable[[str], None] = lambda reason: None,
) -> list[Path]:
    """Writes the pages of the grid into `folder`, or a single one to `out`; returns their paths."""
    paths = [out] if out else [folder / name for name in grid.page_names(len(pages.pages))]
    for page, path in enumerate(paths):
        buffer = io.BytesIO()
        grid.draw(folder, rows, pages, page, on_corrupt).save(buffer, "PNG", pnginfo=png_text(plan))
        write_atomically(path, buffer.getvalue())
    return paths


def _line(row: Row) -> str:
    return encode_row(row).decode().rstrip("\n")


def _open(flags: Flags, needs_null: bool = True) -> tuple[Checkpoint, AnyClassifier | None, GuideModel | None]:
    """The checkpoint and, where there are any, the classifier and the weaker model; refuses a mode that cannot be served."""
    size = options.parse_size(flags.size)
    checkpoint = options.find_checkpoint(flags.model, flags.null_label, size, flags.access)
    judge = None
    if flags.mode in ("classifier", "both"):
        judge = options.find_classifier(flags.classifier, checkpoint, flags.classifier_input, flags.access)
    elif any((flags.classifier, flags.classifier_input, flags.classifier_gradient)):
        raise UsageError(
            "--classifier, --classifier-input and --classifier-gradient are for the modes classifier and both, "
            f"not {flags.mode}."
        )
    needs_null = needs_null or flags.classifier_gradient == "cheap"
    reason = checkpoint.refusal(flags.mode, judge is not None, needs_null)
    if reason and not (flags.mode == "auto" and flags.guide_model):
        raise UsageError(f"--mode {flags.mode} cannot be served: {reason}.")
    for part, _ in judge.parts if judge else ():
        if part.input == "noisy" and not part.own:
            _check_noisy(part, checkpoint)
    return checkpoint, judge, _open_guide(flags, checkpoint, size)


def _open_guide(flags: Flags, checkpoint: Checkpoint, size: tuple[int, int] | None) -> GuideModel | None:
    """The weaker model that is named, or the one in the checkpoint's folder; None where none is asked for."""
    if flags.mode != "auto" and flags.guide_model is None and flags.w_guide is None:
        return None
    if flags.guide_model is None and checkpoint.weak_folder is None:
        raise UsageError(f"--w-guide weighs the model against a weaker one, and there is none beside it. {NAME_ONE}.")
    return open_guide(flags.guide_model or BUNDLED_GUIDE, checkpoint, size, flags.access)


def _check_noisy(judge: ClassifierInfo, checkpoint: Checkpoint) -> None:
    """A noise-aware classifier reads the very x_t that the network draws."""
    channels = judge.config.get("in_channels", 3)
    if channels != checkpoint.shape[0]:
        raise UsageError(
            f"--classifier {judge.ref} reads {channels} channels, and the model draws {checkpoint.shape[0]}"
            f"{' (latents)' if checkpoint.kind.latent else ''}: it was made for another. --classifier-input denoised may do."
        )


def _gradient(flags: Flags, judge: AnyClassifier | None) -> str | None:
    """Which derivative of the denoised estimate is taken; None on noisy input."""
    if judge is not None and any(part.input == "denoised" for part, _ in judge.parts):
        return flags.classifier_gradient or "exact"
    if flags.classifier_gradient is not None:
        reads = "this one reads" if judge is None or len(judge.parts) == 1 else "these read"
        raise UsageError(f"--classifier-gradient is for classifiers of denoised images; {reads} x_t itself.")
    return None


def _guidance(flags: Flags) -> dict[str, Any]:
    """The method and its options, as the settings have them: nothing for the plain one.

    Raises:
        UsageError: no such method or option, or a mode that guides nothing.
    """
    from guidegen.scores.methods import find_method

    if flags.mode == "none" and (flags.interval or flags.w_schedule):
        raise UsageError("--interval and --w-schedule are for guided modes; --mode none guides nothing.")
    if flags.mode in ("none", "auto") and flags.guidance not in (None, "cfg"):
        raise UsageError(
            f"--guidance {flags.guidance} combines predictions with and without the label, and mode {flags.mode} takes one "
            "of them. For a method and a weaker model: --mode cfg --guide-model ID|DIR --w-guide NUMBER."
        )
    words = [word.partition("=") for word in flags.guidance_opt or ()]
    if bad := [word for word, (_, equals, _) in zip(flags.guidance_opt or (), words, strict=True) if not equals]:
        raise UsageError(f"--guidance-opt takes KEY=VALUE, such as eta=0.5; found {bad[0]!r}.")
    ref = flags.guidance or "cfg"
    method, options = find_method(ref, {key.strip(): value.strip() for key, _, value in words})
    if method.name == "cfg":
        return {}
    if split_own(ref):
        options |= {FILE_SHA256: own_sha256(ref)}
    return {"guidance": method.name, "guidance_options": options or None}


def _prompts(flags: Flags, checkpoint: Checkpoint, judge: AnyClassifier | None) -> list[str] | None:
    """The texts that are asked for; None where none is needed."""
    zero_shot = judge is not None and judge.zero_shot
    model_reads = checkpoint.kind.text and flags.mode != "classifier"
    if not (model_reads or zero_shot):
        given = "--prompt" if flags.prompt else "--negative-prompt" if flags.negative_prompt is not None else None
        if given and not checkpoint.kind.text:
            raise UsageError(f"{given}: neither the model nor a classifier reads text. Give --label.")
        if flags.prompt:
            raise UsageError("--prompt: in mode classifier the model draws without one; --mode both uses the prompt too.")
        return None
    if flags.prompt:
        return options.read_prompts(flags.prompt)
    has_labels = checkpoint.class_conditional or (judge is not None and judge.takes_labels)
    if (model_reads and flags.mode != "none") or (zero_shot and not has_labels):
        instead = "takes text, not labels: give" if flags.label else f"needs, in mode {flags.mode},"
        part = "model" if model_reads else "classifier"
        raise UsageError(f'The {part} {instead} --prompt, such as --prompt "a red fox in snow".')
    return None


def _texts(flags: Flags, checkpoint: Checkpoint, judge: AnyClassifier | None, prompts: list[str] | None) -> list[str] | None:
    """What a zero-shot classifier tells apart: the prompts and the null text, or the names of all labels."""
    if judge is None or not judge.zero_shot:
        return None
    if prompts is None:
        return label_texts(checkpoint.known(judge))
    return list(
        dict.fromkeys([*(text for prompt in prompts for text, _ in prompt_parts(prompt)), flags.negative_prompt or ""])
    )


def _weights(flags: Flags, mixed: bool) -> list[float]:
    """The weights asked for; those that a mixture gives its parts count as they are where `--w` is not given."""
    if flags.sweep:
        return parse_weights("0,1,2,4,8" if flags.w is None else flags.w)
    return [parse_weight(flags.w or ("1.0" if mixed else "3.0"))]


def _classifier_weights(flags: Flags) -> list[float] | list[None]:
    text = flags.w_classifier
    if flags.mode != "both":
        if text is not None:
            raise UsageError(f"--w-classifier is for --mode both; in mode {flags.mode} the weight is --w.")
        return [None]
    if flags.sweep:
        return parse_weights("1" if text is None else text, "--w-classifier")
    return [parse_weight("1" if text is None else text, "--w-classifier")]


def _guide_weights(flags: Flags) -> list[float] | list[None]:
    text = flags.w_guide
    if flags.mode == "auto":
        if text is not None:
            raise UsageError("--w-guide goes on top of the other modes; in mode auto the weight is --w.")
        return [None]
    if text is None and flags.guide_model is None:
        return [None]
    if flags.mode == "none":
        raise UsageError(
            "--guide-model and --w-guide guide, and --mode none draws the network as it is. For the model against a "
            "weaker one: --mode auto, with the weight --w."
        )
    text = "2" if text is None else text
    weights = parse_weights(text, "--w-guide") if flags.sweep else [parse_weight(text, "--w-guide")]
    if weights == [1.0]:
        raise UsageError("--w-guide 1 is the model without the weaker one: leave both out, or give another weight.")
    return weights


def _shard(flags: Flags, output: Output) -> Shard | None:
    if flags.shard is None:
        return None
    if output.is_file or output.to_stdout:
        raise UsageError("--shard draws into a run directory; `guidegen merge` makes files of it when all is there.")
    if flags.overwrite:
        raise UsageError("--overwrite would delete what other shards drew: remove the directory, or name another -o.")
    return parse_shard(flags.shard, os.environ)


def _seeds(flags: Flags) -> Seeds:
    if flags.seeds is not None:
        if flags.num is not None or flags.seed is not None:
            raise UsageError("--seeds stands instead of --num and --seed: give one or the other.")
        return parse_seeds(flags.seeds)
    num, first = 1 if flags.num is None else flags.num, flags.seed or 0
    if num < 1:
        raise UsageError(f"--num must be at least 1, found {num}.")
    if not 0 <= first <= LARGEST_SEED:
        raise UsageError(f"--seed must be from 0 to 2^63-1, found {first}.")
    if first + num - 1 > LARGEST_SEED:
        raise UsageError(f"--num {num} with --seed {first} goes past the largest seed, 2^63-1.")
    return Seeds([range(first, first + num)])


def _check_numbers(flags: Flags) -> None:
    if flags.steps is not None and flags.steps < 1:
        raise UsageError(f"--steps must be at least 1, found {flags.steps}.")
    if flags.batch_size != "auto" and not (flags.batch_size.isdecimal() and int(flags.batch_size)):
        raise UsageError(f"--batch-size takes auto or a whole number from 1, found {flags.batch_size!r}.")
    if flags.eta is not None and not 0 <= flags.eta <= 1:
        raise UsageError(f"--eta is from 0 to 1, found {flags.eta}.")
    if flags.mode == "none" and flags.w is not None:
        raise UsageError("--w is for guided modes; --mode none draws the network as it is.")


def _labels(
    flags: Flags,
    checkpoint: Checkpoint,
    judge: AnyClassifier | None,
    known: Labels,
    prompts: list[str] | None,
) -> list[int | str] | list[None]:
    """Label ids and mixtures of them that are asked for; [None] where none is needed."""
    if not flags.label:
        if not _needs_label(flags.mode, checkpoint, judge, prompts):
            return [None]
        first = next(iter(known), 0)
        example = f'"{known.name(first)}"' if len(known) and known.name(first) else first
        raise UsageError(f"--mode {flags.mode} needs --label, such as --label {example}. `guidegen labels` lists them.")
    if not len(known):
        takes = "it takes prompts: --prompt" if checkpoint.kind.text else "the model is unconditional, it takes none"
        raise UsageError(f"--label: {takes}.")
    ids = options.resolve_labels(flags.label, known)
    for part, _ in judge.parts if judge else ():
        knows = part.columns(known) if prompts is None or part.takes_labels else single_labels(ids)
        if missing := [i for i in single_labels(ids) if i not in knows]:
            raise UsageError(f"--label {missing[0]} {known.name(missing[0])}: the classifier {part.ref} does not know it.")
    return ids


def _needs_label(mode: str, checkpoint: Checkpoint, judge: AnyClassifier | None, prompts: list[str] | None) -> bool:
    if judge is not None and judge.takes_labels:
        return True
    if not checkpoint.class_conditional:
        return False
    if mode == "none":
        return not checkpoint.has_null
    return mode != "classifier" or prompts is None


def _about(job: Job) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    def identity(part: Checkpoint | ClassifierInfo) -> dict[str, Any]:
        where = part.ref if part.revision else str(part.folder.resolve())
        return {"path": where, "revision": part.revision}

    def classifiers(judge: AnyClassifier) -> Any:
        if isinstance(judge, ClassifierInfo):
            return identity(judge)
        return [{**identity(part), "weight": weight} for part, weight in judge.parts]

    return {
        "guidegen": __version__,
        "command": ["guidegen", *sys.argv[1:]],
        "checkpoint": identity(job.checkpoint),
        "classifier": job.judge and classifiers(job.judge),
        **({"guide_model": identity(job.guide.checkpoint)} if job.guide and job.guide.checkpoint else {}),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "pillow", "safetensors")},
    }


def _place(row: Row) -> str:
    condition = f"label {row['label']}" if row["prompt"] is None else f"prompt {row['prompt']!r}"
    varied = [named(axis, row[axis]) for axis in grid.axes_of([row]) if axis not in grid.AXES]
    return ", ".join((*varied, f"w {row['w']}", condition, f"seed {row['seed']}"))


def find_failures(rows: Iterable[Row]) -> IncompleteError | None:
    """The error of images that are not finite, with a list of them; None where all are."""
    count = failed = 0
    listed = ""
    for row in rows:
        count += 1
        if row["status"] != "ok":
            failed += 1
            if failed <= _LISTED:
                listed += f"\n  {_place(row)}"
    if not failed:
        return None
    more = f"\n  and {failed - _LISTED} more" if failed > _LISTED else ""
    return IncompleteError(
        f"{failed} of {count} images came out non-finite and were not saved; try --dtype fp32 or a smaller w:{listed}{more}"
    )


class Signals:
    """SIGTERM and SIGUSR1 end the drawing after the batch in flight, SIGINT after the step; a second one at once."""

    def __init__(self) -> None:
        self._caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background jobs have it
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame: object) -> None:
        if self._caught is not None:
            os._exit(_exit_code(number))
        self._caught = number

    def check(self, *only: int) -> None:
        """Raises StoppedError if a signal came, one of `only` if any are named."""
        if self._caught is not None and (not only or self._caught in only):
            raise StoppedError(f"Stopped by {signal.Signals(self._caught).name}", _exit_code(self._caught) - 128)


def _exit_code(number: int) -> int:
    """SIGUSR1 is a scheduler's way to say that SIGTERM is near: it ends in the same way."""
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)
