"""`--seeds-per-label`: seeds that no two labels share, through all that is done with a run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE, call
from PIL import Image

from guidegen.report import grid
from guidegen.runs.manifest import read_rows

WEIGHTS, LABELS, SEEDS = (0.0, 3.0), (0, 3), (1, 2, 3)
FILES = sorted(
    f"images/w{w}/label{label:04d}/{label * 100_000 + seed:06d}.png"
    for w in (0.0, 3.0)
    for label in (0, 3)
    for seed in (1, 2, 3)
)
DRAW = ("--steps", 2, "-q", "--label", "3,0", "-w", "0,3", "--seed", 1, "-n", 3, "--seeds-per-label")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def swept(with_null: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("seeds") / "run"
    call("sweep", "-m", with_null, *DRAW, "-o", run)
    return run


@pytest.fixture
def run(swept: Path) -> Path:
    return Path(shutil.copytree(swept, "run"))


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path))


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.glob("images/*/*/*.png"))


def test_each_image_is_that_of_its_label_and_seed(with_null: Path, run: Path) -> None:
    rows = read_rows(run)
    assert sorted(row["file"] for row in rows) == FILES == files_of(run)
    call("sample", "-m", with_null, "--steps", 2, "-q", "--label", 3, "--seeds", "300001-300003", "-o", "alone")
    for file in files_of(Path("alone")):
        assert np.abs(pixels(f"alone/{file}").astype(int) - pixels(run / file)).max() <= 1
    unconditional = [pixels(run / file) for file in FILES if "w0.0" in file]
    assert len({image.tobytes() for image in unconditional}) == 6, "no two labels start from the same noise"
    pages = grid.layout(rows, (SIZE, SIZE))
    assert len(pages.positions()) == len(FILES), "a row for each label and seed"
    sheet = grid.layout([row for row in rows if row["w"] == 3.0], (SIZE, SIZE))
    assert len(sheet.positions()) == 6, "no column of a seed that one label has alone"


def test_shards_resume_and_advice(with_null: Path, run: Path) -> None:
    for shard in ("0/2", "1/2"):
        call("sweep", "-m", with_null, *DRAW, "--shard", shard, "-o", "parts")
    assert json.loads(call("merge", "parts", "--json").stdout.splitlines()[0])["images"] == 12
    assert files_of(Path("parts")) == FILES
    for file in FILES[2:4]:
        Path("parts", file).unlink()
    plan = call("sweep", "-m", with_null, *DRAW, "-o", "parts", "--dry-run", "--json").stdout
    assert (json.loads(plan)["cells"], json.loads(plan)["there"]) == (12, 10)
    (advice,) = re.findall(r"To draw the rest: (.*)", str(call("verify", "parts", code=3).exception))
    assert "--seeds-per-label" in advice
    call(*shlex.split(advice)[1:])
    call("verify", "parts")
    call("sweep", "-m", with_null, *DRAW, "-o", "parts", "--label", 1, "-n", 4)
    assert len(files_of(Path("parts"))) == 3 * 4 * 2
    call("verify", "parts")


def test_again_and_the_report(run: Path) -> None:
    again = call("again", run, "--show").stdout
    assert "--seeds 1-3 " in again
    assert "--seeds-per-label " in again
    call("again", run, "-q", "-o", "twice")
    assert files_of(Path("twice")) == FILES
    image = next(run.glob("images/w3.0/label0003/*1.png"))
    shown = call("again", image, "--show").stdout
    assert "--seed 300001" in shown
    assert "per-label" not in shown
    call("report", run, "-o", "report.html", "-q")
    page = Path("report.html").read_text()
    assert "300002" in page
    assert re.findall(r'"again": ?"[^"]*per-label', page) == []


def test_evaluate_takes_images_of_other_seeds(run: Path, with_null: Path) -> None:
    Path("real").mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(f"real/{i}.png")
    args = ("--features", with_null / "classifier", "--judge", with_null / "classifier", "--no-curves", "--json", "-q")
    rows = [json.loads(line) for line in call("evaluate", run, "--reference", "real", *args).stdout.splitlines()]
    assert [(row["w"], row["images"], row["distinct"]) for row in rows if row["type"] == "metrics"] == [
        (0.0, 6, 6),
        (3.0, 6, 6),
    ]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--label", "1:2,0:-1"), "is a mixture"),
        (("--mode", "none"), "no label"),
        (("--label", 0, "--num", 100_001), "below 100000"),
        (("--label", 0, "--seeds", "5,100000"), "below 100000"),
    ],
)
def test_what_cannot_be_kept_apart_is_refused(with_null: Path, args: tuple[object, ...], says: str) -> None:
    assert says in str(call("sample", "-m", with_null, "--seeds-per-label", *args, code=2).exception)
    assert not Path("guidegen-runs").exists()


def test_a_random_seed_leaves_room_for_all(with_null: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", lambda count: b"\xff" * count)
    args = ("-m", with_null, "--label", "0-1", "--seed", "random", "-n", 50_000, "--seeds-per-label", "--dry-run", "--json")
    assert json.loads(call("sample", *args).stdout)["cells"] == 100_000
