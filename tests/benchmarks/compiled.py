"""From how many images on `--compile` is worth its start: the bundled network by torch.compile against without.

python tests/benchmarks/compiled.py [--batch 16] [--steps 2] [--pairs 5] [--dtype fp32 bf16]

Both draw the same batches in turn in one process, after a first one that compiles: into an empty cache, and again from
what is in it, as a second process on the same machine would. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import table
import torch
from drawing import DEVICE, batch_of, sampler_of
from table import Row, Took, clock, timed, turns

from guidegen import BUNDLED, open_checkpoint
from guidegen.sampling.device import DTYPES


def rows(options: argparse.Namespace) -> Iterator[Row]:
    checkpoint = open_checkpoint(str(BUNDLED))
    cells = batch_of(checkpoint.labels, options.batch)

    def first(dtype: str, compiled: bool) -> tuple[Callable[[], Took], Took]:
        """What draws a batch, and what its first one takes."""
        torch.compiler.reset()
        work = partial(clock, partial(sampler_of(checkpoint, options.steps, dtype, compiled=compiled).draw, cells))
        return work, work()

    for dtype in options.dtype:
        plain, _ = first(dtype, False)
        _, anew = first(dtype, True)
        compiled, cached = first(dtype, True)
        found = turns(options.pairs, compiled, plain)
        conditions = [f"{DEVICE}, {dtype}, batch {options.batch}, {options.steps} steps"]
        for name, start in (("anew", anew), ("from torch's cache", cached)):
            worth = [_worth(start, found, kind, options, checkpoint.steps) for kind in ("wall", "cpu")]
            conditions.append(
                f"compiled {name} in {start.wall:.0f} s ({start.cpu:.0f} s of CPU time): worth it from {worth[0]:,} images "
                f"of {checkpoint.steps} steps ({worth[1]:,} by CPU time)"
            )
        yield timed("drawing with --compile", found, "without", "; ".join(conditions))


def _worth(start: Took, found: Sequence[tuple[Took, ...]], kind: str, options: argparse.Namespace, steps: int) -> float:
    """Images from which on the start is made good."""
    compiled, plain = (statistics.median(getattr(each[which], kind) for each in found) for which in (0, 1))
    saved = (plain - compiled) / options.batch * steps / options.steps
    return math.ceil((getattr(start, kind) - compiled) / saved) if saved > 0 else math.inf


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, whose CPU time is measured
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        table.show(rows(options))


if __name__ == "__main__":
    main()
