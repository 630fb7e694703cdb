"""What goes wrong: the exit code, the message, what stays on disk, and that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]

WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 91\n"
SLOW = ("--label", "0-1", "--num", "4", "--steps", "40", "--batch-size", "1", "-o", "run")


@pytest.fixture
def model(with_null: Path, tmp_path: Path) -> Path:
    """A checkpoint of this test's own, to be damaged."""
    return Path(shutil.copytree(with_null, tmp_path / "model"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, with_null: Path) -> Path:
    """The run that `SLOW` makes when nothing happens to it."""
    where = tmp_path_factory.mktemp("undisturbed")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GUIDEGEN")}
    command = [sys.executable, "-m", "guidegen", "sample", "-m", str(with_null), *SLOW]
    environment = kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout) == (0, "run\n"), result.stderr
    return where / "run"


def edit(path: Path, **changes: Any) -> None:
    """Changes a JSON file; None takes a key out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """file -> row, the last one counting; a line that is no JSON fails here."""
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    return {row["file"]: row for row in map(json.loads, lines)}


def hashes(folder: Path) -> dict[str, str]:
    """file -> sha256 of what the images on disk really are."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.glob("images/**/*.png"))}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_intact(folder: Path) -> dict[str, int]:
    """Every row that says ok has its image with that hash; returns their mtimes."""
    ok = [row for row in whole_rows(folder) if row["status"] == "ok"]
    for row in ok:
        assert digest(folder / row["file"]) == row["sha256"]
    return {row["file"]: (folder / row["file"]).stat().st_mtime_ns for row in ok}


