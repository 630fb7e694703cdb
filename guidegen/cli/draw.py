"""`guidegen sample` and `guidegen sweep`: the same, but for how many w, the axes and the grid."""

from __future__ import annotations

import typer

from guidegen.cli.afterwards import Afterwards
from guidegen.cli.command import command_of, make_command
from guidegen.cli.drawing import carry_out
from guidegen.cli.dry_run import print_costs
from guidegen.cli.flags import SampleOptions, SweepOptions
from guidegen.cli.resolve import Job, plan_job
from guidegen.errors import UsageError


def register(app: typer.Typer) -> None:
    """Adds the two commands."""
    app.command("sample", help="Draw guided samples at one guidance weight.")(make_command(_run, SampleOptions, Afterwards))
    app.command("sweep", help="Draw the same samples at a range of guidance weights, and a grid of them.")(
        make_command(_run, SweepOptions, Afterwards)
    )


def _run(flags: SampleOptions, afterwards: Afterwards) -> None:
    job = plan_job(flags)
    afterwards.check(job.output, job.models.checkpoint.size)
    if afterwards.evaluate is not None:
        _check_images(job)
    if flags.dry_run:
        print_costs(job)
        return
    carry_out(job, command_of(flags.command, flags, afterwards))
    afterwards.carry_out(job.output, job.title, flags.json_rows, flags.quiet)


def _check_images(job: Job) -> None:
    """Refuses, before it is drawn, a run of which `--evaluate` cannot be done."""
    from guidegen.evaluate.neighbourhoods import MIN_IMAGES

    if job.shard is not None:
        raise UsageError("--evaluate needs the images of all shards: run guidegen evaluate when they are drawn.")
    plan = job.plan
    images = len(plan.labels) * len(plan.prompts or [""]) * len(plan.seeds)
    if images < MIN_IMAGES and not (job.output.path / "run.json").exists():  # which may hold others
        raise UsageError(
            f"--evaluate needs at least {MIN_IMAGES} images at each weight, and these are {images}: draw more with --num or "
            "--label."
        )
