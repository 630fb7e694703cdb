"""Peak memory against the number of images: it should not grow.

    python tests/benchmarks/memory.py [--images 200,1000,5000] [--steps 1] [--npz] [--model DIR]

Each number is a run of the command in a process of its own, whose largest resident set is asked of the kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import table
from processes import GUIDEGEN, run
from table import Row, paired

from guidegen import open_checkpoint
from guidegen.zoo import BUNDLED


def rows(options: argparse.Namespace) -> Iterator[Row]:
    label = next(iter(open_checkpoint(options.model).labels))
    command = [*GUIDEGEN, "sample", "-m", options.model, "--label", str(label), "--w", "1", "-q"]
    first, *more = map(int, options.images.split(","))

    def peak(count: int) -> float:
        out = "x.npz" if options.npz else "run"
        return run([*command, "--steps", str(options.steps), "-n", str(count), "-o", out]).peak

    least = peak(first)
    for count in more:
        yield paired(f"peak memory, {count:,} images", [(peak(count), least)], f"{first:,} images", "", "MiB", 0)


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--images", default="200,1000,5000")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--npz", action="store_true")
    parser.add_argument("--model", default=str(BUNDLED))
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
