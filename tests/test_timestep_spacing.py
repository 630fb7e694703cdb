"""`--timestep-spacing`: what a checkpoint draws whose own scheduler config says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from PIL import Image

SPACINGS = ("leading", "linspace", "trailing")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 20), ("euler", 4), ("dpm++", 4)])
def test_it_draws_what_the_config_would(with_null: Path, tmp_path: Path, scheduler: str, steps: int) -> None:
    drawn = {}
    args = ("--label", 1, "--w", 3, "--steps", steps, "--scheduler", scheduler, "-q")
    for spacing in SPACINGS:
        shutil.copytree(with_null, tmp_path / spacing)
        path = tmp_path / spacing / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": spacing}))
        call("sample", "-m", tmp_path / spacing, *args, "-o", "theirs.png", "--overwrite")
        call("sample", "-m", with_null, *args, "--timestep-spacing", spacing, "-o", "ours.png", "--overwrite")
        drawn[spacing] = pixels(tmp_path / "ours.png")
        assert np.array_equal(drawn[spacing], pixels(tmp_path / "theirs.png"))
    assert not np.array_equal(drawn["leading"], drawn["linspace"])
    assert not np.array_equal(drawn["leading"], drawn["trailing"])


def test_it_is_kept_and_another_one_is_another_run(with_null: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 3, "-q", "-o", "run")
    call(*args, "--timestep-spacing", "trailing")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["settings"]["timestep_spacing"] == about["options"]["timestep-spacing"] == "trailing"
    call(*args, "--timestep-spacing", "trailing")
    assert "other settings: timestep_spacing" in str(call(*args, "--timestep-spacing", "leading", code=2).exception)


def test_what_has_no_timesteps_to_choose_from_refuses_it(with_null: Path, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    shutil.copytree(with_null, tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow" / "scheduler")
    for scheduler in ("euler", "unipc"):
        args = ("--label", 1, "--scheduler", scheduler, "--timestep-spacing", "leading", "-o", "run")
        assert "has no effect" in str(call("sample", "-m", "flow", *args, code=2).exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 4), ("trailing", 150), ("trailing", 600)])
def test_ddim_refuses_timesteps_that_its_steps_do_not_reach(with_null: Path, spacing: str, steps: int) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", steps, "--timestep-spacing", spacing)
    assert "would keep noise" in str(call(*args, code=2).exception)
    call(*args, "--scheduler", "euler", "--dry-run")


def test_a_sweep_goes_over_it(with_null: Path, tmp_path: Path) -> None:
    args = ("-m", with_null, "--label", 1, "--w", 3, "--steps", 4, "--batch-size", 1, "-q")
    call("sweep", *args, "--by", "timestep-spacing=leading,trailing", "-o", "swept")
    for spacing in ("leading", "trailing"):
        call("sample", *args, "--timestep-spacing", spacing, "-o", f"{spacing}.png")
        varied = tmp_path / "swept" / "images" / f"timestep_spacing={spacing}" / "w3.0" / "label0001" / "000000.png"
        assert np.array_equal(pixels(varied), pixels(tmp_path / f"{spacing}.png"))
    assert "choose leading, linspace, trailing" in str(
        call("sweep", *args, "--by", "timestep-spacing=leading,x", "-o", "other", code=2).exception
    )
