"""`guidegen evaluate`: metrics of a run against real images, as a table, as rows and as curves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guidegen.cli import console, options
from guidegen.cli.command import make_command
from guidegen.errors import UsageError
from guidegen.models.checkpoint import Access
from guidegen.models.classifiers.info import SEPARATOR
from guidegen.runs.images import refusal
from guidegen.spec.axes import describe, value_name

if TYPE_CHECKING:
    import torch

    from guidegen.evaluate.features import Reader
    from guidegen.evaluate.measure import Drawn, Judge
    from guidegen.evaluate.reference import Reference

_AGAINST, _HOW = "What to measure against", "How to measure"


@dataclass(frozen=True)
class EvaluateFlags:
    """The flags, a field each."""

    reference: Annotated[
        Path,
        typer.Option(
            "--reference",
            metavar="PATH",
            help="Real images: a folder, .npz (arr_0, arr_1), .parquet (image, label), another run, or what "
            "--save-reference saved.",
            rich_help_panel=_AGAINST,
        ),
    ]
    reference_labels: Annotated[
        str,
        typer.Option(
            "--reference-labels",
            metavar="LIST",
            help="Which of them: run (those with the labels of the run), all, or ids such as 1,5-9.",
            rich_help_panel=_AGAINST,
        ),
    ] = "run"
    resize: Annotated[
        str | None,
        typer.Option(
            "--resize",
            metavar="FILTER",
            help="Bring images of another size to the run's, cropped at the centre: box, bilinear, hamming, bicubic, "
            "lanczos or nearest. Otherwise they are refused.",
            rich_help_panel=_AGAINST,
        ),
    ] = None
    save_reference: Annotated[
        Path | None,
        typer.Option(
            "--save-reference", metavar="NPZ", help="Keep its features for the next time.", rich_help_panel=_AGAINST
        ),
    ] = None
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="ID|DIR",
            help="Network whose features are compared: an image model of transformers or timm, bundled, or inception "
            "(then it is called FID). Default: bundled.",
            rich_help_panel=_HOW,
        ),
    ] = None
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="ID|DIR",
            help="Classifier that says whether an image shows its label; take one that did not guide. Default: bundled.",
            rich_help_panel=_HOW,
        ),
    ] = None
    halves: Annotated[
        int,
        typer.Option(
            "--halves",
            min=0,
            help="Random splits of the images, into halves and quarters, that the standard errors of distances and recall "
            "come from; 0: no standard errors.",
            rich_help_panel=_HOW,
        ),
    ] = 20
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Measure what is there of a run that is not complete or has corrupt images; otherwise it is refused.",
            rich_help_panel=_HOW,
        ),
    ] = False
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images read at once.", rich_help_panel=_HOW)] = 64
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cuda, cuda:1, mps or cpu.", rich_help_panel=_HOW)
    ] = "auto"
    curves: Annotated[
        bool, typer.Option("--curves/--no-curves", help="Draw curves.svg and curves.png.", rich_help_panel=options._OUTPUT)
    ] = True
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where. Default: the first run.", rich_help_panel=options._OUTPUT),
    ] = None
    offline: options.Offline = False
    allow_pickle: options.AllowPickle = False
    json_rows: options.Json = False
    quiet: options.Quiet = False
    debug: options.Debug = False


@dataclass(frozen=True)
class _Runs:
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; their curves share one figure.")]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("evaluate", help="Measure quality and diversity of runs against real images, for every w.")(
        make_command(_run, _Runs, EvaluateFlags)
    )


def _run(given: _Runs, flags: EvaluateFlags) -> None:
    evaluate(given.runs, flags)


def evaluate(runs: Sequence[Path], flags: EvaluateFlags) -> None:
    """Measures the runs, writes metrics.jsonl into each and the curves, and prints the rows.

    Raises:
        UsageError: a run that is incomplete, or images of another size or too few.
        CheckpointError: a network that cannot be opened.
    """
    from guidegen.evaluate import measure as evaluation

    _check(flags)
    drawn = [_open_run(run, flags.partial) for run in runs]
    _check_alike(drawn)
    from guidegen.evaluate import metrics
    from guidegen.evaluate.features import BUNDLED_CLASSIFIER, open_features, open_judge
    from guidegen.evaluate.neighbourhoods import MIN_IMAGES
    from guidegen.sampling.device import pick_device

    metrics.require("torchmetrics", "guidegen evaluate")
    if flags.curves:
        metrics.require("matplotlib", "Drawing curves (--no-curves leaves them out)")
    device = pick_device(flags.device)
    reader = open_features(flags.features or "bundled", device, Access(flags.offline, flags.allow_pickle))
    if reader.size is not None and reader.size != drawn[0].size:
        high, wide = drawn[0].size
        raise UsageError(
            f"The {reader.name} reads images of {reader.size[1]}x{reader.size[0]}, and the run has {wide}x{high}: "
            "name an image model with --features ID|DIR."
        )
    judge = None
    names = {label: name for run in drawn for label, name in run.label_names.items()}
    if names and (flags.judge or drawn[0].size == _size_of(BUNDLED_CLASSIFIER)):
        judge = evaluation.make_judge(
            *open_judge(flags.judge or "bundled", device, Access(flags.offline, flags.allow_pickle)), names
        )
    _say_who_judges(drawn, reader, judge, names, flags)
    with _counter("images read", flags.quiet) as on_image:
        reference = _reference(drawn, reader, judge, device, names, flags, on_image)
        if len(reference.features) < MIN_IMAGES:
            raise UsageError(
                f"--reference {reference.source} has {len(reference.features)} images, and the metrics need "
                f"{MIN_IMAGES} at least."
            )
        if flags.save_reference:
            from guidegen.evaluate.reference import save_reference

            save_reference(flags.save_reference, reference, reader, drawn[0].size)
        meter = metrics.Meter(reference.features)
        measured = [
            evaluation.measure_run(
                run, reader, reference, meter, judge, flags.halves, flags.batch_size, on_image, lambda: on_image(0)
            )
            for run in drawn
        ]
    for run, rows in zip(drawn, measured, strict=True):
        evaluation.write_metrics(run.folder, rows)
    pairs = [(run, row) for run, rows in zip(drawn, measured, strict=True) for row in rows]
    _warn_of_few([(describe(run.axes, evaluation.key_of(row, run.axes)), row) for run, row in pairs], flags)
    _show(drawn, measured, reader, reference, flags)
    if flags.curves:
        from guidegen.report.curves import draw_curves

        where = flags.out or drawn[0].folder
        for path in draw_curves(list(zip(drawn, measured, strict=True)), where):
            if not flags.quiet:
                console.note(f"curves: {path}")


def check_before(flags: EvaluateFlags, size: tuple[int, int]) -> None:
    """What can be refused before the images of (height, width) `size` are drawn.

    Raises:
        UsageError: a flag, a package that is missing, or a reference of another size.
    """
    from guidegen.evaluate import metrics
    from guidegen.evaluate.reference import first_image, fit

    _check(flags)
    metrics.require("torchmetrics", "--evaluate")
    metrics.require("matplotlib", "--evaluate")
    image = first_image(flags.reference)
    if image is not None:
        fit(image, size, flags.resize)


def _check(flags: EvaluateFlags) -> None:
    from guidegen.evaluate.reference import FILTERS, check_writable

    if flags.resize is not None and flags.resize not in FILTERS:
        raise UsageError(f"--resize {flags.resize}: choose {', '.join(FILTERS)}.")
    if flags.save_reference:
        check_writable(flags.save_reference)
    if not flags.reference.exists():
        raise UsageError(f"--reference {flags.reference}: no such file or folder.")
    if flags.reference_labels not in ("run", "all"):
        _ids(flags.reference_labels)
    if flags.out is not None and not flags.out.is_dir():
        raise UsageError(f"-o {flags.out}: no such folder; the curves go into one.")


def _ids(text: str) -> list[int]:
    from guidegen.spec import limits
    from guidegen.spec.parse import parse_seeds

    try:
        ids = parse_seeds(text)  # the same numbers and ranges
    except UsageError:
        ids = None
    if ids is None or len(ids) > limits.LIST:
        raise UsageError(f"--reference-labels {text!r}: give run, all, or ids such as 1,5-9.")
    return list(ids)


def _open_run(folder: Path, partial: bool) -> Drawn:
    from guidegen.evaluate.measure import open_drawn

    drawn = open_drawn(folder)
    if drawn.corrupt and not partial:
        raise refusal(
            drawn.corrupt,
            len(drawn.rows) + len(drawn.corrupt),
            f"{folder} was not measured. Draw them again with the command that began it, or leave them out with --partial.",
        )
    for reason in drawn.corrupt:
        console.note(f"note: left out: {reason}")
    if drawn.missing and not partial:
        raise UsageError(
            f"{folder} is not complete: {'; '.join(drawn.missing)}.\n"
            "Finish it with the command that began it, or measure what is there with --partial."
        )
    for lack in drawn.missing:
        console.note(f"note: {folder} is not complete: {lack}")
    return drawn


def _check_alike(drawn: Sequence[Drawn]) -> None:
    sizes = {(run.size, run.folder) for run in drawn}
    shapes = {tuple(row["shape"][:2]) for run in drawn for row in run.rows}
    if len(shapes) > 1:
        listed = ", ".join(f"{folder} {wide}x{high}" for (high, wide), folder in sorted(sizes))
        raise UsageError(f"The images differ in size ({listed}); measure runs of one size at a time.")


def _size_of(classifier: Path) -> tuple[int, int]:
    size = json.loads((classifier / "config.json").read_text(encoding="utf-8"))["sample_size"]
    return size, size


def _say_who_judges(
    drawn: Sequence[Drawn], reader: Reader, judge: Judge | None, names: dict[int, str], flags: EvaluateFlags
) -> None:
    if flags.quiet:
        return
    for run in drawn:
        guided = (run.about["settings"].get("classifier_sha256") or "").split(SEPARATOR)
        if judge and judge.reader.weights in guided:
            console.note(
                f"warning: the judge guided {run.folder}, so accuracy and confidence flatter it; "
                "name a classifier that did not: --judge ID|DIR"
            )
        if reader.weights in guided:
            console.note(f"warning: the features are those of the classifier that guided {run.folder}; see --features")
    if judge is None and names:
        console.note("note: no judge knows these labels, so accuracy and confidence are left out; see --judge")
    elif judge is not None and (unknown := [i for i in names if i not in judge.columns]):
        console.note(f"note: the judge does not know {len(unknown)} of the {len(names)} labels, such as {unknown[0]}")


def _reference(
    drawn: Sequence[Drawn],
    reader: Reader,
    judge: Judge | None,
    device: torch.device,
    names: dict[int, str],
    flags: EvaluateFlags,
    on_image: Callable[[int], None],
) -> Reference:
    from guidegen.evaluate.reference import open_source, read_reference, saved_reference

    wanted = _wanted(drawn, flags.reference_labels)
    saved = saved_reference(flags.reference, reader, wanted, drawn[0].size)
    if saved is not None:
        return saved
    source = open_source(flags.reference, {name.casefold(): label for label, name in names.items() if name})
    if flags.reference_labels not in ("run", "all") and not source.labelled:
        raise UsageError(f"--reference-labels: {flags.reference} has no labels.")
    right = judge.right if judge else None
    return read_reference(source, wanted, drawn[0].size, flags.resize, reader, right, flags.batch_size, on_image)


def _wanted(drawn: Sequence[Drawn], text: str) -> set[Any] | None:
    """Labels or prompts of the reference to keep; None for all."""
    from guidegen.evaluate.measure import subject_of

    if text == "all":
        return None
    if text != "run":
        return set(_ids(text))
    return {subject for run in drawn for row in run.rows if (subject := subject_of(row)) is not None} or None


@contextmanager
def _counter(what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Counts on a terminal what is read; silent elsewhere."""
    err = console.stderr()
    if quiet or not err.is_terminal:
        yield lambda _: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.completed:.0f} {task.description}")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=err, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda count: bar.advance(task, count)


