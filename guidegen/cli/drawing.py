"""Carrying a job out: draws what is not there, makes the grid or the file, and prints the path."""

from __future__ import annotations

import io
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen import __version__
from guidegen.cli import console
from guidegen.cli.lines import print_image
from guidegen.cli.output import already_there, export
from guidegen.cli.own_loop import offload_of
from guidegen.cli.resolve import Job
from guidegen.cli.signals import Signals, waiting
from guidegen.cli.stepwise import Strips
from guidegen.cli.weights import find_nonfinite, with_hashes
from guidegen.errors import IncompleteError, OutputError, StoppedError, UsageError
from guidegen.models.checkpoint import AnyClassifier, Checkpoint, ClassifierInfo
from guidegen.report import grid
from guidegen.runs.directory import Run
from guidegen.runs.files import write_atomically
from guidegen.runs.manifest import Rows, read_rows
from guidegen.runs.png import png_text
from guidegen.runs.schema import Row
from guidegen.runs.wipe import remove
from guidegen.spec import limits
from guidegen.spec.axes import CELL_AXES, named
from guidegen.spec.cell import Cell
from guidegen.spec.command import Command
from guidegen.spec.composition import prompt_parts
from guidegen.spec.plan import Cells

if TYPE_CHECKING:
    from guidegen.sampling.sampler import Drawer, Drawers

_LISTED = 20
"""Failed images that are named one by one."""
_WORTH_A_NOTE = 20.0
"""Seconds of drawing."""
_TIMES_AS_FAST = 2.2
"""bf16 against fp32 on a CPU with AMX: `tests/benchmarks/sweep_against_loop.py`."""


def carry_out(job: Job, command: Command) -> None:
    """Draws what is not there yet, makes the grid or the file, and prints the path.

    Args:
        job: what to draw.
        command: what asked for it; kept in run.json.

    Raises:
        GuidegenError: as the exit codes say; what was finished is on disk.
    """
    job, flags = with_hashes(job), job.flags
    if there := _there(job):
        _print_result(job, there, job.output.path)
        if failures := find_failures(there, job):
            raise failures
        return
    _note_models(job)
    folder = job.output.folder or Path(tempfile.mkdtemp(prefix="guidegen-"))
    try:
        run_of = partial(Run, folder, job.settings, about_run(job, command), flags.overwrite, job.plan, job.shard)
        with Signals() as signals, run_of(job.variants, waiting(signals.check, flags.quiet) if flags.wait else None) as run:
            there = _there_now(job, folder) if flags.wait else None
            rows: Sequence[Row] = there or draw_missing(job, run, signals, open_networks)
            made = job.output.path if there else _finish(job, folder, rows)
            failures = find_failures(rows, job)
            _print_result(job, rows, made)
            if job.output.is_file:
                remove(folder)
    except StoppedError as stopped:
        kept = "nothing was kept" if job.output.to_stdout else "the finished images are on disk"
        again = command.without("overwrite")
        if job.output.is_file and flags.json_rows:
            for row in read_rows(folder):
                print_image(row, folder)
        raise StoppedError(f"{stopped}; {kept}. To go on: {again}", stopped.code - 128) from None
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        goes_on = not job.output.to_stdout and folder.is_dir() and any(folder.glob("manifest*.jsonl"))
        rest = f" What was finished is intact. To go on: {command.without('overwrite')}" if goes_on else ""
        raise OutputError(f"{error.strerror or error}{where}.{rest}") from error
    finally:
        if job.output.to_stdout:
            shutil.rmtree(folder, ignore_errors=True)
    if failures:
        raise failures


def _there(job: Job) -> list[Row] | None:
    """The rows of the one file if it is there and holds what it is to hold."""
    return already_there(job.output, job.metadata, job.flags.overwrite) if job.output.is_file else None


def _there_now(job: Job, folder: Path) -> list[Row] | None:
    """The same after another process was waited for, which may have made the file."""
    try:
        return _there(job)
    except UsageError:
        remove(folder)
        raise


def _print_result(job: Job, rows: Iterable[Row], made: Path | None) -> None:
    """The path of what was made; with `--json` the images that went into one file: those of a run are printed as drawn."""
    if not job.flags.json_rows:
        if made:
            console.result(str(made))
    elif job.output.is_file:
        for row in rows:
            print_image(row, None, job.output.path)


