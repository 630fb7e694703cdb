"""Several labels or prompts with a weight each, from the command line to the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from conftest import settings_of
from PIL import Image
from setups import open_sampler

from guidegen.cli.options import resolve_labels
from guidegen.errors import UsageError
from guidegen.models.checkpoint import open_checkpoint
from guidegen.models.labels import Labels
from guidegen.sampling.setup import plan_scheduler
from guidegen.spec.cell import Cell
from guidegen.spec.composition import has_weights, label_parts, main_label, prompt_parts, split_weight
from guidegen.spec.plan import Plan, read_plan

Command = Callable[..., Any]
LABELS = Labels({1: "goldfish", 207: "golden retriever", 281: "tabby, tabby cat", 5: "ratio 3:4"})


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["207:3.0,281:-1.0"], ["207:3.0,281:-1.0"]),
        (["golden retriever: 1.5, tabby"], ["207:1.5,281:1.0"]),
        (["207:2", "1,281"], ["207:2.0", 1, 281]),
        (["ratio 3:4"], [5]),
        (["ratio 3:4:2,1:-.5"], ["5:2.0,1:-0.5"]),
    ],
)
def test_labels_with_weights_are_one_mixture(words: list[str], found: list[int | str]) -> None:
    assert resolve_labels(words, LABELS) == found


@pytest.mark.parametrize("word", ["207:1,1-5:1", "207:1,207:2", "all:1", "206:1", "207:inf"])
def test_what_is_no_mixture_is_refused(word: str) -> None:
    with pytest.raises(UsageError):
        resolve_labels([word], LABELS)


def test_parts_and_their_weights() -> None:
    assert label_parts("207:3.0,281:-1.0") == ((207, 3.0), (281, -1.0))
    assert main_label("281:-1.0,207:3.0") == 207
    assert split_weight("a: b :1e-1") == ("a: b", 0.1)
    assert split_weight("at 10:30 pm") == ("at 10:30 pm", None)
    assert prompt_parts("a fox:2 AND snow AND rain:-0.5") == (("a fox", 2.0), ("snow", 1.0), ("rain", -0.5))
    assert prompt_parts("salt AND salt:2") == (("salt", 3.0),)
    assert prompt_parts("a fox:2") == (("a fox:2", 1.0),), "one prompt is itself, colon and all"
    assert prompt_parts("SAND and sea") == (("SAND and sea", 1.0),)
    assert has_weights("a AND b:2")
    assert not has_weights("a AND b")
    assert not has_weights("b:2")


def test_plan_keeps_mixtures() -> None:
    plan = Plan([207, "207:3.0,281:-1.0"], [0], [1.0])
    assert read_plan(json.loads(json.dumps(plan.as_json()))) == plan
    alone, mixed = plan.cells()
    assert (alone.label, alone.mixture, mixed.label, mixed.mixture) == (207, None, 207, "207:3.0,281:-1.0")
    assert mixed.file == "images/w1.0/label0207x3.0_0281x-1.0/000000.png" != alone.file


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_run_of_mixtures(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    flags = ["sweep", "-m", with_null, "--steps", 2, "-o", "run", "--label", "0:2,1:-1", "--label", "0,1"]
    done = guidegen(*flags, "--w", "0,1,2", "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row.get("mixture"), row["label"], row["w"]): row for row in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == 9
    mixed = rows["0:2.0,1:-1.0", 0, 1.0]
    assert mixed["file"] == "images/w1.0/label0000x2.0_0001x-1.0/000000.png"
    assert [rows["0:2.0,1:-1.0", 0, w]["nfe"] for w in (0.0, 1.0, 2.0)] == [2, 4, 6], (
        "weights that sum to 1 need no null at w=1"
    )
    assert guidegen("verify", "run").returncode == 0
    plan = guidegen(*flags, "--w", "0,1,2", "--dry-run", "--json")
    assert json.loads(plan.stdout)["nfe"] == sum(row["nfe"] for row in rows.values())
    grid = Image.open(tmp_path / "run" / "grid.png").text["guidegen"]  # type: ignore[attr-defined]
    assert json.loads(grid)["plan"]["labels"] == ["0:2.0,1:-1.0", 0, 1]

    # 2 c0 - c1 with the weights doubled is u + 2 (2 c0 - c1 - u) of the run above
    again = guidegen("sample", "-m", with_null, "--steps", 2, "--label", "0:4,1:-2", "-o", "a.png")
    assert again.returncode == 0, again.stderr
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "run" / rows["0:2.0,1:-1.0", 0, 2.0]["file"])).max() <= 1
    # a label of weight 3 is that label at w = 3
    one = guidegen("sample", "-m", with_null, "--steps", 2, "--label", "1:3", "-o", "b.png")
    plain = guidegen("sample", "-m", with_null, "--steps", 2, "--label", "1", "--w", 3, "-o", "c.png")
    assert one.returncode == plain.returncode == 0
    assert np.abs(pixels(tmp_path / "b.png") - pixels(tmp_path / "c.png")).max() <= 1


def test_mixture_needs_an_unconditional_prediction(guidegen: Command, without_null: Path) -> None:
    done = guidegen("sample", "-m", without_null, "--label", "0:1,1:1", "--w", 1)
    assert done.returncode == 2
    assert "no null label" in done.stderr


def test_prompts_of_several_parts_are_the_sum_of_their_scores(tmp_path: Path) -> None:
    """Against a loop over diffusers' own UNet, text encoder and scheduler."""
    from diffusers import StableDiffusionPipeline

    folder = pipelines.stable_diffusion(tmp_path / "sd")
    checkpoint = open_checkpoint(folder)
    scheduler = plan_scheduler(checkpoint, "ddim", 3, None)
    sampler = open_sampler(checkpoint, None, scheduler, settings_of("cfg", 3), torch.device("cpu"))
    images, calls = sampler.draw([Cell(None, 5, 2.0, prompt="a fox:1.5 AND snow AND a house:-0.5", prompt_index=0)])
    assert calls == [4 * 3]

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    texts = ["", "a fox", "snow", "a house"]
    states = torch.cat([pipe.encode_prompt(text, torch.device("cpu"), 1, False)[0] for text in texts])
    theirs = plan_scheduler(checkpoint, "ddim", 3, None)
    x = torch.randn((1, *checkpoint.shape), generator=torch.Generator().manual_seed(5)) * theirs.init_noise_sigma
    with torch.no_grad():
        for t in theirs.timesteps:
            null, fox, snow, house = pipe.unet(x.expand(4, -1, -1, -1), t, states).sample.split(1)
            guided = null + 2.0 * (1.5 * (fox - null) + (snow - null) - 0.5 * (house - null))
            x = theirs.step(guided, t, x).prev_sample
        expected = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    # four rows in one call and in ours: fp32 rounding, three steps
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
