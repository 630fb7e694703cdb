"""Files that guidegen did not make are neither overwritten nor deleted, and its own that no longer match are noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call
from PIL import Image

from guidegen.cli.report import write_report
from guidegen.errors import UsageError
from guidegen.evaluate.reference import Reference, save_reference
from guidegen.runs.ours import is_ours, refuse_foreign


@pytest.fixture
def run(with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    call("sweep", "-m", with_null, "--label", "0-1", "--w", "0,2", "--steps", 1, "-o", "run", "-q")
    return tmp_path / "run"


def picture(path: Path) -> bytes:
    Image.new("RGB", (4, 4)).save(path)
    return path.read_bytes()


def test_grid_and_report_refuse_files_of_others(run: Path, with_null: Path, tmp_path: Path) -> None:
    mine = picture(tmp_path / "mine.png")
    assert "--force" in str(call("grid", run, "-o", "mine.png", code=2).exception)
    assert (tmp_path / "mine.png").read_bytes() == mine
    for _ in range(2):  # the second time it is guidegen's
        call("grid", run, "-o", "mine.png", "--force" if (tmp_path / "mine.png").read_bytes() == mine else "--json")
    assert (tmp_path / "mine.png").read_bytes() != mine
    grid = picture(run / "grid.png")
    again = ("sweep", "-m", with_null, "--label", "0-1", "--w", "0,2", "--steps", 1, "-o", "run", "-q")
    for args in (("grid", run), ("merge", run), again, (*again, "--dry-run"), (*again, "--overwrite")):
        assert "grid.png: guidegen did not make" in str(call(*args, code=2).exception)
        assert (run / "grid.png").read_bytes() == grid
    call("merge", run, "--no-grid")
    call(*again, "--force")
    assert (run / "grid.png").read_bytes() != grid
    call("grid", run)
    (tmp_path / "r.html").write_text("<p>mine</p>")
    call("report", run, "-o", "r.html", "-q", code=2)
    assert (tmp_path / "r.html").read_text() == "<p>mine</p>"
    for flags in (("--force",), ()):
        call("report", run, "-o", "r.html", "-q", *flags)


def test_what_comes_after_drawing_is_refused_before_it(run: Path, with_null: Path) -> None:
    (run / "report.html").write_text("<p>mine</p>")
    again = ("sweep", "-m", with_null, "--label", "0-2", "--w", "0,2", "--steps", 1, "-o", "run", "-q")
    call(*again, "--report", code=2)
    assert len((run / "manifest.jsonl").read_text().splitlines()) == 4


def test_merge_refuses_files_of_others_and_verify_notices_its_own_old_ones(run: Path, with_null: Path) -> None:
    (run / "w2.0.npz").write_bytes(b"mine")
    call("merge", "run", "--npz", code=2)
    assert (run / "w2.0.npz").read_bytes() == b"mine"
    call("merge", "run", "--npz", "--tar", "--force")
    assert json.loads(call("verify", "run", "--json").stdout)["stale"] == []
    call("sweep", "-m", with_null, "--label", "0-1", "--w", "2", "--num", 2, "--steps", 1, "-o", "run", "-q")
    shown = call("verify", "run")
    assert "stale: w2.0-00000.tar\nstale: w2.0.npz" in shown.stdout
    assert "w0.0" not in shown.stdout
    assert "guidegen merge" in shown.stderr
    call("merge", "run", "--npz", "--tar")
    assert json.loads(call("verify", "run", "--json").stdout)["stale"] == []
    (run / "w0.0.npz").write_bytes(b"cut short")
    assert json.loads(call("verify", "run", "--json").stdout)["stale"] == ["w0.0.npz"]


def test_overwrite_leaves_what_others_put_under_its_names(run: Path, with_null: Path) -> None:
    mine = {
        run / "report.html": b"<p>mine</p>",
        run / "curves.svg": b"<svg/>",
        run / "manifest.notes.jsonl": b"[1]\n",
        run / "images/000001.png": picture(run / "images/000001.png"),
        run / "grid-7.png": picture(run / "grid-7.png"),
    }
    for path, data in mine.items():
        path.write_bytes(data)
    call("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", "run", "-q", "--overwrite")
    assert {path: path.read_bytes() for path in mine} == mine
    assert not (run / "grid.png").exists()
    assert not (run / "images/w0.0").exists()


def test_saved_reference_and_other_kinds(tmp_path: Path) -> None:
    import torch

    class Reader:
        identity, name = "x", "x"

    path = tmp_path / "r.npz"
    save_reference(path, Reference("a", "b", torch.rand(4, 3), None, None), Reader, (8, 8))  # type: ignore[arg-type]
    refuse_foreign(path)
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"--save-reference .*r\.npz: guidegen did not make"):
        refuse_foreign(path, flag="--save-reference")
    refuse_foreign(path, force=True)
    (tmp_path / "empty.html").touch()
    refuse_foreign(tmp_path / "empty.html")
    with pytest.raises(UsageError, match="no regular file"):
        refuse_foreign(tmp_path)
    assert not is_ours(tmp_path / "absent.png")
    with pytest.raises(UsageError, match="html"):
        write_report([tmp_path], tmp_path / "x.txt")
