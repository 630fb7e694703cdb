"""Every flag and every answer of the command line, through the real command."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]

ROW_KEYS = {"file", "mode", "w", "label", "label_name", "prompt", "seed", "nfe", "sha256", "shape", "status"}
LINE_KEYS = {"type", "path", "run"}
COMMANDS = ("sample", "sweep", "inspect", "labels", "grid", "convert", "verify", "merge", "evaluate", "report", "guidances")
HEAVY = re.compile(r"\|\s+(torch|diffusers|transformers)$", re.MULTILINE)
SWEEP = ("--label", "0-1", "--num", "2", "--w", "0,1,3", "--steps", "3")


class Finished(NamedTuple):
    """A sweep that ran undisturbed: 2 labels, 2 seeds, w 0, 1 and 3."""

    folder: Path
    result: Result
    args: tuple[str, ...]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, with_null: Path) -> Finished:
    where = tmp_path_factory.mktemp("finished")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GUIDEGEN")}
    args = ("sweep", "-m", str(with_null), *SWEEP, "-o", "run")
    result = subprocess.run(
        [sys.executable, "-m", "guidegen", *args, "--json"],
        cwd=where,
        env=kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return Finished(where / "run", result, args)


@pytest.fixture
def finished_copy(finished: Finished, tmp_path: Path) -> Path:
    """The same run where the command of this test will look for it."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What `--json` prints of the images of a run: their rows, and where each is."""
    run = str(folder.resolve())
    return [{"type": "image", "path": f"{run}/{row['file']}", "run": run, **row} for row in manifest(folder)]


def manifest(folder: Path) -> list[dict[str, Any]]:
    return rows_of((folder / "manifest.jsonl").read_text())


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """mtime and content of every file that a person sees."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def without_weights(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint whose weight files are gone or garbage."""
    shutil.copytree(folder, to)
    for i, path in enumerate(sorted(to.rglob("*.safetensors"))):
        path.unlink() if i else path.write_bytes(b"garbage")
    return to


# --- what loads, and where it says things


@pytest.mark.parametrize("args", ["--help", *(f"{command} --help" for command in COMMANDS), "sample -m MODEL --label nix"])
def test_help_and_usage_errors_load_no_torch(
    guidegen: Command, with_null: Path, environment: dict[str, str], args: str
) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "guidegen", *args.replace("MODEL", str(with_null)).split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert "guidegen.cli" in result.stderr
    assert not HEAVY.findall(result.stderr)
    if "--help" in args:
        assert result.returncode == 0
        assert "Usage: guidegen" in result.stdout
        assert "\x1b" not in result.stdout
    else:
        assert result.returncode == 2


def test_import_guidegen_loads_no_torch(environment: dict[str, str]) -> None:
    code = "import sys, guidegen, guidegen.cli; print(guidegen.__version__, {'torch', 'diffusers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"\d+\.\d+\.\d+ set\(\)\n", result.stdout), result.stderr


def test_help_names_every_flag_of_the_contract(guidegen: Command) -> None:
    flags = (
        "--model -m --mode --w --w-classifier --classifier -c --label --null-label --num -n --seed --seeds --steps "
        "--scheduler --eta --dtype --device --batch-size --compile --out -o --overwrite --json -q -v --dry-run --debug "
        "--offline --shard --deterministic"
    )
    for command in ("sample", "sweep"):
        text = guidegen(command, "--help-all").stdout
        assert not [flag for flag in flags.split() if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)]


