"""`guidegen submit` without Slurm: what it refuses, the jobs that it makes, and processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from typer.testing import CliRunner

from guidegen.cli import app, jobs, submit
from guidegen.cli.jobs import Task, Work
from guidegen.errors import UsageError

DRAW = ("--label", "0-2", "-n", "2", "--steps", "2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The work that would be started on this machine."""
    kept: list[Work] = []
    job = type("Submitted", (), {"job_id": "17"})()

    def keep(work: Work, at_once: int | None, gpus: int | None) -> tuple[str, Any]:
        kept.append(work)
        return "17", job

    monkeypatch.setattr(submit, "to_this_machine", keep)
    return kept


@pytest.mark.parametrize(
    ("flags", "words", "reason"),
    [
        ([], ["grid", "run"], "takes sample or sweep"),
        ([], ["sweep", *DRAW, "--shard", "0/2"], "--shards N"),
        ([], ["sweep", *DRAW, "--preview"], "--preview"),
        ([], ["sweep", *DRAW, "--overwrite"], "--overwrite"),
        ([], ["sweep", *DRAW, "-o", "x.png"], "run directory"),
        ([], ["sample", "--label", "0", "-o", "-"], "run directory"),
        ([], ["sweep", "--label", "9"], "--label 9"),
        ([], ["sweep", *DRAW, "--device", "tpu"], "--device 'tpu'"),
        ([], ["sweep", "--label", "0", "--evaluate", "real.npz"], "at least 6 images"),
        ([], ["sweep", *DRAW, "--evaluate", "nowhere"], "nowhere"),
        ([], ["sweep", *DRAW, "--judge", "x"], "--evaluate"),
        (["--partition", "gpu", "--mem", 4], ["sweep", *DRAW], "--mem, --partition: for Slurm"),
        (["--gpus", 99], ["sweep", *DRAW], "--gpus 99"),
        (["--time", "0"], ["sweep", *DRAW], "--time"),
        (["--time", "1:2:3:4"], ["sweep", *DRAW], "--time"),
        (["--time", "x"], ["sweep", *DRAW], "--time"),
        (["--slurm", "array=0-9"], ["sweep", *DRAW], "guidegen submit sets it"),
        (["--slurm", "a b=1"], ["sweep", *DRAW], "KEY=VALUE"),
        (["--slurm", "qos="], ["sweep", *DRAW], "KEY=VALUE"),
    ],
)
def test_refused_before_anything_is_submitted(
    with_null: Path, tmp_path: Path, flags: list[str], words: list[str], reason: str
) -> None:
    (real := tmp_path.parent / "real-of-submit.npz").unlink(missing_ok=True)
    np.savez(real, arr_0=np.zeros((8, 8, 8, 3), np.uint8), arr_1=np.arange(8) % 2)
    words = [str(real) if word == "real.npz" else word for word in words]
    refused = call("submit", "--local", *flags, "--", words[0], "-m", with_null, *words[1:], code=2)
    assert reason in str(refused.exception)
    assert list(tmp_path.iterdir()) == []


def test_run_of_other_settings_is_refused_and_another_dtype_is_not(with_null: Path, submitted: list[Work]) -> None:
    call("sweep", "-m", with_null, *DRAW, "--dtype", "bf16", "-o", "run", "-q", "--w", "1")
    words = ("submit", "--local", "-q", "--", "sweep", "-m", with_null, "--label", "0-2", "-n", "2", "--w", "1", "-o", "run")
    assert "steps 2 there" in str(call(*words, "--steps", "3", code=2).exception)
    assert "dtype bf16 there" in str(call(*words, "--steps", "2", "--dtype", "fp32", code=2).exception)
    call(*words, "--steps", "2")  # in the dtype that --dtype auto is on the machines of the jobs
    call(*words, "--steps", "2", "--device", "cuda")  # theirs too
    assert len(submitted) == 2