def _note_models(job: Job) -> None:
    """Says what the checkpoint lacks, and which classifier counts its labels otherwise."""
    if job.flags.quiet:
        return
    checkpoint, classifier, _ = job.models
    for lack in checkpoint.missing:
        console.note(f"note: {checkpoint.ref} has no {lack}")
    known = checkpoint.known(classifier)
    for part, _ in classifier.parts if classifier else ():
        if part.labels is not known and part.renumbers(known):
            console.note(f"note: {part.ref} has other label ids; its labels are matched by name")


def open_networks(job: Job) -> Drawers:
    """The networks of a job, loaded."""
    from guidegen.models.kinds.pipeline import TextPipeline
    from guidegen.sampling.device import pick_batch_size
    from guidegen.sampling.sampler import Samplers

    flags, checkpoint = job.flags, job.models.checkpoint
    fixed = pick_batch_size(flags.batch_size, job.device, checkpoint.image_shape) if flags.deterministic else None
    if isinstance(checkpoint, TextPipeline):
        from guidegen.pipelines.sampler import PipelineSamplers

        return PipelineSamplers(job.models, job.settings, job.device, flags.access, offload_of(flags), fixed)
    return Samplers(job.models, job.settings, job.device, flags.access, flags.compile_networks, fixed)


def draw_missing(job: Job, run: Run, signals: Signals, networks: Callable[[Job], Drawers]) -> Rows:
    """Draws the cells that are not finished; rows of all.

    Args:
        job: what to draw.
        run: where to.
        signals: that end it.
        networks: of the job; called where anything is to be drawn.
    """
    flags = job.flags
    kept = run.finished(job.cells)
    there = sorted(index for cell in kept if (index := job.cells.find(cell.file)) is not None)
    todo = job.cells.without(there)
    show_rows = flags.json_rows and not job.output.is_file
    for row in run.rows([job.cells[index] for index in there]) if show_rows else ():
        print_image(row, run.folder)
    if flags.verbose:
        console.note(
            f"{len(kept)} images kept, {len(todo)} to draw in {job.settings.dtype} on {job.device}, into {run.folder}"
        )
    if todo:
        _draw_rest(job, run, todo, signals, networks(job))
    return run.rows(job.cells)


def _draw_rest(job: Job, run: Run, todo: Cells, signals: Signals, samplers: Drawers) -> None:
    from guidegen.sampling.device import pick_batch_size
    from guidegen.sampling.equal_images import EqualImages
    from guidegen.sampling.sampler import Tally
    from guidegen.sampling.timings import Stopwatch, keep_seconds
    from guidegen.sampling.worker import draw

    flags, name_of = job.flags, job.conditions.name_of
    show_rows = flags.json_rows and not job.output.is_file
    size = pick_batch_size(flags.batch_size, job.device, job.models.checkpoint.image_shape)
    parts = [(_observed(samplers(setup), flags.stepwise), some) for setup, some in job.by_variant(todo)]
    if not flags.quiet:
        _note_cut_prompts(samplers.is_cut, job.plan.prompts or ())
        _note_equal(job)
    tally, equal, watch = Tally(), EqualImages(todo, job.setups), Stopwatch()
    steps = sum(len(some) * len(sampler.scheduler.timesteps) for sampler, some in parts)
    began = time.monotonic()
    with console.progress(steps, len(todo), flags.quiet) as bar:

        def on_step(cells: int) -> None:
            watch.step()
            bar.step(cells)
            signals.check(signal.SIGINT)

        for sampler, window in ((sampler, window) for sampler, some in parts for window in some.windows(limits.WINDOW)):
            with closing(draw(sampler, window, run, name_of, size, on_step, signals.check, tally, equal)) as drawn:
                for _, row in drawn:
                    bar.image()
                    if show_rows:
                        print_image(row, run.folder)
    if seconds := watch.seconds(tally.made):
        keep_seconds(job.settings, job.device, flags.compile_networks, min(size, len(todo)), seconds)
    if job.plan.grid and not (flags.quiet or flags.json_rows):
        _note_cost(job, todo, tally.made)
    _note_bf16(job, time.monotonic() - began)


def _observed(sampler: Drawer, stepwise: str | None) -> Drawer:
    """The sampler, which writes the strips of `--stepwise` where they are asked for."""
    strips = Strips(Path(stepwise), len(sampler.scheduler.timesteps)) if stepwise else None
    return replace(sampler, on_estimates=strips) if strips else sampler


