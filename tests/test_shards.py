"""Shards of a plan: who draws what, side by side, killed and gone on with, verified and merged."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, settings_of
from filelock import FileLock
from PIL import Image

from guidegen.cli import app
from guidegen.errors import GuidegenError, UsageError
from guidegen.evaluate.measure import open_drawn
from guidegen.runs.directory import Run
from guidegen.runs.manifest import Manifests
from guidegen.spec.plan import Plan
from guidegen.spec.shard import Shard

ARGS = ("--label", "0-2", "--num", "2", "--w", "0,1,3", "--steps", "2", "--deterministic", "--batch-size", "4")


def files(folder: Path) -> dict[str, str]:
    """file -> sha256 of all that is not hidden, but for run.json, which holds the command."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    digests.pop("run.json")
    return digests


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of one manifest, none of them torn."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, with_null: Path) -> Path:
    """The sweep as one process draws it, merged with all files for evaluators."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    call("sweep", "-m", with_null, *ARGS, "-o", folder)
    call("merge", folder, "--npz", "--tar", "--tar-size", 0.008)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def draw_shards(model: Path, count: int, folder: str = "run", skip: int | None = None) -> None:
    for i in range(count):
        if i != skip:
            assert call("sweep", "-m", model, *ARGS, "-o", folder, "--shard", f"{i}/{count}").stdout == f"{folder}\n"


# --- the same files however the work is cut


@pytest.mark.parametrize("count", [1, 4])
def test_merged_shards_are_the_same_bytes_as_one_process(with_null: Path, whole: Path, tmp_path: Path, count: int) -> None:
    draw_shards(with_null, count)
    run = tmp_path / "run"
    manifests = sorted(run.glob("manifest*"))
    assert [path.name for path in manifests] == [f"manifest.{i}-of-{count}.jsonl" for i in range(count)]
    assert not (run / "grid.png").exists()
    samples = [{(row["label"], row["seed"]) for row in rows_of(path)} for path in manifests]
    assert sum(map(len, samples)) == len(set.union(*samples)) == 6, "all weights of a sample are in one shard"
    assert sum(len(rows_of(path)) for path in manifests) == 18
    call("merge", "run", "--npz", "--tar", "--tar-size", 0.008)
    assert files(run) == files(whole)
    assert not list(run.glob("manifest.*-of-*"))
    call("verify", "run")


def test_other_batch_sizes_are_within_one_level(with_null: Path, whole: Path, tmp_path: Path) -> None:
    call("sweep", "-m", with_null, *ARGS[:-3], "--batch-size", 7, "-o", "run", "-q")
    for row in rows_of(whole / "manifest.jsonl"):
        with Image.open(tmp_path / "run" / row["file"]) as mine, Image.open(whole / row["file"]) as theirs:
            assert np.abs(np.asarray(mine).astype(int) - np.asarray(theirs)).max() <= 1


def test_default_directory_is_the_same_for_all_shards(with_null: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", with_null, "--label", "0-1", "--steps", 1, "--batch-size", 1)
    made = {call(*args, "--shard", f"{i}/2").stdout for i in range(2)} | {call(*args).stdout}
    assert len(made) == 1, "and for one process, which finds all drawn"
    assert len(list(tmp_path.glob("guidegen-runs/*/manifest.*-of-2.jsonl"))) == 2


def test_one_process_goes_on_from_shards_and_other_shards_from_those(with_null: Path, whole: Path, tmp_path: Path) -> None:
    draw_shards(with_null, 3, skip=1)
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.glob("images/**/*.png")}
    assert len(before) == 12
    call("sweep", "-m", with_null, *ARGS, "-o", "run", "--shard", "0/2")
    call("sweep", "-m", with_null, *ARGS, "-o", "run")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    call("merge", "run", "--npz", "--tar", "--tar-size", 0.008)
    assert files(run) == files(whole)


def test_shards_that_are_all_there_are_complete_before_they_are_merged(with_null: Path, tmp_path: Path) -> None:
    for i in range(2):
        call("sweep", "-m", with_null, *ARGS, "-o", "run", "--shard", f"{i}/2")
    assert not (tmp_path / "run/grid.png").exists()
    assert json.loads(call("verify", "run", "--json").stdout)["complete"]
    drawn = open_drawn(tmp_path / "run")  # as evaluate and report do
    assert (drawn.missing, drawn.corrupt, len(drawn.rows)) == ([], [], 18)
    assert "warning" not in call("report", "run").stderr
    (tmp_path / "run" / drawn.rows[0]["file"]).unlink()
    assert open_drawn(tmp_path / "run").missing != []


def test_more_shards_than_samples_leave_some_with_nothing_to_do(with_null: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", "run", "--json", "--shard")
    assert call(*args, "3/4").stdout == ""
    assert json.loads(call(*args, "0/4").stdout)["seed"] == 0
    call("merge", "run")


# --- locks


def test_second_process_on_one_shard_is_refused_and_other_shards_are_not(with_null: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", with_null, "--label", "0-1", "--steps", 1, "-o", "run")
    call(*args, "--shard", "0/2")
    with FileLock(tmp_path / "run" / ".lock.0-of-2"):
        refused = call(*args, "--shard", "0/2", code=75)
        assert "shard 0/2" in str(refused.exception)
        call(*args, "--shard", "1/2")
        for other in (["--shard", "0/3"], [], ["--overwrite"]):
            assert "0-of-2" in str(call(*args, *other, code=75).exception)
        assert "0-of-2" in str(call("merge", "run", code=75).exception)
        call("verify", "run")
    with FileLock(tmp_path / "run" / ".lock"):
        assert "all of it" in str(call(*args, "--shard", "0/2", code=75).exception)
    call(*args, "--shard", "0/2")


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, path: Path, at_the_end: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A lock that somebody else holds until the first wait for it."""
    lock = FileLock(path)

    def wait(_: float) -> None:
        at_the_end()
        lock.release()

    monkeypatch.setattr("guidegen.cli.signals.sleep", wait)
    with lock:
        yield
        assert not lock.is_locked, "it was waited for"


