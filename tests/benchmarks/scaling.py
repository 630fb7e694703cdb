"""What a sweep costs against the number of its weights, labels and steps.

    python tests/benchmarks/scaling.py [--steps 4] [--model DIR]

Each row doubles one of them from the same base: the ratio of the times should be that of the network calls, which is
not 2 where the weights 0 and 1 cost less than the others and where the first step is shared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from guidegen import open_checkpoint
from guidegen.runs.directory import Run
from guidegen.sampling.device import pick_batch_size
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Tally, open_sampler
from guidegen.sampling.setup import make_setup, plan_scheduler
from guidegen.sampling.worker import draw
from guidegen.spec.plan import make_cells
from guidegen.spec.settings import Settings
from guidegen.zoo import BUNDLED

WEIGHTS = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default=str(BUNDLED))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(options.model)
    size = pick_batch_size("auto", device, checkpoint.image_shape)

    def cost(weights: int, labels: int, steps: int) -> tuple[float, int]:
        """Seconds and network calls."""
        scheduler = plan_scheduler(checkpoint, "ddim", steps, None)
        settings = Settings("cfg", checkpoint.name, "", "DDIM", steps, None, "fp32", checkpoint.null_label)
        sampler = open_sampler(make_setup(Models(checkpoint), settings, scheduler), device)
        cells = make_cells(list(checkpoint.labels)[:labels], [0, 1], WEIGHTS[:weights])
        tally = Tally()
        with tempfile.TemporaryDirectory() as folder, Run(Path(folder), settings, {}) as run:
            start = time.perf_counter()
            for _ in draw(sampler, cells, run, str, size, tally=tally):
                pass
            return time.perf_counter() - start, tally.made

    base = (4, 2, options.steps)
    cost(*base)
    seconds, calls = cost(*base)
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {size}, two seeds")
    print("doubled    time ratio   call ratio   images   calls   seconds   ms a call")
    rows = {
        "(base)": base,
        "weights": (8, 2, options.steps),
        "labels": (4, 4, options.steps),
        "steps": (4, 2, 2 * options.steps),
    }
    for name, case in rows.items():
        took, made = (seconds, calls) if case == base else cost(*case)
        print(
            f"{name:<8} {took / seconds:12.2f} {made / calls:12.2f} {2 * case[0] * case[1]:8} {made:7} {took:9.2f} "
            f"{1000 * took / made:11.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
