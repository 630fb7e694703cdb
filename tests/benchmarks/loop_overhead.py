"""What the loop costs: time to draw and save a batch over the time of its network calls made bare.

    python tests/benchmarks/loop_overhead.py [--pairs 5] [--batch 16] [--steps 20] [--model DIR]

Both are timed in turn in one process; the ratio of each pair and their median are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from guidegen import open_checkpoint
from guidegen.models.checkpoint import open_classifier
from guidegen.runs.directory import Run
from guidegen.sampling.device import DTYPES
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Sampler, open_sampler
from guidegen.sampling.setup import make_setup, plan_scheduler
from guidegen.sampling.worker import draw
from guidegen.scores.interfaces import autocast
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings
from guidegen.zoo import BUNDLED


def seconds(work: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


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


def saving(sampler: Sampler, cells: list[Cell], settings: Settings, batch: int, where: str | Path) -> Callable[[], None]:
    """Drawing the cells and saving them as the command does, each time into a new run under `where`."""

    def work() -> None:
        with Run(Path(tempfile.mkdtemp(dir=where)), settings, {}) as run:
            for _ in draw(sampler, cells, run, str, batch):
                pass

    return work


def ratios_of(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Median, least and largest of the ratios of the pairs."""
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--model", default=str(BUNDLED))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(options.model)
    classifier = open_classifier(checkpoint.bundled_classifier or "")
    labels = (list(checkpoint.labels) * options.batch)[: options.batch]
    cells = [Cell(label, seed, 3.0) for seed, label in enumerate(labels)]
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, "
        f"batch {options.batch}, {options.steps} steps"
    )
    print("mode        total s   bare s   ratio (median of pairs, min-max)")
    with tempfile.TemporaryDirectory() as where:
        for mode in ("cfg", "classifier"):
            scheduler = plan_scheduler(checkpoint, None, options.steps, None)
            settings = Settings(
                mode, checkpoint.name, "", "DDIMScheduler", options.steps, None, options.dtype, checkpoint.null_label
            )
            sampler = open_sampler(make_setup(Models(checkpoint, classifier), settings, scheduler), device)
            bare = bare_calls(sampler, options.batch, labels)
            total = saving(sampler, cells, settings, options.batch, where)
            total(), bare()
            pairs = [(seconds(total), seconds(bare)) for _ in range(options.pairs)]
            ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            median, least, most = ratios_of(pairs)
            print(f"{mode:<10} {ours:8.2f} {theirs:8.2f}   {median:.3f}  ({least:.3f}-{most:.3f})")


if __name__ == "__main__":
    main()