def _warn_of_few(measured: Sequence[tuple[str, dict[str, Any]]], flags: EvaluateFlags) -> None:
    if flags.quiet:
        return
    from guidegen.evaluate.standard_errors import LEAST

    rows = [row for _, row in measured]
    width = rows[0]["features"]["width"]
    counts = [row["distinct"] for row in rows]
    real = rows[0]["reference"]["images"]
    if min(*counts, real) <= width:
        what = f"{min(counts)} images at a weight" if min(counts) <= width else f"{real} reference images"
        console.note(
            f"warning: {what} are too few for a covariance of {width} features: the Fréchet distance is too large, and may "
            "be compared only between equal numbers of images. The kernel distance has no such bias."
        )
    for where, row in measured:
        if row["distinct"] < row["images"]:
            console.note(
                f"warning: {row['mode']}, {where}: only {row['distinct']} of {row['images']} images differ (a seed "
                "without its label is one image); distances, precision, recall, density and coverage are of those"
            )
    if len(set(counts)) > 1:
        console.note("warning: the numbers of images differ, and Fréchet distance, recall and coverage depend on them")
    per_class = [figure["per_class"] for row in rows if (figure := row["metrics"]["vendi_score"])]
    if len({n for some in per_class for n in some}) > 1:
        low, high = min(low for low, _ in per_class), max(high for _, high in per_class)
        console.note(
            f"warning: the Vendi score is of {low} to {high} images a label, which is the most that it can be: it grows "
            "with their number, and may be compared between equal ones only"
        )
    if per_class and min(low for low, _ in per_class) < LEAST:
        console.note(
            f"note: Vendi score and pairwise distance have a standard error from {LEAST} images of each label on, and here "
            f"some have {min(low for low, _ in per_class)}"
        )