def whole_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of lines that end; a torn last one is left out."""
    data = (folder / "manifest.jsonl").read_bytes()
    yield from map(json.loads, data[: data.rfind(b"\n") + 1].splitlines())


def assert_completed_like(folder: Path, undisturbed: Path, kept: dict[str, int]) -> None:
    """The run equals the undisturbed one, and what was finished before was not touched again."""
    assert hashes(folder) == hashes(undisturbed)
    assert {file: row["sha256"] for file, row in rows(folder).items()} == hashes(folder)
    assert {file: (folder / file).stat().st_mtime_ns for file in kept} == kept


def assert_refused(result: Result, code: int, *words: str) -> None:
    """The exit code, every word in the message, no traceback, nothing on standard output."""
    assert result.returncode == code, result.stderr
    assert not [word for word in words if word not in result.stderr], result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


# --- 4: missing, incomplete, unreachable, of an unknown kind


def lfs_pointer(model: Path) -> None:
    (model / "unet" / WEIGHTS).write_text(POINTER)


def no_weights(model: Path) -> None:
    (model / "unet" / WEIGHTS).unlink()


def only_bin(model: Path) -> None:
    weights = model / "unet" / WEIGHTS
    torch.save(load_file(weights), model / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()


def no_scheduler(model: Path) -> None:
    (model / "scheduler" / "scheduler_config.json").unlink()


def no_config(model: Path) -> None:
    (model / "unet" / "config.json").unlink()


def no_index(model: Path) -> None:
    (model / "model_index.json").unlink()


def torn_config(model: Path) -> None:
    (model / "unet" / "config.json").write_text('{"_class_name": "UNet2DM')


def unknown_class(model: Path) -> None:
    edit(model / "unet" / "config.json", _class_name="PixArtTransformer")


def unknown_part(model: Path) -> None:
    edit(model / "model_index.json", unet=["diffusers", "UNet3DModel"])


def short_part(model: Path) -> None:
    edit(model / "model_index.json", unet=["UNet2DModel"])


def no_sample_size(model: Path) -> None:
    edit(model / "unet" / "config.json", sample_size=None)


def null_past_the_end(model: Path) -> None:
    edit(model / "model_index.json", null_label=77)


def steps_in_words(model: Path) -> None:
    edit(model / "model_index.json", default_steps="many")


def auto_map(model: Path) -> None:
    edit(model / "unet" / "config.json", auto_map={"AutoModel": "evil.py"})


def own_pipeline(model: Path) -> None:
    edit(model / "model_index.json", _class_name=["evil", "Pipeline"])


def own_library(model: Path) -> None:
    edit(model / "model_index.json", scheduler=["evil", "Scheduler"])


DAMAGE: list[tuple[Callable[[Path], None], int, str]] = [
    (lfs_pointer, 4, "git lfs pull"),
    (no_weights, 4, WEIGHTS),
    (no_scheduler, 4, "scheduler_config.json"),
    (no_config, 4, "unet/config.json"),
    (no_index, 4, "model_index.json"),
    (torn_config, 4, "unet/config.json"),
    (unknown_class, 4, "PixArtTransformer"),
    (unknown_part, 4, "UNet3DModel"),
    (short_part, 4, "unet"),
    (no_sample_size, 4, "sample_size"),
    (null_past_the_end, 4, "77"),
    (steps_in_words, 4, "default_steps"),
    (only_bin, 5, "--allow-pickle"),
    (auto_map, 5, "auto_map"),
    (own_pipeline, 5, "evil"),
    (own_library, 5, "evil"),
]


@pytest.mark.parametrize(("damage", "code", "word"), DAMAGE, ids=[damage.__name__ for damage, _, _ in DAMAGE])
def test_inspect_refuses_a_damaged_or_unsafe_checkpoint(
    guidegen: Command, model: Path, damage: Callable[[Path], None], code: int, word: str
) -> None:
    damage(model)
    assert_refused(guidegen("inspect", model), code, word)


def test_sample_refuses_unsafe_weights_before_it_writes(guidegen: Command, model: Path, tmp_path: Path) -> None:
    only_bin(model)
    assert_refused(guidegen("sample", "-m", model, "--label", 0, "--steps", 1, "-o", "run"), 5, "--allow-pickle")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ref", ["./nix", "/nix/nix", "owner/name", "owner/name@main", "a b"])
def test_model_that_is_nowhere_is_named(guidegen: Command, ref: str, tmp_path: Path) -> None:
    assert_refused(guidegen("sample", "-m", ref, "--label", 0), 4, ref)
    assert list(tmp_path.iterdir()) == []


def test_offline_flag_never_asks_the_network(guidegen: Command, environment: dict[str, str], tmp_path: Path) -> None:
    del environment["HF_HUB_OFFLINE"]
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    began = time.monotonic()
    assert_refused(guidegen("inspect", "owner/name", "--offline", env=environment), 4, "owner/name", "cache")
    assert time.monotonic() - began < 30


def test_file_is_not_a_checkpoint(guidegen: Command, model: Path) -> None:
    assert_refused(guidegen("inspect", model / "model_index.json"), 4, "is a file", "folder")


def test_unet_is_not_a_classifier(guidegen: Command, with_null: Path, without_null: Path) -> None:
    result = guidegen("sample", "-m", with_null, "--mode", "classifier", "-c", without_null, "--label", 0)
    assert_refused(result, 4, "UNet2DModel", "NoisyClassifier")


def test_checkpoint_with_a_scheduler_of_an_unknown_kind_is_refused_as_a_checkpoint(
    guidegen: Command, model: Path, tmp_path: Path
) -> None:
    edit(model / "scheduler" / "scheduler_config.json", _class_name="MagicScheduler")
    result = guidegen("sample", "-m", model, "--label", 0, "--steps", 1, "-o", "run")
    assert_refused(result, 4, "MagicScheduler")
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_the_config_are_refused(guidegen: Command, model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "unet" / WEIGHTS)
    weights.pop("conv_in.weight")
    save_file(weights, model / "unet" / WEIGHTS)
    result = guidegen("sample", "-m", model, "--label", 0, "--steps", 1, "-o", "run")
    assert_refused(result, 4, "config.json", "conv_in.weight")
    assert not hashes(tmp_path)


def test_truncated_weights_are_refused_and_the_same_command_draws_once_they_are_whole(
    guidegen: Command, model: Path, tmp_path: Path
) -> None:
    weights = model / "unet" / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    args = ("sample", "-m", model, "--label", 0, "--steps", 1, "-o", "run")
    assert_refused(guidegen(*args), 4, WEIGHTS, "cut short")
    assert not hashes(tmp_path)
    weights.write_bytes(whole)
    result = guidegen(*args)
    assert (result.returncode, result.stdout) == (0, "run/images/w3.0/label0000/000000.png\n"), result.stderr


def test_allow_pickle_reads_bin_weights_to_the_same_image(
    guidegen: Command, model: Path, tmp_path: Path, undisturbed: Path
) -> None:
    only_bin(model)
    result = guidegen("sample", "-m", model, "--label", 0, "--steps", 40, "-o", "run", "--allow-pickle")
    assert (result.returncode, result.stdout) == (0, "run/images/w3.0/label0000/000000.png\n"), result.stderr
    file = "images/w3.0/label0000/000000.png"
    with Image.open(tmp_path / "run" / file) as ours, Image.open(undisturbed / file) as theirs:
        assert ours.tobytes() == theirs.tobytes()


# --- 74: disk or I/O


def test_output_below_a_file_is_an_input_output_error(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    result = guidegen("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", "notes/run")
    assert_refused(result, 74, "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_grid_that_cannot_be_written_is_an_input_output_error(guidegen: Command, undisturbed: Path) -> None:
    assert_refused(guidegen("grid", undisturbed, "-o", "/proc/nix/g.png"), 74, "/proc/nix")


def test_full_disk_keeps_what_was_finished_and_the_run_goes_on_without_the_limit(
    guidegen: Command, with_null: Path, tmp_path: Path, undisturbed: Path
) -> None:
    limit = (undisturbed / "manifest.jsonl").stat().st_size * 3 // 4  # no image is as large, but the manifest grows past it
    assert max(path.stat().st_size for path in undisturbed.glob("images/**/*.png")) < limit

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    args = ("sample", "-m", with_null, *SLOW)
    result = guidegen(*args, preexec_fn=small_files)
    assert_refused(result, 74, "File too large", "intact")
    kept = assert_intact(tmp_path / "run")
    assert 1 <= len(kept) < 8
    assert not list((tmp_path / "run").rglob("*.part"))
    again = guidegen(*args)
    assert again.returncode == 0, again.stderr
    assert_completed_like(tmp_path / "run", undisturbed, kept)


# --- 3: non-finite images


@pytest.fixture
def half_broken(model: Path) -> Path:
    """A checkpoint whose label 2 gives NaN, and nothing else does."""
    weights = load_file(model / "unet" / WEIGHTS)
    weights["class_embedding.weight"][2] = float("nan")
    save_file(weights, model / "unet" / WEIGHTS)
    return model


def test_non_finite_images_are_listed_not_saved_and_spoil_no_other(
    guidegen: Command, half_broken: Path, tmp_path: Path
) -> None:
    args = ("sweep", "-m", half_broken, "--label", "1,2", "--w", "0,1,3", "--steps", 2, "-o", "run")
    result = guidegen(*args)
    assert (result.returncode, result.stdout) == (3, "run/grid.png\n"), result.stderr
    status = {(row["label"], row["w"]): row["status"] for row in rows(tmp_path / "run").values()}
    bad = {(2, 1.0), (2, 3.0)}  # w = 0 asks the network for no label
    assert status == {(label, w): "nonfinite" if (label, w) in bad else "ok" for label in (1, 2) for w in (0.0, 1.0, 3.0)}
    assert len(hashes(tmp_path / "run")) == 4
    assert "2 of 6" in result.stderr
    assert "w 1.0, label 2, seed 0" in result.stderr
    assert "w 3.0, label 2, seed 0" in result.stderr
    for row in rows(tmp_path / "run").values():
        if row["status"] == "nonfinite":
            assert (row["sha256"], row["shape"]) == (None, None)
    kept = assert_intact(tmp_path / "run")
    again = guidegen(*args)
    assert again.returncode == 3
    assert "2 of 6" in again.stderr
    assert assert_intact(tmp_path / "run") == kept
    assert len(list(whole_rows(tmp_path / "run"))) == 6, "one row a cell, also after a second try"


def test_npz_of_images_that_all_failed_is_a_failure_of_the_cells(
    guidegen: Command, half_broken: Path, tmp_path: Path
) -> None:
    result = guidegen("sample", "-m", half_broken, "--label", 2, "--num", 2, "--steps", 2, "-o", "x.npz")
    assert_refused(result, 3, "2 of 2", "label 2, seed 1")
    assert not (tmp_path / "x.npz").exists()


def test_file_of_partly_failed_images_fails_again_when_asked_again(
    guidegen: Command, half_broken: Path, tmp_path: Path
) -> None:
    args = ("sample", "-m", half_broken, "--label", "1-2", "--steps", 2, "-o", "x.npz")
    for _ in range(2):
        result = guidegen(*args)
        assert (result.returncode, result.stdout) == (3, "x.npz\n"), result.stderr
        assert "1 of 2" in result.stderr


# --- 130, 143 and SIGKILL


def heed_interrupts() -> None:
    """The suite may run in a background job, whose children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(where: Path, model: Path, environment: dict[str, str], *flags: str) -> subprocess.Popen[str]:
    """The slow run, returned once two images are on disk and more are to come."""
    command = [sys.executable, "-m", "guidegen", "sample", "-m", str(model), *SLOW, *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=where, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_interrupts
    )
    folder = f"{flags[flags.index('-o') + 1]}.partial" if "-o" in flags else "run"
    written = where / folder / "manifest.jsonl"
    end = time.monotonic() + 120
    while not (written.exists() and written.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no image in two minutes"
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "code", "flags"),
    [(signal.SIGINT, 130, ()), (signal.SIGTERM, 143, ("--overwrite",))],
    ids=["SIGINT", "SIGTERM"],
)
def test_signal_leaves_finished_images_and_says_the_command_that_resumes(
    with_null: Path,
    tmp_path: Path,
    environment: dict[str, str],
    undisturbed: Path,
    number: signal.Signals,
    code: int,
    flags: tuple[str, ...],
) -> None:
    process = start(tmp_path, with_null, environment, *flags)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), err
    assert "Traceback" not in err
    assert number.name in err
    kept = assert_intact(tmp_path / "run")
    assert kept.keys() == hashes(tmp_path / "run").keys()
    assert 2 <= len(kept) < 8
    found = re.search(r"guidegen sample .*", err)
    assert found, err
    command = shlex.split(found[0])
    again = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert (again.returncode, again.stdout) == (0, "run\n"), again.stderr
    assert_completed_like(tmp_path / "run", undisturbed, kept)
    assert "StoppedError" not in err, "a message for people, not the name of a class"


