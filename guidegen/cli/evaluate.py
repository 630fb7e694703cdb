"""`guidegen evaluate`: metrics of a run against real images, as a table, as rows and as curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guidegen.cli import console, threads
from guidegen.cli.command import make_command
from guidegen.cli.evaluate_flags import EvaluateFlags
from guidegen.cli.evaluate_protocol import (
    check_before_protocol,
    check_free,
    check_networks,
    check_protocol,
    counter,
    make_features,
    measure_by_protocol,
    require_matplotlib,
    write,
)
from guidegen.cli.metrics_table import about_free, notes_on_few, print_metrics
from guidegen.errors import UsageError
from guidegen.models.checkpoint import Access
from guidegen.models.classifiers.info import SEPARATOR
from guidegen.runs.images import refusal
from guidegen.runs.ours import refuse_foreign

if TYPE_CHECKING:
    from guidegen.evaluate.features import EvaluationClassifier, Reader
    from guidegen.evaluate.measure import Drawn
    from guidegen.evaluate.reference import Reference

    Pairs = Sequence[tuple[Drawn, Sequence[dict[str, Any]]]]


@dataclass(frozen=True)
class _Runs:
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", help="Run directories, or images: .npz (arr_0), .parquet or a folder of others."),
    ] = None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("evaluate", help="Measure quality and diversity of runs against real images, for every w.")(
        make_command(_run, _Runs, EvaluateFlags)
    )


def _run(given: _Runs, flags: EvaluateFlags) -> None:
    threads.use(flags.threads)
    evaluate(given.runs or [], flags)


def evaluate(runs: Sequence[Path], flags: EvaluateFlags) -> None:
    """Measures the runs, writes metrics.jsonl into each and the curves, and prints the rows.

    Raises:
        UsageError: a run that is incomplete, or images of another size or too few.
        CheckpointError: a network that cannot be opened.
    """
    if flags.check:
        check_networks(flags)
        return
    _check(flags)
    if not runs:
        raise UsageError("Name the runs to evaluate: guidegen evaluate RUN... --reference PATH")
    drawn = [_open_run(run, flags.partial) for run in runs]
    _check_alike(drawn)
    curves = flags.curves and flags.shard is None and not any(isinstance(run.axes, tuple) and not run.axes for run in drawn)
    for kind in ("svg", "png") if curves else ():
        refuse_foreign((flags.out or drawn[0].folder) / f"curves.{kind}", flags.force)
    if curves:
        require_matplotlib()
    measured = measure_by_protocol(drawn, flags) if flags.protocol else _measure_free(drawn, flags)
    if measured is None:  # a shard
        return
    pairs, about = measured
    for run, rows in pairs:
        if run.axes:
            write(run.folder, rows)
    print_metrics(pairs, about, flags.json_rows, flags.quiet)
    if curves:
        from guidegen.report.curves import draw_curves

        out = flags.out or drawn[0].folder
        out.mkdir(parents=True, exist_ok=True)
        for path in draw_curves(pairs, out):
            if not flags.quiet:
                console.note(f"curves: {path}")


def _measure_free(drawn: Sequence[Drawn], flags: EvaluateFlags) -> tuple[Pairs, str] | None:
    """The free form: the metrics of any features against images; None of a shard."""
    from guidegen.evaluate.measuring import measure_run, per_class, read_features
    from guidegen.evaluate.metrics import Meter
    from guidegen.evaluate.reference import subject_of

    for run in drawn if flags.per_class else ():
        if all(subject_of(row) is None for row in run.rows):
            raise UsageError(f"--per-class: the images of {run.folder} have no labels.")
    names = {label: name for run in drawn for label, name in run.label_names.items()}
    reader, classifier = _open_networks(drawn[0].size, names, flags)
    if not flags.quiet:
        _note_networks(drawn, reader, classifier, names)
    readers = [reader] if classifier is None else [reader, classifier.reader]
    if flags.shard is not None:
        make_features(drawn, readers, flags)
        return None
    with counter(drawn, len(readers), flags.quiet) as on_image:
        reference = _reference(drawn, reader, classifier, names, flags, lambda _: None)
        meter = Meter(reference.features)
        pairs = [
            (run, measure_run(run, reader, reference, meter, classifier, flags.halves, flags.batch_size, on_image))
            for run in drawn
        ]
    for run in drawn if flags.per_class else ():
        caches = read_features(run, [reader], flags.batch_size, lambda _: None)
        write(run.folder, per_class(run, caches, meter), "per_class.jsonl")
    if not flags.quiet:
        for note in notes_on_few(pairs):
            console.note(note)
    return pairs, about_free([row for _, rows in pairs for row in rows], reader, reference)


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
    assert flags.reference is not None
    if flags.protocol is not None and not check_before_protocol(flags):
        return
    image = first_image(flags.reference)
    if image is not None:
        fit(image, size, flags.resize)


def _check(flags: EvaluateFlags) -> None:
    from guidegen.evaluate.reference import FILTERS, check_writable

    if flags.resize is not None and flags.resize not in FILTERS:
        raise UsageError(f"--resize {flags.resize}: choose {', '.join(FILTERS)}.")
    if flags.protocol is not None:
        check_protocol(flags)
    elif flags.extrapolate:
        raise UsageError("--extrapolate is for --protocol.")
    if flags.save_reference:
        check_writable(flags.save_reference, ".pkl" if flags.protocol == "edm2" else ".npz")
        refuse_foreign(flags.save_reference, flags.force, "--save-reference")
    if flags.reference is None:
        if flags.shard is None:
            raise UsageError("Missing option '--reference': name the real images to measure against.")
        return
    if not flags.reference.exists():
        raise UsageError(f"--reference {flags.reference}: no such file or folder.")
    if flags.protocol is None:
        check_free(flags)
    if flags.reference_labels not in ("run", "all"):
        _ids(flags.reference_labels)
    if flags.out is not None and flags.out.exists() and not flags.out.is_dir():
        raise UsageError(f"-o {flags.out}: is a file, and the curves go into a folder.")


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
    from guidegen.evaluate.samples import is_samples, open_samples

    drawn = open_samples(folder) if is_samples(folder) else open_drawn(folder)
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
    device, access = pick_device(flags.device), Access(flags.offline, flags.allow_pickle)
    if flags.features == "inception":
        from guidegen.evaluate.published import open_inception

        reader: Reader = open_inception(flags.inception, device, access)
    else:
        reader = open_features(flags.features or "bundled", device, access)
    reader.check_size(size)
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
    from guidegen.evaluate.measuring import open_reference
    from guidegen.evaluate.reference import save_reference

    wanted, size = _wanted(drawn, flags.reference_labels), drawn[0].size
    assert flags.reference is not None
    reference = open_reference(
        flags.reference,
        wanted,
        names,
        size,
        flags.resize,
        reader,
        classifier.correct if classifier else None,
        flags.batch_size,
        on_image,
        only_labelled=flags.reference_labels not in ("run", "all"),
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
