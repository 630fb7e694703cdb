"""The lines of `--json`: every one an object with its type, an absolute path that is there, and its run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from typer.testing import CliRunner

from guidegen.cli import app
from guidegen.cli.lines import print_image, print_made

TINY = ("--steps", 1, "-q")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*args: object, code: int = 0) -> list[dict[str, Any]]:
    """The lines of a command, all of whose paths are absolute and there."""
    found = [json.loads(line) for line in call(*args, "--json", code=code).stdout.splitlines()]
    for line in found:
        for path in (line["path"], line["run"]):
            assert path is None or (Path(path).is_absolute() and Path(path).exists()), line
    return found


def test_every_command_names_what_it_made_and_the_run(with_null: Path, here: Path) -> None:
    images = lines("sweep", "-m", with_null, "--label", "0-1", "--w", "0,2", "-o", "run", *TINY)
    assert [line["type"] for line in images] == ["image"] * 4
    rows = [json.loads(line) for line in (here / "run/manifest.jsonl").read_text().splitlines()]
    run = str(here / "run")
    assert images == [{"type": "image", "path": f"{run}/{row['file']}", "run": run, **row} for row in rows]
    assert lines("grid", "run") == [{"type": "grid", "path": f"{run}/grid.png", "run": run}]
    assert lines("grid", "run", "run", "-o", "both.png") == [{"type": "grid", "path": str(here / "both.png"), "run": None}]
    assert lines("report", "run", "-o", "r.html", "-q") == [{"type": "report", "path": str(here / "r.html"), "run": run}]
    (verified,) = lines("verify", "run")
    assert (verified["type"], verified["path"], verified["run"]) == ("verify", run, run)
    assert (verified["complete"], verified["images"]) == (True, 4)
    (merged,) = lines("merge", "run", "--npz")
    assert (merged["type"], merged["run"], merged["images"]) == ("merge", run, 4)


def test_what_lists_or_describes_has_types_too(with_null: Path) -> None:
    for args, kind in (
        (("labels", "-m", with_null), "label"),
        (("inspect", with_null), "checkpoint"),
        (("guidances",), "guidance"),
    ):
        found = [json.loads(line) for line in call(*args, "--json").stdout.splitlines()]
        assert {line["type"] for line in found} == {kind}


def test_a_report_beside_images_is_a_line_too(with_null: Path, here: Path) -> None:
    found = lines("sample", "-m", with_null, "--label", 0, "-o", "run", "--report", *TINY)
    assert [line["type"] for line in found] == ["image", "report"]
    assert found[1]["path"] == str(here / "run/report.html")


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
def test_one_file_is_the_path_of_its_images(with_null: Path, here: Path, name: str) -> None:
    args = ("sample", "-m", with_null, "--label", 0, "-o", name, *TINY)
    (line,) = made = lines(*args)
    assert (line["type"], line["path"], line["run"]) == ("image", str(here / name), None)
    assert lines(*args) == made, "also when it is there"


def test_an_image_that_was_not_saved_has_no_path(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_image({"file": "images/x.png", "status": "nonfinite", "type": "odd", "run": "odd"}, here)
    line = json.loads(capsys.readouterr().out)
    assert (line["type"], line["path"], line["run"]) == ("image", None, str(here))
    print_made("file", Path("x"), None, as_json=False)
    assert capsys.readouterr().out == "x\n"


def test_json_and_pixels_do_not_share_standard_output(with_null: Path) -> None:
    result = call("sample", "-m", with_null, "--label", 0, "-o", "-", "--json", *TINY, code=2)
    assert "--json" in str(result.exception)
    assert result.stdout == ""


def test_the_default_name_does_not_depend_on_where_guidegen_is_installed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guidegen.zoo import BUNDLED

    elsewhere = here / "site-packages" / BUNDLED.name
    shutil.copytree(BUNDLED, elsewhere)
    names = []
    for bundled in (BUNDLED, elsewhere):
        monkeypatch.setattr("guidegen.cli.options.BUNDLED", bundled)
        monkeypatch.setattr("guidegen.cli.resolve.BUNDLED", bundled)
        (plan,) = (json.loads(line) for line in call("sample", "--label", 207, "--dry-run", "--json").stdout.splitlines())
        names.append(plan["out"])
    assert names[0] == names[1]


def test_labels_are_read_back_with_a_byte_order_mark_blank_lines_and_comments(with_null: Path) -> None:
    listed = call("labels", "-m", with_null).stdout
    text = "\ufeff" + listed.replace("\n", "\r\n\r\n# a comment\n")
    plan = CliRunner().invoke(
        app, ["sample", "-m", str(with_null), "--label", "-", "--dry-run", "--json"], input=text.encode()
    )
    assert json.loads(plan.stdout)["cells"] == len(listed.splitlines()) == 5


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_traceback(with_null: Path, environment: dict[str, str], closed: str) -> None:
    line = f"{sys.executable} -m guidegen labels -m {with_null} {closed}"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
