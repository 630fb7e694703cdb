"""Training data like those of the bundled checkpoint, and networks that train on them in a moment."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guidegen.models.classifiers.noisy import NoisyClassifier
from guidegen.zoo import classifier
from guidegen.zoo import train as recipe

NAMES = {"1": "goldfish", "207": "golden retriever", "281": "tabby", "500": "x"}


def write_photographs(folder: Path, images: Sequence[Image.Image]) -> Path:
    """A folder with these as JPEGs of the four labels in turn."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def jpeg(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        return buffer.getvalue()

    labels = [int(list(NAMES)[i % 4]) for i in range(len(images))]
    folder.mkdir()
    table = pa.table({"image": [jpeg(image) for image in images], "label": pa.array(labels, pa.int32())})
    pq.write_table(table, folder / "train-0.parquet")
    (folder / "labels.json").write_text(json.dumps(NAMES))
    return folder


def write_noise(folder: Path) -> Path:
    """A folder of eight photographs of each label, all noise, one greyscale."""
    draw, shapes = np.random.default_rng(0), [(64, 64) if i == 5 else (64, 64, 3) for i in range(32)]
    return write_photographs(folder, [Image.fromarray(draw.integers(0, 255, s, dtype=np.uint8)) for s in shapes])


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Makes the networks of the recipe small."""
    down = {"down_block_types": ("DownBlock2D",) * 2, "layers_per_block": 1}
    unet = {**down, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4, "num_class_embeds": 1001}
    patch.setattr(recipe, "UNET", {**unet, "block_out_channels": (16, 32)})
    patch.setattr(classifier, "CLASSIFIER", {**down, "block_out_channels": (16, 32)})


def small_classifier(names: dict[str, str], **config: Any) -> Any:
    return NoisyClassifier(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), id2label=names, **config
    ).eval()
