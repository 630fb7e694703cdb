"""`guidegen again`: what an image or a run was drawn with, drawn again, with any flag changed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.cli import console, options
from guidegen.cli.afterwards import Afterwards
from guidegen.cli.command import command_of, make_command
from guidegen.cli.draw import draw
from guidegen.cli.flags import SampleOptions, SweepOptions
from guidegen.cli.picture_text import read_text, run_of
from guidegen.cli.recovered import Options, changed, options_of, refuse_python
from guidegen.cli.resolve import Job
from guidegen.cli.webui import options_of_parameters
from guidegen.cli.weights import with_hashes
from guidegen.errors import CheckpointError, UsageError, quoted
from guidegen.runs.carried import Carried, check_carried
from guidegen.zoo import BUNDLED

_WEIGHTS = ("w", "w_classifier", "w_guide")
_HASHES = {
    "model_sha256": "the model has other weights",
    "classifier_sha256": "the classifier has other weights",
    "guide_model_sha256": "the guiding model has other weights",
    "config_sha256": "the configs of the networks or of the scheduler differ",
    "classifier_texts": "the classifier distinguishes other texts",
}
"""What of the settings no flag sets."""
_DECIDE_CONFIGS = {"mode", "classifier", "classifier_input", "guide_model", "w_guide"}
"""Flags that lead to other networks and so to other configs."""


@dataclass(frozen=True)
class Again:
    """What to draw again."""

    context: typer.Context
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|RUN",
            help="An image or .npz of guidegen, a run directory or its run.json, or an image with the text of the "
            "AUTOMATIC1111 web interface.",
        ),
    ]
    show: Annotated[
        bool, typer.Option("--show", help="Print the command instead of drawing.", rich_help_panel=options._TALK)
    ] = False
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Refuse networks other than those that it was drawn with.", rich_help_panel=options._MODEL
        ),
    ] = False


def register(app: typer.Typer) -> None:
    """Adds the command."""
    about = "Draw an image or a run again from the settings in it. All flags of sample and sweep change them."
    app.command("again", help=about)(make_command(_again, Again, SweepOptions, Afterwards))


def _again(asked: Again, flags: SweepOptions, afterwards: Afterwards) -> None:
    given = _given(asked.context, flags)
    carried, found = _read(asked.file, flags.quiet)
    named = carried is not None and carried.source is not None
    if not named and not flags.model:
        name = quoted(carried.settings.model) if carried else "a checkpoint"
        raise UsageError(f"{asked.file} was drawn with {name} and does not say where that is: give --model ID|DIR.")
    made = [_flags(kind, some, given, None if named else flags.model) for kind, some in found]
    if asked.show:
        console.result("\n".join(str(command_of(each.command, each, afterwards)) for each in made))
        return
    if len(made) > 1:
        show = f"guidegen again {shlex.quote(str(asked.file))} --show"
        raise UsageError(f"{asked.file} was made by {len(made)} commands. `{show}` prints them.")
    draw(made[0], afterwards, lambda job: _check_same(job, carried, given, asked.strict))


def _given(context: typer.Context, flags: SweepOptions) -> dict[str, Any]:
    """The options of the command line, without those that have their defaults or are of the environment."""
    names = [field.name for field in fields(flags)]
    asked = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    return {name: getattr(flags, name) for name in asked}


def _read(path: Path, quiet: bool) -> tuple[Carried | None, list[tuple[type[SampleOptions], Options]]]:
    """What a file says, None where it is of another program, and the command and options of all that made it."""
    text = read_text(path)
    if text.ours is None:
        found, unread = options_of_parameters(text.parameters or "", path)
        if unread and not quiet:
            console.note(f"note: not taken over from {path}: {', '.join(unread)}")
        return None, [(SampleOptions, found)]
    carried = check_carried(_completed(text.ours, path), path)
    plans = carried.plans or (None,)
    kinds: list[type[SampleOptions]] = [SweepOptions if plan and plan.grid else SampleOptions for plan in plans]
    return carried, [(kind, options_of(carried, plan)) for kind, plan in zip(kinds, plans, strict=True)]


def _completed(about: Any, path: Path) -> Any:
    """What a file says, with what only the run says in whose folder it is."""
    is_run = path.is_dir() or path.name == "run.json"
    run = None if is_run or not isinstance(about, dict) else run_of(path)
    if run is None:
        return about
    if not about.keys() & {"cell", "cells", "plan", "plans"}:
        return run  # a grid that was drawn anew
    return about if "source" in about or "source" not in run else {**about, "source": run["source"]}


def _flags(kind: type[SampleOptions], found: Options, given: Mapping[str, Any], model: str | None) -> SampleOptions:
    """The options, with those that are given; a list of weights or an axis makes them a sweep's.

    Args:
        kind: of options.
        found: what the file says.
        given: on the command line.
        model: the checkpoint, where the file does not name one.
    """
    refuse_python(found, given)
    merged = changed(found, {name: value for name, value in given.items() if name != "model" or model is None})
    if model is not None:
        merged["model"] = model
    elif "model" not in merged and os.environ.get("GUIDEGEN_MODEL"):
        merged["model"] = str(BUNDLED)  # what a command that names none would not take
    lists = any(letter in (merged.get(name) or "") for name in _WEIGHTS for letter in ",:")
    is_sweep = lists or any(merged.get(name) for name in ("by", "columns", "rows"))
    return (SweepOptions if is_sweep else kind)(**merged)


def _check_same(job: Job, carried: Carried | None, given: Mapping[str, Any], strict: bool) -> Job:
    """Says where the networks are others than those that the file was drawn with; the job with their hashes.

    Raises:
        CheckpointError: with `strict`, where they are.
    """
    job = with_hashes(job)
    if carried is None:
        return job
    then, now = asdict(carried.settings), asdict(job.settings)
    decided = {"config_sha256", "classifier_texts"} if given.keys() & _DECIDE_CONFIGS else set()
    pairs = {name: (then[name], now[name]) for name in _HASHES if name not in decided}
    if apart := [_HASHES[name] for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]]:
        message = f"these are not the networks that it was drawn with: {'; '.join(apart)}"
        if strict:
            raise CheckpointError(f"--strict: {message}.")
        if not job.flags.quiet:
            console.note(f"note: {message}")
    return job
