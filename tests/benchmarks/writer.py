"""What writing costs beside drawing: CPU time of one image on disk, by size, and of the progress bar.

python tests/benchmarks/writer.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from processes import head, line, spread
from rich.console import Console

from guidegen.cli import console
from guidegen.runs.directory import Run
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings


def pixels(size: int) -> np.ndarray:
    """Smooth as a photograph, with some noise."""
    draw = np.random.default_rng(0)
    ramp = np.linspace(0, 200, size)
    return (
        (ramp[:, None, None] * 0.5 + ramp[None, :, None] * 0.5 + draw.normal(20, 6, (size, size, 3)))
        .clip(0, 255)
        .astype(np.uint8)
    )


def milliseconds_of_writing(size: int, count: int) -> float:
    """CPU time of one image."""
    settings = Settings("cfg", "model", "", "DDIMScheduler", 20, None, "fp32", None)
    image = pixels(size)
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder), settings, {}) as run:
        start = time.process_time()
        for seed in range(count):
            run.write(Cell(0, seed, 3.0), image, "label", 40, None)
        return (time.process_time() - start) / count * 1000


def share_of_progress(seconds: float) -> float:
    """Of one core, of a bar that is shown while nothing else is done."""
    terminal = Console(file=io.StringIO(), force_terminal=True)
    plain, console.stderr = console.stderr, lambda: terminal
    try:
        with console.progress(1000, 100, False) as bar:
            start, cpu = time.perf_counter(), time.process_time()
            while time.perf_counter() - start < seconds:
                bar.step(1)
                time.sleep(0.05)
            return (time.process_time() - cpu) / (time.perf_counter() - start)
    finally:
        console.stderr = plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    head("beside drawing", "CPU time")
    for size, count in ((32, 50), (256, 10), (512, 5), (1024, 2)):
        found = [milliseconds_of_writing(size, count) for _ in range(options.repeats)]
        line(f"one image of {size}x{size} written", f"{spread(found, 1)} ms")
    found = [100 * share_of_progress(2.0) for _ in range(options.repeats)]
    line("the bar of a terminal", f"{spread(found, 1)} % of a core")


if __name__ == "__main__":
    main()
