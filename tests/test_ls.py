"""`guidegen ls`: every run below a folder, how far it got, and nothing that is no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_runs_are_listed_with_what_they_hold(with_null: Path, tmp_path: Path) -> None:
    args = ("-m", with_null, "--label", 1, "--steps", 2, "-q")
    call("sweep", *args, "-w", "0,3", "-n", 2)
    call("sample", *args, "-o", "guidegen-runs/deeper/other")
    (tmp_path / "guidegen-runs" / "notes").mkdir()
    lines = [json.loads(line) for line in call("ls", "--json").stdout.splitlines()]
    assert [(line["images"], line["planned"]) for line in lines] == [(4, 4), (1, 1)]
    assert all(line["type"] == "run" and line["path"] == line["run"] for line in lines)
    assert lines[1]["path"] == str(tmp_path / "guidegen-runs" / "deeper" / "other")
    assert lines[0]["bytes"] == sum(p.stat().st_size for p in Path(lines[0]["path"]).rglob("*") if p.is_file())
    first, second = (line.split("\t") for line in call("ls").stdout.splitlines())
    assert first[1:3] == ["with-null · classifier-free guidance · DDIM, 2 steps", "4 of 4"]
    assert second[0] == "guidegen-runs/deeper/other"
    assert second[-1].endswith("ago")
    assert call("ls", "guidegen-runs/deeper").stdout.splitlines()[0].startswith("guidegen-runs/deeper/other\t")


def test_what_cannot_be_read_is_left_out_with_the_reason(with_null: Path, tmp_path: Path) -> None:
    call("sample", "-m", with_null, "--label", 1, "--steps", 2, "-q", "-o", "runs/good")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "run.json").write_text("{")
    listed = call("ls", "runs")
    assert [line.split("\t")[0] for line in listed.stdout.splitlines()] == ["runs/good"]
    assert "note: runs/bad is left out" in listed.stderr
    assert "is not a folder" in str(call("ls", "nowhere", code=2).exception)


def test_a_dry_run_knows_what_is_there_and_refuses_what_the_command_would(with_null: Path, tmp_path: Path) -> None:
    args = ("sweep", "-m", with_null, "--label", "0-1", "--steps", 2, "-w", "0,3", "-n", 2, "-o", "run")
    plan = json.loads(call(*args, "--dry-run", "--json").stdout)
    assert (plan["cells"], plan["there"], plan["nfe_left"]) == (8, 0, plan["nfe"])
    assert not (tmp_path / "run").exists()
    call(*args, "-q")
    for file in sorted((tmp_path / "run" / "images" / "w3.0").rglob("*.png"))[:3]:
        file.unlink()
    plan = json.loads(call(*args, "--dry-run", "--json").stdout)
    assert (plan["cells"], plan["there"], plan["nfe_left"]) == (8, 5, 3 * 2 * 2)
    assert "5 of them are there already; 3 are left, 12 calls" in call(*args, "--dry-run").stdout
    assert json.loads(call(*args, "--dry-run", "--json", "--overwrite").stdout)["there"] == 0
    assert "other settings: steps 2 there, 3 now" in str(call(*args, "--steps", 3, "--dry-run", code=2).exception)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.txt").write_text("x")
    assert "not a run directory" in str(call(*args[:-1], "mine", "--dry-run", code=2).exception)
