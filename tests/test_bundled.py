"""The checkpoint that guidegen carries."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from guidegen import (
    BUNDLED,
    Guide,
    NoisyScore,
    UNetDenoiser,
    load_classifier,
    load_network,
    make_scheduler,
    open_checkpoint,
    open_classifier,
    sample,
)

CHECKPOINT = open_checkpoint(BUNDLED)
JUDGE = open_classifier(CHECKPOINT.bundled_classifier or "")


def test_it_is_what_the_card_says() -> None:
    card = " ".join((BUNDLED / "README.md").read_text(encoding="utf-8").split())
    assert CHECKPOINT.null_label == 1000
    assert CHECKPOINT.config["num_class_embeds"] == 1001
    assert CHECKPOINT.labels.name(207) == "golden retriever"
    assert list(JUDGE.labels) == list(CHECKPOINT.labels)
    assert [mode for mode in ("cfg", "classifier", "both", "none") if CHECKPOINT.refusal(mode, True)] == []
    for label in CHECKPOINT.labels:
        assert f"{label} {CHECKPOINT.labels.name(label)}" in card
    weights = [path for path in BUNDLED.rglob("*") if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {"unet", "classifier"}
    assert sum(path.stat().st_size for path in weights) <= 40e6
    assert CHECKPOINT.guiding_folder is None


def test_its_card_has_its_pictures() -> None:
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\(([\w.]+\.(?:png|svg))\)", card)
    assert sorted(pictures) == ["curves.svg", "grid.png", "methods.png"]
    assert all(0 < (BUNDLED / name).stat().st_size < 500_000 for name in pictures)


def test_main_job(guidegen: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    result = guidegen("sample", "--mode", "cfg", "--w", "3.0", "--label", "207", "--steps", "4")
    assert (result.returncode, result.stderr) == (0, "")
    (path,) = result.stdout.splitlines()
    with Image.open(tmp_path / path) as image:
        assert image.size == (32, 32)
        about = json.loads(image.text["guidegen"])  # type: ignore[attr-defined]
        assert image.text["parameters"].startswith("golden retriever\nSteps: 4, ")  # type: ignore[attr-defined]
    assert {"label": 207, "seed": 0, "w": 3.0, "w_classifier": None}.items() <= about["cell"].items()
    assert about["label_name"] == "golden retriever"


def test_a_label_it_does_not_know(guidegen: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = guidegen("sample", "--label", "golden retreiver")
    assert (result.returncode, result.stdout) == (2, "")
    assert "207 golden retriever" in result.stderr


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_the_label_grows_with_w(mode: str) -> None:
    """Mean log-probability of the label under the classifier, on clean samples; it guides one of the modes only."""
    denoiser = UNetDenoiser(load_network(CHECKPOINT, "cpu"), "v_prediction", CHECKPOINT.null_label)
    network = load_classifier(JUDGE, "cpu")
    columns = JUDGE.columns(CHECKPOINT.labels)
    labels = list(CHECKPOINT.labels)
    means = []
    for w in (0.0, 1.0, 4.0):
        weights, zero = [w] * len(labels), [0.0] * len(labels)
        pair = (weights, zero) if mode == "cfg" else (zero, weights)
        guide = Guide(denoiser, labels, *pair, NoisyScore(network, columns))
        images = sample(guide, make_scheduler(CHECKPOINT.scheduler_config), range(len(labels)), CHECKPOINT.shape, 10)
        with torch.no_grad():
            log_p = network(images.clamp(-1, 1), torch.tensor(0)).log_softmax(-1)
        means.append(log_p[range(len(labels)), [columns[label] for label in labels]].mean().item())
    # twenty samples: seen to grow by more than one nat from 0 to 4 in both modes
    assert means[0] < means[1] < means[2], means
    assert means[2] - means[0] > 0.5, means
