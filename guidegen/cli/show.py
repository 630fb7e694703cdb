"""`guidegen inspect`, `guidegen labels` and `guidegen grid`: nothing here runs a network."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.cli import console, options
from guidegen.cli.axes import parse_axes
from guidegen.cli.drawing import draw_grid
from guidegen.cli.lines import print_made
from guidegen.errors import CheckpointError, UsageError, quoted
from guidegen.models.checkpoint import MODES, Access, Checkpoint, ClassifierInfo
from guidegen.models.classifiers.info import SEPARATOR
from guidegen.models.labels import Labels
from guidegen.models.noise_schedule import parametrisation, sigma_range
from guidegen.models.weight_files import count_numbers, find_weights
from guidegen.report import grid
from guidegen.runs.images import invalid_rows, refusal
from guidegen.runs.manifest import read_rows, with_axes
from guidegen.runs.ours import refuse_foreign
from guidegen.runs.schema import Row, read_plans, read_run
from guidegen.spec.axes import CELL_AXES, differences, run_names
from guidegen.spec.parse import parse_seeds
from guidegen.spec.plan import Plan

_WITHOUT_NULL = "random labels with --uncond icg; weight 1 needs none"


def register(app: typer.Typer) -> None:
    """Adds the three commands."""
    app.command("inspect", help="Describe a checkpoint and the modes that it serves.")(_inspect)
    app.command("labels", help="List the labels of a checkpoint, or search them.")(_labels)
    app.command(
        "grid",
        help="Draw the grid of a run again, with other axes or at another scale. A missing or corrupt image is a "
        "crossed-out cell, and the exit code is then 3.",
    )(_grid)


def _inspect(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", envvar="GUIDEGEN_MODEL", help="Folder or hub id. Default: bundled.")
    ] = None,
    classifier: options.ClassifierRef = None,
    null_label: options.NullLabel = None,
    variant: options.Variant = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    access = Access(offline, allow_pickle, variant)
    checkpoint = options.find_checkpoint(model, null_label, access=access)
    opened = options.find_classifier(classifier, checkpoint, access=access)
    # a hub checkpoint is looked at, not downloaded
    folders = checkpoint.part_folders if checkpoint.revision is None else {}
    parameters = {part: sum(map(_parameters, find_weights(folder, access).files)) for part, folder in folders.items()}
    refusals = {mode: checkpoint.refusal(mode, opened is not None) for mode in MODES}
    fields: dict[str, Any] = {
        "checkpoint": checkpoint.ref,
        "revision": checkpoint.revision,
        "kind": _kind(checkpoint),
        "resolution": "{2}x{1}, {0} channels".format(*checkpoint.image_shape),
        "latents": "{2}x{1}, {0} channels".format(*checkpoint.shape) if checkpoint.latent else None,
        "parameters": parameters.get(checkpoint.network) or None,
        "other parts": {p: f"{n:,} parameters" for p, n in parameters.items() if p != checkpoint.network},
        "condition": "prompt" if checkpoint.reads_prompts else "label" if checkpoint.class_conditional else "none",
        "labels": None if checkpoint.reads_prompts else len(checkpoint.labels),
        "null label": "the empty or negative prompt" if checkpoint.reads_prompts else checkpoint.null_label,
        "without a null label": None if checkpoint.has_null or not checkpoint.class_conditional else _WITHOUT_NULL,
        **_noise(checkpoint),
        "guidance weight": checkpoint.convention,
        "learned variance": checkpoint.learned_variance,
        "classifier": opened and SEPARATOR.join(_classifier_line(*part) for part in opened.parts),
        "modes": [mode for mode, reason in refusals.items() if reason is None],
        "cannot serve": {mode: reason for mode, reason in refusals.items() if reason},
        "published": {name: preset.line() for name, preset in checkpoint.published.items()},
        "missing": checkpoint.missing,
    }
    if as_json:
        console.result(json.dumps({"type": "checkpoint"} | fields, ensure_ascii=False))
    else:
        _print_fields(fields)


def _print_fields(fields: Mapping[str, Any]) -> None:
    shown = {key: _text(value) for key, value in fields.items() if value not in (None, [], {})}
    if not sys.stdout.isatty():
        console.result("\n".join(f"{key}: {text}" for key, text in shown.items()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in shown.items():
        table.add_row(*map(console.clean, row))
    Console(highlight=False, markup=False).print(table)


def _noise(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the network predicts at which noise, and how it is walked."""
    noise = sigma_range(checkpoint.scheduler_config)
    return {
        "prediction type": checkpoint.prediction_type,
        "parametrisation": parametrisation(checkpoint.scheduler_config),
        "noise range": noise and "sigma {:g} to {:g}".format(*noise),
        "scheduler": checkpoint.scheduler_config.get("_class_name"),
        "default scheduler": checkpoint.default_scheduler,
        "default steps": checkpoint.steps,
        "recommended": checkpoint.recommended,
    }


