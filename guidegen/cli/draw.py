"""`guidegen sample` and `guidegen sweep`: the same, but for how many w, the axes and the grid."""

from __future__ import annotations

from collections.abc import Callable

import typer

from guidegen.cli.afterwards import Afterwards
from guidegen.cli.asked import with_seed
from guidegen.cli.command import command_of, make_command
from guidegen.cli.drawing import carry_out
from guidegen.cli.dry_run import print_costs
from guidegen.cli.flags import SampleOptions, SweepOptions
from guidegen.cli.resolve import Job, plan_job


def register(app: typer.Typer) -> None:
    """Adds the two commands."""
    app.command("sample", help="Draw guided samples at one guidance weight.")(make_command(draw, SampleOptions, Afterwards))
    app.command("sweep", help="Draw the same samples at a range of guidance weights, and a grid of them.")(
        make_command(draw, SweepOptions, Afterwards)
    )


def draw(flags: SampleOptions, afterwards: Afterwards, check: Callable[[Job], Job] = lambda job: job) -> None:
    """Draws what flags ask for, and does with it what comes afterwards.

    Args:
        flags: of `sample` or `sweep`.
        afterwards: the flags for that.
        check: called before any network is loaded, but not with `--dry-run`; its job is drawn.
    """
    flags = with_seed(flags)
    job = plan_job(flags)
    afterwards.check(job.output, job.models.checkpoint.size)
    if flags.dry_run:
        print_costs(job)
        return
    job = check(job)
    carry_out(job, command_of(flags.command, flags, afterwards))
    afterwards.carry_out(job.output, job.title, flags.json_rows, flags.quiet)
