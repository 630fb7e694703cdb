"""`guidegen sweep` in the loops of text-to-image pipelines, against the pictures of the pipelines themselves.

Networks are small, with random weights. w = 1 and w = 4 are held against the ordinary pipeline's own weight, w = 0 against
its picture of the negative prompt alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_pipelines
import torch
from conftest import call
from PIL import Image

from guidegen.models.families import FAMILIES, Family

STEPS, SEEDS, PROMPT, NEGATIVE = 3, [0, 1], "a red fox", "blue"
WEIGHTS = [0.0, 1.0, 4.0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("text")
    return cache(lambda name: text_pipelines.save(name, home / name))


def family_of(folder: Path) -> Family:
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return next(family for family in FAMILIES if name in family.pipelines)


def their_images(folder: Path, w: float) -> list[np.ndarray]:
    """What the ordinary pipeline draws: at w = 0 of the negative prompt."""
    import diffusers

    family = family_of(folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": STEPS, **family.call}
    if w == 0 and family.renormalised:
        return renormalised_at_zero(pipeline, family, given)
    negative = NEGATIVE if family.negative else ""
    prompt = {"prompt": PROMPT if w else negative} | ({"negative_prompt": negative} if w > 1 and family.negative else {})
    if family.name == "Sana" and not w:
        prompt["complex_human_instruction"] = None  # as it encodes a negative prompt
    scale = {family.scale: max(w, 1.0) - family.offset}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipeline(**prompt, **scale, **given, num_images_per_prompt=len(SEEDS), generator=generators).images
    return [np.asarray(image) for image in images]


def renormalised_at_zero(pipeline: Any, family: Family, given: dict[str, Any]) -> list[np.ndarray]:
    """By the guider of diffusers, since the ordinary pipeline does not guide at a weight of 0."""
    import diffusers

    modular = getattr(diffusers, str(family.blocks))().init_pipeline()
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    modular.update_components(**parts, guider=diffusers.ClassifierFreeGuidance(guidance_scale=0.0))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    prompts = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_images_per_prompt": len(SEEDS)}
    return [np.asarray(image) for image in modular(**prompts, **given, generator=generators, output="images")]


def sweep(folder: Path, out: Path, *more: object, command: str = "sweep", code: int = 0) -> Any:
    family = family_of(folder)
    negative = ["--negative-prompt", NEGATIVE] if family.negative else []
    words = ["-m", folder, "--prompt", PROMPT, *negative, "--size", 32, "--steps", STEPS, "--device", "cpu", "-q"]
    return call(command, *words, "-o", f"{out}/", *more, code=code)


def rows_of(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.glob("manifest*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", text_pipelines.FOLDERS)
def test_equals_the_pipeline(folders: Any, name: str, tmp_path: Path) -> None:
    folder = folders(name)
    family = family_of(folder)
    sweep(folder, tmp_path / "run", "-w", "0,1,4", "-n", len(SEEDS), "--batch-size", 6)
    rows = {(row["w"], row["seed"]): row for row in rows_of(tmp_path / "run")}
    ours = {key: np.asarray(Image.open(tmp_path / "run" / row["file"])) for key, row in rows.items()}
    for w in WEIGHTS:
        for seed, expected in zip(SEEDS, their_images(folder, w), strict=True):
            assert np.abs(ours[w, seed].astype(int) - expected).max() <= 1, (w, seed)
    assert np.abs(ours[0.0, 0].astype(int) - ours[4.0, 0]).max() > 8
    null = STEPS * (2 if family.renormalised or family.blocks is None else 1)
    assert [rows[w, 0]["nfe"] for w in WEIGHTS] == [null, STEPS, 2 * STEPS]
