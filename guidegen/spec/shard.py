"""The part of a plan that one process draws."""

from __future__ import annotations

import sys
from collections.abc import Mapping
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


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """`I/N`, counted from 0, or `auto`: the rank of this process among those that a launcher started.

    `auto` reads torchrun's RANK and WORLD_SIZE (accelerate sets the same), or else SLURM_PROCID and
    SLURM_NTASKS of srun; in a SLURM job array each task of the array takes its part of that.

    Raises:
        UsageError: neither, or no launcher is to be seen.
    """
    if text == "auto":
        return _launched(environment)
    index, count = (whole(part.strip()) for part in f"{text}/".split("/", 2)[:2])
    if text.count("/") != 1 or index is None or count is None or not index < count <= sys.maxsize:
        raise UsageError(f"--shard takes auto, or I/N with I from 0 to N-1, such as 0/4; found {quoted(text)}.")
    return Shard(index, count)


def _launched(environment: Mapping[str, str]) -> Shard:
    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name, "")
        found = whole(text) if text or default is None else default
        if found is None:
            raise UsageError(f"--shard auto: {name} is {quoted(text)}, not a whole number; give --shard I/N.")
        return found

    parts = []
    if environment.get("SLURM_ARRAY_TASK_ID"):
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1) or 1
        parts.append(Shard((number("SLURM_ARRAY_TASK_ID") - first) // step, number("SLURM_ARRAY_TASK_COUNT")))
    if environment.get("RANK") and environment.get("WORLD_SIZE"):
        parts.append(Shard(number("RANK"), number("WORLD_SIZE")))
    elif environment.get("SLURM_PROCID") and environment.get("SLURM_NTASKS"):
        parts.append(Shard(number("SLURM_PROCID"), number("SLURM_NTASKS")))
    if not parts:
        raise UsageError(
            "--shard auto: neither torchrun (RANK, WORLD_SIZE) nor SLURM (SLURM_ARRAY_TASK_ID, SLURM_PROCID) "
            "started this process. Give --shard I/N, such as 0/4."
        )
    shard = Shard(0, 1)
    for part in parts:
        shard = Shard(shard.index * part.count + part.index, shard.count * part.count)
    if not 0 <= shard.index < shard.count <= sys.maxsize:
        raise UsageError(f"--shard auto: shard {shard.index} of {shard.count} is not one; give --shard I/N.")
    return shard