def test_wait_goes_on_when_the_other_process_has_ended(
    with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("sample", "-m", with_null, "--label", "0-1", "--steps", 1, "-o", "run", "--wait")
    call(*args, "--shard", "0/2")
    for name, flags in (
        (".lock.0-of-2", ("--shard", "0/2", "-q")),
        (".lock", ("--shard", "1/2", "-q")),
        (".lock.0-of-2", ()),
    ):
        with held(monkeypatch, tmp_path / "run" / name):
            waited = call(*args, *flags)
        assert waited.stdout == "run\n"
        assert waited.stderr.count("Waiting for it.") == (not flags)
    with held(monkeypatch, tmp_path / "run/.lock"):
        assert call("merge", "run", "--wait").stdout == "run/manifest.jsonl\n"


def test_wait_does_not_draw_over_a_file_that_the_other_process_made(
    with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("sample", "-m", with_null, "--steps", 1, "-q", "--wait", "-o", "x.png", "--label")
    call(*args, 0)
    file = tmp_path / "x.png"
    made = file.read_bytes()
    for label, code in ((0, 0), (1, 2)):
        file.unlink()
        (tmp_path / "x.png.partial").mkdir()
        with held(monkeypatch, tmp_path / "x.png.partial/.lock", lambda: file.write_bytes(made)):
            call(*args, label, code=code)
        assert file.read_bytes() == made
        assert not (tmp_path / "x.png.partial").exists()


def test_a_signal_ends_the_wait(with_null: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "guidegen", "sample", "-m", str(with_null), "--label", "0", "-o", "run", "--wait"]
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run/.lock"),
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr
        assert "Waiting for it." in process.stderr.readline()
        process.terminate()
        assert process.wait(timeout=30) == 143


def test_lock_that_a_dead_process_left_behind_is_taken_over(with_null: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".lock.0-of-2", ".run.json.lock"):
        (tmp_path / "run" / name).write_text("4194304")
    call("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", "run", "--shard", "0/2")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--shard", "2/2"], "--shard"),
        (["--shard", "auto"], "torchrun"),
        (["--shard", "0/2", "-o", "x.npz"], "merge"),
        (["--shard", "0/2", "-o", "-"], "merge"),
        (["--shard", "0/2", "--overwrite"], "other shards"),
        (["--shard", "0/2", "--evaluate", "REAL"], "all shards"),
        (["--evaluate", "REAL"], "at least 6 images"),
        (["--evaluate", "REAL", "--dry-run"], "at least 6 images"),
    ],
)
def test_shard_that_cannot_be_is_refused(with_null: Path, tmp_path: Path, flags: list[str], word: str) -> None:
    np.savez(tmp_path.parent / "real.npz", arr_0=np.zeros((8, 8, 8, 3), np.uint8), arr_1=np.arange(8) % 2)
    flags = [str(tmp_path.parent / "real.npz") if flag == "REAL" else flag for flag in flags]
    assert word in str(call("sample", "-m", with_null, "--label", "0-1", *flags, code=2).exception)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_dead_shard_are_its_own_to_clear(with_null: Path, tmp_path: Path) -> None:
    draw_shards(with_null, 2)
    run = tmp_path / "run"
    of = [rows_of(run / f"manifest.{i}-of-2.jsonl")[0]["file"] for i in range(2)]
    parts = [(run / file).with_name(f".{Path(file).name}.4194304.part") for file in of]
    for part in parts:
        part.touch()
    with (run / "manifest.0-of-2.jsonl").open("ab") as file:
        file.write(b'{"file": "images/w3')
    call("sweep", "-m", with_null, *ARGS, "-o", "run", "--shard", "0/2")
    assert [part.exists() for part in parts] == [False, True]
    assert len(rows_of(run / "manifest.0-of-2.jsonl")) == 9


