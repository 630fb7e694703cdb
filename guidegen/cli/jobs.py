"""Jobs of guidegen on Slurm and on this machine, through submitit."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidegen import errors
from guidegen.cli import console
from guidegen.errors import GuidegenError, UsageError
from guidegen.spec.parse import whole

_MOST_TIMEOUTS = 100
"""How often a job that reaches its time is queued again."""
_A_YEAR = 366 * 24 * 60
"""Minutes."""
_FAILED = re.compile(r"^guidegen\.errors\.(\w+): (.*?)\n-{9}", re.MULTILINE | re.DOTALL)
"""An error of ours at the end of the traceback that submitit keeps."""


class Task:
    """Commands of guidegen as one job, which goes on where it was when it is queued again.

    Args:
        commands: the words of each, after `guidegen`; the first that fails ends the job.
    """

    def __init__(self, commands: Sequence[Sequence[str]]):
        self._commands = commands

    def __call__(self) -> None:
        from submitit import JobEnvironment

        from guidegen.cli import app

        preempted = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")  # submitit queues the job again when this comes
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # comes before that, or before SIGKILL: a job that ended is not requeued
        if preempted != signal.SIGUSR1:
            signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(preempted))
        console.guard()
        for words in self._commands:
            console.note(f"$ guidegen {shlex.join(words)}")
            try:
                app(list(words), prog_name="guidegen", standalone_mode=False)
            except GuidegenError as error:
                console.error(error)
                if error.code == 143:  # SIGUSR1 while it drew
                    signal.raise_signal(preempted)
                raise

    def checkpoint(self) -> Any:
        """What submitit queues in place of this when it is preempted."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Work:
    """Tasks that are done side by side, and one after all of them, whatever became of them.

    Attributes:
        folder: for what submitit keeps of them, and their logs.
        tasks: the first ones.
        last: the one after them.
        minutes: the time of each; what reaches it is queued again.
    """

    folder: Path
    tasks: Sequence[Task]
    last: Task
    minutes: int


class LocalArray:
    """Work as processes of this machine: one job, as `LocalExecutor` knows neither arrays nor what comes after them.

    Args:
        work: what to do.
        gpus: the devices of each of the tasks that run at once.
    """

    def __init__(self, work: Work, gpus: Sequence[Sequence[int]]):
        self._work, self._gpus = work, gpus

    def __call__(self) -> None:
        from submitit import LocalExecutor

        running: dict[int, Any] = {}

        def free() -> list[int]:
            return [i for i in range(len(self._gpus)) if i not in running or running[i].done()]

        try:
            for task in self._work.tasks:
                while not free():
                    time.sleep(0.1)
                executor, slot = LocalExecutor(self._work.folder), free()[0]
                gpus = tuple(self._gpus[slot])
                executor.update_parameters(
                    timeout_min=self._work.minutes, gpus_per_node=len(gpus), visible_gpus=gpus, stderr_to_stdout=True
                )
                running[slot] = executor.submit(task)
            while len(free()) < len(self._gpus):
                time.sleep(0.1)
        finally:
            for job in running.values():
                job.cancel()  # of one that has ended it is nothing
        self._work.last()


def has_slurm() -> bool:
    """Whether the commands of Slurm are here."""
    from submitit import SlurmExecutor

    return bool(SlurmExecutor.affinity() > 0)