def _note_equal(job: Job) -> None:
    """Says at which weights axes of `--by` make no difference, such as the method where nothing is guided."""
    keys: dict[float, list[Any]] = {}
    for variant, setup in job.setups.items():
        for w in job.plan.weights_of(variant):
            cell = Cell(None, 0, w, job.plan.classifier_weights[-1], w_guide=job.plan.guide_weights[-1])
            keys.setdefault(w, []).append(setup.image_key(cell))
    if equal := [f"{w:g}" for w, found in keys.items() if len(set(found)) < len(found)]:
        console.note(f"note: at w = {', '.join(equal)} variants draw the same images, as guidance adds nothing there")


def _note_cost(job: Job, todo: Cells, made: int) -> None:
    """What a sweep spent, and what it saved against a loop that makes every call for every image."""
    images = len(todo)
    plain = sum(setup.plain_cost(len(some)) for setup, some in job.by_variant(todo))
    share = f"{abs(plain - made):,} ({abs(plain - made) / plain:.0%})"
    saved = f"{share} fewer than" if made <= plain else f"{share} more than"
    console.note(f"{made:,} network calls for {images:,} images, {saved} one image at a time without skipping any")


def _note_bf16(job: Job, took: float) -> None:
    """What `--dtype auto` would have saved in bf16, on a CPU that multiplies in it."""
    from guidegen.sampling.device import multiplies_bf16

    in_fp32 = job.flags.dtype == "auto" and job.settings.dtype == "fp32" and job.device.type == "cpu"
    if in_fp32 and not job.flags.quiet and took > _WORTH_A_NOTE and multiplies_bf16():
        saved = took * (1 - 1 / _TIMES_AS_FAST)
        console.note(f"note: --fast (--dtype bf16) would have saved about {saved:.0f} of {took:.0f} s on this CPU")


def _note_cut_prompts(is_cut: Callable[[str], bool] | None, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if is_cut and any(is_cut(text) for text, _ in prompt_parts(prompt)):
            console.note(f"note: {prompt[:40]!r}... has more tokens than the model reads; its end is left out")


def _finish(job: Job, folder: Path, rows: Sequence[Row]) -> Path | None:
    """Draws the grid, makes the one file if one was asked for; returns the path to print."""
    output = job.output
    if job.shard is not None:
        return folder
    made = folder / rows[0]["file"] if len(rows) == 1 and rows[0]["status"] == "ok" else folder
    if job.pages:
        made = draw_grid(folder, rows, job.pages, job.metadata)[0]
    if not output.is_file and not output.to_stdout:
        return made
    exported = any(row["status"] == "ok" for row in rows)
    if exported:
        export(folder, rows, made, job.metadata, output, 1 if job.pages else job.flags.scale or 1)
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


def about_run(job: Job, command: Command) -> dict[str, Any]:
    """The rest of run.json."""
    import platform
    from importlib.metadata import version

    def identity(part: Checkpoint | ClassifierInfo) -> dict[str, Any]:
        where = part.ref if part.revision else str(part.folder.resolve())
        return {"path": where, "revision": part.revision}

    def classifiers(classifier: AnyClassifier) -> Any:
        if isinstance(classifier, ClassifierInfo):
            return identity(classifier)
        return [{**identity(part), "weight": weight} for part, weight in classifier.parts]

    guide = job.models.guide
    return {
        "guidegen": __version__,
        **command.as_json(),
        **job.origin,
        "checkpoint": identity(job.models.checkpoint),
        "classifier": job.models.classifier and classifiers(job.models.classifier),
        **({"guide_model": identity(guide.checkpoint)} if guide and guide.checkpoint else {}),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "pillow", "safetensors")},
    }


def _describe(row: Row) -> str:
    condition = f"label {row['label']}" if row["prompt"] is None else f"prompt {row['prompt']!r}"
    varied = [named(axis, row[axis]) for axis in grid.axes_of([row]) if axis not in CELL_AXES]
    return ", ".join((*varied, f"w {row['w']}", condition, f"seed {row['seed']}"))


def find_failures(rows: Iterable[Row], job: Job | None = None) -> IncompleteError | None:
    """The error of images that are not finite, with a list of them; None where all are.

    Args:
        rows: of the images.
        job: what drew them, whose weights may be the reason.
    """
    count = failed = 0
    listed = ""
    for row in rows:
        count += 1
        if row["status"] != "ok":
            failed += 1
            if failed <= _LISTED:
                listed += f"\n  {_describe(row)}"
    if not failed:
        return None
    more = f"\n  and {failed - _LISTED} more" if failed > _LISTED else ""
    why = (find_nonfinite(job) if job else None) or "try --dtype fp32 or a smaller w"
    return IncompleteError(f"{failed} of {count} images came out non-finite and were not saved; {why}:{listed}{more}")
