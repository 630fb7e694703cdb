"""`guidegen evaluate`: metrics of a run against real images, as a table, as rows and as curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guidegen.cli import console, options, threads
from guidegen.cli.command import make_command
from guidegen.errors import UsageError
from guidegen.models.checkpoint import Access
from guidegen.models.classifiers.info import SEPARATOR
from guidegen.runs.images import refusal
from guidegen.runs.ours import refuse_foreign

if TYPE_CHECKING:
    from guidegen.evaluate.features import EvaluationClassifier, Reader
    from guidegen.evaluate.measure import Drawn
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
            help="Real images: a folder, .npz (arr_0, arr_1), .parquet (image, label), another run, or a file of "
            "--save-reference.",
            rich_help_panel=_AGAINST,
        ),
    ]
    reference_labels: Annotated[
        str,
        typer.Option(
            "--reference-labels",
            metavar="LIST",
            help="Labels to keep: run (those of the run), all, or ids such as 1,5-9.",
            rich_help_panel=_AGAINST,
        ),
    ] = "run"
    resize: Annotated[
        str | None,
        typer.Option(
            "--resize",
            metavar="FILTER",
            help="Resize images of another size to that of the run after a centre crop: box, bilinear, hamming, bicubic, "
            "lanczos or nearest. Without it they are an error.",
            rich_help_panel=_AGAINST,
        ),
    ] = None
    save_reference: Annotated[
        Path | None,
        typer.Option(
            "--save-reference", metavar="NPZ", help="Save the features of the reference for reuse.", rich_help_panel=_AGAINST
        ),
    ] = None
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="ID|DIR",
            help="Network that makes the features: an image model of transformers or timm, bundled, or inception "
            "(the distance is then the FID). Default: bundled.",
            rich_help_panel=_HOW,
        ),
    ] = None
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="ID|DIR",
            help="Evaluation classifier, which measures how often an image shows its label; choose one that did not guide. "
            "Default: bundled.",
            rich_help_panel=_HOW,
        ),
    ] = None
    halves: Annotated[
        int,
        typer.Option(
            "--halves",
            metavar="N",
            min=0,
            help="Random splits into half-samples and quarter-samples, for the standard errors of distances and recall; "
            "0: no standard errors.",
            rich_help_panel=_HOW,
        ),
    ] = 20
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Measure an incomplete or damaged run by the images that it has; otherwise it is refused.",
            rich_help_panel=_HOW,
        ),
    ] = False
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Images read at once.", rich_help_panel=_HOW)
    ] = 64
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cuda, cuda:1, mps or cpu.", rich_help_panel=_HOW)
    ] = "auto"
    threads: options.Threads = None
    curves: Annotated[
        bool, typer.Option("--curves/--no-curves", help="Draw curves.svg and curves.png.", rich_help_panel=options._OUTPUT)
    ] = True
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="For the curves. Default: the first run.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    force: options.Force = False
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
    threads.use(flags.threads)
    evaluate(given.runs, flags)


def evaluate(runs: Sequence[Path], flags: EvaluateFlags) -> None:
    """Measures the runs, writes metrics.jsonl into each and the curves, and prints the rows.

    Raises:
        UsageError: a run that is incomplete, or images of another size or too few.
        CheckpointError: a network that cannot be opened.
    """
    from guidegen.cli.metrics_table import notes_on_few, print_metrics
    from guidegen.evaluate.measure import measure_run, write_metrics
    from guidegen.evaluate.metrics import Meter

    _check(flags)
    drawn = [_open_run(run, flags.partial) for run in runs]
    _check_alike(drawn)
    for kind in ("svg", "png") if flags.curves else ():
        refuse_foreign((flags.out or drawn[0].folder) / f"curves.{kind}", flags.force)
    names = {label: name for run in drawn for label, name in run.label_names.items()}
    reader, classifier = _open_networks(drawn[0].size, names, flags)
    if not flags.quiet:
        _note_networks(drawn, reader, classifier, names)
    with _counter("images read", flags.quiet) as on_image:
        reference = _reference(drawn, reader, classifier, names, flags, on_image)
        meter = Meter(reference.features)
        pairs = [
            (run, measure_run(run, reader, reference, meter, classifier, flags.halves, flags.batch_size, on_image))
            for run in drawn
        ]
    for run, rows in pairs:
        write_metrics(run.folder, rows)
    if not flags.quiet:
        for note in notes_on_few(pairs):
            console.note(note)
    print_metrics(pairs, reader, reference, flags.json_rows, flags.quiet)
    if flags.curves:
        from guidegen.report.curves import draw_curves

        for path in draw_curves(pairs, flags.out or drawn[0].folder):
            if not flags.quiet:
                console.note(f"curves: {path}")


def check_before(flags: EvaluateFlags, size: tuple[int, int]) -> None:
    """Refuses, before images of (height, width) `size` are drawn, what could not be measured after it.

    Raises:
        UsageError: a wrong flag, a missing package, or a reference of another size.
    """
    from guidegen.evaluate.metrics import require
    from guidegen.evaluate.reference import first_image, fit

    _check(flags)
    require("torchmetrics", "--evaluate")
    require("matplotlib", "--evaluate")
    image = first_image(flags.reference)
    if image is not None:
        fit(image, size, flags.resize)


def _check(flags: EvaluateFlags) -> None:
    from guidegen.evaluate.reference import FILTERS, check_writable

    if flags.resize is not None and flags.resize not in FILTERS:
        raise UsageError(f"--resize {flags.resize}: choose {', '.join(FILTERS)}.")
    if flags.save_reference:
        check_writable(flags.save_reference)
        refuse_foreign(flags.save_reference, flags.force, "--save-reference")
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


def _open_networks(
    size: tuple[int, int], names: Mapping[int, str], flags: EvaluateFlags
) -> tuple[Reader, EvaluationClassifier | None]:
    """The network of the features, and the evaluation classifier where one knows some of the labels."""
    from guidegen.evaluate.features import bundled_size, open_evaluation_classifier, open_features
    from guidegen.evaluate.metrics import require
    from guidegen.sampling.device import pick_device

    require("torchmetrics", "guidegen evaluate")
    if flags.curves:
        require("matplotlib", "Drawing curves (--no-curves leaves them out)")
    device, access = pick_device(flags.device), Access(flags.offline, flags.allow_pickle)
    reader = open_features(flags.features or "bundled", device, access)
    if reader.size is not None and reader.size != size:
        raise UsageError(
            f"The {reader.name} reads images of {reader.size[1]}x{reader.size[0]}, and the run has {size[1]}x{size[0]}: "
            "name an image model with --features ID|DIR."
        )
    if not names or not (flags.judge or size == bundled_size()):
        return reader, None
    return reader, open_evaluation_classifier(flags.judge or "bundled", names, device, access)


def _note_networks(
    drawn: Sequence[Drawn], reader: Reader, classifier: EvaluationClassifier | None, names: Mapping[int, str]
) -> None:
    """Warns of networks that guided a run, and of labels that the evaluation classifier does not know."""
    for run in drawn:
        guided = (run.about["settings"].get("classifier_sha256") or "").split(SEPARATOR)
        if classifier and classifier.reader.weights in guided:
            console.note(
                f"warning: the evaluation classifier guided {run.folder}, so accuracy and confidence are biased upwards; "
                "name a classifier that did not: --judge ID|DIR"
            )
        if reader.weights in guided:
            console.note(f"warning: the features are those of the classifier that guided {run.folder}; see --features")
    if classifier is None and names:
        console.note(
            "note: no evaluation classifier knows these labels, so accuracy and confidence are left out; see --judge"
        )
    elif classifier is not None and (unknown := [i for i in names if i not in classifier.columns]):
        console.note(
            f"note: the evaluation classifier does not know {len(unknown)} of the {len(names)} labels, such as {unknown[0]}"
        )


def _reference(
    drawn: Sequence[Drawn],
    reader: Reader,
    classifier: EvaluationClassifier | None,
    names: Mapping[int, str],
    flags: EvaluateFlags,
    on_image: Callable[[int], None],
) -> Reference:
    from guidegen.evaluate.neighbourhoods import MIN_IMAGES
    from guidegen.evaluate.reference import open_source, read_reference, save_reference, saved_reference

    wanted, size = _wanted(drawn, flags.reference_labels), drawn[0].size
    reference = saved_reference(flags.reference, reader, wanted, size)
    if reference is None:
        source = open_source(flags.reference, {name.casefold(): label for label, name in names.items() if name})
        if flags.reference_labels not in ("run", "all") and not source.labelled:
            raise UsageError(f"--reference-labels: {flags.reference} has no labels.")
        correct = classifier.correct if classifier else None
        reference = read_reference(source, wanted, size, flags.resize, reader, correct, flags.batch_size, on_image)
    if len(reference.features) < MIN_IMAGES:
        raise UsageError(
            f"--reference {reference.source} has {len(reference.features)} images, and the metrics need {MIN_IMAGES} "
            "at least."
        )
    if flags.save_reference:
        save_reference(flags.save_reference, reference, reader, size)
    return reference


def _wanted(drawn: Sequence[Drawn], text: str) -> set[Any] | None:
    """Labels or prompts of the reference to keep; None for all."""
    from guidegen.evaluate.reference import subject_of

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
