"""The card's table of the noise-aware classifier: `python -m guidegen.zoo.calibration --data DIR`.

Accuracy on held-out photographs by noise level, and the mean probability of the likeliest label: a calibrated
classifier is right as often as it says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from guidegen.models.checkpoint import open_checkpoint
from guidegen.models.classifiers.opening import load_classifier, open_classifier
from guidegen.zoo import BUNDLED
from guidegen.zoo.batches import load_images
from guidegen.zoo.classifier import LabelledBatches, logits_at

TIMESTEPS = (0, 100, 200, 300, 400, 500, 700, 900)


def main(
    data: Annotated[Path, typer.Option(help="Folder with val.parquet.")],
    classifier: Annotated[str | None, typer.Argument(help="Its folder. Default: the bundled one.")] = None,
    split: Annotated[str, typer.Option(help="Photographs to measure on: val or train.")] = "val",
    draws: Annotated[int, typer.Option(help="Draws of noise for each photograph.")] = 2,
) -> None:
    """Print the accuracy and the confidence of the classifier by noise level, as a table in Markdown."""
    info = open_classifier(classifier or open_checkpoint(BUNDLED).bundled_classifier or "")
    network, ids = load_classifier(info, "cpu"), list(info.labels)
    images, labels = load_images(data, split, ids, info.size[0] if info.size else 32)
    held_out, draw = LabelledBatches(images, labels, 1, 0, "cpu", ids), torch.Generator().manual_seed(0)
    columns: list[tuple[str, ...]] = [("timestep", "sigma/alpha", "accuracy", "mean confidence")]
    for t in TIMESTEPS:
        with torch.no_grad():
            p = torch.cat([logits_at(network, held_out, t, draw) for _ in range(draws)]).softmax(1)
        accuracy = (p.argmax(1) == held_out.columns.repeat(draws)).float().mean().item()
        level = (held_out.sigma[t] / held_out.alpha[t]).item()
        columns.append((str(t), f"{level:.3g}", f"{accuracy:.1%}", f"{p.amax(1).mean().item():.1%}"))
    for i, row in enumerate(zip(*columns, strict=True)):
        typer.echo(f"| {' | '.join(row)} |")
        if i == 0:
            typer.echo("| --- " * len(row) + "|")
    typer.echo(f"{len(labels)} photographs, {draws} draws of noise each")


if __name__ == "__main__":
    typer.run(main)
