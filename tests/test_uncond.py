"""`--uncond icg`, random labels in place of a null label, and `--guide-model tsg`, timesteps with noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

from guidegen.scores.guided import Guide
from guidegen.scores.independent import disturbed_times, independent_labels
from guidegen.scores.interfaces import NULL
from guidegen.scores.noise import Level, to_score

MEANS, SPREAD, PRIOR = torch.tensor([-0.6, 0.1, 0.7]).double(), 0.3, torch.tensor([0.5, 0.2, 0.3]).double()
T = torch.tensor(0)


class Labelled:
    """The exact scores of one-dimensional Gaussians, of a model that has never seen a null label."""

    prediction_type = "sample"

    def __init__(self, level: Level):
        self.level = level

    def check_labels(self, labels: list[int]) -> None:
        if NULL in labels:
            raise ValueError("no null label")

    def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert (labels >= 0).all()
        gain = SPREAD**2 / (SPREAD**2 + self.level.sigma**2)
        means = MEANS[labels][:, None, None, None]
        return means + gain * (x.double() - means)


def scores(x: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """score(x | y) for each y, and p(y | x); both (N, K)."""
    variance = SPREAD**2 + level.sigma**2
    apart = MEANS - x[:, None]
    return apart / variance, (PRIOR.log() - apart**2 / (2 * variance)).softmax(1)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 5.0, 80.0])
def test_the_mean_over_random_labels(sigma: float) -> None:
    """It is sum_y p(y) score(x | y), not the unconditional score, but where p(y | x) = p(y): where x is noise."""
    level, x = Level(1.0, sigma), torch.linspace(-1, 1, 5).double()
    seeds = list(range(20_000))
    labels = independent_labels(seeds, [0, 1, 2], 1)[0]
    shares = torch.bincount(labels) / len(seeds)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.015)  # four standard errors
    per_label, posterior = scores(x, level)
    drawn = []
    for label in range(3):
        guide = Guide(Labelled(level), [0] * 5, [0.0] * 5, stand_ins=torch.full((1, 5), label))
        drawn.append(to_score(guide(x[:, None, None, None], T, level), x[:, None, None, None], level, "sample").flatten())
    found = torch.stack(drawn, 1)
    torch.testing.assert_close(found, per_label, rtol=1e-9, atol=1e-9)
    unconditional = (posterior * per_label).sum(1)
    torch.testing.assert_close((posterior * found).sum(1), unconditional)  # exact with labels of the posterior
    error = ((PRIOR * found).sum(1) - unconditional).abs().max() / per_label.abs().max()
    assert error < 0.5 / sigma**2
    assert sigma > 1 or error > 0.1


def test_labels_are_of_the_seed_and_the_step_alone() -> None:
    together = independent_labels([3, 7, 3, 2**64 - 1], [5, 8, 9], 40)
    assert torch.equal(together[:, 1:2], independent_labels([7], [5, 8, 9], 40))
    assert torch.equal(together[:, 0], together[:, 2])
    assert set(together.unique().tolist()) == {5, 8, 9}
    assert torch.equal(independent_labels([7], [5, 8, 9], 10)[:, 0], together[:10, 1])


def rows(*args: object) -> list[dict[str, object]]:
    return [json.loads(line) for line in call(*args, "--json", "--quiet", "--dtype", "fp32").stdout.splitlines()]


def picture(run: Path, row: dict[str, object]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(run / str(row["file"]))).astype(int)


def test_a_model_without_a_null_label(without_null: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", without_null, "--label", "0-2", "--steps", 3, "--scheduler", "ddim", "--w", 2.5)
    refused = call(*args, code=2)
    assert "no null label" in str(refused.exception)
    assert "--uncond icg" in str(refused.exception)
    together = rows(*args, "--uncond", "icg", "-o", tmp_path / "all", "--batch-size", 3)
    assert [row["nfe"] for row in together] == [6, 6, 6]
    alone = rows(*args[:4], "1", *args[5:], "--uncond", "icg", "-o", tmp_path / "one", "--deterministic", "--batch-size", 1)
    pictures = [picture(tmp_path / name, row) for name, row in (("all", together[1]), ("one", alone[0]))]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    settings = json.loads((tmp_path / "one" / "run.json").read_text())["settings"]
    assert settings["uncond"] == "icg"
    plain = rows(*args[:-1], 1, "-o", tmp_path / "plain")
    same = rows(*args[:-1], 1, "--uncond", "icg", "-o", tmp_path / "same")
    assert np.array_equal(picture(tmp_path / "plain", plain[1]), picture(tmp_path / "same", same[1]))
    assert [row["nfe"] for row in same] == [3, 3, 3]
    assert "no null label" in str(call(*args[:-1], 1, "--guidance", "cfg++", code=2).exception)


def test_a_noisy_classifier_guides_it_too(without_null: Path, with_null: Path, tmp_path: Path) -> None:
    args = (
        "sample",
        "-m",
        without_null,
        "-c",
        with_null / "classifier",
        "--label",
        "1",
        "--steps",
        2,
        "--mode",
        "classifier",
    )
    assert "--uncond icg" in str(call(*args, code=2).exception)
    assert rows(*args, "--uncond", "icg", "-o", tmp_path / "c")[0]["nfe"] == 4
    denoised = (*args, "--uncond", "icg", "--classifier-input", "denoised")
    assert "detached" in str(call(*denoised, code=2).exception)
    assert rows(*denoised, "--classifier-gradient", "detached", "-o", tmp_path / "d")[0]["status"] == "ok"


@pytest.mark.parametrize(
    ("folder", "args", "words"),
    [
        ("without_null", ["--mode", "none"], "is for the modes cfg, classifier and both"),
        ("unconditional", ["--mode", "cfg"], "the model is unconditional"),
    ],
)
def test_where_random_labels_mean_nothing(folder: str, args: list[str], words: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(folder)
    assert words in str(call("sample", "-m", model, "--label", "0", *args, "--uncond", "icg", code=2).exception)


class Told(Labelled):
    """The same, which believes the timestep that it is told: sigma, for each row."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sigma = t.double().expand(len(x))[:, None, None, None]
        means = MEANS[labels][:, None, None, None]
        return means + SPREAD**2 / (SPREAD**2 + sigma**2) * (x.double() - means)


