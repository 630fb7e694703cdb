"""What the README says is what happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
    commands = "sample sweep inspect labels grid guidances convert verify merge evaluate report"
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
