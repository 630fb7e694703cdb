"""An empty word is refused for every flag and argument of every command that takes one, at one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import call

from guidegen.cli import app

TEXTS = ("--prompt", "--negative-prompt")


def words() -> list[tuple[str, str]]:
    """(command, flag or argument) of all that take a word."""
    found = []
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for param in command.params:
            takes = not getattr(param, "is_flag", False) and param.name != "help"
            names = [param.opts[0]] if param.param_type_name == "option" else [""]
            found += [(name, flag) for flag in names if takes and flag not in TEXTS]
    return found


@pytest.mark.parametrize(("command", "flag"), words())
def test_an_empty_word_is_refused(command: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for blank in ("", " "):
        given = [[flag, blank], [f"{flag}={blank}"]] if flag.startswith("--") else [[blank]]
        for asked in given:
            result = call(command, *asked, code=2)
            assert str(result.exception).startswith(f"{flag or 'An argument'} is empty"), result.exception
    assert not list(tmp_path.iterdir())


def test_short_flags_too(tmp_path: Path) -> None:
    for flag in ("-m", "-o", "-l", "-c", "-n"):
        assert f"{flag} is empty" in str(call("sample", flag, "", code=2).exception)


def test_empty_text_is_a_text(unconditional: Path) -> None:
    """It reaches the command, which then says that nothing reads text."""
    for flag in TEXTS:
        for asked in ([flag, ""], [f"{flag}="]):
            error = call("sample", "-m", unconditional, "--mode", "none", *asked, "--dry-run", code=2).exception
            assert "reads text" in str(error)


def test_empty_environment_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDEGEN_MODEL", "")
    assert "imagenet20-32" in call("inspect").output


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--columns", ","], "--columns and --rows take axes"),
        (["--rows", " , "], "--columns and --rows take axes"),
        (["--features", "x", "--dry-run"], "are for --evaluate"),
        (["--report", "-o", "x.png", "--dry-run"], "need a run directory"),
    ],
)
def test_flags_that_would_do_nothing(with_null: Path, flags: list[str], told: str) -> None:
    assert told in str(call("sweep", "-m", with_null, "--label", 1, *flags, code=2).exception)
