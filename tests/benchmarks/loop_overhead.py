"""What the loop costs: time to draw and save a batch over the time of its network calls made bare.

    python tests/benchmarks/loop_overhead.py [--pairs 5] [--batch 16] [--steps 20] [--dtype fp32] [--model DIR]

Both are timed in turn in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import table
import torch
from drawing import DEVICE, batch_of, sampler_of, saving
from table import Row, clock, timed, turns

from guidegen import open_checkpoint
from guidegen.models.checkpoint import open_classifier
from guidegen.sampling.device import DTYPES
from guidegen.sampling.sampler import Sampler
from guidegen.scores.interfaces import autocast
from guidegen.zoo import BUNDLED


def bare_calls(sampler: Sampler, batch: int, labels: list[int]) -> Callable[[], None]:
    """The network calls of one batch at w = 3 with nothing around them, in the sampler's precision."""
    denoiser: Any = sampler.condition([])[0]
    classifier: Any = sampler.classifier
    x = torch.randn((batch, *sampler.setup.models.checkpoint.shape), device=sampler.device)
    y = torch.tensor(labels, device=sampler.device)
    null = torch.full((batch,), denoiser.null_label, device=sampler.device)
    joined = (torch.cat([x, x]), torch.cat([null, y])) if sampler.setup.settings.mode == "cfg" else (x, null)
    timesteps = sampler.scheduler.timesteps.to(sampler.device)

    def gradient(t: torch.Tensor) -> None:
        leaf = x.detach().requires_grad_()
        with autocast(x, classifier.autocast):
            logits = classifier.network(leaf.view_as(leaf), t.expand(batch))  # counting FLOP cannot begin at a leaf
        torch.autograd.grad(logits.float().log_softmax(-1)[:, 0].sum(), leaf)

    def work() -> None:
        for t in timesteps:
            with torch.no_grad(), autocast(x, denoiser.autocast):
                denoiser.network(joined[0], t.expand(len(joined[0])), class_labels=joined[1], return_dict=False)
            if sampler.setup.settings.mode == "classifier":
                gradient(t)
        if sampler.decode:
            with torch.no_grad():
                sampler.decode(x)

    return work


def rows(options: argparse.Namespace) -> Iterator[Row]:
    checkpoint = open_checkpoint(options.model)
    classifier = open_classifier(checkpoint.bundled_classifier or "")
    cells = batch_of(checkpoint.labels, options.batch)
    with tempfile.TemporaryDirectory() as where:
        for mode, guide in (("cfg", None), ("classifier", classifier)):
            sampler = sampler_of(checkpoint, options.steps, options.dtype, mode, guide)
            bare = bare_calls(sampler, options.batch, [cell.label or 0 for cell in cells])
            total = saving(sampler, cells, options.batch, where)
            total(), bare()
            found = turns(options.pairs, partial(clock, total), partial(clock, bare))
            conditions = f"{DEVICE}, {options.dtype}, batch {options.batch}, {options.steps} steps"
            yield timed(f"drawing and saving, {mode}", found, "bare network calls", conditions)


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--model", default=str(BUNDLED))
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
