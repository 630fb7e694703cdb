"""`guidegen sample` and `guidegen sweep`: the same command, but for how many w and the grid."""

from __future__ import annotations

from typing import Any

import typer

from guidegen.cli.afterwards import Afterwards
from guidegen.cli.command import make_command
from guidegen.cli.drawing import carry_out
from guidegen.cli.flags import Flags
from guidegen.cli.resolve import plan_job, say_what_it_takes


def register(app: typer.Typer) -> None:
    """Adds the two commands; both take the same flags."""
    command = make_command(_run, Flags, Afterwards)
    app.command("sample", help="Draw guided samples at one guidance weight.")(command)
    app.command("sweep", help="Draw the same samples at a range of guidance weights, and a grid of them.")(command)


def _run(ctx: typer.Context, given: dict[str, Any], afterwards: dict[str, Any]) -> None:
    flags, after = Flags(sweep=ctx.info_name == "sweep", **given), Afterwards(**afterwards)
    job = plan_job(flags)
    after.check(job.output, job.checkpoint.size)
    if flags.dry_run:
        say_what_it_takes(job)
        return
    carry_out(job)
    after.carry_out(job.output, job.title, flags.json_rows, flags.quiet)
