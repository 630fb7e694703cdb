"""`guidegen submit`: a drawing command as a job array, and the job after it that finishes the run, through submitit."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.cli import console, options
from guidegen.cli.afterwards import Afterwards
from guidegen.cli.asked import asked_shard, with_seed
from guidegen.cli.command import command_of, make_command
from guidegen.cli.draw import check_images
from guidegen.cli.draw import register as register_draw
from guidegen.cli.dry_run import print_costs
from guidegen.cli.flags import SampleOptions
from guidegen.cli.jobs import Task, Work, error_of, has_slurm, is_gone, to_slurm, to_this_machine
from guidegen.cli.lines import print_line
from guidegen.cli.resolve import Job, plan_job
from guidegen.cli.signals import Signals
from guidegen.cli.weights import with_hashes
from guidegen.errors import StoppedError, UsageError, quoted
from guidegen.runs.directory import finished_before
from guidegen.runs.schema import read_run
from guidegen.spec.parse import whole

_JOBS, _SLURM = "Jobs", "Slurm"
_OURS = {"array", "dependency", "error", "job-name", "ntasks", "open-mode", "output", "parsable", "signal", "wait", "wrap"}
"""Options of sbatch that are made here or by submitit."""


@dataclass(frozen=True)
class SubmitFlags:
    """The flags, a field each."""

    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="sample or sweep, with its options.")]
    shards: Annotated[
        int, typer.Option("--shards", metavar="N", min=1, help="Jobs to cut the plan into.", rich_help_panel=_JOBS)
    ] = 4
    array_parallelism: Annotated[
        int | None,
        typer.Option(
            "--array-parallelism",
            metavar="N",
            min=1,
            help="Jobs that run at once. Default: all with Slurm; on this machine as many as there are GPUs for, or one.",
            rich_help_panel=_JOBS,
        ),
    ] = None
    gpus: Annotated[
        int | None, typer.Option("--gpus", metavar="N", min=0, help="GPUs of each job.", rich_help_panel=_JOBS)
    ] = None
    cpus: Annotated[
        int | None, typer.Option("--cpus", metavar="N", min=1, help="CPUs of each job.", rich_help_panel=_SLURM)
    ] = None
    mem: Annotated[
        float | None, typer.Option("--mem", metavar="GB", min=0.1, help="Memory of each job.", rich_help_panel=_SLURM)
    ] = None
    limit: Annotated[
        str,
        typer.Option(
            "--time",
            metavar="TIME",
            help="Time of each job, as Slurm writes it: 90 (minutes), 8:00:00, 1-12. A job that reaches it, or is preempted,"
            " is queued again and goes on with what it has drawn.",
            rich_help_panel=_JOBS,
        ),
    ] = "60"
    partition: Annotated[
        str | None, typer.Option("--partition", metavar="NAME", help="Partition of the jobs.", rich_help_panel=_SLURM)
    ] = None
    account: Annotated[
        str | None, typer.Option("--account", metavar="NAME", help="Account of the jobs.", rich_help_panel=_SLURM)
    ] = None
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            "--slurm",
            metavar="KEY=VALUE",
            help="Another option of sbatch, such as constraint=a100 or exclusive. Repeats.",
            rich_help_panel=_SLURM,
        ),
    ] = None
    local: Annotated[
        bool, typer.Option("--local", help="Run on this machine, also where there is Slurm.", rich_help_panel=_JOBS)
    ] = False
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Show the progress until the run is finished, and end with the exit code of that.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = False
    as_json: options.Json = False
    quiet: options.Quiet = False
    debug: options.Debug = False


_HELP = """Draw a run by a job array on Slurm, or by processes on this machine; then verify and merge it.

- guidegen submit --shards 64 --gpus 1 --partition gpu --time 8:00:00 -- sample --label all -n 50

- guidegen submit --shards 2 --wait -- sweep --label 207 -w 0,1,2,4 --evaluate photographs.parquet --report