def test_help_shows_the_options_that_most_need_first(guidegen: Command, environment: dict[str, str]) -> None:
    common = ["label", "prompt", "w", "mode", "num", "seed", "out", "model", "classifier", "steps", "scheduler", "guidance"]
    for command, more in (("sample", []), ("sweep", ["by"])):
        for columns in ("80", "120"):
            environment["COLUMNS"] = columns
            text = guidegen(command, "--help").stdout
            assert re.findall(r"^│ --([a-z-]+)", text, re.MULTILINE) == [*common, *more, "help-all", "help"]
            assert "<bool>" not in text
            assert f"guidegen {command} --label" in text, "examples"
            assert all(len(line) <= int(columns) for line in text.splitlines())
    everything = guidegen("sample", "--help-all").stdout
    assert "--by" not in everything
    assert re.search(r"Checkpoint.*How to draw it.*Output.*Messages.*Afterwards", everything, re.DOTALL)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("sample --wrong 3", "error: No such option: --wrong"),
        ("sample --num x", "error: --num: 'x' is not a whole number. See `guidegen sample --help`."),
        ("sample --dtype fp8", "error: --dtype: 'fp8' is not one of 'auto', 'fp16', 'bf16', 'fp32'."),
        ("paint", "error: No such command 'paint'."),
        ("sample -m nofile.py:X --label :smile:", "error: No Python file at nofile.py."),
    ],
)
def test_errors_of_the_parser_are_like_all_others(guidegen: Command, args: str, message: str) -> None:
    result = guidegen(*args.split())
    assert result.returncode in (2, 4)
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_version_goes_to_standard_output(guidegen: Command) -> None:
    result = guidegen("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"guidegen \d+\.\d+\.\d+\n", result.stdout)


def on_terminal(args: list[str], where: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, standard output (a pipe) and standard error (a terminal) of the command."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "guidegen", *args]
    process = subprocess.Popen(command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says the other end is closed in this way
            break
        if not part:
            break
        shown += part
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, shown.decode(errors="replace")


def test_terminal_gets_a_bar_and_colours_unless_no_color(
    with_null: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    terminal = environment | {"TERM": "xterm-256color"}
    terminal.pop("NO_COLOR", None)
    colour = re.compile(r"\x1b\[(\d+;)*([349][0-7]|[34]8;[\d;]+)m")
    _, _, message = on_terminal(["sample", "--num", "0"], tmp_path, terminal)
    assert colour.search(message)
    _, _, message = on_terminal(["sample", "--num", "0"], tmp_path, terminal | {"NO_COLOR": "1"})
    assert "--num" in message
    assert not colour.search(message)
    args = ["sample", "-m", str(with_null), "--label", "0", "--steps", "60", "-o", "x.png"]
    code, out, shown = on_terminal(args, tmp_path, terminal | {"NO_COLOR": "1"})
    assert (code, out) == (0, "x.png\n"), shown
    assert "drawing" in shown
    assert "1 images" in shown or "1/1" in shown
    assert not colour.search(shown)


# --- usage errors: exit 2, nothing on standard output, nothing written, no colours

USAGE = {
    "w-nan": (["--w", "nan"], ["--w", "finite", "nan"]),
    "w-inf": (["--w", "inf"], ["--w", "finite"]),
    "w-minus-inf": (["--w=-inf"], ["--w", "finite"]),
    "w-too-big-for-a-float": (["--w", "1e400"], ["--w", "finite"]),
    "w-word": (["--w", "much"], ["--w", "much"]),
    "w-empty": (["--w", ""], ["--w"]),
    "w-list-in-sample": (["--w", "1,2"], ["--w", "1,2"]),
    "num-0": (["--num", "0"], ["--num", "0"]),
    "num-negative": (["-n", "-3"], ["--num", "-3"]),
    "num-word": (["--num", "few"], ["--num"]),
    "seed-negative": (["--seed", "-1"], ["--seed", "-1"]),
    "seed-too-big": (["--seed", str(2**63)], ["--seed"]),
    "seeds-empty": (["--seeds", ""], ["--seeds"]),
    "seeds-backwards": (["--seeds", "3-1"], ["--seeds", "3-1"]),
    "seeds-word": (["--seeds", "1,x"], ["--seeds", "x"]),
    "seeds-and-num": (["--seeds", "1", "--num", "2"], ["--seeds", "--num"]),
    "steps-0": (["--steps", "0"], ["--steps", "0"]),
    "batch-size-0": (["--batch-size", "0"], ["--batch-size", "0"]),
    "batch-size-word": (["--batch-size", "big"], ["--batch-size", "big"]),
    "eta-above-1": (["--eta", "1.5"], ["--eta", "1.5"]),
    "eta-nan": (["--eta", "nan"], ["--eta"]),
    "dtype": (["--dtype", "int8"], ["--dtype", "int8"]),
    "mode": (["--mode", "magic"], ["--mode", "magic"]),
    "unknown-flag": (["--guidance", "3"], ["--guidance"]),
    "output-kind": (["-o", "x.gif"], [".gif", ".png"]),
    "output-one-image": (["-o", "x.png", "--num", "2"], ["x.png", "2"]),
    "output-stdout-one-image": (["-o", "-", "--num", "2"], ["2"]),
    "w-classifier-in-cfg": (["--w-classifier", "1"], ["--w-classifier", "both"]),
    "w-classifier-nan": (["--mode", "both", "--w-classifier", "nan"], ["--w-classifier", "finite"]),
    "w-in-mode-none": (["--mode", "none", "--w", "2"], ["--w", "none"]),
    "classifier-in-cfg": (["--classifier", "CLASSIFIER"], ["--classifier", "cfg"]),
    "null-label-past-the-end": (["--null-label", "99"], ["--null-label", "99"]),
    "label-unknown-id": (["--label", "17"], ["17", "Closest", "lion"]),
    "label-null": (["--label", "5"], ["5", "not a label"]),
    "label-misspelt": (["--label", "golfish"], ["golfish", "Closest", "0 goldfish"]),
    "label-ambiguous": (["--label", "crane"], ["ambiguous", "2 crane", "3 crane", "hoist"]),
    "label-backwards": (["--label", "3-1"], ["3-1"]),
    "label-range-past-the-end": (["--label", "3-9"], ["--label", "5"]),
    "label-empty": (["--label", ""], ["--label"]),
    "label-no-such-file": (["--label", "@nix.txt"], ["nix.txt"]),
}


def asked(flags: list[str]) -> list[str]:
    return flags if "--label" in flags else [*flags, "--label", "0"]


@pytest.mark.parametrize("name", USAGE)
def test_bad_flag_is_refused_with_what_was_wrong(
    guidegen: Command, with_null: Path, classifier_folder: Path, tmp_path: Path, name: str
) -> None:
    flags, words = USAGE[name]
    flags = [str(classifier_folder) if flag == "CLASSIFIER" else flag for flag in flags]
    result = guidegen("sample", "-m", with_null, *asked(flags))
    assert result.returncode == 2, result.stderr
    assert not [word for word in words if word not in result.stderr], result.stderr
    assert result.stdout == ""
    assert "\x1b" not in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "w", ["", ",", "0,nan", "0:1", "0:1:0", "1:0:0.5", "0:inf:1", "a:b:c", "1e400:1e400:1", "0:1:1e-12"]
)
def test_sweep_refuses_weights_that_are_no_list_of_finite_numbers(guidegen: Command, with_null: Path, w: str) -> None:
    result = guidegen("sweep", "-m", with_null, "--label", 0, f"--w={w}", "--dry-run")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--w" in result.stderr


def test_label_is_needed_and_an_example_is_given(guidegen: Command, with_null: Path, without_null: Path) -> None:
    result = guidegen("sample", "-m", with_null)
    assert result.returncode == 2
    assert '--label "goldfish"' in result.stderr
    result = guidegen("sample", "-m", without_null, "--null-label", 4)
    assert result.returncode == 2
    assert "--label 0" in result.stderr


def test_labels_on_several_lines_of_one_argument_are_understood_or_refused(guidegen: Command, with_null: Path) -> None:
    result = guidegen("sample", "-m", with_null, "--label", "0\nnix")
    assert result.returncode == 2, result.stderr
    assert "--label" in result.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(guidegen: Command, with_null: Path) -> None:
    result = guidegen("sample", "-m", with_null, "--label", "nix", "--debug")
    assert "Traceback" in result.stderr
    assert "nix" in result.stderr
    assert result.returncode == 2


@pytest.mark.parametrize(
    ("model", "flags", "reason"),
    [
        ("unconditional", ["--mode", "cfg", "--label", "0"], "unconditional"),
        ("unconditional", ["--mode", "both", "--label", "0"], "unconditional"),
        ("unconditional", ["--mode", "classifier", "--label", "0"], "no classifier"),
        ("unconditional", ["--mode", "none", "--label", "0"], "takes none"),
        ("unconditional", ["--mode", "none", "--null-label", "0"], "no classes"),
        ("without_null", ["--mode", "cfg", "--label", "0"], "no null label"),
        ("without_null", ["--mode", "classifier", "-c", "CLASSIFIER", "--label", "0"], "no null label"),
        ("without_null", ["--mode", "none"], "--label"),
        ("without_null", ["--mode", "both", "--null-label", "4", "--label", "0"], "no classifier"),
        ("without_null", ["--mode", "cfg", "--null-label", "4", "--label", "4"], "4"),
    ],
)
def test_mode_that_the_checkpoint_cannot_serve_is_refused_with_the_reason(
    request: pytest.FixtureRequest, guidegen: Command, tmp_path: Path, model: str, flags: list[str], reason: str
) -> None:
    classifier = str(request.getfixturevalue("classifier_folder"))
    flags = [classifier if flag == "CLASSIFIER" else flag for flag in flags]
    result = guidegen("sample", "-m", request.getfixturevalue(model), *flags)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert reason in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", ["--scheduler nosuch", "--scheduler RePaintScheduler", "--device bogus", "--device meta"])
def test_scheduler_or_device_that_cannot_be_used_is_refused(
    guidegen: Command, with_null: Path, tmp_path: Path, flags: str
) -> None:
    result = guidegen("sample", "-m", with_null, "--label", 0, "--steps", 2, *flags.split())
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert flags.split()[1] in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_eta_is_for_ddim_alone(guidegen: Command, unconditional: Path, tmp_path: Path) -> None:
    refused = guidegen("sample", "-m", unconditional, "--mode", "none", "--eta", 0.5)
    assert refused.returncode == 2
    assert "--eta" in refused.stderr
    assert "DDPMScheduler" in refused.stderr
    assert list(tmp_path.iterdir()) == []


# --- a run directory


def test_json_rows_have_the_keys_of_the_contract_and_go_to_standard_output_alone(finished: Finished) -> None:
    rows = rows_of(finished.result.stdout)
    assert len(rows) == 12
    assert all(set(row) == ROW_KEYS | LINE_KEYS for row in rows)
    assert {(row["label"], row["seed"], row["w"]) for row in rows} == {
        (label, seed, w) for label in (0, 1) for seed in (0, 1) for w in (0.0, 1.0, 3.0)
    }
    assert {row["label"]: row["label_name"] for row in rows} == {0: "goldfish", 1: "tabby"}
    assert all((row["mode"], row["prompt"], row["status"], row["shape"]) == ("cfg", None, "ok", [8, 8, 3]) for row in rows)
    assert {row["w"]: row["nfe"] for row in rows} == {0.0: 3, 1.0: 3, 3.0: 6}
    assert finished.result.stderr == ""
    assert all(set(row) == ROW_KEYS for row in manifest(finished.folder))
    assert lines_of(finished.folder) == rows


def test_run_directory_holds_what_the_manifest_says_and_nothing_else(finished: Finished) -> None:
    rows = manifest(finished.folder)
    for row in rows:
        assert row["file"] == f"images/w{row['w']}/label{row['label']:04d}/{row['seed']:06d}.png"
        assert hashlib.sha256((finished.folder / row["file"]).read_bytes()).hexdigest() == row["sha256"]
    assert set(state(finished.folder)) == {"run.json", "manifest.jsonl", "grid.png", *(row["file"] for row in rows)}
    assert not list(finished.folder.rglob("*.part"))
    assert len({row["sha256"] for row in rows}) == 12
    unguided = [row for row in rows if row["w"] == 0]
    by_seed = [pixels(finished.folder / row["file"]) for row in sorted(unguided, key=lambda row: row["seed"])]
    assert abs(by_seed[0] - by_seed[1]).max() <= 1, "w = 0 draws the same image whatever the label"


def test_run_json_says_what_made_the_run(finished: Finished, with_null: Path) -> None:
    about = json.loads((finished.folder / "run.json").read_text())
    settings = about["settings"]
    weights = (with_null / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert settings["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (settings["mode"], settings["steps"], settings["dtype"]) == ("cfg", 3, "fp32")
    assert (settings["scheduler"], settings["null_label"], settings["classifier"]) == ("DDIMScheduler", 5, None)
    assert about["checkpoint"] == {"path": str(with_null.resolve()), "revision": None}
    assert about["command"] == "sweep"
    asked = {"model": str(with_null), "label": ["0-1"], "num": 2, "w": "0,1,3", "steps": 3, "out": "run", "json": True}
    assert about["options"] == asked
    assert {"python", "torch", "diffusers"} <= set(about["versions"])


def test_png_text_makes_the_picture_again_and_reads_in_image_browsers(finished: Finished) -> None:
    path = finished.folder / "images/w3.0/label0001/000001.png"
    assert b"iTXtguidegen\0" in path.read_bytes()
    assert b"tEXtparameters\0" in path.read_bytes()
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("RGB", (8, 8))
        text = image.text  # type: ignore[attr-defined]
    facts = json.loads(text["guidegen"])
    assert facts["settings"] == json.loads((finished.folder / "run.json").read_text())["settings"]
    assert {key: facts["cell"][key] for key in ("label", "seed", "w")} == {"label": 1, "seed": 1, "w": 3.0}
    first, last = text["parameters"].splitlines()
    fields = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert first == "tabby"
    assert (fields["Steps"], fields["CFG scale"], fields["Seed"], fields["Size"]) == ("3", "3.0", "1", "8x8")


def test_same_command_again_draws_nothing_and_prints_only_the_grid(
    finished: Finished, finished_copy: Path, guidegen: Command
) -> None:
    before = state(finished_copy)
    result = guidegen(*finished.args)
    assert (result.returncode, result.stdout) == (0, "run/grid.png\n")
    after = state(finished_copy)
    before.pop("grid.png")
    after.pop("grid.png")
    assert after == before


def test_other_settings_are_refused_by_name_and_overwrite_starts_over(
    finished: Finished, finished_copy: Path, guidegen: Command
) -> None:
    before = state(finished_copy)
    other = [*finished.args[:-4], "--steps", "2", "--dtype", "bf16", "--eta", "1", "-o", "run"]
    refused = guidegen(*other)
    assert (refused.returncode, refused.stdout) == (2, "")
    for words in ("steps 3 there, 2 now", "dtype fp32 there, bf16 now", "eta None there, 1.0 now", "--overwrite"):
        assert words in refused.stderr
    assert "model_sha256" not in refused.stderr
    assert state(finished_copy) == before
    redrawn = guidegen(*other, "--overwrite", "--label", 2, "--batch-size", 5, "--device", "cpu", "-q", "-v")
    assert (redrawn.returncode, redrawn.stdout) == (0, "run/grid.png\n"), redrawn.stderr
    rows = manifest(finished_copy)
    assert len(rows) == 18
    assert {row["label"] for row in rows} == {0, 1, 2}
    assert {row["w"]: row["nfe"] for row in rows} == {0.0: 2, 1.0: 2, 3.0: 4}
    settings = json.loads((finished_copy / "run.json").read_text())["settings"]
    assert (settings["steps"], settings["dtype"], settings["eta"]) == (2, "bf16", 1.0)


def test_directory_of_other_files_is_left_alone(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("mine")
    result = guidegen("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", "papers", "--overwrite")
    assert result.returncode == 2
    assert "papers" in result.stderr
    assert state(tmp_path).keys() == {"papers/thesis.txt"}


def test_default_directory_is_named_by_the_settings_and_found_again(
    guidegen: Command, with_null: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    environment["GUIDEGEN_MODEL"] = str(with_null)
    args = ("sample", "--label", "tabby cat", "--steps", 2, "--seed", 7, "--scheduler", "dpm++")
    first = guidegen(*args, env=environment)
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"guidegen-runs/with-null-sample-cfg-\w+/images/w3\.0/label0001/000007\.png\n", first.stdout)
    assert first.stderr == ""
    about = json.loads(next(tmp_path.glob("guidegen-runs/*/run.json")).read_text())
    assert about["settings"]["scheduler"] == "DPMSolverMultistepScheduler"
    before = state(tmp_path)
    again = guidegen(*args, env=environment)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert state(tmp_path) == before


def test_json_into_head_ends_cleanly_and_draws_all(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "guidegen", "sample", "-m", str(with_null), "--label", "0-4", "--steps", "9"]
    line = f"{shlex.join([*command, '--json', '--batch-size', '1', '-o', 'run'])} | head -1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    row, status = result.stdout.splitlines()
    assert set(json.loads(row)) == ROW_KEYS | LINE_KEYS
    assert (status, result.stderr) == ("0", "")
    assert len(manifest(tmp_path / "run")) == 5


# --- one file


def test_png_file_holds_the_image_and_is_made_once(
    guidegen: Command, with_null: Path, finished: Finished, tmp_path: Path
) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--seed", 1, "--steps", 3)
    made = guidegen(*args, "-o", "new/x.png")
    assert (made.returncode, made.stdout) == (0, "new/x.png\n"), made.stderr
    assert state(tmp_path).keys() == {"new/x.png"}, "no run directory is left beside it"
    path = tmp_path / "new/x.png"
    assert abs(pixels(path) - pixels(finished.folder / "images/w3.0/label0001/000001.png")).max() <= 1
    with Image.open(path) as image:
        assert {"guidegen", "parameters"} <= image.text.keys()  # type: ignore[attr-defined]
    before = state(tmp_path)
    again = guidegen(*args, "-o", "new/x.png")
    assert (again.returncode, again.stdout) == (0, "new/x.png\n")
    assert state(tmp_path) == before
    refused = guidegen(*args, "--w", 2, "-o", "new/x.png")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "new/x.png" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert state(tmp_path) == before
    redrawn = guidegen(*args, "--w", 2, "-o", "new/x.png", "--overwrite")
    assert redrawn.returncode == 0
    assert state(tmp_path)["new/x.png"][1] != before["new/x.png"][1]


def test_npz_file_holds_uint8_images_and_labels(
    guidegen: Command, with_null: Path, finished: Finished, tmp_path: Path
) -> None:
    args = ("sample", "-m", with_null, "--label", "1,0", "--num", 2, "--steps", 3, "-o", "x.npz", "--json")
    made = guidegen(*args)
    assert made.returncode == 0, made.stderr
    assert state(tmp_path).keys() == {"x.npz"}
    with np.load(tmp_path / "x.npz", allow_pickle=False) as data:
        images, labels = data["arr_0"], data["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (4, 8, 8, 3))
    assert labels.tolist() == [1, 1, 0, 0]
    rows = rows_of(made.stdout)
    assert [row["label"] for row in rows] == labels.tolist()
    for row, image in zip(rows, images, strict=True):
        assert abs(image - pixels(finished.folder / row["file"])).max() <= 1
    before = state(tmp_path)
    again = guidegen(*args)
    assert again.returncode == 0
    assert state(tmp_path) == before
    assert rows_of(again.stdout) == rows, "--json prints rows, not the path, also when nothing is left to draw"


def test_suffix_of_the_file_may_be_in_capitals(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    result = guidegen("sample", "-m", with_null, "--label", "0-1", "--steps", 1, "-o", "X.NPZ")
    assert (result.returncode, result.stdout) == (0, "X.NPZ\n"), result.stderr
    with np.load(tmp_path / "X.NPZ", allow_pickle=False) as data:
        assert data["arr_0"].shape == (2, 8, 8, 3)


def test_empty_file_in_the_way_is_refused_not_a_crash(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    (tmp_path / "x.npz").touch()
    result = guidegen("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", "x.npz")
    assert result.returncode == 2, result.stderr
    assert "x.npz" in result.stderr


@pytest.mark.parametrize(
    ("name", "kind", "scheduler", "cls"),
    [
        ("x.webp", "WEBP", "Heun", "HeunDiscreteScheduler"),
        ("x.jpg", "JPEG", "EulerAncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_webp_and_jpeg_files_carry_the_plan(
    guidegen: Command, with_null: Path, tmp_path: Path, name: str, kind: str, scheduler: str, cls: str
) -> None:
    result = guidegen("sample", "-m", with_null, "--label", 4, "--steps", 2, "--scheduler", scheduler, "-o", name)
    assert (result.returncode, result.stdout) == (0, f"{name}\n"), result.stderr
    assert result.stderr == ""
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (kind, (8, 8))
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    packed = bytes(comment).removeprefix(b"ASCII\0\0\0guidegen:")
    plan = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert plan["settings"]["scheduler"] == cls
    assert plan["cells"][0]["label"] == 4


@pytest.mark.parametrize(("name", "num", "w"), [("many.jpg", 130, "0"), ("tall.webp", 40, "0")])
def test_grid_too_large_for_its_format_is_refused_before_drawing_not_after(
    guidegen: Command, with_null: Path, tmp_path: Path, name: str, num: int, w: str
) -> None:
    args = ("sweep", "-m", with_null, "--label", "0-4", "--num", num, "--w", w, "--steps", 1, "-o", name)
    result = guidegen(*args, "--batch-size", 128)
    assert result.returncode in (0, 2), result.stderr
    assert state(tmp_path).keys() == ({name} if result.returncode == 0 else set())


def test_sweep_to_one_file_is_its_grid(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    made = guidegen(
        "sweep", "-m", with_null, "--label", 0, "--w", "0:0.3:0.1", "--steps", 1, "--scheduler", "unipc", "-o", "g.png"
    )
    assert (made.returncode, made.stdout) == (0, "g.png\n"), made.stderr
    with Image.open(tmp_path / "g.png") as image:
        width, height = image.size
        plan = json.loads(image.text["guidegen"])  # type: ignore[attr-defined]
    assert width > 4 * 90
    assert height > 90
    assert [cell["w"] for cell in plan["cells"]] == [0.0, 0.1, 0.2, 0.3]
    assert plan["settings"]["scheduler"] == "UniPCMultistepScheduler"


def test_dash_writes_a_png_on_standard_output_and_nothing_on_disk(
    guidegen: Command, with_null: Path, tmp_path: Path
) -> None:
    result: Any = guidegen("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", "-", text=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(result.stdout)) as image:
        image.load()
        assert image.size == (8, 8)
    assert list(tmp_path.iterdir()) == []


# --- dry run


def test_dry_run_counts_without_weights_and_writes_nothing(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    model = without_weights(with_null, tmp_path / "model")
    before = state(tmp_path)
    args = (
        "sweep",
        "-m",
        model,
        "--label",
        "all",
        "-n",
        3,
        "--w",
        "0,1:3:1",
        "--steps",
        4,
        "--scheduler",
        "heun",
        "--dry-run",
    )
    result = guidegen(*args, "--json", "-o", "run")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    evaluations = 2 * 4 - 1  # Heun takes two a step but for the last
    assert facts["cells"] == 5 * 3 * 4
    assert facts["nfe"] == 5 * 3 * (1 + 1 + 2 + 2) * evaluations
    assert facts["bytes"] == 60 * 8 * 8 * 3
    assert (facts["grid_pages"], facts["out"]) == (1, "run")
    assert facts["grid_pixels"] > 60 * 96 * 96
    assert state(tmp_path) == before
    text = guidegen(*args)
    assert text.returncode == 0
    for words in ("60 images of 8x8", f"{facts['nfe']} network calls", f"grid of {facts['grid_pixels']:,} pixels"):
        assert words in text.stdout
    assert "guidegen-runs/model-sweep-cfg-" in text.stdout
    assert state(tmp_path) == before


# --- labels, seeds, schedulers, modes


def test_every_form_of_label_and_seeds_is_understood(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("# what to draw\n\ncrane, hoist   # a machine\n")
    forms = ["--label", "lion,2", "--label", "TABBY CAT", "--label", "@names.txt", "--label", "-", "--label", "0-1"]
    args = ("sample", "-m", with_null, *forms, "--seeds", "0-1,7", "--steps", 1, "--scheduler", "ddpm", "-o", "run")
    result = guidegen(*args, "--json", input="goldfish\n")
    assert result.returncode == 0, result.stderr
    rows = rows_of(result.stdout)
    assert list(dict.fromkeys(row["label"] for row in rows)) == [4, 2, 1, 3, 0]
    assert {row["label"]: row["label_name"] for row in rows}[3] == "crane"
    assert [row["seed"] for row in rows if row["label"] == 4] == [0, 1, 7]
    assert len(rows) == 15
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert settings["scheduler"] == "DDPMScheduler"


def test_null_label_flag_lets_cfg_serve_a_checkpoint_that_does_not_say(
    guidegen: Command, without_null: Path, tmp_path: Path
) -> None:
    args = ("sample", "-m", without_null, "--null-label", 4, "--label", "all", "--steps", 1, "--scheduler", "euler")
    result = guidegen(*args, "-o", "run", "--json")
    assert result.returncode == 0, result.stderr
    assert [row["label"] for row in rows_of(result.stdout)] == [0, 1, 2, 3]
    assert "scheduler_config.json" in result.stderr, "what stands in for the missing file is said"
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert (settings["null_label"], settings["scheduler"]) == (4, "EulerDiscreteScheduler")


def test_mode_classifier_guides_an_unconditional_model(
    guidegen: Command, unconditional: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    args = ("sweep", "-m", unconditional, "-c", classifier_folder, "--mode", "classifier", "--label", "lion", "--w", "0,50")
    result = guidegen(*args, "--steps", 2, "-o", "run", "--json")
    assert result.returncode == 0, result.stderr
    plain, guided = rows_of(result.stdout)
    assert (plain["nfe"], guided["nfe"]) == (2, 4)
    assert (guided["label"], guided["label_name"], guided["mode"]) == (4, "lion", "classifier")
    assert plain["sha256"] != guided["sha256"]
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    weights = (classifier_folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert settings["classifier_sha256"] == hashlib.sha256(weights).hexdigest()


def test_mode_both_is_a_product_and_its_corners_are_the_single_modes(
    guidegen: Command, with_null: Path, tmp_path: Path
) -> None:
    args = ("sweep", "-m", with_null, "--mode", "both", "--label", 0, "--w", "0,1,2", "--w-classifier", "0,9", "--steps", 2)
    result = guidegen(*args, "-o", "run", "--json")
    assert result.returncode == 0, result.stderr
    rows = rows_of(result.stdout)
    assert all(set(row) == ROW_KEYS | LINE_KEYS | {"w_classifier"} for row in rows)
    calls = {(row["w"], row["w_classifier"]): row["nfe"] for row in rows}
    assert calls == {(0, 0): 2, (0, 9): 4, (1, 0): 2, (1, 9): 4, (2, 0): 4, (2, 9): 6}
    assert len({row["file"] for row in rows}) == len({row["sha256"] for row in rows}) == 6


def test_mode_none_draws_with_and_without_a_label(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    labelled = guidegen("sample", "-m", with_null, "--mode", "none", "--label", 1, "--steps", 2, "-o", "a", "--json")
    plain = guidegen("sample", "-m", with_null, "--mode", "none", "--seed", 2**63 - 1, "--steps", 2, "-o", "b", "--json")
    (with_label,), (no_label,) = rows_of(labelled.stdout), rows_of(plain.stdout)
    assert (with_label["w"], with_label["label"], with_label["nfe"]) == (1.0, 1, 2)
    assert (no_label["w"], no_label["label"], no_label["label_name"], no_label["nfe"]) == (0.0, None, "", 2)
    assert no_label["seed"] == 2**63 - 1


# --- inspect, labels, grid


def test_inspect_says_what_a_checkpoint_is_and_serves(
    guidegen: Command, with_null: Path, without_null: Path, unconditional: Path, classifier_folder: Path
) -> None:
    def facts(*args: object) -> dict[str, Any]:
        result = guidegen("inspect", *args, "--json")
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout))

    full = facts(with_null)
    assert (full["labels"], full["null label"], full["prediction type"]) == (5, 5, "epsilon")
    assert full["resolution"].startswith("8x8")
    assert full["modes"] == ["cfg", "classifier", "both", "none"]
    lacking = facts(without_null)
    assert (lacking["modes"], lacking["null label"]) == (["none"], None)
    assert "null label" in lacking["cannot serve"]["cfg"]
    assert lacking["missing"]
    assert facts(without_null, "--null-label", 4)["modes"] == ["cfg", "none"]
    assert facts(unconditional)["modes"] == ["none"]
    assert facts(unconditional, "-c", classifier_folder)["modes"] == ["classifier", "none"]


def test_inspect_in_words_has_no_empty_lines_and_no_colours(
    guidegen: Command, with_null: Path, environment: dict[str, str]
) -> None:
    result = guidegen("inspect", env=environment | {"GUIDEGEN_MODEL": str(with_null)})
    assert (result.returncode, result.stderr) == (0, "")
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert lines["null label"] == "5"
    assert lines["modes"] == "cfg, classifier, both, none"
    assert "\x1b" not in result.stdout
    assert not [key for key, value in lines.items() if value in ("", "None")]


def test_labels_lists_and_searches(guidegen: Command, with_null: Path, unconditional: Path, classifier_folder: Path) -> None:
    everything = guidegen("labels", "-m", with_null)
    assert (everything.returncode, everything.stderr) == (0, "")
    assert everything.stdout.splitlines()[0] == "0\tgoldfish, Carassius auratus"
    assert len(everything.stdout.splitlines()) == 5
    found = rows_of(guidegen("labels", "tabby", "-m", with_null, "--json").stdout)
    assert found[0] == {"type": "label", "label": 1, "name": "tabby, tabby cat"}
    assert guidegen("labels", "golfish", "-m", with_null).stdout.startswith("0\t")
    assert guidegen("labels", "4", "-m", with_null).stdout.startswith("4\tlion")
    nothing = guidegen("labels", "zzzz", "-m", with_null)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "zzzz" in nothing.stderr
    assert guidegen("labels", "-m", unconditional).returncode == 2
    assert "lion" in guidegen("labels", "-m", unconditional, "-c", classifier_folder).stdout


def test_grid_is_drawn_again_with_other_axes_and_size(guidegen: Command, finished_copy: Path, tmp_path: Path) -> None:
    before = state(finished_copy)
    again = guidegen("grid", "run")
    assert (again.returncode, again.stdout, again.stderr) == (0, "run/grid.png\n", "")
    assert (pixels(finished_copy / "grid.png") == pixels_of(before["grid.png"][1])).all()
    small = guidegen("grid", "run", "--columns", "seed", "--scale", 1, "-o", "small.png")
    large = guidegen("grid", "run", "--columns", "seed", "--scale", 30, "-o", "large.png")
    assert (small.stdout, large.stdout) == ("small.png\n", "large.png\n")
    sizes = [pixels(tmp_path / name).shape for name in ("small.png", "large.png")]
    rows, growth = 2 * 3, 8 * 30 - 8
    assert abs(sizes[1][0] - sizes[0][0] - rows * growth) <= 2 * 20  # but for lines of text
    assert sizes[1][1] > 2 * 8 * 30
    assert {name for name in state(tmp_path) if "/" not in name} == {"small.png", "large.png"}


def pixels_of(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_grid_shows_the_pixels_of_the_images_enlarged_without_blur(
    guidegen: Command, finished_copy: Path, tmp_path: Path
) -> None:
    assert guidegen("grid", "run", "--scale", 5, "-o", "g.png").returncode == 0
    sheet = pixels(tmp_path / "g.png")
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (40, 40), axis=(0, 1))
    for row in manifest(finished_copy):
        tile = pixels(finished_copy / row["file"]).repeat(5, 0).repeat(5, 1).transpose(2, 0, 1)
        corners = np.argwhere((sheet == tile[:, 0, 0]).all(-1))
        inside = [(y, x) for y, x in corners if y + 40 <= sheet.shape[0] and x + 40 <= sheet.shape[1]]
        assert any((windows[y, x] == tile).all() for y, x in inside), row["file"]


def test_grid_crosses_out_an_image_that_is_missing_or_damaged(
    guidegen: Command, finished_copy: Path, tmp_path: Path
) -> None:
    assert guidegen("grid", "run", "-o", "whole.png").returncode == 0
    files = [finished_copy / row["file"] for row in manifest(finished_copy)]
    files[0].unlink()
    files[1].write_bytes(b"damaged")
    result = guidegen("grid", "run", "-o", "holes.png")
    assert (result.returncode, result.stdout) == (3, "holes.png\n"), result.stderr
    whole, holes = pixels(tmp_path / "whole.png"), pixels(tmp_path / "holes.png")
    assert whole.shape == holes.shape
    changed = (whole != holes).any(-1).mean()
    assert 0.01 < changed < 0.5


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ("grid nowhere", "nowhere"),
        ("grid run --columns size", "--columns"),
        ("grid run --scale 0", "--scale"),
        ("grid run -o g.jpg", "g.jpg"),
        ("grid", "RUN"),
    ],
)
def test_grid_refuses_what_it_cannot_draw(
    guidegen: Command, finished_copy: Path, tmp_path: Path, args: str, word: str
) -> None:
    before = state(tmp_path)
    result = guidegen(*args.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert word in result.stderr
    assert state(tmp_path) == before


def test_a_classifier_on_a_conditional_score_needs_no_null_label(
    guidegen: Callable[..., Any], without_null: Path, classifier_folder: Path
) -> None:
    """Dhariwal & Nichol's guided conditional models: s(x|y) + w grad log p(y|x)."""
    flags = ["sample", "--mode", "both", "-m", without_null, "-c", classifier_folder, "--label", 2, "--steps", 2]
    done = guidegen(*flags, "--w", 1, "--w-classifier", 5, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["nfe"] == 4
    refused = guidegen(*flags, "--w", 2)
    assert refused.returncode == 2
    assert "--mode both --w 1" in refused.stderr
