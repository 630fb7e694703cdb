"""What it costs to start: the commands from nothing, against an interpreter that imports what each of them needs.

python tests/benchmarks/start_up.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIBRARIES = "import torch, diffusers; from diffusers import UNet2DModel, DDIMScheduler"
COMMANDS = [
    ("--help", "--help", "import typer, rich.console"),
    ("a usage error", "sample --label nix", "import typer, rich.console"),
    ("labels", "labels retriever", "import typer, rich.console"),
    ("dry run", "sample --label 207 --dry-run", LIBRARIES),
    ("one image, 1 step", "sample --label 207 --steps 1 -o -", LIBRARIES),
]


def seconds(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("command             times its imports (median, min-max)   seconds   imports s")
    for name, args, imports in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            pairs = [
                (
                    seconds([sys.executable, "-m", "guidegen", *args.split()], Path(folder)),
                    seconds([sys.executable, "-c", imports], Path(folder)),
                )
                for _ in range(options.repeats)
            ]
        ratios = [ours / theirs for ours, theirs in pairs]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"{name:<19} {statistics.median(ratios):.2f} ({spread}){'':<22} {ours:8.2f} {theirs:8.2f}", flush=True)


if __name__ == "__main__":
    main()