It prints the id of the array (or of the process). A job after it merges, verifies, evaluates and makes the report.
The same command goes on with a run that is not complete. Logs are in RUN/.jobs.
"""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    settings = {"allow_interspersed_args": False}  # what comes after the first word is of the drawing command
    app.command("submit", help=_HELP, short_help=_HELP.split("\n")[0], context_settings=settings)(
        make_command(_submit, SubmitFlags)
    )


def _submit(asked: SubmitFlags) -> None:
    from guidegen.evaluate.metrics import require

    minutes, extra = _minutes(asked.limit), _extra(asked.slurm or [])
    parsed = _parse(asked.words)
    if parsed is None:  # it was --help
        return
    require("submitit", "guidegen submit")
    on_slurm = _is_for_slurm(asked)
    flags, afterwards = parsed
    job = _plan(flags, afterwards, asked.shards)
    folder = job.output.path / ".jobs"
    if on_slurm and "%" in str(folder.absolute()):
        raise UsageError(f"-o {job.output.path}: Slurm reads % in a path; give the run another name.")
    if job.flags.dry_run:
        print_costs(job)
        return
    job = with_hashes(job)  # once, before many jobs do it at the same time
    work = _work(job, afterwards, min(asked.shards, job.plan.samples), minutes)
    if on_slurm:
        first, last = to_slurm(work, asked.array_parallelism, _resources(asked, extra))
    else:
        first, last = to_this_machine(work, asked.array_parallelism, asked.gpus)
    if asked.as_json:
        ids = {"job": first, "finish": last.job_id, "shards": len(work.tasks), "images": len(job.cells)}
        print_line("job", folder, job.output.path, ids)
    else:
        console.result(first)
    if not asked.quiet:
        stop = f"scancel {first} {last.job_id}" if on_slurm else f"kill -INT {first}"
        console.note(f"{len(job.cells):,} images in {len(work.tasks)} shards into {job.output.path}; logs in {folder}")
        console.note(f"job {last.job_id} merges and verifies it then; to stop all: {stop}")
    if asked.wait:
        _wait(job, last, on_slurm, asked.quiet)


def _parse(words: Sequence[str]) -> tuple[SampleOptions, Afterwards] | None:
    """The options of the drawing command; None where it has shown its help."""
    if words[0] not in ("sample", "sweep"):
        raise UsageError(f"guidegen submit takes sample or sweep: guidegen submit -- sweep ...; found {quoted(words[0])}.")
    drawing = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    register_draw(drawing, lambda flags, afterwards, _: (flags, afterwards))
    parsed: Any = drawing(list(words), prog_name="guidegen", standalone_mode=False)
    return parsed if isinstance(parsed, tuple) else None


def _plan(flags: SampleOptions, afterwards: Afterwards, shards: int) -> Job:
    """What is to be drawn; refuses all that the drawing command would.

    Devices are those of the jobs: --device cuda need not be here, and with --dtype auto a run goes on in its own.
    """
    if flags.shard is not None:
        raise UsageError("Each job has a --shard of its own: leave it out, and give guidegen submit --shards N.")
    if afterwards.preview:
        raise UsageError("--preview shows pictures in this terminal, and jobs have none: leave it out.")
    flags = with_seed(flags)
    here = replace(flags, device="cpu", quiet=True) if re.fullmatch(r"cuda(:\d+)?", flags.device) else flags
    job = plan_job(here)
    asked_shard(replace(flags, shard=f"0/{shards}"), job.output)
    afterwards.check(job.output, job.models.checkpoint.size, here)
    if afterwards.evaluate is not None:
        check_images(job, afterwards.protocol)
    folder, settings = job.output.path, job.settings
    if flags.dtype == "auto" and (folder / "run.json").is_file():
        settings = replace(settings, dtype=read_run(folder)["settings"]["dtype"])
    variants = {variant: replace(own, dtype=settings.dtype) for variant, own in job.variants.items()}
    finished_before(folder, settings, job.plan, variants, flags.overwrite, shard=None, wait=True)
    return replace(job, flags=flags)


def _work(job: Job, afterwards: Afterwards, count: int, minutes: int) -> Work:
    """A task that draws each shard, and one that finishes the run."""
    run, plan = str(job.output.path), job.plan
    read = {"label": list(map(str, plan.labels)), "prompt": list(plan.prompts or ())}
    command = command_of(job.flags.command, job.flags).without("json").into(run, read, source={})
    shards = (replace(command, options={**command.options, "shard": f"{i}/{count}", "wait": True}) for i in range(count))
    last = [["merge", run, "--wait"], ["verify", run]]
    if afterwards.evaluate is not None:
        named = {name: getattr(afterwards, name) for name in ("protocol", "features", "judge", "resize")}
        options = [f"--{name}={value}" for name, value in named.items() if value is not None]
        last.append(["evaluate", run, "--reference", str(afterwards.evaluate), *options])
    if afterwards.report:
        last.append(["report", run, "-o", str(job.output.path / "report.html")])
    return Work(job.output.path / ".jobs", [Task([shard.words()[1:]]) for shard in shards], Task(last), minutes)


def _resources(asked: SubmitFlags, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a job on Slurm asks for, as submitit names it."""
    return {
        "gpus_per_node": asked.gpus,
        "cpus_per_task": asked.cpus,
        "mem_gb": asked.mem,
        "slurm_partition": asked.partition,
        "slurm_account": asked.account,
        "slurm_additional_parameters": {"requeue": True, **extra},
    }