def to_slurm(work: Work, at_once: int | None, parameters: Mapping[str, Any]) -> tuple[str, Any]:
    """Submits an array, and a job after it.

    Args:
        work: what to do.
        at_once: how many jobs of the array may run at once; None for all.
        parameters: of submitit, for the resources of each job.

    Returns:
        The id of the array, and the submitit job after it.

    Raises:
        UsageError: Slurm does not take them.
    """
    from submitit import AutoExecutor
    from submitit.helpers import clean_env

    config = os.environ.get("SLURM_CONF")
    with _as_our_errors("Slurm", work.folder), clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext():
        if config:  # which is not of the job that this may run in
            os.environ["SLURM_CONF"] = config
        executor = AutoExecutor(work.folder, cluster="slurm", slurm_max_num_timeout=_MOST_TIMEOUTS)
        executor.update_parameters(
            name=f"guidegen-{work.folder.parent.name}",
            timeout_min=work.minutes,
            stderr_to_stdout=True,
            slurm_array_parallelism=at_once or len(work.tasks),
            slurm_signal_delay_s=min(90, work.minutes * 15),
            **parameters,
        )
        jobs = executor.submit_array(work.tasks)
        array = str(jobs[0].job_id).partition("_")[0]
        try:
            executor.update_parameters(slurm_dependency=f"afterany:{array}")
            return array, executor.submit(work.last)
        except BaseException:
            for job in jobs:
                job.cancel(check=False)
            raise


def to_this_machine(work: Work, at_once: int | None, gpus: int | None) -> tuple[str, Any]:
    """Starts processes on this machine.

    Args:
        work: what to do.
        at_once: how many tasks run at once; None for as many as there are GPUs for, or one.
        gpus: of each task; None for one where this machine has any.

    Returns:
        The id of the process that starts all others, and its submitit job.

    Raises:
        UsageError: this machine has not so many GPUs.
    """
    import torch
    from submitit import LocalExecutor

    visible = [whole(text.strip()) for text in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    numbered = [i for i in visible if i is not None]
    devices = numbered if len(numbered) == len(visible) else list(range(torch.cuda.device_count()))
    each = min(1, len(devices)) if gpus is None else gpus
    count = min(len(work.tasks), at_once or (max(1, len(devices) // each) if each else 1))
    if each * count > len(devices):
        raise UsageError(f"{count} x --gpus {each} at once take {each * count}, and this machine has {len(devices)}.")
    executor = LocalExecutor(work.folder)
    executor.update_parameters(
        timeout_min=_A_YEAR, gpus_per_node=len(devices), visible_gpus=tuple(devices), stderr_to_stdout=True
    )
    with _as_our_errors("This machine", work.folder), _detached():
        job: Any = executor.submit(LocalArray(work, [devices[i * each : (i + 1) * each] for i in range(count)]))
    return str(job.job_id), job


@contextmanager
def _detached() -> Iterator[None]:
    """Processes that are started do not hold standard output and error open, for which a pipe would wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nothing = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        yield
    finally:
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)


@contextmanager
def _as_our_errors(who: str, folder: Path) -> Iterator[None]:
    """What submitit prints and raises, in one line; the folder that it has made goes."""
    before = folder.exists()
    logging.getLogger("submitit").setLevel(logging.CRITICAL)  # it writes to standard output
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except (RuntimeError, NameError, ValueError, AssertionError, subprocess.SubprocessError) as error:
        if not before:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # the run is not empty
                folder.parent.rmdir()
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        instead = "\nWithout Slurm: guidegen submit --local ..." if who == "Slurm" else ""
        raise UsageError(f"{who} did not take the jobs: {lines[-1]}{instead}") from None


def is_gone(job: Any, on_slurm: bool) -> bool:
    """Whether a job has ended without a result; submitit asks sacct, and many a Slurm keeps no accounts."""
    if not on_slurm:
        return bool(job.done()) and not job.paths.result_pickle.exists()
    known = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True)
    gone = "Invalid job id" in known.stderr if known.returncode else not known.stdout.strip()
    return gone and not job.paths.result_pickle.exists()


def error_of(job: Any, otherwise: str) -> GuidegenError | None:
    """The error of ours that ended a job; None where it did what it should."""
    failed = job.exception() if job.paths.result_pickle.exists() else otherwise
    if failed is None:
        return None
    found = _FAILED.search(str(failed))
    error = GuidegenError(found[2] if found else otherwise)
    error.code = getattr(errors, found[1], error).code if found else 1
    return error
