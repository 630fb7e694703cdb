"""CLIP-like models as classifiers: their logits, their gradient, and what text does to an unconditional model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from torch import Tensor

from guidegen.models.checkpoint import open_checkpoint, open_classifier
from guidegen.models.classifiers.info import label_texts
from guidegen.models.classifiers.opening import load_classifier
from guidegen.scores.gradient import gradient_of_log_probability
from guidegen.scores.noise import Level

TEXTS = ["a red fox", "snow", ""]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = getattr(pipelines, request.param)
    return make(tmp_path_factory.mktemp("zero-shot") / request.param)


def images(count: int = 3, edge: int = 8) -> Tensor:
    return torch.rand((count, 3, edge, edge), generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_logits_are_the_models_own(folder: Path) -> None:
    """Against the whole of transformers, its processor included; a bias that all texts share aside."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    ours: Any = load_classifier(open_classifier(folder), "cpu", texts=TEXTS)
    model = AutoModel.from_pretrained(folder).eval()
    padding = "max_length" if "siglip" in folder.name else True
    length = model.config.text_config.max_position_embeddings
    tokens = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=padding, truncation=True, max_length=length, return_tensors="pt"
    )
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = AutoImageProcessor.from_pretrained(folder)(images=list(pixels.numpy()), return_tensors="pt")
    with torch.no_grad():
        theirs = model(**seen, **tokens).logits_per_image
        mine = ours(pixels.float() / 127.5 - 1)
    torch.testing.assert_close(mine.log_softmax(-1), theirs.log_softmax(-1), rtol=1e-5, atol=1e-5)
    assert (mine[:, 0] - mine[:, 1]).abs().max() > 1e-3  # the texts are told apart


def test_gradient_against_finite_differences(folder: Path) -> None:
    network: Any = load_classifier(open_classifier(folder), "cpu", texts=TEXTS).double()
    x, columns, h = images(2).double(), torch.tensor([0, 1]), 1e-6
    gradient = gradient_of_log_probability(network, x, columns, scaled=False)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (
            network(x + sign * h * direction).log_softmax(-1).gather(1, columns[:, None])[:, 0] for sign in (1, -1)
        )
    slope = (ahead - behind) / (2 * h)
    torch.testing.assert_close((gradient.double() * direction).sum((1, 2, 3)), slope, rtol=1e-4, atol=1e-7)


def test_labels_become_texts(folder: Path, with_null: Path) -> None:
    labels = open_checkpoint(with_null).labels
    assert label_texts(labels)[:2] == ["a photo of a goldfish", "a photo of a tabby"]
    assert open_classifier(folder).columns(labels) == {i: i for i in range(5)}


def test_text_steers_an_unconditional_model(
    folder: Path, unconditional: Path, guidegen: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ["--mode", "classifier", "-m", unconditional, "-c", folder, "--steps", 3, "--prompt", "a red fox"]
    done = guidegen("sweep", *flags, "--prompt", "snow", "--w", "0,40", "-o", "run", "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row["prompt"], row["w"]): row for row in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == 4
    hashes = {key: pixels(tmp_path / "run" / row["file"]) for key, row in rows.items()}
    assert hashes["a red fox", 0.0] == hashes["snow", 0.0]
    assert len({*hashes.values()}) == 3
    assert rows["snow", 40.0]["file"] == "images/w40.0/prompt0001/000000.png"
    assert (rows["snow", 0.0]["nfe"], rows["snow", 40.0]["nfe"]) == (3, 9)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["classifier_texts"] == ["a red fox", "snow", ""]
    again = guidegen("sweep", *flags, "--w", "0,40", "-o", "run")
    assert again.returncode == 2  # other candidates are another softmax
    assert "classifier_texts" in again.stderr


def pixels(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).tobytes()


def test_names_of_labels_are_matched(folder: Path, with_null: Path, guidegen: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["sample", "-m", with_null, "-c", folder, "--steps", 2, "--label", "tabby"]
    assert guidegen(*flags, "--mode", "both", "--w", 1, "-o", "a").returncode == 0
    texts = json.loads((tmp_path / "a" / "run.json").read_text())["settings"]["classifier_texts"]
    assert texts[1] == "a photo of a tabby"
    without = guidegen("sample", "--mode", "classifier", "-m", with_null, "-c", folder, "--steps", 2)
    assert without.returncode == 2
    assert "--label" in without.stderr


def test_an_unconditional_model_needs_a_prompt(folder: Path, unconditional: Path, guidegen: Callable[..., Any]) -> None:
    done = guidegen("sample", "--mode", "classifier", "-m", unconditional, "-c", folder, "--label", "tabby")
    assert done.returncode == 2
    assert "--prompt" in done.stderr
    noisy = guidegen("sample", "--mode", "classifier", "-m", unconditional, "-c", folder, "--classifier-input", "noisy")
    assert noisy.returncode == 2
    assert "no timestep" in noisy.stderr


def test_cheap_gradient_is_that_of_the_estimate_over_alpha(folder: Path) -> None:
    """d x0 / d x_t = 1 / alpha with the noise held fixed; one call of the classifier, none of the denoiser."""
    from guidegen.scores.gradient import DetachedScore

    network: Any = load_classifier(open_classifier(folder), "cpu", texts=TEXTS).double()
    level, columns = Level(0.6, 0.8), torch.tensor([0, 1])
    x_t, eps = images(2).double(), torch.randn((2, 3, 8, 8), dtype=torch.float64)
    score = DetachedScore(network, {0: 0, 1: 1}, "epsilon")
    found = score(x_t, torch.tensor(500), columns, level, eps)

    leaf = x_t.clone().requires_grad_()
    log_p = network((leaf - level.sigma * eps) / level.alpha).log_softmax(-1).gather(1, columns[:, None]).sum()
    torch.testing.assert_close(found.double(), torch.autograd.grad(log_p, leaf)[0], rtol=1e-5, atol=1e-8)
    assert score(x_t, torch.tensor(999), columns, Level(0.0, 1.0), eps).abs().max() == 0
