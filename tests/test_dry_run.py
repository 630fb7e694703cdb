"""`--dry-run` says how long a command takes here, and refuses what the command refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import call

from guidegen.runs.locks import lock_run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUIDEGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timings"


def planned(*args: object, code: int = 0) -> dict[str, Any]:
    return dict(json.loads(call(*args, "--dry-run", "--json", code=code).stdout))


def test_what_calls_took_is_known_for_the_same_networks_mode_and_size(with_null: Path, cache: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 4, "-q")
    assert planned(*args)["seconds_left"] is None
    assert "time: not known" in call(*args, "--dry-run").stdout
    call(*args, "-n", 3, "-o", "run")
    (place,) = cache.glob("*.json")
    each = json.loads(place.read_text())["seconds"]["3"]
    assert 0 < each < 5
    plan = planned(*args, "-n", 10, "-w", 1)
    assert (plan["nfe"], plan["seconds_a_call"], plan["measured_batch"]) == (40, each, 3)
    assert plan["seconds_left"] == pytest.approx(40 * each)
    assert planned(*args, "-n", 3, "-o", "run")["seconds_left"] == 0
    place.write_text(json.dumps({"seconds": {"3": 2.0, "64": 0.5}}))
    assert (
        "time: about 100 seconds, 0.5 s a call as measured here in batches of 64"
        in call(*args, "-n", 25, "--batch-size", 25, "--dry-run").stdout
    )
    assert "about 4.44 hours" in call(*args, "-n", 1000, "--dry-run", "--batch-size", 4).stdout
    for other in (("--mode", "classifier"), ("--dtype", "bf16")):
        assert planned(*args, *other)["seconds_a_call"] is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": {"0": 1}}', '{"seconds": {"3": -1}}', '{"seconds": {"x": 1}}'])
def test_damaged_timings_are_not_known_and_are_replaced(with_null: Path, cache: Path, text: str) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 2, "-q")
    call(*args, "-o", "a")
    (place,) = cache.glob("*.json")
    place.write_text(text)
    assert planned(*args)["seconds_a_call"] is None
    call(*args, "-o", "b")
    assert planned(*args)["seconds_a_call"] > 0


@pytest.mark.parametrize("where", ["", "/dev/null/x", "/proc/nothing"])
def test_where_timings_cannot_be_kept_nothing_is_lost(with_null: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDEGEN_CACHE", where)
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 2, "-q")
    call(*args, "-o", "a")
    assert planned(*args)["seconds_a_call"] is None


def test_a_run_that_another_process_draws_into_is_refused(with_null: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 2, "-q", "-o", "run")
    call(*args)
    lock = lock_run(Path("run"))
    try:
        for refused in (args, (*args, "--overwrite"), (*args, "--shard", "0/2")):
            assert "Another process" in str(call(*refused, "--dry-run", code=75).exception)
        assert planned(*args, "--wait")["there"] == 1
    finally:
        lock.release()
    before = sorted(Path("run").rglob("*"))
    assert planned(*args, "--shard", "0/1")["there"] == 1
    assert sorted(Path("run").rglob("*")) == before


def test_files_other_settings_and_broken_weights_are_refused(with_null: Path, without_null: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 2, "-q")
    for name in ("x.png", "x.npz"):
        call(*args, "-o", name)
        plan = planned(*args, "-o", name)
        assert (plan["there"], plan["nfe_left"]) == (1, 0)
        assert "something else" in str(call(*args, "--seed", 1, "-o", name, "--dry-run", code=2).exception)
        assert planned(*args, "--seed", 1, "-o", name, "--overwrite")["there"] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    assert "not a run" in str(call(*args, "-o", "mine", "--overwrite", "--dry-run", code=2).exception)
    swept = ("sweep", *args[1:], "-w", "0,1", "-o", "by", "--by", "guidance=cfg,own.py:mine")
    method = "def mine(u, c, w, step):\n    return u + w * (c - u)\n"
    Path("own.py").write_text(method)
    call(*swept)
    Path("own.py").write_text(f"{method}\n")
    errors = [str(call(*swept, *dry, code=2).exception) for dry in ((), ("--dry-run",))]
    assert errors[0] == errors[1]
    assert "other settings" in errors[0]
    (model,) = without_null.glob("*.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((without_null / "config.json").read_bytes())
    (broken / model.name).write_bytes(model.read_bytes()[:2000])
    assert "cut short" in str(call("sample", "-m", broken, "--label", 1, "--mode", "none", "--dry-run", code=4).exception)
