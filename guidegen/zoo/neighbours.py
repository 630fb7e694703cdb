"""Whether samples are copies of training photographs: `python -m guidegen.zoo.neighbours --data DIR --judge DIR RUN`.

Draws a few samples of a run beside the training photographs nearest to them, in pixels and in the
features of an evaluation classifier that never guided, and counts how often a sample is nearer to a training
photograph than to any of as many held-out ones: half of the time where nothing was copied, the idea
of Meehan et al. 2020 (arXiv 2004.05675). The evaluation classifier was trained on the training photographs and knows
them better than others, so the count in its features is biased above one half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from guidegen.evaluate.features import open_features, read_image
from guidegen.runs.manifest import read_rows
from guidegen.runs.schema import Row
from guidegen.zoo.batches import load_images
from guidegen.zoo.train import CLASSES

TILE = 64
_GAP, _LEFT = 4, 96


def pixels(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to vectors (N, 3HW) whose distance is the root mean square difference in grey levels."""
    return images.flatten(1).float() / images[0].numel() ** 0.5


def distances(samples: Tensor, photographs: Tensor, space: Callable[[Tensor], Tensor]) -> Tensor:
    """From each sample (N, 3, H, W) to each photograph (M, 3, H, W) or its mirror image, the nearer: (N, M).

    Training saw both, so either would be a copy.
    """
    drawn = space(samples)
    straight, mirrored = (torch.cdist(drawn, space(x)) for x in (photographs, photographs.flip(3)))
    return torch.minimum(straight, mirrored)


def nearer_to_training(
    train: Tensor, held_out: Tensor, train_labels: Tensor, held_out_labels: Tensor, seed: int = 0
) -> float:
    """Share of samples whose nearest photograph is a training one, among as many of each label from either set.

    Args:
        train: distances (N, M) to the training photographs.
        held_out: distances (N, K) to the held-out ones.
        train_labels: of the training photographs (M,).
        held_out_labels: of the held-out ones (K,).
        seed: of the order in which training photographs are taken; all are, as often as they go into such sets.
    """
    draw = torch.Generator().manual_seed(seed)
    of_label = {}
    for label, count in zip(*held_out_labels.unique(return_counts=True), strict=True):
        (there,) = torch.where(train_labels == label)
        of_label[int(label)] = there[torch.randperm(len(there), generator=draw)].split(int(count))
    whole = min(sum(len(part) == len(parts[0]) for part in parts) for parts in of_label.values())
    nearest = held_out.min(1).values
    shares = []
    for i in range(whole):
        some = train[:, torch.cat([parts[i] for parts in of_label.values()])]
        shares.append((some.min(1).values < nearest).float().mean().item())
    return sum(shares) / len(shares)


def first_of_each(rows: Sequence[Row], count: int) -> list[Row]:
    """The first sample of each label, then the second of each, and so on, until there are `count`: none is chosen by eye."""
    by_label: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["label"], row["seed"])):
        by_label.setdefault(row["label"], []).append(row)
    turns = chain.from_iterable(zip_longest(*by_label.values()))
    return list(islice((row for row in turns if row is not None), count))


def picture(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Named rows of images, uint8 (N, 3, H, W) each, one under the other."""
    across = len(rows[0][1])
    sheet = Image.new("RGB", (_LEFT + across * (TILE + _GAP), len(rows) * (TILE + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows):
        top = _GAP + y * (TILE + _GAP)
        pen.text((_LEFT - 8, top + TILE // 2), name, (20, 20, 20), ImageFont.load_default(14), anchor="rm")
        for x, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (_LEFT + x * (TILE + _GAP), top))
    return sheet


def main(
    run: Annotated[Path, typer.Argument(help="Run directory of 32x32 images with the labels of the recipe.")],
    data: Annotated[Path, typer.Option(help="Folder with train*.parquet and val*.parquet.")],
    judge: Annotated[Path, typer.Option(help="Folder of the evaluation classifier, as guidegen.zoo.measure trains it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("neighbours.png"),
    w: Annotated[float, typer.Option("--w", help="Guidance weight of the samples.")] = 3.0,
    count: Annotated[int, typer.Option(help="Samples in the picture; all of this weight are counted.")] = 16,
    near: Annotated[int, typer.Option(help="Neighbours of each.")] = 3,
) -> None:
    """Draw samples beside the training photographs nearest to them, and count what a copy would change."""
    rows = [row for row in read_rows(run) if row["status"] == "ok" and row["w"] == w]
    if not rows:
        raise typer.BadParameter(f"{run} holds no samples with w = {w:g}.")
    shown = first_of_each(rows, count)
    files = [run / row["file"] for row in shown + [row for row in rows if row not in shown]]
    samples = torch.from_numpy(np.stack([read_image(file) for file in files])).permute(0, 3, 1, 2).contiguous()
    ids = [int(label) for label in CLASSES.split(",")]
    train, train_labels = load_images(data, "train", ids, samples.shape[2])
    held_out, held_out_labels = load_images(data, "val", ids, samples.shape[2])
    reader = open_features(str(judge), torch.device("cpu"))

    def features(images: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(reader(part.permute(0, 2, 3, 1).numpy())) for part in images.split(128)])

    tiles = [("sample", samples[: len(shown)])]
    for name, space in (("pixels", pixels), ("features", features)):
        to_train, to_held_out = (distances(samples, photographs, space) for photographs in (train, held_out))
        share = nearer_to_training(to_train, to_held_out, train_labels, held_out_labels)
        typer.echo(
            f"{name}: {share:.1%} of {len(samples)} samples are nearer to a training photograph than to a held-out one"
        )
        closest = to_train.min(1).values
        typer.echo(f"{name}: nearest training photograph {closest.min():.4g} away, half within {closest.median():.4g}")
        nearest = to_train[: len(shown)].topk(near, largest=False).indices
        tiles += [(f"{name} {rank + 1}", train[nearest[:, rank]]) for rank in range(near)]
    picture(tiles).save(out, optimize=True)
    typer.echo(str(out))


if __name__ == "__main__":
    typer.run(main)
