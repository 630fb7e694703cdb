"""How often a sample shows its label: `python -m guidegen.zoo.measure --data DIR --judge FILE RUN...`.

The judge is a small ResNet of transformers, trained here on clean photographs with another
architecture and seed than the noise-aware classifier; it never guides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from guidegen.run import read_rows, read_run
from guidegen.zoo.train import CLASSES, load_images

_COLUMNS = [int(label) for label in CLASSES.split(",")]


def make_judge() -> Any:
    """An untrained ResNet for 32x32 images, 2.8 million parameters."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=len(_COLUMNS),
    )
    model = ResNetForImageClassification(config)
    model.resnet.embedder.embedder.convolution = nn.Conv2d(3, 32, 3, padding=1, bias=False)  # keep 32x32
    model.resnet.embedder.pooler = nn.Identity()
    return model


def columns_of(labels: Tensor) -> Tensor:
    """Label ids (B,) to columns of the judge (B,)."""
    table = torch.full((max(_COLUMNS) + 1,), -1)
    table[torch.tensor(_COLUMNS)] = torch.arange(len(_COLUMNS))
    return table[labels]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, H, W) to [-1, 1] with a random flip and a random shift of up to four pixels."""
    x = images.float() / 127.5 - 1
    if torch.rand(1, generator=generator) < 0.5:
        x = x.flip(3)
    dy, dx = torch.randint(0, 9, (2,), generator=generator).tolist()
    return nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]


def train_judge(data: Path, epochs: int, batch: int = 32) -> Any:
    """Trains the judge on the training photographs."""
    torch.manual_seed(1234)
    images, labels = load_images(data, "train", _COLUMNS, 32)
    targets, judge = columns_of(labels), make_judge().train()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1234)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(batch)[: len(images) // batch]:
            with torch.autocast("cpu", torch.bfloat16):
                logits = judge(augment(images[index], generator)).logits
            loss = nn.functional.cross_entropy(logits.float(), targets[index], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return judge.eval()


@torch.no_grad()
def probabilities(judge: Any, images: Tensor) -> Tensor:
    """p(label | image) of uint8 images (B, 3, H, W), in fp32."""
    return torch.cat([judge(part.float() / 127.5 - 1).logits.softmax(-1) for part in images.split(256)])


def score_run(judge: Any, run: Path) -> list[dict[str, Any]]:
    """For each w of a run: number of images, share whose likeliest label is the intended one, mean p of it."""
    import numpy as np
    from PIL import Image

    mode = read_run(run)["settings"]["mode"]
    rows = [row for row in read_rows(run) if row["status"] == "ok"]
    table = []
    for w in sorted({row["w"] for row in rows}):
        some = [row for row in rows if row["w"] == w]
        pixels = [np.asarray(Image.open(run / row["file"])) for row in some]
        p = probabilities(judge, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
        target = columns_of(torch.tensor([row["label"] for row in some]))
        table.append(
            {
                "mode": mode,
                "w": w,
                "images": len(some),
                "share": (p.argmax(1) == target).float().mean().item(),
                "p": p.gather(1, target[:, None]).mean().item(),
            }
        )
    return table


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of 32x32 images with the labels of the recipe.")],
    data: Annotated[Path, typer.Option(help="Folder with train*.parquet and val*.parquet.")],
    judge_file: Annotated[Path, typer.Option("--judge", help="Weights of the judge; trained first if not there.")],
    epochs: Annotated[int, typer.Option(help="Epochs of the judge.")] = 12,
) -> None:
    """Share of the intended label by guidance weight, under a classifier that never guided."""
    if judge_file.exists():
        judge = make_judge().eval()
        judge.load_state_dict(torch.load(judge_file, weights_only=True))
    else:
        judge = train_judge(data, epochs)
        torch.save(judge.state_dict(), judge_file)
    images, labels = load_images(data, "val", _COLUMNS, 32)
    accuracy = (probabilities(judge, images).argmax(1) == columns_of(labels)).float().mean()
    typer.echo(f"judge: {accuracy:.1%} on {len(images)} held-out photographs")
    for run in runs:
        for row in score_run(judge, run):
            typer.echo(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