def test_jobs_are_commands_that_need_nothing_of_this_one(with_null: Path, tmp_path: Path, submitted: list[Work]) -> None:
    np.savez("real.npz", arr_0=np.zeros((8, 8, 8, 3), np.uint8), arr_1=np.arange(8) % 2)
    drawing = ["sweep", "-m", str(with_null), "--label", "-", "-n", "2", "--seed", "random", "--w", "1,-2", "-o", "run"]
    after = ["--json", "--evaluate", "real.npz", "--resize", "box", "--report"]
    words = ["submit", "--local", "--json", "--shards", "99", "--time", "1-2:03:04", "--", *drawing, *after]
    line = json.loads(CliRunner().invoke(app, words, input="lion\ntabby\n0\n").stdout)
    assert line == {
        "type": "job", "path": str(tmp_path / "run/.jobs"), "run": str(tmp_path / "run"),
        "job": "17", "finish": "17", "shards": 6, "images": 12,
    }  # fmt: skip
    (work,) = submitted
    assert (work.folder, work.minutes) == (Path("run/.jobs"), 26 * 60 + 4)
    for i, task in enumerate(work.tasks):
        ((name, *words),) = task._commands
        pairs = dict(zip(words[::2], words[1::2], strict=False))
        assert (name, pairs["--shard"], pairs["--out"]) == ("sweep", f"{i}/6", "run")
        assert pairs["--seed"].isdecimal()
        assert [word for flag, word in pairwise(words) if flag == "--label"] == ["4", "1", "0"]
        assert words[-1] == "--wait"
        assert not {"--json", "--evaluate", "--report"} & set(words)
    assert work.last._commands == [
        ["merge", "run", "--wait"],
        ["verify", "run"],
        ["evaluate", "run", "--reference", "real.npz", "--resize=box"],
        ["report", "run", "-o", "run/report.html"],
    ]


def test_dry_run_prints_what_would_be_drawn(with_null: Path, tmp_path: Path, submitted: list[Work]) -> None:
    printed = call("submit", "--local", "--", "sweep", "-m", with_null, *DRAW, "--w", "0,1", "--dry-run").stdout
    assert printed.startswith("12 images of 8x8")
    assert not submitted
    assert list(tmp_path.iterdir()) == []


def test_processes_of_this_machine_and_the_error_of_the_last(
    with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(job: Any, afterwards: Any, count: int, minutes: int) -> Work:
        return Work(Path("run/.jobs"), [Task([["--version"]])] * 3, Task([["verify", "nothing"]]), minutes)

    monkeypatch.setattr(submit, "_work", work)
    words = ("submit", "--local", "--array-parallelism", 2, "--wait", "--", "sample", "-m", with_null, *DRAW, "-o", "run")
    result = call(*words, code=2)
    assert "nothing is not a run directory" in str(result.exception)
    logs = {path.name.partition("_")[0]: path.read_text() for path in tmp_path.glob("run/.jobs/*_log.out")}
    last = logs.pop(result.stdout.strip())
    assert "$ guidegen verify nothing\nerror: nothing is not a run directory" in last
    assert len(logs) == 3
    assert all("\nguidegen 0." in log and "$ guidegen --version\n" in log for log in logs.values())


@pytest.mark.parametrize(
    ("visible", "at_once", "gpus", "devices"),
    [
        (None, None, None, [(0,), (1,), (2,), (3,)]),
        (None, None, 2, [(0, 1), (2, 3)]),
        (None, 2, None, [(0,), (1,)]),
        (None, None, 0, [()]),
        (None, 3, 0, [(), (), ()]),
        ("5,7", None, 1, [(5,), (7,)]),
        ("5,7", 2, 2, None),
    ],
)
def test_gpus_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, at_once: int | None, gpus: int | None, devices: Any
) -> None:
    started: list[Any] = []

    def keep(executor: Any, array: Any) -> Any:
        started.append((array._gpus, executor.parameters["visible_gpus"]))
        return type("Job", (), {"job_id": "1"})

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("submitit.LocalExecutor.submit", keep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    work = Work(Path("jobs"), [Task([])] * 5, Task([]), 60)
    if devices is None:
        with pytest.raises(UsageError, match="this machine has 2"):
            jobs.to_this_machine(work, at_once, gpus)
        return
    jobs.to_this_machine(work, at_once, gpus)
    assert [tuple(some) for some in started[0][0]] == devices
    assert started[0][1] == ((5, 7) if visible else (0, 1, 2, 3))


def test_a_job_that_ends_without_a_result() -> None:
    paths = type("Paths", (), {"result_pickle": Path("nowhere")})
    error = jobs.error_of(type("Job", (), {"paths": paths})(), "killed")
    assert error is not None
    assert (str(error), error.code) == ("killed", 1)


def test_submitit_is_an_extra(with_null: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from guidegen.cli import app; assert not {'submitit', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused = call("submit", "--", "sweep", "-m", with_null, *DRAW, code=2)
    assert "pip install submitit" in str(refused.exception)