# --- verify and merge


def verified(code: int = 3) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(call("verify", "run", "--json", code=code).stdout)
    assert (facts.pop("type"), facts.pop("path"), facts.pop("run")) == ("verify", *[str(Path("run").absolute())] * 2)
    return {kind: found for kind, found in facts.items() if found not in ([], 18)}


def test_verify_and_merge_of_a_whole_run(copy: Path, whole: Path) -> None:
    assert verified(0) == {"complete": True}
    assert "18 of 18" in call("verify", "run").stdout
    call("merge", "run", "--npz", "--tar", "--tar-size", 0.008)
    assert files(copy) == files(whole), "merged twice is merged once"


def test_verify_names_what_is_missing_corrupt_or_extra_and_merge_refuses(with_null: Path, copy: Path) -> None:
    rows = rows_of(copy / "manifest.jsonl")
    missing, corrupt, unrecorded = (row["file"] for row in rows[:3])
    (copy / missing).unlink()
    (copy / corrupt).write_bytes((copy / corrupt).read_bytes()[:-9])
    lines = [json.dumps(row) + "\n" for row in rows if row["file"] != unrecorded]
    (copy / "manifest.jsonl").write_text("".join(lines))
    before = files(copy)
    assert verified() == {"complete": False, "missing": [missing, unrecorded], "corrupt": [corrupt]}
    result = call("verify", "run", code=3)
    assert "15 of 18" in result.stdout
    assert f"corrupt: {corrupt}" in result.stdout
    assert "guidegen" in str(result.exception), "the command that draws the rest"
    assert "lacks 3 of 18" in str(call("merge", "run", code=3).exception)
    assert files(copy) == before
    call("sweep", "-m", with_null, *ARGS, "-o", "run")
    (copy / "images/w9.0").mkdir()
    (copy / "images/w9.0/stray.png").touch()
    assert verified() == {"complete": False, "extra": ["images/w9.0/stray.png"]}
    assert "stray.png" in call("merge", "run").stderr


def test_verify_needs_a_run_that_says_its_plan(copy: Path, tmp_path: Path) -> None:
    about = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(about | {"plans": [{"labels": [0]}]}))
    assert "no plan" in str(call("verify", "run", code=2).exception)
    assert "run directory" in str(call("verify", tmp_path, code=2).exception)
    assert "run directory" in str(call("merge", tmp_path, code=2).exception)
    assert not (tmp_path / ".lock").exists()


def test_second_plan_in_one_directory_joins_the_first(with_null: Path, tmp_path: Path) -> None:
    for labels, code in (("0", 0), ("0-1", 0), ("0", 0)):
        call("sample", "-m", with_null, "--label", labels, "--steps", 1, "-o", "run", code=code)
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert [plan["labels"] for plan in about["plans"]] == [[0], [0, 1]]
    shutil.rmtree(tmp_path / "run/images/w3.0/label0001")
    assert json.loads(call("verify", "run", "--json", code=3).stdout)["missing"] == ["images/w3.0/label0001/000000.png"]