def told(out: str) -> dict[str, dict[str, Any]]:
    """file -> row of `--json`, each of which is there once, with its image."""
    told = [json.loads(line) for line in out.splitlines()]
    assert all(row.pop("type") == "image" and row.pop("path") == f"{row.pop('run')}/{row['file']}" for row in told)
    assert len({row["file"] for row in told}) == len(told)
    return {row["file"]: row for row in told}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_rows_of_all_images_that_are_on_disk_are_told_when_a_signal_ends_the_run(
    with_null: Path, tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    process = start(tmp_path, with_null, environment, "--json")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, 143), err
    assert told(out) == rows(tmp_path / "run")
    assert told(out).keys() == hashes(tmp_path / "run").keys()
    assert 2 <= len(told(out)) < 8
    again = subprocess.run(process.args, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert (again.returncode, len(told(again.stdout))) == (0, 8), "those that were there before are told again"


def test_rows_are_told_of_what_was_saved_before_the_disk_was_full(
    guidegen: Command, with_null: Path, tmp_path: Path, undisturbed: Path
) -> None:
    limit = (undisturbed / "manifest.jsonl").stat().st_size * 3 // 4

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = guidegen(
        "sample", "-m", with_null, *SLOW[:-4], "--batch-size", 3, "-o", "run", "--json", preexec_fn=small_files
    )
    assert result.returncode == 74, result.stderr
    assert told(result.stdout) == rows(tmp_path / "run")
    assert "manifest.jsonl" in result.stderr
    assert 1 <= len(told(result.stdout)) < 8


def test_full_disk_under_standard_output_leaves_a_run_that_goes_on(
    guidegen: Command, with_null: Path, tmp_path: Path, undisturbed: Path
) -> None:
    with open("/dev/full", "wb") as full:
        result = guidegen(
            "sample", "-m", with_null, *SLOW, "--json", capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert result.returncode == 74, result.stderr
    assert "No space left" in result.stderr
    kept = assert_intact(tmp_path / "run")
    assert guidegen("sample", "-m", with_null, *SLOW).returncode == 0
    assert_completed_like(tmp_path / "run", undisturbed, kept)


def test_file_that_was_interrupted_goes_on_and_leaves_nothing_beside_it(
    guidegen: Command, with_null: Path, tmp_path: Path, environment: dict[str, str], undisturbed: Path
) -> None:
    process = start(tmp_path, with_null, environment, "-o", "x.npz")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    kept = assert_intact(tmp_path / "x.npz.partial")
    assert not (tmp_path / "x.npz").exists()
    again = guidegen("sample", "-m", with_null, *SLOW, "-o", "x.npz", "-v")
    assert (again.returncode, again.stdout) == (0, "x.npz\n"), again.stderr
    assert f"{len(kept)} images kept, {8 - len(kept)} to draw" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    with np.load(tmp_path / "x.npz", allow_pickle=False) as data:
        images = list(data["arr_0"])
    for file, image in zip(rows(undisturbed), images, strict=True):
        with Image.open(undisturbed / file) as theirs:
            assert (np.asarray(theirs) == image).all()


def test_kill_half_way_costs_no_finished_image(
    guidegen: Command, with_null: Path, tmp_path: Path, environment: dict[str, str], undisturbed: Path
) -> None:
    process = start(tmp_path, with_null, environment)
    process.kill()
    process.communicate(timeout=60)
    kept = assert_intact(tmp_path / "run")
    assert 2 <= len(kept) < 8
    again = guidegen("sample", "-m", with_null, *SLOW)
    assert (again.returncode, again.stdout) == (0, "run\n"), again.stderr
    assert_completed_like(tmp_path / "run", undisturbed, kept)


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, {130}), (signal.SIGTERM, {143, -signal.SIGTERM})])
def test_signal_before_drawing_ends_at_once_with_nothing_written(
    with_null: Path, tmp_path: Path, environment: dict[str, str], number: signal.Signals, codes: set[int]
) -> None:
    command = [sys.executable, "-m", "guidegen", "sample", "-m", str(with_null), "--label", "-"]
    pipe = subprocess.PIPE
    settings = {"cwd": tmp_path, "env": environment, "text": True, "preexec_fn": heed_interrupts}
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, **settings)
    time.sleep(3)  # by now it waits for labels on standard input
    process.send_signal(number)
    process.wait(timeout=30)
    assert process.returncode in codes
    assert process.stdin is not None
    process.stdin.close()
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read() == ""
    assert "Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


