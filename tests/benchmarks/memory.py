"""Peak memory against the number of images: it should not grow.

    python tests/benchmarks/memory.py [--images 200,1000,5000] [--steps 1] [--npz] [--model DIR]

Each number is a run of the command in a process of its own, whose largest resident set is asked of the kernel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

from guidegen import open_checkpoint
from guidegen.zoo import BUNDLED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="200,1000,5000")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--npz", action="store_true")
    parser.add_argument("--model", default=str(BUNDLED))
    options = parser.parse_args()
    label = next(iter(open_checkpoint(options.model).labels))
    command = [sys.executable, "-m", "guidegen", "sample", "-m", options.model, "--label", str(label), "--w", "1", "-q"]
    print("images   peak memory / that of the first   MiB   seconds")
    first = None
    for count in map(int, options.images.split(",")):
        with tempfile.TemporaryDirectory() as where:
            out = f"{where}/x.npz" if options.npz else f"{where}/run"
            start = time.perf_counter()
            process = subprocess.Popen(
                [*command, "--steps", str(options.steps), "-n", str(count), "-o", out], stdout=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            took = time.perf_counter() - start
            if status:
                sys.exit(f"the run of {count} images failed")
        first = first or usage.ru_maxrss
        print(f"{count:6}   {usage.ru_maxrss / first:27.3f}   {usage.ru_maxrss / 1024:8.0f} {took:8.1f}", flush=True)


if __name__ == "__main__":
    main()
