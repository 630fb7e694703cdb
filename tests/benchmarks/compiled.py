"""From how many images on `--compile` is worth its start: the bundled network by torch.compile against without.

python tests/benchmarks/compiled.py [--batch 16] [--steps 2] [--pairs 5] [--dtype fp32 bf16]

Both draw the same batches in turn in one process, after a first batch each that is timed alone. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from functools import partial

import table
from drawing import DEVICE, batch_of, sampler_of
from table import Row, clock, timed, turns

from guidegen import BUNDLED, open_checkpoint
from guidegen.sampling.device import DTYPES


def rows(options: argparse.Namespace) -> Iterator[Row]:
    checkpoint = open_checkpoint(str(BUNDLED))
    cells = batch_of(checkpoint.labels, options.batch)
    for dtype in options.dtype:
        samplers = [sampler_of(checkpoint, options.steps, dtype, compiled=compiled) for compiled in (True, False)]
        works = [partial(clock, partial(sampler.draw, cells)) for sampler in samplers]
        first = [work() for work in works]
        found = turns(options.pairs, *works)
        worth = {}
        for kind in ("wall", "cpu"):
            compiled, plain = (
                statistics.median(getattr(each, kind) for each in column) for column in zip(*found, strict=True)
            )
            saved = (plain - compiled) / options.batch * checkpoint.steps / options.steps
            worth[kind] = math.ceil((getattr(first[0], kind) - compiled) / saved) if saved > 0 else math.inf
        conditions = (
            f"{DEVICE}, {dtype}, batch {options.batch}, {options.steps} steps; compiling takes {first[0].wall:.0f} s "
            f"({first[0].cpu:.0f} s of CPU time): worth it from {worth['wall']:,} images of {checkpoint.steps} steps "
            f"({worth['cpu']:,} by CPU time)"
        )
        yield timed("--compile", found, "without", conditions)


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
