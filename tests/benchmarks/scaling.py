"""What a sweep costs against the number of its weights, labels and steps.

    python tests/benchmarks/scaling.py [--pairs 3] [--steps 4] [--model DIR]

Each row doubles one of them from the same base, both timed in turn: the ratio should be that of the network calls,
which is not 2 where the weights 0 and 1 cost less than the others and where the first step is shared.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial

import table
from drawing import DEVICE, sampler_of, save
from table import Row, Took, clock, timed, turns

from guidegen import open_checkpoint
from guidegen.sampling.device import pick_batch_size
from guidegen.sampling.sampler import Tally
from guidegen.spec.plan import make_cells
from guidegen.zoo import BUNDLED

WEIGHTS = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    checkpoint = open_checkpoint(options.model)
    size = pick_batch_size("auto", DEVICE, checkpoint.image_shape)
    samplers = {steps: sampler_of(checkpoint, steps, scheduler="ddim") for steps in (options.steps, 2 * options.steps)}
    calls = {}

    def cost(case: tuple[int, int, int]) -> Took:
        weights, labels, steps = case
        cells = make_cells(list(checkpoint.labels)[:labels], [0, 1], WEIGHTS[:weights])
        tally = Tally()
        with tempfile.TemporaryDirectory() as folder:
            took = clock(partial(save, samplers[steps], cells, size, folder, tally))
        calls[case] = tally.made
        return took

    base = (4, 2, options.steps)
    cost(base)
    for name, case in {
        "weights": (8, 2, options.steps),
        "labels": (4, 4, options.steps),
        "steps": (4, 2, 2 * options.steps),
    }.items():
        found = turns(options.pairs, partial(cost, case), partial(cost, base))
        conditions = f"batches of {size}; network calls {calls[case] / calls[base]:.2f}"
        yield timed(f"a sweep of twice the {name}", found, "once", conditions)


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default=str(BUNDLED))
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