# --- a run that was damaged, or is in use


def test_torn_row_is_dropped_and_damaged_or_missing_images_are_drawn_again(
    guidegen: Command, with_null: Path, tmp_path: Path, undisturbed: Path
) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    files = [json.loads(line)["file"] for line in lines]
    damaged = folder / files[0]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (folder / files[1]).unlink()
    kept = {file: (folder / file).stat().st_mtime_ns for file in files[2:-1]}
    result = guidegen("sample", "-m", with_null, *SLOW, "-v")
    assert (result.returncode, result.stdout) == (0, "run\n"), result.stderr
    assert "5 images kept, 3 to draw" in result.stderr
    assert_completed_like(folder, undisturbed, kept)
    assert len(list(whole_rows(folder))) == 8, "one row a finished image"


def test_second_process_on_the_same_run_is_refused(
    guidegen: Command, with_null: Path, tmp_path: Path, undisturbed: Path
) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    before = hashes(folder)
    with FileLock(folder / ".lock"):
        result = guidegen("sample", "-m", with_null, *SLOW, "--overwrite")
    assert_refused(result, 75, "run", "process")
    assert hashes(folder) == before
    assert len(rows(folder)) == 8


def test_directory_with_a_run_json_that_cannot_be_read_is_left_alone(
    guidegen: Command, with_null: Path, tmp_path: Path, undisturbed: Path
) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    (folder / "run.json").write_text("{")
    before = hashes(folder)
    assert_refused(guidegen("sample", "-m", with_null, *SLOW), 2, "run.json")
    assert_refused(guidegen("grid", "run"), 2, "run.json")
    assert hashes(folder) == before