def _kind(checkpoint: Checkpoint) -> str:
    name = checkpoint.kind
    if checkpoint.reads_prompts:
        return f"{name}, text-conditional"
    if not checkpoint.class_conditional:
        return f"{name}, unconditional"
    return f"{name}, class-conditional {'with' if checkpoint.has_null else 'without'} a null label"


def _classifier_line(classifier: ClassifierInfo, weight: float) -> str:
    knows = "any text" if classifier.zero_shot else f"{len(classifier.labels)} labels"
    weighs = "" if weight == 1 else f", weight {weight:g}"
    return f"{classifier.ref} ({classifier.input} input, {knows}{weighs})"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{mode}: {reason}" for mode, reason in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file; 0 for other kinds and for damaged ones."""
    try:
        return count_numbers(path)
    except CheckpointError:
        return 0


def _labels(
    query: Annotated[str, typer.Argument(metavar="[QUERY]", help="A name or a part of one; close matches count.")] = "",
    model: options.Model = None,
    classifier: options.ClassifierRef = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    access = Access(offline)
    checkpoint = options.find_checkpoint(model, access=access)
    labels = checkpoint.labels
    if not checkpoint.class_conditional:
        opened = options.find_classifier(classifier, checkpoint, access=access)
        if opened is None or not opened.takes_labels:
            takes = "takes prompts" if checkpoint.reads_prompts else "is unconditional"
            raise UsageError(f"{checkpoint.ref} {takes}: it has no labels. Name a classifier that has: --classifier.")
        labels = opened.labels
    found = labels.search(query)
    if not found:
        raise UsageError(
            f"No label like {quoted(query)} among the {len(labels)} of {checkpoint.ref}. `guidegen labels` lists all."
        )
    for label in found:
        name = labels.names[label]
        console.result(
            json.dumps({"type": "label", "label": label, "name": name}, ensure_ascii=False)
            if as_json
            else f"{label}\t{console.clean(name, keep='')}"
        )


def _grid(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are shown side by side.")],
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            metavar="AXIS,...",
            help="Axes across: w, label, prompt, seed, w-classifier, w-guide, or an axis of --by. [default: as in the run]",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option("--rows", metavar="AXIS,...", help="Axes down, outermost first; the others follow."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="LABEL", help="Only these labels. Repeats."),
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="LIST", help="Only these seeds: 0-3,100.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Show a metric of `guidegen evaluate` under each column: frechet_distance, accuracy, recall ... Repeats.",
        ),
    ] = None,
    scale: Annotated[
        int | None, typer.Option("--scale", metavar="N", min=1, help="Enlarge images N times. Default: to about 96 pixels.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PNG", help="File to write. Default: grid.png in the run.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    _check_out(runs, out)
    abouts = [read_run(run) for run in runs]
    across, down = parse_axes(columns), parse_axes(rows)
    if len(runs) == 1:
        plan = _plan_with_grid(runs[0], abouts[0])
        across, down = across or tuple(plan.columns if plan else ()), down or tuple(plan.rows if plan else ())
    cells, apart = _side_by_side(runs, [about["settings"] for about in abouts], metric or [])
    cells = _chosen(cells, label, seeds)
    title = grid.title_of(abouts[0]["settings"], apart)
    pages = grid.layout(cells, _shape_of(cells, runs[0]), across, scale, title, down)
    if out is not None and len(pages.pages) > 1:
        raise UsageError(f"The grid needs {len(pages.pages)} pages; leave out -o to write them into the run.")
    for name in grid.page_names(len(pages.pages)):
        refuse_foreign(out or runs[0] / name, force)
    metadata = {"settings": abouts[0]["settings"]} if len(runs) == 1 else {"runs": [about["settings"] for about in abouts]}
    problems = [line for run in runs for line in invalid_rows(run)]
    for path in draw_grid(runs[0], cells, pages, metadata, out, problems.append):
        print_made("grid", path, runs[0] if len(runs) == 1 else None, as_json)
    if problems:
        raise refusal(problems, len(cells), "their cells are crossed out")


def _shape_of(rows: Sequence[Row], run: Path) -> tuple[int, ...]:
    """(height, width) of the images."""
    shapes = {tuple(row["shape"][:2]) for row in rows if row["shape"]}
    if not shapes:
        raise UsageError(f"{run} holds no finished images yet.")
    if len(shapes) > 1:
        raise UsageError("The images differ in size; draw grids of one size at a time.")
    return shapes.pop()


def _check_out(runs: Sequence[Path], out: Path | None) -> None:
    if out is not None and out.suffix.lower() != ".png":
        raise UsageError(f"-o {out}: a grid is written as .png.")
    if out is None and len(runs) > 1:
        raise UsageError("Several runs make one grid: name its file with -o, such as -o grid.png.")


def _plan_with_grid(run: Path, about: Mapping[str, Any]) -> Plan | None:
    """The last of the run's plans that a grid was wanted of."""
    try:
        plans = [plan for plan in read_plans(run, about) if plan.grid]
    except UsageError:
        return None
    return plans[-1] if plans else None


def _chosen(rows: Sequence[Row], labels: list[str] | None, seeds: str | None) -> list[Row]:
    """The rows of these labels and seeds; None for all."""
    known = Labels({row["label"]: row["label_name"] for row in rows if row["label"] is not None})
    wanted = set(options.resolve_labels(labels, known)) if labels else None
    starts = parse_seeds(seeds) if seeds else None
    chosen = [
        row for row in rows if (wanted is None or row["label"] in wanted) and (starts is None or row["seed"] in starts)
    ]
    if not chosen:
        raise UsageError("No image has one of these labels and one of these seeds.")
    return chosen


def _measured(run: Path, rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """The rows, each with what was measured of its group as its caption."""
    from guidegen.evaluate.measure import key_of, open_drawn, read_metrics
    from guidegen.evaluate.metrics import METRICS, PUBLISHED_METRICS

    titles = {metric.name: metric.short for metric in (*METRICS, *PUBLISHED_METRICS)}
    if unknown := [name for name in metrics if name not in titles]:
        raise UsageError(f"--metric {unknown[0]!r}: choose of {', '.join(titles)}.")
    drawn = open_drawn(run, check_hashes=False)
    captions = {
        key_of(row, drawn.axes): "\n".join(
            f"{titles[name]} {row['metrics'][name]['value']:.3g}" for name in metrics if row["metrics"].get(name)
        )
        for row in read_metrics(drawn)[0]
    }
    if not captions:
        command = f"guidegen evaluate {shlex.quote(str(run))}"
        raise UsageError(f"{run} was not measured, or has other images now: run `{command}` first.")
    return [row | {"caption": captions.get(key_of(row, drawn.axes), "")} for row in rows]


def _side_by_side(
    runs: Sequence[Path], settings: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """Rows of all runs, named by what distinguishes the runs, and the axes that are not the same in all rows."""
    rows_of = [_measured(run, read_rows(run), metrics) if metrics else read_rows(run) for run in runs]
    swept = dict.fromkeys(axis for rows in rows_of for axis in grid.axes_of(rows) if axis not in CELL_AXES)
    names = run_names(settings, [run.resolve().name for run in runs], swept)
    cells: list[Row] = []
    for run, some, rows, name in zip(runs, settings, rows_of, names, strict=True):
        whose = {"run": name} if len(runs) > 1 else {}
        cells += [row | whose | {"folder": str(run.resolve())} for row in with_axes(rows, some, swept)]
    return cells, [*swept, *differences(settings)]
