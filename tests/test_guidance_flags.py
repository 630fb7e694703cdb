"""--guidance, --interval and --w-schedule from the command line to the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings_of
from PIL import Image
from typer.testing import CliRunner

from guidegen import BUNDLED
from guidegen.cli import app
from guidegen.errors import UsageError
from guidegen.models.checkpoint import open_checkpoint, open_classifier
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Samplers
from guidegen.sampling.setup import make_setup, plan_scheduler
from guidegen.scores.methods import METHODS
from guidegen.spec.cell import Cell

Command = Callable[..., Any]
CUSTOM = '''
def Damped(unconditional, conditional, w, step, *, rate=1.0):
    """Less guidance with every step."""
    return conditional + (w - 1) / (1 + rate * step.index) * (conditional - unconditional)
'''


def rows_of(done: Any) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_interval_over_half_the_steps_spends_one_and_a_half_calls_a_step(guidegen: Command, with_null: Path) -> None:
    flags = ["sample", "-m", with_null, "--label", 1, "--steps", 4]
    assert rows_of(guidegen(*flags, "--interval", "50%:100%", "--json"))[0]["nfe"] == 6
    assert json.loads(guidegen(*flags, "--interval", "50%:100%", "--dry-run", "--json").stdout)["nfe"] == 6
    assert rows_of(guidegen(*flags, "--json"))[0]["nfe"] == 8


def test_interval_without_ends_is_none(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    flags = ["sample", "-m", with_null, "--label", 1, "--steps", 3]
    for name, more in (("a", []), ("b", ["--interval", "0:inf"]), ("c", ["--interval", "0%:50%"])):
        assert guidegen(*flags, *more, "-o", f"{name}.png").returncode == 0
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "c.png")).max() > 3


def test_method_of_ones_own_is_run_when_named_by_its_path(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(CUSTOM)
    flags = ["sample", "-m", with_null, "--label", 1, "--steps", 3]
    own = [*flags, "--guidance", "own.py:Damped"]
    for name, command in (
        ("none", [*own, "--guidance-opt", "rate=0"]),
        ("some", [*own, "--guidance-opt", "rate=2"]),
        ("cfg", flags),
    ):
        done = guidegen(*command, "-o", f"{name}.png")
        assert done.returncode == 0, done.stderr
    assert np.abs(pixels(tmp_path / "none.png") - pixels(tmp_path / "cfg.png")).max() <= 1, "rate 0 is plain guidance"
    assert np.abs(pixels(tmp_path / "some.png") - pixels(tmp_path / "cfg.png")).max() > 3
    settings = json.loads(Image.open(tmp_path / "some.png").text["guidegen"])["settings"]  # type: ignore[attr-defined]
    assert settings["guidance"] == "own.py:Damped"
    assert settings["guidance_options"]["rate"] == 2.0
    assert len(settings["guidance_options"]["file_sha256"]) == 64
    (tmp_path / "own.py").write_text(CUSTOM.replace("1 + rate", "3 + rate"))
    changed = guidegen(*own, "--guidance-opt", "rate=2", "-o", "some.png")
    assert changed.returncode == 2
    assert "holds something else" in changed.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mode", "none", "--interval", "1:2"], "guides nothing"),
        (["--mode", "none", "--guidance", "apg"], "takes one"),
        (["--guidance", "apq"], "Did you mean apg?"),
        (["--guidance-opt", "eta"], "KEY=VALUE"),
        (["--guidance", "apg", "--guidance-opt", "eta=high"], "number"),
        (["--interval", "9:5"], "LOW:HIGH"),
        (["--interval", "1e9:inf"], "none of the"),
        (["--w-schedule", "steep"], "no such schedule"),
        (["--guidance", "none.py:Name"], "No Python file"),
    ],
)
def test_refused_before_anything_is_drawn(
    with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["sample", "-m", str(with_null), "--label", "1", "--steps", "3", *flags])
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_half_precision_at_a_large_weight_is_finite_with_every_method(mode: str) -> None:
    checkpoint = open_checkpoint(str(BUNDLED))
    classifier = open_classifier(str(checkpoint.bundled_classifier)) if mode == "classifier" else None
    settings = settings_of(mode, 2, dtype="fp16", classifier="x" if classifier else None)
    models = Models(checkpoint, classifier)
    samplers = Samplers(models, settings, torch.device("cpu"))
    for name in METHODS:
        scheduler = plan_scheduler(checkpoint, None, 2, None)
        sampler = samplers(make_setup(models, replace(settings, guidance=name), scheduler))
        images, _ = sampler.draw([Cell(207, 0, 20.0), Cell(950, 1, 20.0)])
        assert images.isfinite().all(), name
