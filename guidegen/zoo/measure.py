"""How often a sample shows its label: `python -m guidegen.zoo.measure --data DIR --judge DIR RUN...`.

The evaluation classifier is a small ResNet of transformers, trained here on clean photographs with another
architecture and seed than the noise-aware classifier; it never guides. `guidegen evaluate --judge DIR --features DIR`
reads its folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from guidegen.models.checkpoint import open_checkpoint
from guidegen.models.classifiers.networks import ImageClassifier
from guidegen.models.classifiers.opening import load_classifier, open_classifier
from guidegen.models.classifiers.preprocessing import Preprocessing
from guidegen.runs.manifest import read_rows
from guidegen.runs.schema import read_run
from guidegen.zoo import BUNDLED
from guidegen.zoo.batches import load_images, random_flip, random_shift, scaled
from guidegen.zoo.classifier import columns_by_label
from guidegen.zoo.train import CLASSES

_COLUMNS = [int(label) for label in CLASSES.split(",")]
_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 128, "width": 128},
    "resample": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def make_classifier() -> ImageClassifier:
    """An untrained ResNet of 2.8 million parameters; its stem, made for large images, sees ours four times enlarged."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        id2label={column: str(label) for column, label in enumerate(_COLUMNS)},
    )
    return ImageClassifier(ResNetForImageClassification(config), Preprocessing.from_config(_PREPROCESSOR))


def save_classifier(classifier: ImageClassifier, folder: Path) -> None:
    """A transformers folder whose labels are those of the bundled checkpoint."""
    labels = open_checkpoint(BUNDLED).labels
    network: Any = classifier.network
    network.config.id2label = {column: labels.names[label] for column, label in enumerate(_COLUMNS)}
    network.config.label2id = {name: column for column, name in network.config.id2label.items()}
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2) + "\n", encoding="utf-8")


def columns_of(labels: Tensor) -> Tensor:
    """Label ids (B,) to columns of the evaluation classifier (B,)."""
    return columns_by_label(_COLUMNS)[labels]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, H, H) to [-1, 1], each image with a random flip and a random shift of up to four pixels."""
    return random_shift(random_flip(scaled(images), generator), 4, generator)


def train_classifier(data: Path, epochs: int, batch: int = 32) -> ImageClassifier:
    """Trains the evaluation classifier on the training photographs."""
    torch.manual_seed(1234)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load_images(data, "train", _COLUMNS, 32)
    targets, classifier = columns_of(labels).to(device), make_classifier().to(device).train()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1234)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(batch)[: len(images) // batch]:
            with torch.autocast(device, torch.bfloat16):
                logits = classifier(augment(images[index], generator).to(device))
            loss = nn.functional.cross_entropy(logits.float(), targets[index], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return classifier.eval()


def make_ready(folder: Path, data: Path, epochs: int) -> None:
    """Trains the evaluation classifier and saves it, unless it is there."""
    if not (folder / "config.json").exists():
        save_classifier(train_classifier(data, epochs), folder)


@torch.no_grad()
def probabilities(classifier: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """p(label | image) of uint8 images (B, 3, H, W), in fp32."""
    return torch.cat([classifier(scaled(part)).softmax(-1) for part in images.split(256)])


def score_run(classifier: Callable[[Tensor], Tensor], run: Path) -> list[dict[str, Any]]:
    """For each w of a run: number of images, share whose most likely label is the intended one, its mean p."""
    import numpy as np
    from PIL import Image

    mode = read_run(run)["settings"]["mode"]
    rows = [row for row in read_rows(run) if row["status"] == "ok"]
    table = []
    for w in sorted({row["w"] for row in rows}):
        some = [row for row in rows if row["w"] == w]
        pixels = [np.asarray(Image.open(run / row["file"])) for row in some]
        p = probabilities(classifier, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
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
    data: Annotated[Path, typer.Option(help="Folder with train*.parquet and val*.parquet.")],
    folder: Annotated[
        Path, typer.Option("--judge", help="Folder of the evaluation classifier; trained first if it is not there.")
    ],
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories of 32x32 images with the labels of the recipe.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the evaluation classifier.")] = 12,
) -> None:
    """Share of the intended label by guidance weight, under a classifier that never guided."""
    make_ready(folder, data, epochs)
    classifier = load_classifier(open_classifier(folder), "cpu")
    images, labels = load_images(data, "val", _COLUMNS, 32)
    accuracy = (probabilities(classifier, images).argmax(1) == columns_of(labels)).float().mean()
    typer.echo(f"evaluation classifier: {accuracy:.1%} on {len(images)} held-out photographs")
    for run in runs or ():
        for row in score_run(classifier, run):
            typer.echo(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
