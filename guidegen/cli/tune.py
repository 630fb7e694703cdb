"""`guidegen tune`: searches for the best setting by drawing, measuring, and drawing more where it is close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guidegen.cli import console, options, threads
from guidegen.cli.axes import parse_by
from guidegen.cli.command import command_of, make_command
from guidegen.cli.flags import Apart, Messages, Sampling, Source, What
from guidegen.cli.lines import print_line
from guidegen.cli.searching import Work, is_worker, workers
from guidegen.cli.settings_drawn import SettingJobs
from guidegen.cli.signals import Signals
from guidegen.errors import StoppedError, UsageError, quoted
from guidegen.models.checkpoint import Access
from guidegen.models.classifiers.info import SEPARATOR
from guidegen.runs.files import write_atomically
from guidegen.runs.ours import refuse_foreign
from guidegen.runs.schema import dumps
from guidegen.spec import limits
from guidegen.spec.axes import axis_options
from guidegen.spec.command import Command
from guidegen.spec.options import PlainOptions
from guidegen.spec.parse import whole

if TYPE_CHECKING:
    from guidegen.tune.measuring import Measurer
    from guidegen.tune.rounds import Goal
    from guidegen.tune.space import Space

_HELP = """Search for the best guidance weight, method or other setting, and say how sure that is.

- guidegen tune --label all --by w=0.5:8 --metric frechet_distance --reference photographs.parquet