def test_plan_of_other_prompts_is_refused_and_leaves_run_json_alone(tmp_path: Path) -> None:
    def opened(*prompts: str) -> None:
        with Run(tmp_path / "run", settings_of(), {}, plan=Plan([None], [0], [3.0], prompts=prompts)):
            pass

    opened("a fox")
    opened("a fox", "a hen")
    with pytest.raises(UsageError, match="'a hen' there, 'an owl' now"):
        opened("a fox", "an owl")
    assert len(json.loads((tmp_path / "run/run.json").read_text())["plans"]) == 2


def test_rows_are_read_while_another_shard_adds_to_its_own(with_null: Path, tmp_path: Path) -> None:
    draw_shards(with_null, 2)
    manifests = Manifests(tmp_path / "run")
    before = {file: manifests.read(place) for file, place in manifests.offsets().items()}
    with (tmp_path / "run/manifest.0-of-2.jsonl").open("a") as file:
        file.write(
            json.dumps(before["images/w3.0/label0000/000000.png"] | {"file": "images/w9.0/nolabel/000000.png"}) + "\n"
        )
    assert {file: manifests.read(place) for file, place in manifests.offsets().items()} == before
    assert len(Manifests(tmp_path / "run").offsets()) == len(before) + 1
    assert len(Manifests(tmp_path / "run", Shard(1, 2)).offsets()) == 9


def test_plan_in_run_json_does_not_grow_with_the_number_of_images(with_null: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", with_null, "--label", "0-4", "--steps", 1, "--num", 20_000, "-o", "run")
    call(*args, "--shard", "99999/100000")
    assert (tmp_path / "run/run.json").stat().st_size < 4_000
    assert json.loads(call(*args, "--dry-run", "--json").stdout)["cells"] == 100_000


def test_npz_of_each_weight_holds_its_images(whole: Path) -> None:
    rows = rows_of(whole / "manifest.jsonl")
    for w in (0.0, 1.0, 3.0):
        some = [row for row in rows if row["w"] == w]
        with np.load(whole / f"w{w}.npz", allow_pickle=False) as data:
            assert data["arr_1"].tolist() == [row["label"] for row in some]
            for image, row in zip(data["arr_0"], some, strict=True):
                with Image.open(whole / row["file"]) as picture:
                    assert (np.asarray(picture) == image).all()


def test_tar_shards_are_webdataset_samples_of_limited_size(whole: Path) -> None:
    paths = sorted(whole.glob("w3.0-*.tar"))
    assert [path.name for path in paths] == [f"w3.0-{i:05d}.tar" for i in range(len(paths))]
    assert len(paths) > 1
    names, seen = [], []
    for path in paths:
        with tarfile.open(path) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in archive} == {(0, 0, 0, "")}
        names += list(members)
        keys = sorted({name.split(".")[0] for name in members})
        assert len(members) == 3 * len(keys)
        assert path.stat().st_size <= 8_000 + 10_240, "past the limit by the end of the archive alone"
        for key in keys:
            row = json.loads(members[f"{key}.json"])
            assert hashlib.sha256(members[f"{key}.png"]).hexdigest() == row["sha256"]
            assert int(members[f"{key}.cls"]) == row["label"]
            seen.append(row)
    assert names == sorted(names)
    assert seen == [row for row in rows_of(whole / "manifest.jsonl") if row["w"] == 3.0]


# --- killed at any moment


