"""From how many images on `--compile` is worth its start: the bundled network by torch.compile against without.

python tests/benchmarks/compiled.py [--batch 16] [--steps 5] [--pairs 3] [--dtype fp32]

Both draw the same batches in turn in one process, after a first batch each that is timed alone. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from processes import head, line, spread

from guidegen import BUNDLED, open_checkpoint
from guidegen.sampling.device import DTYPES
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Sampler, open_sampler
from guidegen.sampling.setup import make_setup, plan_scheduler
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(str(BUNDLED))
    settings = Settings(
        "cfg", checkpoint.name, "", "DDIMScheduler", options.steps, None, options.dtype, checkpoint.null_label
    )
    setup = make_setup(Models(checkpoint), settings, plan_scheduler(checkpoint, None, options.steps, None))
    samplers = [open_sampler(setup, device, compile_networks=compiled) for compiled in (False, True)]
    labels = (list(checkpoint.labels) * options.batch)[: options.batch]
    cells = [Cell(label, seed, 3.0) for seed, label in enumerate(labels)]

    def seconds(sampler: Sampler) -> float:
        start = time.perf_counter()
        sampler.draw(cells)[0].cpu()
        return time.perf_counter() - start

    first = [seconds(sampler) for sampler in samplers]
    pairs = [tuple(seconds(sampler) for sampler in samplers) for _ in range(options.pairs)]
    head(f"{device}, {options.dtype}, batches of {options.batch}, {options.steps} steps", "first batch, s", "later ones, s")
    for index, name in enumerate(("without", "--compile")):
        line(name, f"{first[index]:.1f}", spread([pair[index] for pair in pairs]))
    plain, compiled = (statistics.median(column) for column in zip(*pairs, strict=True))
    saved = (plain - compiled) / options.batch * checkpoint.steps / options.steps
    images = math.ceil((first[1] - compiled) / saved) if saved > 0 else math.inf
    line(f"worth it from {images} images of {checkpoint.steps} steps on", "", f"{plain / compiled:.2f} times as fast")


if __name__ == "__main__":
    main()
