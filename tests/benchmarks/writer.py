"""What writing and progress cost beside drawing, in CPU time: an image on disk by size, and a sweep's threads.

python tests/benchmarks/writer.py [--repeats 5] [--sweep "--label 207,281 -n 8 -w 0,1,2,3"]

The sweep is the command in this process, with the bar of a terminal; each of its threads is asked for its own time.
"""

from __future__ import annotations

import argparse
import io
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import table
from PIL import Image
from rich import live
from rich.console import Console
from table import Row, Took, clock, paired, turns

from guidegen.cli import app, console
from guidegen.runs.directory import Run
from guidegen.sampling import worker
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings

THREADS = {
    "the writer's thread": (worker._Writer, "_work"),
    "the bar's thread": (live._RefreshThread, "run"),
    "steps of the bar": (console.Progress, "step"),
}


def pixels(size: int) -> np.ndarray:
    """Smooth as a photograph, with some noise."""
    draw = np.random.default_rng(0)
    ramp = np.linspace(0, 200, size)
    return (
        (ramp[:, None, None] * 0.5 + ramp[None, :, None] * 0.5 + draw.normal(20, 6, (size, size, 3)))
        .clip(0, 255)
        .astype(np.uint8)
    )


def writes(size: int, count: int) -> tuple[Callable[[], Took], Callable[[], Took]]:
    """An image of the run and the same saved by Pillow, so many times."""
    settings = Settings("cfg", "model", "", "DDIMScheduler", 20, None, "fp32", None)
    image = pixels(size)

    def ours() -> Took:
        with tempfile.TemporaryDirectory() as folder, Run(Path(folder), settings, {}) as run:
            return clock(lambda: [run.write(Cell(0, seed, 3.0), image, "label", 40, None) for seed in range(count)])

    def theirs() -> Took:
        with tempfile.TemporaryDirectory() as folder:
            return clock(lambda: [Image.fromarray(image).save(f"{folder}/{seed}.png") for seed in range(count)])

    return ours, theirs


def of_threads(sweep: str) -> dict[str, float]:
    """CPU seconds of each of THREADS in one sweep, and of all of the command as `all`."""
    spent = dict.fromkeys(THREADS, 0.0)

    def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **given: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **given)
            finally:
                spent[name] += time.thread_time() - start

        return timed

    terminal = Console(file=io.StringIO(), force_terminal=True)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(patch.object(console, "stderr", lambda: terminal))
        stack.enter_context(patch("sys.stdout", io.TextIOWrapper(io.BytesIO())))
        for name, (owner, function) in THREADS.items():
            stack.enter_context(patch.object(owner, function, measured(name, getattr(owner, function))))
        work = partial(app, ["sweep", *shlex.split(sweep), "-o", f"{folder}/run"], standalone_mode=False)
        return spent | {"all": clock(work).cpu}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for size, count in ((32, 50), (256, 10), (512, 5), (1024, 2)):
        found = turns(options.repeats, *writes(size, count))
        pairs = [(ours.cpu / count * 1000, theirs.cpu / count * 1000) for ours, theirs in found]
        yield paired(f"an image of {size}x{size} written", pairs, "Pillow alone", "CPU time", "ms", 1)
    spent = [of_threads(options.sweep) for _ in range(options.repeats)]
    for name in THREADS:
        pairs = [(each[name], each["all"]) for each in spent]
        yield paired(f"a sweep: {name}", pairs, "all of it", f"CPU time, `{options.sweep}`", digits=3)


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", default="--label 207,281 -n 8 -w 0,1,2,3")
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
