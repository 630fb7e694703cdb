"""`guidegen sample` and `guidegen sweep`: the same command, but for how many w and the grid."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guidegen import __version__, grid
from guidegen.checkpoints import Checkpoint, ClassifierInfo, weights_sha256
from guidegen.cli import console, options
from guidegen.cli.output import Output, already_there, export, parse_output
from guidegen.errors import GuidegenError, StoppedError, UsageError
from guidegen.plan import Cell, Settings, fingerprint, make_cells, parse_seeds, parse_weight, parse_weights
from guidegen.run import Run, png_text, write_atomically

if TYPE_CHECKING:
    from guidegen.run import Row

_WHAT, _HOW = "What to draw", "How to draw it"


class Mode(StrEnum):
    cfg = "cfg"
    classifier = "classifier"
    both = "both"
    none = "none"


class Dtype(StrEnum):
    auto = "auto"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


def register(app: typer.Typer) -> None:
    """Adds the two commands; both take the same flags."""
    app.command("sample", help="Draw guided samples at one guidance weight.")(_command)
    app.command("sweep", help="Draw the same samples at a range of guidance weights, and a grid of them.")(_command)


def _command(
    ctx: typer.Context,
    mode: Annotated[
        Mode,
        typer.Option(
            help="cfg: with the label against without. classifier: a classifier's gradient. both, or none.",
            rich_help_panel=_WHAT,
        ),
    ] = Mode.cfg,
    w: Annotated[
        str | None,
        typer.Option(
            "--w",
            metavar="NUMBER",
            help="Guidance weight: 0 unconditional, 1 conditional, more sharper. sample: one number (3.0). "
            "sweep: 0,1,2.5 and START:STOP:STEP, both ends included (0,1,2,4,8). It is diffusers' guidance_scale, "
            "Ho & Salimans' 1+w, and ADM's classifier_scale.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    w_classifier: Annotated[
        str | None,
        typer.Option(
            "--w-classifier",
            metavar="NUMBER",
            help="Mode both: weight of the classifier's gradient; --w then weighs the label's own score. [default: 1]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="LABEL",
            help='Id, name, range or list: 207, "golden retriever", 0-9, all; @FILE or - for standard input. Repeats.',
            rich_help_panel=_WHAT,
        ),
    ] = None,
    num: Annotated[
        int | None, typer.Option("--num", "-n", help="Samples of each label. [default: 1]", rich_help_panel=_WHAT)
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="First seed; the others count up. [default: 0]", rich_help_panel=_WHAT)
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="LIST", help="Seeds instead of --num and --seed: 0-63,100.", rich_help_panel=_WHAT),
    ] = None,
    model: options.Model = None,
    classifier: options.ClassifierRef = None,
    null_label: options.NullLabel = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the scheduler. Default: the checkpoint's.", rich_help_panel=_HOW)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="NAME",
            help="ddim, ddpm, dpm++, unipc, euler, heun, or a diffusers class. Default: the checkpoint's.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", help="ddim: 0 deterministic, 1 as noisy as ddpm.", rich_help_panel=_HOW)
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Autocast. auto: fp16 on CUDA, fp32 elsewhere.", rich_help_panel=_HOW)
    ] = Dtype.auto,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cuda, cuda:1, mps or cpu.", rich_help_panel=_HOW)
    ] = "auto",
    batch_size: Annotated[
        str, typer.Option("--batch-size", metavar="N", help="Images at once: auto, or a number.", rich_help_panel=_HOW)
    ] = "auto",
    compile_networks: Annotated[
        bool, typer.Option("--compile", help="torch.compile the networks: slow start, faster steps.", rich_help_panel=_HOW)
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="Run directory, or one file: x.png, x.webp, x.jpg (an image, or a "
            "sweep's grid), x.npz, or - for PNG on standard output. Default: guidegen-runs/NAME.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start over. Otherwise finished images are kept.", rich_help_panel=options._OUTPUT),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be drawn and what it costs; load no weights.", rich_help_panel=options._OUTPUT
        ),
    ] = False,
    json_rows: options.Json = False,
    quiet: options.Quiet = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=options._TALK)] = False,
    debug: options.Debug = False,
) -> None:
    sweep = ctx.info_name == "sweep"
    ws = parse_weights(w or "0,1,2,4,8") if sweep else [parse_weight(w or "3.0")]
    wcs = _classifier_weights(w_classifier, mode, sweep)
    seed_list = _seeds(num, seed, seeds)
    _check_numbers(steps, batch_size, eta)
    output = parse_output(out)

    checkpoint = options.find_checkpoint(model, null_label, offline, allow_pickle)
    judge = None
    if mode in (Mode.classifier, Mode.both):
        judge = options.find_classifier(classifier, checkpoint, offline, allow_pickle)
    elif classifier is not None:
        raise UsageError(f"--classifier is for the modes classifier and both, not {mode}.")
    if reason := checkpoint.refusal(mode, judge is not None):
        raise UsageError(f"--mode {mode} cannot be served: {reason}.")
    labels, name_of = _labels(label, checkpoint, judge, mode)
    if mode == Mode.none:
        if w is not None:
            raise UsageError("--w is for guided modes; --mode none draws the network as it is.")
        ws = [0.0 if labels == [None] else 1.0]
    cells = make_cells(labels, seed_list, ws, wcs)
    if not sweep and len(cells) > 1 and output.one_image:
        raise UsageError(f"-o {out} holds one image, and this is {len(cells)}: use a directory, .npz, or sweep for a grid.")

    title_rows = [{**asdict(cell), "label_name": name_of(cell.label)} for cell in cells]
    stepped = steps or checkpoint.steps
    from guidegen import engine  # torch, from here on

    walker = engine.plan_scheduler(checkpoint, scheduler, stepped, eta)
    run_device = engine.pick_device(device)
    settings = Settings(
        mode=mode.value,
        model=checkpoint.name,
        model_sha256="",
        scheduler=type(walker).__name__,
        steps=stepped,
        eta=eta,
        dtype=engine.pick_dtype(dtype.value, run_device),
        null_label=checkpoint.null_label,
        classifier=judge.folder.resolve().name if judge else None,
    )
    title = grid.title_of(asdict(settings))
    pages = None
    if sweep:
        pages = grid.layout(title_rows, checkpoint.shape[1:], title=title)
        if output.one_image and len(pages.pages) > 1:
            raise UsageError(f"The grid needs {len(pages.pages)} pages; write it to a directory instead of {out}.")
    identity = fingerprint(asdict(settings), checkpoint.ref, checkpoint.revision, judge and judge.ref, title_rows)
    output = output.named(f"{checkpoint.name}-{ctx.info_name}-{mode}-{identity}")
    if dry_run:
        _dry_run(cells, engine.cost(cells, mode.value, walker), checkpoint, pages, output, json_rows)
        return

    if checkpoint.revision or (judge and judge.revision):
        checkpoint = options.find_checkpoint(model, null_label, offline, allow_pickle, weights=True)
        judge = judge and options.find_classifier(classifier, checkpoint, offline, allow_pickle, weights=True)
    settings = replace(
        settings,
        model_sha256=weights_sha256(checkpoint.unet_folder, allow_pickle),
        classifier_sha256=weights_sha256(judge.folder, allow_pickle) if judge else None,
    )
    plan = {"settings": asdict(settings), "cells": [asdict(cell) for cell in cells]}
    if output.is_file and already_there(output, plan, overwrite):
        console.result(str(output.path))
        return
    if output.to_stdout and sys.stdout.isatty():
        raise UsageError("-o - writes PNG bytes, and standard output is a terminal: redirect it to a file or a pipe.")
    if not quiet:
        for lack in checkpoint.missing:
            console.note(f"note: {checkpoint.ref} has no {lack}")
    folder = output.folder or Path(tempfile.mkdtemp(prefix="guidegen-"))
    try:
        with _Signals() as signals, Run(folder, settings, _about(checkpoint, judge), overwrite) as run:
            rows = run.finished(cells)
            if json_rows and not output.to_stdout:
                for row in rows.values():
                    console.result(_line(row))
            todo = [cell for cell in cells if cell not in rows]
            if verbose:
                console.note(f"{len(rows)} images kept, {len(todo)} to draw, into {folder}")
            if todo:
                painter = engine.open_painter(
                    checkpoint,
                    judge,
                    mode.value,
                    walker,
                    stepped,
                    eta,
                    settings.dtype,
                    run_device,
                    allow_pickle,
                    compile_networks,
                )
                size = engine.pick_batch_size(batch_size, run_device)
                with console.progress(len(todo) * len(walker.timesteps), len(todo), quiet) as bar:
                    for row in engine.draw(painter, todo, run, name_of, size, bar.step, signals.check):
                        bar.image()
                        rows[_cell_of(row)] = row
                        if json_rows and not output.to_stdout:
                            console.result(_line(row))
            made = _finish(folder, [rows[cell] for cell in cells], pages, title, plan, output)
    except StoppedError as stopped:
        raise StoppedError(f"{stopped} To go on: {shlex.join(['guidegen', *sys.argv[1:]])}", stopped.code - 128) from None
    finally:
        if output.to_stdout:
            shutil.rmtree(folder, ignore_errors=True)
    if made and not json_rows:
        console.result(str(made))
    _report_failures([rows[cell] for cell in cells])


def _finish(
    folder: Path, rows: Sequence[Row], pages: grid.Layout | None, title: str, plan: dict[str, Any], output: Output
) -> Path | None:
    """Draws the grid, makes the one file if one was asked for; returns the path to print."""
    made = folder / rows[0]["file"] if len(rows) == 1 and rows[0]["status"] == "ok" else folder
    if pages:
        paths = draw_grid(folder, rows, pages, title, plan)
        made = paths[0]
    if not output.is_file and not output.to_stdout:
        return made
    exported = made != folder or output.path.suffix == ".npz"
    if exported:
        export(folder, rows, made, plan, output)
    if output.is_file:
        shutil.rmtree(folder)
    return output.path if output.is_file and exported else None


def draw_grid(
    folder: Path, rows: Sequence[Row], pages: grid.Layout, title: str, plan: dict[str, Any], out: Path | None = None
) -> list[Path]:
    """Writes the pages of the grid into `folder`, or a single one to `out`; returns their paths."""
    import io

    paths = [out] if out else [folder / name for name in grid.page_names(len(pages.pages))]
    for page, path in enumerate(paths):
        buffer = io.BytesIO()
        grid.draw(folder, rows, pages, page, title).save(buffer, "PNG", pnginfo=png_text(plan))
        write_atomically(path, buffer.getvalue())
    return paths


def _cell_of(row: Row) -> Cell:
    return Cell(row["label"], row["seed"], row["w"], row.get("w_classifier"))


def _line(row: Row) -> str:
    import json

    return json.dumps(row, ensure_ascii=False)


def _classifier_weights(text: str | None, mode: Mode, sweep: bool) -> list[float | None]:
    if mode != Mode.both:
        if text is not None:
            raise UsageError(f"--w-classifier is for --mode both; in mode {mode} the weight is --w.")
        return [None]
    if sweep:
        return list(parse_weights(text or "1", "--w-classifier"))
    return [parse_weight(text or "1", "--w-classifier")]


def _seeds(num: int | None, seed: int | None, seeds: str | None) -> list[int]:
    if seeds is not None:
        if num is not None or seed is not None:
            raise UsageError("--seeds stands instead of --num and --seed: give one or the other.")
        return parse_seeds(seeds)
    num, seed = 1 if num is None else num, 0 if seed is None else seed
    if num < 1:
        raise UsageError(f"--num must be at least 1, found {num}.")
    if not 0 <= seed <= 2**63 - num:
        raise UsageError(f"--seed must be from 0 to 2^63-1, found {seed}.")
    return list(range(seed, seed + num))


def _check_numbers(steps: int | None, batch_size: str, eta: float | None) -> None:
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1, found {steps}.")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise UsageError(f"--batch-size takes auto or a whole number from 1, found {batch_size!r}.")
    if eta is not None and not 0 <= eta <= 1:
        raise UsageError(f"--eta is from 0 to 1, found {eta}.")


def _labels(words: list[str] | None, checkpoint: Checkpoint, judge: ClassifierInfo | None, mode: Mode) -> Any:
    """Label ids (or [None]) and the function from id to name."""
    known = checkpoint.labels if checkpoint.class_conditional or judge is None else judge.labels

    def name_of(label: int | None) -> str:
        return "" if label is None else known.name(label)

    if not words:
        if mode == Mode.none and (checkpoint.null_label is not None or not checkpoint.class_conditional):
            return [None], name_of
        raise UsageError(
            f"--mode {mode} needs --label: ids or names, such as {_example(known)}. `guidegen labels` lists them."
        )
    if not len(known):
        raise UsageError("--label: the model is unconditional, it takes none.")
    ids = options.resolve_labels(words, known)
    if judge is not None:
        unknown = [i for i in ids if i not in judge.columns(known)]
        if unknown:
            raise UsageError(f"--label {unknown[0]} {name_of(unknown[0])}: the classifier {judge.ref} does not know it.")
    return ids, name_of


def _example(known: Any) -> str:
    first = next(iter(known), 0)
    return f'--label "{known.name(first)}"' if len(known) and known.name(first) else f"--label {first}"


def _about(checkpoint: Checkpoint, judge: ClassifierInfo | None) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    def identity(part: Checkpoint | ClassifierInfo) -> dict[str, Any]:
        where = part.ref if part.revision else str(part.folder.resolve())
        return {"path": where, "revision": part.revision}

    return {
        "guidegen": __version__,
        "command": ["guidegen", *sys.argv[1:]],
        "checkpoint": identity(checkpoint),
        "classifier": judge and identity(judge),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "pillow", "safetensors")},
    }


def _dry_run(
    cells: Sequence[Cell], nfe: int, checkpoint: Checkpoint, pages: grid.Layout | None, output: Output, as_json: bool
) -> None:
    channels, height, width = checkpoint.shape
    pixels = sum(w * h for w, h in map(pages.size, range(len(pages.pages)))) if pages else 0
    facts = {
        "cells": len(cells),
        "nfe": nfe,
        "bytes": len(cells) * channels * height * width,
        "grid_pixels": pixels,
        "grid_pages": len(pages.pages) if pages else 0,
        "out": str(output.path),
    }
    if as_json:
        return console.result(_line(facts))
    console.result(f"{facts['cells']} images of {width}x{height}, at most {facts['bytes']:,} bytes of pixels")
    console.result(f"{nfe:,} network calls (NFE), {nfe / len(cells):.0f} an image")
    if pages:
        sizes = ", ".join("{}x{}".format(*pages.size(i)) for i in range(len(pages.pages)))
        console.result(f"grid of {pixels:,} pixels ({sizes})")
    return console.result(f"into {output.path}")


def _report_failures(rows: Sequence[Row]) -> None:
    failed = [row for row in rows if row["status"] != "ok"]
    if failed:
        listed = "\n".join(f"  w {row['w']}, label {row['label']}, seed {row['seed']}" for row in failed[:20])
        more = f"\n  and {len(failed) - 20} more" if len(failed) > 20 else ""
        error = GuidegenError(
            f"{len(failed)} of {len(rows)} images came out non-finite and were not saved; try --dtype fp32 or a smaller w:\n"
            f"{listed}{more}"
        )
        error.code = 3
        raise error


class _Signals:
    """SIGINT and SIGTERM end the drawing between batches; a second one ends it at once."""

    def __init__(self) -> None:
        self._caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame: object) -> None:
        if self._caught is not None:
            os._exit(128 + number)
        self._caught = number

    def check(self) -> None:
        """Raises StoppedError if a signal came."""
        if self._caught is not None:
            name = signal.Signals(self._caught).name
            raise StoppedError(f"StoppedError by {name}; the finished images are on disk.", self._caught)
