"""What the README says is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import call
from run_readme import README, ROOT, make_stand_ins, readme_commands, stood_in, transcript
from typer.testing import CliRunner

from guidegen.cli import app
from guidegen.scores.methods import find_method

BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ci_calls_the_test_command() -> None:
    (command,) = re.findall(r"^ {4}(python3 -m venv .*pytest)$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_python_example_runs() -> None:
    code = next(block for block in BLOCKS if "BUNDLED" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["pixels"].shape == (2, 32, 32, 3)
    assert (names["pixels"][0] != names["pixels"][1]).any()


def test_method_of_ones_own_runs(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(next(block for block in BLOCKS if block.startswith("# own.py")))
    method, options = find_method(f"{tmp_path}/own.py:Damped", {"rate": "2"})
    assert options == {"rate": 2.0}
    assert method.line == "Less guidance with every step."


def test_every_command_and_flag_exists() -> None:
    shown = ""
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        shown += (
            CliRunner(env={"COLUMNS": "200"})
            .invoke(app, [name, "--help-all" if name in ("sample", "sweep") else "--help"])
            .output
        )
        assert f"guidegen {name}" in README
    others = r"^ {4}(python|#SBATCH).*$|torchrun .*(?=-m guidegen)|--gnet|`python -m [^`]*`"  # whose flags are not ours
    own = re.sub(others, "", README, flags=re.MULTILINE)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)):
        assert flag in shown, flag


@pytest.mark.parametrize("line", readme_commands())
def test_commands_are_ones_that_the_parser_takes(line: str) -> None:
    group: Any = typer.main.get_command(app)
    name, *words = shlex.split(re.split(r" \| | & ", line)[0])[1:]
    group.commands[name].make_context(name, words)


def test_commands_do_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins, run = make_stand_ins(tmp_path), tmp_path / "RUN"
    monkeypatch.chdir(tmp_path)
    call("sweep", "--label", "145,207", "-w", "0,3", "-n", "6", "--steps", "1", "-o", run, "-q")
    done = 0
    for line in dict.fromkeys(readme_commands()):
        command = stood_in(line.replace("steps=10,20", "steps=1,2"), stand_ins, run, run)
        if command is None or "--label king" in line:
            continue
        name, *words = shlex.split(re.split(r" \| | & ", command)[0])[1:]
        words = [word for word in words if word != "--open"]
        if name in ("sample", "sweep"):
            words += ["-n", "1"]
        if name == "tune":
            words += ["--steps", "1"]
        if name in ("sample", "sweep", "again") and "steps=" not in line:
            words += ["--steps", "2"]
        assert call(name, *words).stdout_bytes or name == "verify", line
        if "--shard 0/4" in line:
            for shard in (1, 2, 3):
                call(name, *(word.replace("0/4", f"{shard}/4") for word in words))
        done += 1
    assert done > 38


def test_transcript_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, below in transcript():
        result = call(*shlex.split(command)[1:], code=2 if below[0].startswith("error") else 0)
        shown = result.output if result.exception is None else f"error: {result.exception}"
        for line in below:
            assert line in shown.replace("\n", " "), (command, shown)