- guidegen tune --label all --by w=1:6 --by guidance=cfg,apg --metric frechet_distance --metric accuracy --reference DIR
"""
_SEARCH = "What to search"
_OF_SEARCH = ("out", "seed", "seeds-per-label", "overwrite", "force", "json", "quiet", "verbose", "debug")
"""Options of a search that say nothing of the image found."""


@dataclass(frozen=True)
class SearchOptions:
    """What is searched."""

    by: Annotated[
        list[str],
        typer.Option(
            "--by",
            metavar="AXIS=RANGE",
            help="What to vary: w=0.5:8, steps=10:50, guidance=cfg,apg, interval=none,0.3:5, apg.eta=0:1 ... LOW:HIGH is a "
            "range, commas make a list. Repeats.",
            rich_help_panel=_SEARCH,
        ),
    ]
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="What is to be best, as `evaluate` names it, or nfe (network calls). Repeats; the first counts for the "
            "answer. [default: frechet_distance]",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="PATH",
            help="Real images, as `evaluate --reference` takes them.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    budget: Annotated[
        int, typer.Option("--budget", metavar="N", min=1, help="Images to draw at most.", rich_help_panel=_SEARCH)
    ] = 10_000
    target_se: Annotated[
        float | None,
        typer.Option(
            "--target-se",
            metavar="NUMBER",
            min=0,
            help="Stop once the first metric at the setting found is within this standard error of the best there is.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=1, help="Processes that draw.", rich_help_panel=_SEARCH)
    ] = 1
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="Database of the search, for the same command on several machines that share the run directory: "
            "postgresql://... [default: tune.db in the run]",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    reference_labels: Annotated[
        str,
        typer.Option(
            "--reference-labels",
            metavar="LIST",
            help="Labels of the reference to keep: run or all.",
            rich_help_panel=_SEARCH,
        ),
    ] = "run"
    resize: Annotated[
        str | None,
        typer.Option(
            "--resize", metavar="FILTER", help="How to resize reference images of another size.", rich_help_panel=_SEARCH
        ),
    ] = None
    features: Annotated[
        str,
        typer.Option("--features", metavar="ID|DIR", help="Network that makes the features.", rich_help_panel=_SEARCH),
    ] = "bundled"
    judge: Annotated[
        str,
        typer.Option("--judge", metavar="ID|DIR", help="Evaluation classifier of the metrics.", rich_help_panel=_SEARCH),
    ] = "bundled"


@dataclass(frozen=True)
class TuneOptions(Messages, PlainOptions, Sampling, Source, Apart, What):
    """What is drawn, and how, where it does not vary."""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="The run directory. Default: one in guidegen-runs.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    overwrite: options.Overwrite = False
    force: options.Force = False

    @property
    def access(self) -> Access:
        """How checkpoints may be read."""
        return Access(self.offline, self.allow_pickle, self.variant)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("tune", help=_HELP, short_help=_HELP.split("\n")[0])(make_command(tune, SearchOptions, TuneOptions))


def tune(asked: SearchOptions, flags: TuneOptions) -> None:
    """Searches, and prints the command that draws with what was found.

    Raises:
        UsageError: what cannot be varied, measured or afforded, before anything is drawn.
    """
    from guidegen.tune.result import FILE
    from guidegen.tune.rounds import Search
    from guidegen.tune.study import Study, checked_address, propose, require_packages

    require_packages()
    threads.use(flags.threads or threads.share(asked.workers))
    if asked.storage and flags.overwrite:
        raise UsageError("--overwrite would delete what other machines drew: remove the directory, or name another -o.")
    shown = replace(asked, storage=asked.storage and checked_address(asked.storage))
    flags = replace(flags, seed=_first_seed(flags))
    space, metrics = _space_of(asked.by), _metrics_of(asked)
    jobs = SettingJobs(flags, space, {"search": _about(asked, space, metrics)})
    jobs.command, command = (
        command_of("tune", flags, each).into(str(jobs.folder), jobs.conditions, {}).without("overwrite")
        for each in (shown, asked)
    )
    goal = _goal(asked, flags, space, metrics, jobs.per_seed)
    for name in (FILE, "tune.svg", "tune.png"):
        refuse_foreign(jobs.folder / name, flags.force)
    measurer, measured_by = _open_measurer(asked, flags, jobs, metrics)
    jobs.begin(flags.overwrite)
    first = space.first_settings()
    about = {**_about(asked, space, metrics), **measured_by, **jobs.identity}
    study = Study(jobs.folder, asked.storage, space, metrics, about | {"first seeds": goal.first})
    goal = replace(goal, first=study.first_seeds)
    search = Search(space, goal, first, lambda measured, count: propose(space, measured, metrics, count))
    work = Work(jobs, study, search, measurer, flags.quiet)
    with workers(asked.workers, command, flags.device), Signals() as signals:
        try:
            work.until_the_end(signals)
        except StoppedError as stopped:
            again = f"{stopped}; the finished images are on disk. To go on: {jobs.command}"
            raise StoppedError(again, stopped.code - 128) from None
    if not is_worker():
        _print_result(work, goal, flags, {"measured": measured_by, "width": measurer.width})


def _first_seed(flags: TuneOptions) -> str:
    if flags.seed == "random":
        raise UsageError("--seed random would begin another search each time: give a number.")
    first = whole((flags.seed or "0").strip())
    if first is None or first > 2**62:
        raise UsageError(f"--seed must be from 0 to 2^62, found {quoted(flags.seed or '')}.")
    return str(first)


def _space_of(words: Sequence[str]) -> Space:
    """What is varied.

    Raises:
        UsageError: no axis, one twice, or one that has a single value.
    """
    from guidegen.tune.space import Dimension, Space, parse_range

    found = []
    for word in words:
        dimension = parse_range(word)
        if dimension is None:
            (by,) = parse_by([word])
            if by.weights:
                raise UsageError(f"--by {quoted(word)}: tune searches for the weights itself (VALUE@W is for sweep).")
            dimension = Dimension(by.axis.name, tuple(by.values))
        if len(dimension.values) == 1:
            raise UsageError(f"--by {quoted(word)}: one value is nothing to search; give a range LOW:HIGH or a list.")
        found.append(dimension)
    names = [each.name for each in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--by {twice[0]} stands there twice: give all its values in one.")
    return Space(tuple(found))


def _metrics_of(asked: SearchOptions) -> dict[str, int]:
    """Name -> which way is better."""
    from guidegen.tune.measuring import BETTER, needs_reference

    names = list(dict.fromkeys(asked.metric or ["frechet_distance"]))
    if unknown := [name for name in names if name not in BETTER]:
        raise UsageError(f"--metric {quoted(unknown[0])}: choose {', '.join(BETTER)}.")
    if asked.reference is None and needs_reference(names):
        raise UsageError(f"--metric {names[0]} compares with real images: give --reference PATH.")
    if asked.reference is not None and not asked.reference.exists():
        raise UsageError(f"--reference {asked.reference}: no such file or folder.")
    if asked.reference_labels not in ("run", "all"):
        raise UsageError(f"--reference-labels {quoted(asked.reference_labels)}: give run or all.")
    return {name: BETTER[name] for name in names}


def _goal(asked: SearchOptions, flags: TuneOptions, space: Space, metrics: Mapping[str, int], per_seed: int) -> Goal:
    """What is looked for.

    Raises:
        UsageError: the budget does not do for the first round, or takes more seeds than there are.
    """
    from guidegen.tune.measuring import least_seeds
    from guidegen.tune.rounds import Goal, first_seeds

    most = asked.budget // (2 * per_seed)
    if flags.seeds_per_label and int(flags.seed or 0) + most > limits.SEEDS_OF_A_LABEL:
        raise UsageError(
            f"--seeds-per-label leaves each label {limits.SEEDS_OF_A_LABEL:,} seeds, and --budget {asked.budget:,} may take "
            f"{most:,} of {per_seed} labels: give a smaller one, or more labels."
        )
    settings = len(space.first_settings())
    seeds = first_seeds(settings, asked.budget, per_seed, least_seeds(metrics, per_seed))
    if (least := settings * seeds * per_seed) > asked.budget:
        raise UsageError(
            f"--budget {asked.budget:,} is too small: the first round draws {seeds * per_seed} images of each of {settings} "
            f"settings, {least:,} in all. Vary less, or give a larger one."
        )
    return Goal(metrics, asked.budget, asked.target_se, per_seed, seeds)


def _about(asked: SearchOptions, space: Space, metrics: Mapping[str, int]) -> dict[str, Any]:
    """What is searched, of which there is one search in a run directory."""
    return {
        "axes": {each.name: each.as_json() for each in space.dimensions},
        "metrics": list(metrics),
        "reference labels": asked.reference_labels,
    }


def _open_measurer(
    asked: SearchOptions, flags: TuneOptions, jobs: SettingJobs, metrics: Mapping[str, int]
) -> tuple[Measurer, dict[str, Any]]:
    """What measures the metrics, and what names it; notes where its numbers are to be read with care."""
    from guidegen.sampling.device import pick_device
    from guidegen.tune.measuring import Networks, open_networks

    networks = Networks(asked.features, asked.judge, pick_device(flags.device), flags.access)
    images = jobs.image_size, jobs.label_names, jobs.subjects if asked.reference_labels == "run" else None
    opened = open_networks(list(metrics), networks, *images, asked.reference, asked.resize)
    guided = (jobs.base.settings.classifier_sha256 or "").split(SEPARATOR)
    for note in opened.notes(list(metrics), guided) if not flags.quiet else ():
        console.note(note)
    on_note = (lambda _: None) if flags.quiet else console.note
    return opened.measurer(jobs.folder, list(metrics), on_note), opened.identity


def _print_result(work: Work, goal: Goal, flags: TuneOptions, about: Mapping[str, Any]) -> None:
    """Writes tune.json and the plot; prints the command of the best setting, and the table."""
    from guidegen.report.tuning import draw_tuning, lines_of
    from guidegen.tune.result import FILE, result_of

    evaluations, folder = work.study.evaluations(), work.jobs.folder
    result = {**result_of(work.jobs.space, goal, work.search.progress(evaluations), evaluations), **about}
    for one in result["metrics"]:
        one["command"] = str(_best_command(flags, work.jobs, one["best"]))
    result |= {"search": str(work.jobs.command), "lines": list(lines_of(result))}
    write_atomically(folder / FILE, (dumps(result, indent=1) + "\n").encode())
    made = draw_tuning(result, folder)
    if not flags.quiet:
        for line in (*result["lines"], f"curve: {made[0]}"):
            console.note(line)
    if flags.json_rows:
        print_line("tune", folder / FILE, folder, result)
    else:
        console.result(result["metrics"][0]["command"])


def _best_command(flags: TuneOptions, jobs: SettingJobs, best: Mapping[str, Any]) -> Command:
    """`guidegen sample` with a setting."""
    command = command_of("sample", flags).into("", jobs.conditions, {}).without(*_OF_SEARCH)
    given = axis_options(command.options, best)
    if "w" not in best and flags.w is None and jobs.weight is not None:
        given["w"] = jobs.weight
    return Command("sample", given)
