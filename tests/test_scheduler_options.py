"""`--scheduler-opt`: options of the scheduler's class in diffusers, held against it before anything is drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from PIL import Image


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(path: Path | str) -> Any:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("euler", {"use_karras_sigmas": True}),
        ("dpm++", {"use_karras_sigmas": True, "solver_order": 3, "solver_type": "heun"}),
        ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("ddim", {"set_alpha_to_one": False, "steps_offset": 1}),
    ],
)
def test_it_draws_what_the_config_would(with_null: Path, tmp_path: Path, scheduler: str, options: dict[str, Any]) -> None:
    args = ("--label", 1, "--steps", 5, "--scheduler", scheduler, "-q")
    shutil.copytree(with_null, tmp_path / "theirs")
    path = tmp_path / "theirs" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    call("sample", "-m", "theirs", *args, "-o", "theirs.png")
    words = [word for key, value in options.items() for word in ("--scheduler-opt", f"{key}={value}")]
    call("sample", "-m", with_null, *args, *words, "-o", "ours.png")
    call("sample", "-m", with_null, *args, "-o", "plain.png")
    assert np.array_equal(pixels("ours.png"), pixels("theirs.png"))
    assert not np.array_equal(pixels("ours.png"), pixels("plain.png"))
    call("again", "ours.png", "-q", "-o", "again.png")
    assert np.array_equal(pixels("ours.png"), pixels("again.png"))


def test_they_are_kept_in_one_order_and_others_are_another_run(with_null: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 3, "--scheduler", "dpm++", "-q", "-o", "run")
    one, other = ("--scheduler-opt", "use_karras_sigmas=true"), ("--scheduler-opt", "solver_order=3")
    call(*args, *one, *other)
    about = json.loads(Path("run/run.json").read_text())
    assert about["settings"]["scheduler_opt"] == ["solver_order=3", "use_karras_sigmas=true"]
    call(*args, *other, *one)
    assert "scheduler_opt" in str(call(*args, *one, code=2).exception)


def test_the_spacing_is_one_thing(with_null: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 3, "--scheduler", "euler", "-q", "-o", "run")
    call(*args, "--scheduler-opt", "timestep_spacing=trailing")
    about = json.loads(Path("run/run.json").read_text())
    assert (about["settings"]["timestep_spacing"], about["settings"]["scheduler_opt"]) == ("trailing", None)
    call(*args, "--timestep-spacing", "trailing")
    both = ("--timestep-spacing", "trailing", "--scheduler-opt", "timestep_spacing=trailing")
    assert "give one of them" in str(call(*args, *both, code=2).exception)


@pytest.mark.parametrize(
    ("scheduler", "word", "reason"),
    [
        ("euler", "use_karras_sigma=true", "no such option. It has interpolation_type, use_karras_sigmas"),
        ("ddim", "use_karras_sigmas=true", "no such option"),
        ("euler", "use_karras_sigmas=maybe", "give yes or no"),
        ("dpm++", "solver_order=x", "give a whole number"),
        ("dpm++", "solver_order=7", "solver_order = 7 in its config does not fit"),
        ("dpm++", "algorithm_type=other", "with algorithm_type = other: DPMSolverMultistepScheduler refuses"),
        ("dpm++", "solver_type=other", "refuses"),
        ("unipc", "lower_order_final=false", "--steps 4"),
        ("euler", "beta_start=0.1", "what its network was trained on"),
        ("euler", "prediction_type=sample", "what its network was trained on"),
        ("ddim", "clip_sample=true", "what its network was trained on"),
        ("dpm++", "use_flow_sigmas=true", "what its network was trained on"),
        ("unipc", "disable_corrector=1", "cannot be written as text"),
        ("euler", "timestep_spacing=x", "choose leading"),
        ("euler", "use_karras_sigmas", "takes KEY=VALUE"),
        ("euler", "=true", "takes KEY=VALUE"),
    ],
)
def test_what_does_not_fit_is_refused(with_null: Path, scheduler: str, word: str, reason: str) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 4, "--scheduler", scheduler, "-o", "run")
    assert reason in str(call(*args, "--scheduler-opt", word, code=2).exception)
    assert not Path("run").exists()


def test_one_key_twice_is_refused(with_null: Path) -> None:
    twice = ("--scheduler-opt", "solver_order=2", "--scheduler-opt", "solver_order=3")
    assert "given twice" in str(call("sample", "-m", with_null, "--label", 1, *twice, code=2).exception)


def test_a_sweep_over_schedulers_keeps_them(with_null: Path) -> None:
    args = ("-m", with_null, "--label", 1, "--w", 3, "--steps", 4, "--batch-size", 1, "-q")
    karras = ("--scheduler-opt", "use_karras_sigmas=true")
    call("sweep", *args, *karras, "--by", "scheduler=euler,heun", "-o", "swept")
    call("sample", *args, *karras, "--scheduler", "heun", "-o", "heun.png")
    varied = Path("swept/images/scheduler=HeunDiscreteScheduler/w3.0/label0001/000000.png")
    assert np.array_equal(pixels(varied), pixels("heun.png"))
