"""Lists without end, text that a terminal would obey, and plans that are larger than memory."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import on_a_terminal

from guidegen.cli import console
from guidegen.errors import UsageError
from guidegen.report import grid

Command = Callable[..., Any]
DRAW = """
import re, sys
from guidegen.cli import main
import os
leave = os._exit
def told(code=0):
    print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
    leave(code)
os._exit = told
try:
    main()
except SystemExit as done:
    told(done.code or 0)
"""


def measured(*args: object, environment: dict[str, str], cwd: Path, **kwargs: Any) -> tuple[Any, int]:
    """A command and the most memory it had, in MiB."""
    command = [sys.executable, "-c", DRAW, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, **kwargs)
    return done, int(done.stderr.split()[-1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_plan_of_a_milliard_is_planned_in_the_room_of_ten(
    with_null: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    flags = ("sample", "-m", with_null, "--label", "1,0", "--steps", 4, "--dry-run", "--json")
    few, room = measured(*flags, "--num", 10, environment=environment, cwd=tmp_path)
    many, more = measured(*flags, "--num", 10**9, environment=environment, cwd=tmp_path)
    assert few.returncode == many.returncode == 0, many.stderr
    small, large = json.loads(few.stdout), json.loads(many.stdout)
    assert (small["cells"], large["cells"]) == (20, 2 * 10**9)
    assert large["nfe"] == small["nfe"] * 10**8
    assert large["bytes"] == small["bytes"] * 10**8
    assert more < room + 30, "MiB"


def test_plan_of_a_milliard_draws_at_once(
    guidegen: Command, with_null: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Its first images are there before the others are even counted; a signal and the same command go on."""
    command = [sys.executable, "-m", "guidegen", "sample", "-m", str(with_null), "--label", "1", "--num", str(10**9)]
    command += ["--steps", "1", "-o", "run", "--json", "--batch-size", "2"]
    files: list[str] = []
    for _ in range(2):
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            before = len(files)
            for seen, line in enumerate(process.stdout, start=1):
                if seen > before + 2:
                    process.terminate()
                if json.loads(line)["file"] not in files:
                    files.append(json.loads(line)["file"])
            assert process.wait(60) == 143
        assert len(files) > before
    assert files == [f"images/w3.0/label0001/{seed:06d}.png" for seed in range(len(files))]


def test_sweep_whose_grid_cannot_be_is_refused(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    for flags in (["--num", 10**9], ["--num", 10**9, "--shard", "0/4"], ["--label", "0", "--w", "0:999999:1"]):
        done = guidegen("sweep", "-m", with_null, "--label", "1", *flags, "-o", "run", timeout=60)
        assert done.returncode == 2
        assert "A sweep of " in done.stderr
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="100,001 columns"):
        grid.layout([{"w": float(w), "label": 0, "seed": 0} for w in range(100_001)], (32, 32))


def test_standard_input_without_end_or_closed_or_a_terminal(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    flags = ("sample", "-m", with_null, "--label", "-", "--dry-run")
    with Path("/dev/zero").open("rb") as zeros:
        done = guidegen(*flags, stdin=zeros, timeout=60)
    assert (done.returncode, "no end" in done.stderr) == (2, True)
    ours, theirs = pty.openpty()
    done = guidegen(*flags, stdin=theirs, timeout=60)
    assert (done.returncode, "is a terminal" in done.stderr) == (2, True)
    os.close(ours)
    os.close(theirs)
    command = [sys.executable, "-m", "guidegen", *map(str, flags)]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "is closed" in done.stderr) == (2, True)


def test_labels_are_read_as_they_are_listed(guidegen: Command, with_null: Path) -> None:
    listed = guidegen("labels", "-m", with_null)
    done = guidegen("sample", "-m", with_null, "--label", "-", "--dry-run", "--json", input=listed.stdout)
    assert json.loads(done.stdout)["cells"] == len(listed.stdout.splitlines()) == 5


# --- what reaches a terminal

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    "args",
    [
        ["--mode", "\x1b[31m"],
        ["--\x1b[31m"],
        ["\x1b]0;title\x07"],
        ["--label", "\x1b[31m\u202e"],
        ["--label", "\x1b[31m" * 30],
        ["--seeds", "\x1b[31m"],
        ["--num", "\x1b[31m"],
        ["-m", "\x1b[31m"],
        ["--label", "@\x9b31m"],
        ["--label", b"\xff"],
        ["--prompt", b"\xc3("],
        ["-o", b"\xff.png", "--label", "1"],
        ["--scheduler", "\x1b[31m", "--label", "1"],
        ["--debug", "--label", "\x1b[31m"],
    ],
)
def test_control_characters_do_not_reach_the_terminal(
    guidegen: Command, args: list[Any], environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "guidegen", "sample", "--dry-run", *args]
    for more in ({}, {"PYTHONIOENCODING": "ascii"}):
        done = subprocess.run(command, env=environment | more, capture_output=True, timeout=60)
        assert done.returncode in (2, 4), done.stderr
        said = done.stderr.decode()
        assert said
        assert not CONTROL.search(said)
        assert "Unexpected" not in said
        assert ("Traceback" in said) == ("--debug" in args)


def test_names_of_labels_do_not_reach_the_terminal_as_they_are(
    with_null: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(with_null, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "\x1b[31mred", "1": "a\x00b", "2": "two\nlines", "3": "\u202ereversed", "4": "😀 tiger"}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "classifier")
    command = [sys.executable, "-m", "guidegen"]
    for args in (["labels", "-m", "model"], ["inspect", "model"], ["labels", "no such one", "-m", "model"]):
        _, shown = on_a_terminal([*command, *args], tmp_path, environment | {"TERM": "dumb", "NO_COLOR": "1"})
        assert shown.strip()
        assert not CONTROL.search(shown.decode().replace("\r\n", "\n"))
    plain = subprocess.run(
        [*command, "labels", "-m", "model"], cwd=tmp_path, env=environment, capture_output=True, timeout=60
    )
    assert len(plain.stdout.splitlines()) == 5, "a line each"
    sweep = [*command, "sweep", "-m", "model", "--label", "all", "--w", "0,2", "--steps", "1", "-o", "run", "--json"]
    done = subprocess.run(sweep, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", done.stdout), "JSON escapes them"
    assert (tmp_path / "run" / "grid.png").exists()


def test_texts_of_a_grid_may_be_anything() -> None:
    names = ["a\0b", "two\nlines", "\x1b[31m", "😀", "\ud800", "\u202e", "x" * 10**6, "", " "]
    cells = [{"w": 1.0, "label": i, "label_name": name, "seed": 0} for i, name in enumerate(names)]
    pages = grid.layout(cells, (8, 8), title="model\n\0\x1b")
    grid.draw(Path("nowhere"), [cell | {"status": "ok", "file": "x.png"} for cell in cells], pages, 0)
    assert pages.size()[0] < 2000
    across = grid.layout(cells, (8, 8), ["label"])
    grid.draw(Path("nowhere"), [cell | {"status": "nonfinite"} for cell in cells], across, 0)


def test_cleaned_text_says_what_it_was() -> None:
    assert console.clean("a\tb\nc\x1b[31m\x9b\u202e\ud800é😀") == "a\tb\nc\\x1b[31m\\x9b\\u202e\\ud800é😀"
    assert console.clean("a\nb", keep="") == "a\\nb"
    with pytest.raises(UsageError, match="not UTF-8"):
        console.check_text(["a", "\udcff"])
