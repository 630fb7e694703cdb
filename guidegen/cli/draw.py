"""`guidegen sample` and `guidegen sweep`: the same, but for how many w, the axes and the grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from guidegen.cli import threads
from guidegen.cli.afterwards import Afterwards
from guidegen.cli.asked import with_seed
from guidegen.cli.command import command_of, make_command
from guidegen.cli.drawing import carry_out
from guidegen.cli.dry_run import print_costs
from guidegen.cli.evaluate_protocol import fewest_images
from guidegen.cli.flags import COMMON, SampleOptions, SweepOptions
from guidegen.cli.help import HelpAll, with_short_help
from guidegen.cli.resolve import Job, plan_job
from guidegen.errors import UsageError

_SAMPLE = """Draw guided samples at one guidance weight.

- guidegen sample --label "golden retriever" -w 3

- guidegen sample --label all -n 50 -o samples.npz

- guidegen sample -m owner/stable-diffusion --prompt "a red fox" -w 7.5
"""
_SWEEP = """Draw the same samples at a range of guidance weights, and a grid of them.

- guidegen sweep --label "golden retriever,monarch" -w 0,1,2,4,8 -n 4

- guidegen sweep --mode classifier --label 207 -w 0:8:0.5

- guidegen sweep --label 207 -w 1,3 --by guidance=cfg,apg,cfg++
"""


def register(app: typer.Typer, run: Callable[..., Any] | None = None) -> None:
    """Adds the two commands; `run` is called with their options instead of drawing."""
    app.command("sample", help=_SAMPLE, short_help=_SAMPLE.split("\n")[0], cls=with_short_help(COMMON))(
        make_command(run or _run, SampleOptions, Afterwards, HelpAll)
    )
    app.command("sweep", help=_SWEEP, short_help=_SWEEP.split("\n")[0], cls=with_short_help((*COMMON, "by")))(
        make_command(run or _run, SweepOptions, Afterwards, HelpAll)
    )


def _run(flags: SampleOptions, afterwards: Afterwards, _: HelpAll) -> None:
    draw(flags, afterwards)


def draw(flags: SampleOptions, afterwards: Afterwards, check: Callable[[Job], Job] = lambda job: job) -> None:
    """Draws what flags ask for, and does with it what comes afterwards.

    Args:
        flags: of `sample` or `sweep`.
        afterwards: the flags for that.
        check: called before any network is loaded, but not with `--dry-run`; its job is drawn.
    """
    threads.use(flags.threads)
    flags = with_seed(flags)
    job = plan_job(flags)
    afterwards.check(job.output, job.models.checkpoint.size, flags)
    if afterwards.evaluate is not None:
        check_images(job, afterwards.protocol)
    if flags.dry_run:
        print_costs(job)
        return
    job = check(job)
    carry_out(job, command_of(flags.command, job.flags, afterwards))
    afterwards.carry_out(job.output, job.title, flags)


def check_images(job: Job, protocol: str | None) -> None:
    """Refuses, before it is drawn, a run of which `--evaluate` cannot be done."""
    if job.shard is not None:
        raise UsageError("--evaluate needs the images of all shards: run guidegen evaluate when they are drawn.")
    plan = job.plan
    images = plan.samples // max(1, len(plan.variants()))
    fewest = fewest_images(protocol)
    if images < fewest and not (job.output.path / "run.json").exists():  # which may hold others
        raise UsageError(
            f"--evaluate needs at least {fewest} images at each weight, and these are {images}: draw more with --num or "
            "--label."
        )