def test_time_step_guidance_is_away_from_disturbed_timesteps() -> None:
    """D(x, t') + w (D(x, t) - D(x, t')), each sample at the t' of its seed."""
    level, x, w = Level(1.0, 0.5), torch.linspace(-1, 1, 4).double()[:, None, None, None], [0.0, 1.0, 2.0, 3.5]
    times = disturbed_times([4, 5, 6, 7], 0.3, 2)
    told = Told(level)
    guide = Guide(told, [0, 1, 2, 0], [1.0] * 4, guiding=told, w_guide=w, disturbance=times)
    t, labels = torch.tensor(0.5), torch.tensor([0, 1, 2, 0])
    for index in range(2):
        strong, weak = told(x, t, labels), told(x, 0.5 * times[index], labels)
        expected = weak + torch.tensor(w).double()[:, None, None, None] * (strong - weak)
        torch.testing.assert_close(guide(x, t, level, index), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(disturbed_times([6], 0.3, 2)[:, 0], times[:, 2])


def test_time_step_guidance_of_an_unconditional_model(unconditional: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", unconditional, "--mode", "autoguidance", "--guide-model", "tsg:0.3", "--steps", 3)
    together = rows(*args, "--w", 2, "--num", 3, "-o", tmp_path / "all")
    alone = rows(*args, "--w", 2, "--seed", 1, "-o", tmp_path / "one", "--deterministic", "--batch-size", 1)
    assert [row["nfe"] for row in (*together, *alone)] == [6] * 4
    assert np.abs(picture(tmp_path / "all", together[1]) - picture(tmp_path / "one", alone[0])).max() <= 1
    plain = rows(*args[:3], "--mode", "none", "--steps", 3, "-o", tmp_path / "plain")
    same = rows(*args, "--w", 1, "-o", tmp_path / "same")
    assert np.array_equal(picture(tmp_path / "plain", plain[0]), picture(tmp_path / "same", same[0]))
    assert not np.array_equal(picture(tmp_path / "plain", plain[0]), picture(tmp_path / "all", together[0]))
    for bad in ("tsg:0", "tsg:2", "tsg:", "tsg:x", "tsg:nan"):
        assert "--guide-model tsg" in str(call(*args[:6], bad, "--w", 2, code=2).exception)