def _is_for_slurm(asked: SubmitFlags) -> bool:
    """Whether the jobs go to Slurm; refuses flags for it where they do not."""
    if not asked.local and has_slurm():
        return True
    named = [f"--{name}" for name in ("cpus", "mem", "partition", "account", "slurm") if getattr(asked, name) is not None]
    if named:
        where = "--local runs the jobs on this machine" if asked.local else "there is none here (no srun)"
        raise UsageError(f"{', '.join(named)}: for Slurm, and {where}.")
    return False


def _wait(job: Job, last: Any, on_slurm: bool, quiet: bool) -> None:
    """Shows how many images are drawn until the last job has ended.

    Raises:
        GuidegenError: it failed.
        StoppedError: by a signal; the jobs go on, but for SIGINT on this machine.
    """
    run, total, rows = job.output.path, len(job.cells), _RowCount(job.output.path)
    try:
        with Signals() as signals, console.progress(total, total, quiet) as bar:
            shown = 0
            for turn in itertools.count(1):
                for _ in range(min(total, rows()) - shown):
                    bar.image()
                    bar.step(1)
                    shown += 1
                if last.paths.result_pickle.exists() or (turn % 10 == 0 and is_gone(last, on_slurm)):
                    break
                signals.check()
                time.sleep(0.5)
    except StoppedError as stopped:
        ends = not on_slurm and stopped.code == 130
        if ends:
            last.cancel()
        goes_on = "" if ends else f"; job {last.job_id} goes on"
        raise StoppedError(f"{stopped}{goes_on}. The images that are finished are in {run}.", stopped.code - 128) from None
    if error := error_of(last, f"The job that finishes {run} ended without a result; its log: {last.paths.stdout}"):
        raise error
    if not quiet:
        console.note(f"{run} is complete")


class _RowCount:
    """How many rows the manifests of a run have; reads what was added since it was last asked."""

    def __init__(self, folder: Path):
        self._folder, self._seen = folder, dict[Path, tuple[int, int]]()

    def __call__(self) -> int:
        for path in self._folder.glob("manifest*.jsonl"):
            size, rows = self._seen.get(path, (0, 0))
            with suppress(OSError), path.open("rb") as file:  # merge takes those of the shards away
                file.seek(size)
                data = file.read()
                self._seen[path] = size + len(data), rows + data.count(b"\n")
        return sum(rows for _, rows in self._seen.values())


def _minutes(text: str) -> int:
    """`90`, `MM:SS`, `HH:MM:SS` or `D-HH[:MM[:SS]]`, as sbatch reads them, in whole minutes."""
    days, dash, rest = text.strip().rpartition("-")
    numbers = [whole(part) for part in (*([days] if dash else []), *rest.split(":"))]
    units = (86400, 3600, 60, 1) if dash else (3600, 60, 1) if len(numbers) == 3 else (60, 1)
    known = [number for number in numbers if number is not None]
    seconds = sum(number * unit for number, unit in zip(known, units, strict=False))
    if len(known) != len(numbers) or len(numbers) > len(units) or not 0 < seconds < 2**31:
        raise UsageError(f"--time takes minutes, HH:MM:SS or D-HH:MM:SS, such as 90, 8:00:00 or 1-12; found {quoted(text)}.")
    return -(-seconds // 60)


def _extra(words: Sequence[str]) -> dict[str, Any]:
    """The options of `--slurm`."""
    pairs = [
        (key.strip().lstrip("-"), equals, value.strip()) for key, equals, value in (word.partition("=") for word in words)
    ]
    for key, equals, value in pairs:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or (equals and not value) or not value.isprintable():
            raise UsageError(f"--slurm takes KEY=VALUE or KEY of sbatch, such as constraint=a100; found {quoted(key)}.")
        if key in _OURS:
            raise UsageError(f"--slurm {key}: guidegen submit sets it.")
    return {key: value if equals else True for key, equals, value in pairs}
