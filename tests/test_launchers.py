"""`--shard auto` under each launcher: the variables that it sets, and what is refused where they do not say enough."""

from __future__ import annotations

import sys
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guidegen.errors import UsageError
from guidegen.spec.shard import ARRAYS, PROCESSES, Launcher, Shard, parse_shard


def slurm_array(index: int, count: int, first: int, last: int, step: int = 1) -> dict[str, str]:
    """What Slurm 22.05 sets."""
    values = {"ID": index, "COUNT": count, "MIN": first, "MAX": last, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()} | SBATCH


SBATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "1"}
"""A batch script without --ntasks."""
TWO_TASKS = SBATCH | {"SLURM_NTASKS": "2", "SLURM_NPROCS": "2"}
"""A batch script with --ntasks=2."""
SRUN = TWO_TASKS | {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
ALONE = {"RANK": "3", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}


@pytest.mark.parametrize("launcher", [*ARRAYS, *PROCESSES], ids=lambda launcher: launcher.name)
def test_every_launcher_of_the_table(launcher: Launcher) -> None:
    environment = {launcher.index: "2", launcher.count: "5"} if launcher.count else {launcher.index: "2"}
    if launcher.name == "an SGE array":
        environment |= {"SGE_TASK_FIRST": "1", "SGE_TASK_LAST": "5", "SGE_TASK_STEPSIZE": "1"}
        assert parse_shard("auto", environment) == Shard(1, 5)
    elif launcher.count:
        assert parse_shard("auto", environment) == Shard(2, 5)
        with pytest.raises(UsageError, match="--shard I/N"):
            parse_shard("auto", environment | {launcher.count: "2"})
    else:
        with pytest.raises(UsageError, match=r"not how many there are\. Give --shard \$.*/N for"):
            parse_shard("auto", environment)


@pytest.mark.parametrize(
    ("environment", "index", "count"),
    [
        (slurm_array(3, 10, 0, 9), 3, 10),  # --array=0-9%2
        (slurm_array(5, 4, 1, 7, 2), 2, 4),  # 1-7:2
        (slurm_array(10, 3, 2, 10, 4), 2, 3),  # 2-10:4
        (slurm_array(3, 2, 3, 7), 0, 2),  # 3,7
        (slurm_array(7, 2, 3, 7), 1, 2),
        (slurm_array(5, 3, 3, 9), 1, 3),  # 3,5,9
        (slurm_array(9, 3, 3, 9), 2, 3),
        (slurm_array(5, 1, 5, 5), 0, 1),  # 5
        ({"SGE_TASK_ID": "7", "SGE_TASK_FIRST": "1", "SGE_TASK_LAST": "8", "SGE_TASK_STEPSIZE": "3"}, 2, 3),  # -t 1-8:3
        (SBATCH, 0, 1),
        (SBATCH | {"SLURM_NTASKS": "1"}, 0, 1),
        (SRUN, 1, 2),
        (SRUN | {"SLURM_NTASKS": "4"}, 1, 2),  # srun --ntasks=2 of 4
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 0, 1),  # accelerate launch --num-processes 1
        ({"ACCELERATE_MIXED_PRECISION": "no"} | TORCHRUN, 3, 8),
        ({"SGE_TASK_ID": "undefined", "LSB_JOBINDEX": "0"} | TORCHRUN, 3, 8),  # no arrays
        # an array and what its jobs start: each job has its part, and each process a part of that
        (slurm_array(1, 2, 0, 1) | SRUN, 3, 4),
        (slurm_array(1, 2, 0, 1) | TWO_TASKS | ALONE, 11, 16),
        ({"SKYPILOT_JOB_RANK": "1", "SKYPILOT_NUM_JOBS": "2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}, 1, 2),
        # the innermost of those that start processes
        (SRUN | TORCHRUN, 3, 8),
        (SRUN | {"PMI_RANK": "1", "PMI_SIZE": "2"}, 1, 2),  # srun --mpi=pmi2
        (TWO_TASKS | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 1, 2),  # mpirun in a batch script
        ({"DSTACK_NODE_RANK": "1", "DSTACK_NODES_NUM": "2"} | TORCHRUN, 3, 8),
        ({"JOB_COMPLETION_INDEX": "1"} | TORCHRUN, 3, 8),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"} | ALONE, 3, 8),
        (TWO_TASKS | ALONE, 3, 8),  # no srun: one torchrun
    ],
)
def test_index_and_count(environment: dict[str, str], index: int, count: int) -> None:
    assert parse_shard("auto", environment) == Shard(index, count)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (slurm_array(3, 4, 1, 7), "with gaps.*--array=0-3"),  # 1,3,5,7
        (slurm_array(4, 4, 0, 8, 4), "with gaps"),  # 0-8:4,1
        (slurm_array(8, 5, 0, 8), "with gaps"),  # 0-3,8
        (slurm_array(3, 2, 4, 7), "not one of 2|with gaps"),
        (TWO_TASKS, "no srun.*Start it with srun"),
        (slurm_array(1, 2, 0, 1) | TWO_TASKS, "no srun"),
        ({"LSB_JOBINDEX": "3"} | TORCHRUN, r"LSB_JOBINDEX-1\)\)/N"),
        (slurm_array(1, 2, 0, 1) | {"PBS_ARRAY_INDEX": "1"}, "both number"),
        (SRUN | ALONE, "srun started 2 processes.*--nnodes 2"),
        ({"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"} | ALONE, "SkyPilot started 2.*--nnodes 2"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "many"}, "not a whole number"),
        ({"SGE_TASK_ID": "2", "SGE_TASK_FIRST": "5", "SGE_TASK_LAST": "1", "SGE_TASK_STEPSIZE": "1"}, "SGE"),
    ],
)
def test_what_does_not_say_which_part_it_is(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=f"--shard auto: .*{words}"):
        parse_shard("auto", environment)


VARIABLES = [
    name
    for launcher in (*ARRAYS, *PROCESSES)
    for name in (launcher.index, launcher.count, *launcher.spread, "SLURM_NTASKS", "SLURM_STEP_ID", "GROUP_WORLD_SIZE")
    if name
]
VALUES = st.integers(0, 9).map(str) | st.sampled_from(["", "undefined", "-1", "x", "9" * 40, "\u0663"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(VARIABLES), VALUES, max_size=8))
def test_any_variables_are_a_shard_or_an_error(environment: dict[str, str]) -> None:
    with suppress(UsageError):
        shard = parse_shard("auto", environment)
        assert 0 <= shard.index < shard.count <= sys.maxsize


@pytest.mark.parametrize("spec", ["0-9", "1-7:2", "1-8:3", "3,7", "3,5,9", "5", "1,3,5,7", "0-3,8", "0-8:4,1"])
def test_an_array_is_cut_into_all_of_its_parts_or_refused_as_a_whole(spec: str) -> None:
    ids = set()
    for part in spec.split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        ids.update(range(int(first), int(last or first) + 1, int(step or 1)))
    step = int(spec.partition(":")[2].partition(",")[0] or 1)
    found: list[Shard | str] = []
    for i in sorted(ids):
        try:
            found.append(parse_shard("auto", slurm_array(i, len(ids), min(ids), max(ids), step)))
        except UsageError as error:
            found.append(str(error).partition(" come before ")[0])
    assert found == [Shard(i, len(ids)) for i in range(len(ids))] or len(set(found)) == 1
