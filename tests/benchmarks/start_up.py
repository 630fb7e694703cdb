"""What it costs to start: the commands from nothing, against an interpreter that imports what each of them needs.

python tests/benchmarks/start_up.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import table
from processes import GUIDEGEN, run
from table import Row, timed, turns

LIBRARIES = "import torch, diffusers; from diffusers import UNet2DModel, DDIMScheduler"
COMMANDS = [
    ("--help", "--help", "import typer, rich.console"),
    ("a usage error", "sample --label nix", "import typer, rich.console"),
    ("labels", "labels retriever", "import typer, rich.console"),
    ("dry run", "sample --label 207 --dry-run", LIBRARIES),
    ("one image, 1 step", "sample --label 207 --steps 1 -o -", LIBRARIES),
]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for name, args, imports in COMMANDS:
        works = ([*GUIDEGEN, *args.split()], [sys.executable, "-c", imports])
        found = turns(options.repeats, *(partial(run, command, codes=(0, 2)) for command in works))
        yield timed(f"start: {name}", found, "its imports", "whole processes")


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
