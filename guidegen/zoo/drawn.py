"""Images that a checkpoint draws, by the commands of guidegen: what is finished is kept, so the same command goes on.

Each label has seeds of its own: at a small w the images of one seed are nearly the same for every label, and near copies
say nothing of diversity.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from guidegen.runs.manifest import read_rows


def guidegen(*args: object) -> None:
    """Runs `guidegen ARGS` as a process, and exits with its exit code where it fails."""
    result = subprocess.run([sys.executable, "-m", "guidegen", *map(str, args)])
    if result.returncode:
        raise typer.Exit(result.returncode)


def drawn_as(labels: str, num: int, dtype: str, seed: int = 0) -> tuple[object, ...]:
    """Options that draw `num` samples of each label, no two of one seed; those of a larger `num` begin with them."""
    return ("--label", labels, "--num", num, "--seed", seed, "--seeds-per-label", "--dtype", dtype, "--quiet")


def draw_images(
    checkpoint: Path, out: Path, labels: Sequence[int], weights: Sequence[float], images: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """About so many `images` of a checkpoint by classifier guidance, of each label, at each w; as `read_images` gives them.

    Args:
        checkpoint: its folder.
        out: where the run goes, or is already.
        labels: label ids.
        weights: w.
        images: of all labels and weights together; at least one of each.
        seed: the first one of each label.

    Raises:
        typer.Exit: the command that draws them failed.
    """
    num = max(1, images // (len(labels) * len(weights)))
    w, ids = (",".join(f"{each:g}" for each in several) for several in (weights, labels))
    guidegen("sweep", "-m", checkpoint, "--mode", "classifier", "--w", w, *drawn_as(ids, num, "bf16", seed), "-o", out)
    return read_images(out)


def read_images(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a run as uint8 (N, 3, H, W), in the order of seeds and weights, and their labels (N,)."""
    import numpy as np

    from guidegen.evaluate.features import read_image

    rows = sorted((row for row in read_rows(run) if row["status"] == "ok"), key=lambda row: (row["seed"], row["w"]))
    images = torch.from_numpy(np.stack([read_image(run / row["file"]) for row in rows]))
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor([row["label"] for row in rows])
