"""The part of a plan that one process draws."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from guidegen.errors import UsageError, quoted
from guidegen.spec.parse import whole


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a plan.

    Attributes:
        index: from 0.
        count: how many there are.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


@dataclass(frozen=True)
class Launcher:
    """Something that starts processes, and the environment variables by which each of them knows which it is.

    Attributes:
        name: as people call it.
        index: the variable that numbers its processes.
        count: the one that counts them; empty where there is none.
        spread: those of the first and the last index and of the step between them, where they do not count up from 0.
        absent: what `index` holds where the launcher is not at work.
        shard: `I/N` for a shell where `count` is empty.
    """

    name: str
    index: str
    count: str = ""
    spread: Sequence[str] = ()
    absent: str = ""
    shard: str = ""


_SLURM = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("MIN", "MAX", "STEP"))
_SGE = ("SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE")
ARRAYS = (
    Launcher("a Slurm array", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", _SLURM),
    Launcher("an SGE array", "SGE_TASK_ID", spread=_SGE, absent="undefined"),
    Launcher("an AWS Batch array", "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    Launcher("a Cloud Run job", "CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
    Launcher("SkyPilot's --num-jobs", "SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS"),
    Launcher("a PBS array", "PBS_ARRAY_INDEX", shard="$PBS_ARRAY_INDEX/N for -J 0-(N-1)"),
    Launcher("a Torque array", "PBS_ARRAYID", shard="$PBS_ARRAYID/N for -t 0-(N-1)"),
    Launcher("an LSF array", "LSB_JOBINDEX", absent="0", shard="$((LSB_JOBINDEX-1))/N for [1-N]"),
)
"""They start jobs, each of which may start processes."""
TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE")
SRUN = Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
PROCESSES = (
    TORCHRUN,  # accelerate launch is torchrun where it starts several
    Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    Launcher("MPI", "PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, Cray
    Launcher("MVAPICH2", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    SRUN,
    Launcher("SkyPilot", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    Launcher("dstack", "DSTACK_NODE_RANK", "DSTACK_NODES_NUM"),
    Launcher("AWS Batch", "AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_NUM_NODES"),
    Launcher("a Kubernetes job", "JOB_COMPLETION_INDEX", shard="$JOB_COMPLETION_INDEX/N for N completions"),
)
"""They start processes; the innermost comes first, and its numbers count: torchrun is started by srun, not srun by it."""
_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
"""Set by `accelerate launch`, which numbers nothing where it starts one process."""


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """`I/N`, counted from 0, or `auto`: the index of this process among those that a launcher started.

    `auto` reads the variables of `ARRAYS` and `PROCESSES`; each job of an array takes its part of the plan, and each of
    the processes that it starts takes its part of that.

    Raises:
        UsageError: neither, no launcher is to be seen, or what it set does not say which part this is.
    """
    if text == "auto":
        return _launched(environment)
    index, count = (whole(part.strip()) for part in f"{text}/".split("/", 2)[:2])
    if text.count("/") != 1 or index is None or count is None or not index < count <= sys.maxsize:
        raise UsageError(f"--shard takes auto, or I/N with I from 0 to N-1, such as 0/4; found {quoted(text)}.")
    return Shard(index, count)


def _launched(environment: Mapping[str, str]) -> Shard:
    parts = [part for part in (_array(environment), _process(environment)) if part]
    if not parts:
        if not environment.get(_ACCELERATE):
            raise UsageError(
                "--shard auto: no launcher started this process: no job array, torchrun, accelerate, MPI, srun, SkyPilot or "
                "dstack. Give --shard I/N, such as 0/4."
            )
        parts = [Shard(0, 1)]
    shard = Shard(0, 1)
    for part in parts:
        shard = Shard(shard.index * part.count + part.index, shard.count * part.count)
    if shard.count > sys.maxsize:
        raise _refusal(f"shard {shard.index} of {shard.count} is not one")
    return shard


def _array(environment: Mapping[str, str]) -> Shard | None:
    """Which job of an array this is; None outside of arrays."""
    seen = [launcher for launcher in ARRAYS if environment.get(launcher.index, "") not in ("", launcher.absent)]
    if len(seen) > 1:
        raise _refusal(f"{seen[0].name} and {seen[1].name} both number this job ({seen[0].index}, {seen[1].index})")
    return _part(seen[0], environment) if seen else None


def _process(environment: Mapping[str, str]) -> Shard | None:
    """Which process of a job this is; None where its launcher does not number them."""
    seen = [launcher for launcher in PROCESSES if environment.get(launcher.index)]
    if SRUN in seen and not environment.get(SRUN.count):  # of a batch script, or of an srun of long ago
        environment = {**environment, SRUN.count: environment.get("SLURM_NTASKS") or "1"}
        if seen[0] is SRUN and environment[SRUN.count] != "1" and environment[SRUN.index] == "0":
            raise _refusal(
                f"SLURM_NTASKS is {quoted(environment[SRUN.count])}, and this is the only process: no srun started it",
                "Start it with srun, or submit it with --ntasks=1.",
            )
    known = [launcher for launcher in seen if environment.get(launcher.count)]
    if not seen:
        return None
    launcher, *around = known or seen[:1]
    if launcher is TORCHRUN and environment.get("GROUP_WORLD_SIZE") == "1":
        for outer in around:
            if (environment.get("SLURM_STEP_ID") or outer is not SRUN) and _part(outer, environment).count > 1:
                raise _refusal(
                    f"{outer.name} started {environment[outer.count]} processes ({outer.count}), and each of them a "
                    "torchrun that does not know of the others",
                    f"Give torchrun --nnodes {environment[outer.count]}, or guidegen --shard I/N.",
                )
    return _part(launcher, environment)


def _part(launcher: Launcher, environment: Mapping[str, str]) -> Shard:
    index = _number(launcher.index, environment)
    if not (environment.get(launcher.count) or launcher.spread):
        lacks = f"{launcher.name} says which this is ({launcher.index}={index}) and not how many there are"
        raise _refusal(
            lacks, f"Give --shard {launcher.shard}." if launcher.shard else f"Set {launcher.count}, or --shard I/N."
        )
    count = _number(launcher.count, environment) if launcher.count else 0
    if launcher.spread:
        first, step = _number(launcher.spread[0], environment, 0), _number(launcher.spread[2], environment, 1) or 1
        last = _number(launcher.spread[1], environment, first + step * (count - 1) if count else None)
        count = count or (last - first) // step + 1
        index = _position(launcher, index, count, (first, last, step))
    if not 0 <= index < count:
        raise _refusal(f"{launcher.index}={environment[launcher.index]} is not one of {count} of {launcher.name}")
    return Shard(index, count)


def _position(launcher: Launcher, index: int, count: int, spread: tuple[int, int, int]) -> int:
    """Where an index stands in an array: `0-9`, `1-7:2`, or up to three of a list such as `3,5,9`."""
    first, last, step = spread
    if first + step * (count - 1) <= last < first + step * count and (index - first) % step == 0:
        return (index - first) // step
    if count <= 3 and first <= index <= last:  # the first, the last, or the one between them
        return 0 if index == first else count - 1 if index == last else 1
    raise _refusal(
        f"{launcher.name} has {count} tasks from {first} to {last} with gaps, and does not say how many come before {index}",
        f"Number them without gaps, as in --array=0-{count - 1}, or give --shard I/N.",
    )


def _number(name: str, environment: Mapping[str, str], default: int | None = None) -> int:
    text = environment.get(name, "")
    found = whole(text) if text or default is None else default
    if found is None:
        raise _refusal(f"{name} is {quoted(text)}, not a whole number")
    return found


def _refusal(reason: str, instead: str = "Give --shard I/N.") -> UsageError:
    return UsageError(f"--shard auto: {reason}. {instead}")