def _show(
    drawn: Sequence[Drawn],
    measured: Sequence[Sequence[dict[str, Any]]],
    reader: Reader,
    reference: Reference,
    flags: EvaluateFlags,
) -> None:
    from guidegen.evaluate.metrics import METRICS, title_of

    if flags.json_rows:
        for run, rows in zip(drawn, measured, strict=True):
            for row in rows:
                console.result(json.dumps({"run": str(run.folder), **row}, ensure_ascii=False))
        return
    axes = list(dict.fromkeys(axis for run in drawn for axis in run.axes))
    head = ["run" if len({run.mode for run in drawn}) < len(drawn) else "mode", *axes, "images"]
    metrics = [metric for metric in METRICS if any(row["metrics"][metric.name] for rows in measured for row in rows)]
    lines = []
    for run, rows in zip(drawn, measured, strict=True):
        name = run.folder.name if head[0] == "run" else run.mode
        for row in rows:
            figures = [_figure(row["metrics"][metric.name], row["images"]) for metric in metrics]
            lines.append([name, *(_plain(axis, row.get(axis)) for axis in axes), f"{row['images']:,}", *figures])
    titles = [title_of(metric, reader.inception) for metric in metrics]
    about = f"{reader.name} features, {len(reference.features):,} reference images of {reference.source}"
    if reference.accuracy is not None:
        about += f", {reference.accuracy:.1%} of which the judge names right"
    vendi = [figure for rows in measured for row in rows if (figure := row["metrics"]["vendi_score"])]
    if sizes := sorted({n for figure in vendi for n in figure["per_class"]}):
        many = " to ".join(map(str, sorted({sizes[0], sizes[-1]})))
        about += f"; Vendi score of {many} images a label, the most that it can be"
    if not flags.quiet:
        console.note(about)
    if not sys.stdout.isatty():
        short = [title.lower() if title.isupper() else metric.name for metric, title in zip(metrics, titles, strict=True)]
        table = [[*head, *short], *lines]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        for line in table:
            console.result("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table

    table_of: Any = Table(box=None, pad_edge=False, header_style="bold")
    for title in [*head, *titles]:
        table_of.add_column(console.clean(title), justify="right")
    for line in lines:
        table_of.add_row(*(console.clean(text.replace("±", " ±")) for text in line))
    Console(highlight=False, markup=False).print(table_of)


def _figure(found: dict[str, Any] | None, images: int) -> str:
    """`12.3±0.4`, with the number of images where it is another than the row's."""
    if found is None:
        return "-"
    spread = "" if found["spread"] is None else f"±{found['spread']:.2g}"
    count = "" if found["images"] == images else f"({found['images']:,})"
    return f"{found['value']:.4g}{spread}{count}"


def _plain(axis: str, value: Any) -> str:
    return "-" if value is None else value_name(axis, value)
