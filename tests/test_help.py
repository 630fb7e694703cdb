"""The help of every command at the width of a terminal: no word broken, no types of Python."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from guidegen.cli import app

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable(command: str, width: int) -> None:
    flag = "--help-all" if command in ("sample", "sweep") else "--help"
    shown = CliRunner().invoke(app, [command, flag], env={"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}).stdout
    assert max(map(len, shown.splitlines())) <= width
    assert re.findall(r"<bool>|<list|<int |<float|<path|\{RUN", shown, re.IGNORECASE) == []
    assert re.findall(r"<[a-z0-9][^<>│\n]*│", shown) == [], "a choice is not broken between lines"
    assert "…" not in shown
