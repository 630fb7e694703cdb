"""The commands that `verify` and `merge` print draw just what is missing, and end in a whole run."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import call
from typer.testing import CliRunner

from guidegen.cli import app


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def advised(*args: object) -> list[list[str]]:
    """The commands that an error of exit code 3 names, without their first word."""
    (found,) = re.findall(r"To draw the rest: (.*)", str(call(*args, code=3).exception))
    return [shlex.split(command)[1:] for command in found.split(" && ")]


def test_advice_after_a_move_and_other_commands_ends_in_a_whole_run(with_null: Path, tmp_path: Path) -> None:
    sample = ("sample", "-m", with_null, "--steps", 1, "-q", "-o", "run")
    call(*sample, "--label", "0-1")
    call(*sample, "--label", 2, "--num", 2, "--shard", "0/1")
    call("sweep", *sample[1:], "--label", 3, "--w", "0,2")
    moved = tmp_path / "else where"
    os.rename("run", moved)
    images = sorted(moved.glob("images/*/*/*.png"))
    assert len(images) == 6
    images[0].unlink()
    (one,) = advised("verify", moved)
    assert one[0] == "sweep"
    assert str(moved) in one
    for image in images[1:]:
        image.unlink()
    kept = moved / "images"
    commands = advised("merge", moved)
    assert [command[0] for command in commands] == ["sample", "sample", "sweep"]
    for command in commands:
        assert "--shard" not in command
        call(*command)
    assert sorted(kept.glob("*/*/*.png")) == images
    assert json.loads(call("verify", moved, "--json").stdout)["complete"]
    assert not (tmp_path / "run").exists()


def test_advice_needs_no_standard_input_a_second_time(with_null: Path) -> None:
    args = ["sample", "-m", str(with_null), "--label", "-", "--steps", "1", "-q", "-o", "run"]
    assert CliRunner().invoke(app, args, input="1\ttabby\n3\n").exit_code == 0
    for image in Path("run").glob("images/*/*/*.png"):
        image.unlink()
    (command,) = advised("verify", "run")
    assert "-" not in command
    call(*command)
    call("verify", "run")


def test_advice_works_from_any_directory(with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink(with_null, "model")
    Path("labels.txt").write_text("0\n3\n1\n")
    Path("deep/er").mkdir(parents=True)
    args = (
        "sample",
        "-m",
        "model",
        "--mode",
        "classifier",
        "-c",
        "model/classifier:0.5",
        "--label",
        "@labels.txt",
        "--steps",
        1,
    )
    call(*args, "-q", "-o", "deep/run", "--report")
    for here, run in ((".", "deep/run"), ("deep", "run"), ("deep/run", "."), ("deep/er", "../run")):
        monkeypatch.chdir(tmp_path / here)
        next(Path(run).glob("images/*/*/*.png")).unlink()
        (command,) = advised("verify", run)
        assert "--report" not in command
        call(*command)
        call("verify", run)
    assert not list(tmp_path.rglob("guidegen-runs"))
