"""What the README says is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import call

from guidegen.cli import app
from guidegen.scores.methods import find_method

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
    import subprocess
    import sys

    shown = ""
    commands = "sample sweep again ls inspect labels grid guidances convert verify merge evaluate report"
    for command in commands.split():
        run = subprocess.run(
            [sys.executable, "-m", "guidegen", command, "--help-all" if command in ("sample", "sweep") else "--help"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        shown += run.stdout
        assert f"guidegen {command}" in README
    others = r"^ {4}(python|#SBATCH).*$|torchrun .*(?=-m guidegen)"  # whose flags are not ours
    own = re.sub(others, "", README, flags=re.MULTILINE)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)):
        assert flag in shown, flag


def readme_commands() -> list[str]:
    """The command lines of the README that start with guidegen, without what comes after them on the line."""
    lines = re.findall(r"^ {4}(?:\$ )?(guidegen .*)$", README, re.MULTILINE)
    return [re.split(r"\s{3,}| \| | & ", line)[0] for line in lines]


@pytest.mark.parametrize("line", readme_commands())
def test_commands_are_ones_that_the_parser_takes(line: str) -> None:
    group: Any = typer.main.get_command(app)
    name, *words = shlex.split(line)[1:]
    group.commands[name].make_context(name, words)


@pytest.mark.parametrize("line", [line for line in readme_commands() if re.match(r"guidegen (sample|sweep) ", line)])
def test_commands_on_the_bundled_checkpoint_are_ones_that_it_serves(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    if {"-m", "-c"} & set(words) or "--label king" in line or "--shard auto" in line:
        pytest.skip("names what is not here, or an error")
    assert re.search('network calls|"nfe"', call(*(word if word != "-" else "x.png" for word in words), "--dry-run").stdout)
