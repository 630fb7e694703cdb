"""What the benchmarks that draw in their own process share: a sampler of a checkpoint, and a run of some cells."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from guidegen import Checkpoint
from guidegen.runs.directory import Run
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Sampler, Tally, open_sampler
from guidegen.sampling.setup import make_setup, plan_scheduler
from guidegen.sampling.worker import draw
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sampler_of(
    checkpoint: Checkpoint,
    steps: int,
    dtype: str = "fp32",
    mode: str = "cfg",
    classifier: Any = None,
    scheduler: str | None = None,
    compiled: bool = False,
) -> Sampler:
    """With networks in memory; deterministic sampling where the scheduler is `ddim`."""
    eta = 0.0 if scheduler == "ddim" else None
    settings = Settings(
        mode,
        checkpoint.name,
        "",
        "DDIMScheduler",
        steps,
        eta,
        dtype,
        checkpoint.null_label,
        classifier_input="noisy" if classifier else None,
    )
    setup = make_setup(Models(checkpoint, classifier), settings, plan_scheduler(checkpoint, scheduler, steps, eta))
    return open_sampler(setup, DEVICE, compile_networks=compiled)


def batch_of(labels: Iterable[int], size: int, w: float = 3.0) -> list[Cell]:
    """A cell a seed, the labels in turn."""
    return [Cell(label, seed, w) for seed, label in enumerate(islice(cycle(labels), size))]


def save(sampler: Sampler, cells: Sequence[Cell], batch: int, folder: str | Path, tally: Tally | None = None) -> None:
    """Draws and saves the cells as the command does, into a run in a folder."""
    with Run(Path(folder), sampler.setup.settings, {}) as run:
        for _ in draw(sampler, cells, run, str, batch, tally=tally):
            pass


def saving(sampler: Sampler, cells: Sequence[Cell], batch: int, where: str | Path) -> Callable[[], None]:
    """The same, each time into a new folder under `where`."""
    return lambda: save(sampler, cells, batch, tempfile.mkdtemp(dir=where))