def forked(*args: object) -> int:
    """The command in a fork of this process, which has torch loaded already; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        app([str(arg) for arg in args], standalone_mode=False)
        code = 0
    except GuidegenError as error:
        os.write(2, str(error).encode())
        code = error.code
    finally:
        os._exit(code)


SLOW = ("--label", "0-3", "-n", 3, "--steps", 12, "--batch-size", 2, "--deterministic", "-o", "run")


def images_on_disk(count: int) -> None:
    """Waits until that many images have a row."""
    end = time.monotonic() + 60
    while sum(path.read_bytes().count(b"\n") for path in Path("run").glob("manifest*.jsonl")) < count:
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, with_null: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    call("sample", "-m", with_null, *SLOW[:-1], folder)
    call("merge", folder)
    return files(folder)


def test_shards_that_start_at_once_need_no_word_of_each_other(
    with_null: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    pids = [forked("sample", "-m", with_null, *SLOW, "--shard", f"{i}/6") for i in range(6)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 6, Path("err").read_text()
    call("merge", "run")
    assert files(tmp_path / "run") == undisturbed


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    with_null: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    chance = random.Random(5)
    for i in range(5):
        pid = forked("sample", "-m", with_null, *SLOW, "--shard", f"{i % 2}/2")
        time.sleep(chance.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for i in range(2):
        call("sample", "-m", with_null, *SLOW, "--shard", f"{i}/2")
    assert len(rows_of(tmp_path / "run/manifest.0-of-2.jsonl")) == 6
    assert not list((tmp_path / "run").rglob("*.part"))
    call("merge", "run")
    assert files(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 143), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_after_the_batch_and_says_the_command_that_resumes(
    with_null: Path, tmp_path: Path, undisturbed: dict[str, str], number: signal.Signals, code: int
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the suite may run in the background
    pid = forked("sample", "-m", with_null, *SLOW)
    signal.signal(signal.SIGINT, before)
    images_on_disk(1)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert number.name in Path("err").read_text()
    assert "To go on: guidegen" in Path("err").read_text()
    rows = rows_of(tmp_path / "run/manifest.jsonl")
    assert len(rows) % 2 == 0, "whole batches"
    assert {row["file"]: row["sha256"] for row in rows}.items() <= undisturbed.items()
    assert len(rows) < 12


def test_second_signal_ends_at_once(with_null: Path, tmp_path: Path) -> None:
    pid = forked("sample", "-m", with_null, "--label", 0, "--num", 2, "--steps", 1000, "--batch-size", 1, "-o", "run")
    end = time.monotonic() + 30
    while not (tmp_path / "run/manifest.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # two of one number that are pending at once are one
        time.sleep(0.2)
        os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert rows_of(tmp_path / "run/manifest.jsonl") == [], "the batch, which takes seconds, was waited for"


FULL = """
set -e
mkdir run && mount -t tmpfs -o size=48k tmpfs run
code=0; "$@" 2>err || code=$?
cp -r run full; echo $code
mount -o remount,size=4m run
"$@"
cp -r run done
"""


def test_full_file_system_keeps_what_was_finished_and_goes_on_with_more_room(
    with_null: Path, tmp_path: Path, undisturbed: dict[str, str], environment: dict[str, str]
) -> None:
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    command = [sys.executable, "-m", "guidegen", "sample", "-m", str(with_null), *map(str, SLOW)]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL, "sh", *command], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "74\nrun\n", result.stderr
    assert "No space left" in Path("err").read_text()
    assert "intact" in Path("err").read_text()
    rows = rows_of(tmp_path / "full/manifest.jsonl")
    assert 1 <= len(rows) < 12
    assert {row["file"]: row["sha256"] for row in rows}.items() <= files(tmp_path / "full").items()
    assert not list((tmp_path / "full").rglob("*.part"))
    call("merge", "done")
    assert files(tmp_path / "done") == undisturbed


WORKER = """
import os, signal
from guidegen.cli import main
from guidegen.runs.directory import Run
write, images = Run.write, []

def fragile(*args, **kwargs):
    row = write(*args, **kwargs)
    images.append(row)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(images) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return row

Run.write = fragile
main()
"""


def test_torchrun_worker_that_dies_once_ends_in_a_whole_run(
    with_null: Path, tmp_path: Path, undisturbed: dict[str, str], environment: dict[str, str]
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    words = ["--num" if word == "-n" else str(word) for word in SLOW]  # which torchrun takes for its own, but for the "--"
    command = [*launch, "--standalone", "worker.py", "--", "sample", "-m", str(with_null), *words, "--shard", "auto"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "SIGKILL" in result.stderr or "exitcode: -9" in result.stderr
    call("verify", "run")
    call("merge", "run")
    assert files(tmp_path / "run") == undisturbed
