from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import settings_of
from PIL import Image
from typer.testing import CliRunner

from guidegen.cli import app
from guidegen.errors import UsageError
from guidegen.evaluate.measure import images_digest, open_drawn, write_metrics
from guidegen.report import grid
from guidegen.runs.directory import Run
from guidegen.spec.plan import Plan

COLOURS = {(207, 0.0): (200, 0, 0), (207, 3.0): (0, 200, 0), (281, 0.0): (0, 0, 200), (281, 3.0): (90, 90, 0)}


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    found = []
    for (label, w), colour in COLOURS.items():
        for seed in (0, 1):
            file = f"{label}-{w}-{seed}.png"
            Image.new("RGB", (32, 32), colour).save(tmp_path / file)
            name = "golden retriever" if label == 207 else "tabby"
            row = {"file": file, "w": w, "label": label, "label_name": name, "seed": seed, "status": "ok"}
            found.append(row)
    return found


def draw(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[np.ndarray[Any, Any], grid.Layout]:
    plan = grid.layout(rows, (32, 32), title="a title", **options)
    return np.asarray(grid.draw(folder, rows, plan, 0)), plan


def test_every_image_stands_under_its_w_and_beside_its_label(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    picture, plan = draw(tmp_path, rows)
    assert picture.shape[:2][::-1] == plan.size()
    assert plan.heads == {(0.0,): "w = 0", (3.0,): "w = 3"}
    assert plan.title == "a title"
    assert plan.pages == [[(207, 0), (207, 1), (281, 0), (281, 1)]]
    for x, w in enumerate((0.0, 3.0)):
        for y, label in enumerate((207, 207, 281, 281)):
            left, top = plan.left + x * plan.pitch, plan.top + y * (96 + 4)
            tile = picture[top : top + 96, left : left + 96]
            assert (tile == COLOURS[label, w]).all()  # 32 pixels, three times as large, without blur


def test_text_is_there_and_inside(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    picture, plan = draw(tmp_path, rows)
    names = picture[plan.top :, : plan.left - 4]
    heads = picture[: plan.top - 4]
    assert (names < 100).any()
    assert (heads < 100).any()
    assert (picture[:, :4] == 255).all()  # nothing touches the edges
    assert (picture[:4] == 255).all()
    assert (picture[:, -8:] == 255).all()


@pytest.mark.parametrize(("axis", "across", "down"), [("seed", 2, 4), ("label", 2, 4), ("w", 2, 4)])
def test_other_axes(tmp_path: Path, rows: list[dict[str, Any]], axis: str, across: int, down: int) -> None:
    _, plan = draw(tmp_path, rows, columns=[axis])
    assert (len(plan.heads), len(plan.pages[0])) == (across, down)


def test_missing_and_failed_images_stay_empty(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows[0]["status"] = "nonfinite"
    (tmp_path / rows[2]["file"]).unlink()
    picture, plan = draw(tmp_path, rows, scale=2)
    assert plan.tile == (64, 64)
    corner = picture[plan.top : plan.top + 64, plan.left : plan.left + 64]
    assert (corner[10, 40] == 255).all()


def test_large_grids_are_paged_and_too_wide_ones_refused() -> None:
    cells = [{"w": w, "label": 0, "label_name": "x", "seed": s} for w in (0.0, 1.0) for s in range(3000)]
    plan = grid.layout(cells, (256, 256))
    assert len(plan.pages) > 1
    assert sum(map(len, plan.pages)) == 3000
    assert all(w * h <= grid.MAX_PIXELS for w, h in map(plan.size, range(len(plan.pages))))
    assert grid.page_names(2) == ["grid-1.png", "grid-2.png"]
    wide = [{"w": float(i), "label": 0, "label_name": "x", "seed": 0} for i in range(2000)]
    with pytest.raises(UsageError, match="megapixels"):
        grid.layout(wide, (512, 512))


def test_single_cell_and_unlabelled(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 7).save(tmp_path / "a.png")
    row = {"file": "a.png", "w": 0.0, "label": None, "label_name": "", "seed": 3, "status": "ok"}
    picture, plan = draw(tmp_path, [row])
    assert plan.tile == (96, 96)
    assert plan.title == "a title · seed 3"  # what is not named at the side stands above
    assert (picture[plan.top + 5, plan.left + 5] == 7).all()


def test_measures_under_the_columns_and_a_choice_of_rows(tmp_path: Path) -> None:
    run, labels, seeds = tmp_path / "run", [1, 2], list(range(6))
    weights = [0.0, 2.0]
    plan = Plan(labels, seeds, weights)
    with Run(run, settings_of("cfg"), {}, plan=plan) as drawn:
        for cell in plan.cells():
            drawn.write(cell, np.full((8, 8, 3), int(cell.seed * 20), np.uint8), f"name {cell.label}", 1)

    def ask(*flags: object) -> Any:
        return CliRunner().invoke(app, ["grid", str(run), "-o", str(tmp_path / "g.png"), *map(str, flags)])

    assert "was not measured" in str(ask("--metric", "accuracy").exception)
    measured = [
        {"w": key[0], "metrics": {"accuracy": {"value": 0.25 * (i + 1)}}, "images_sha256": images_digest(rows)}
        for i, (key, rows) in enumerate(open_drawn(run).groups().items())
    ]
    write_metrics(run, measured)
    plain = ask("--label", 2, "--seeds", "1-2")
    assert plain.exit_code == 0, plain.output
    height = Image.open(tmp_path / "g.png").height
    assert ask("--label", "name 2", "--seeds", "1-2", "--metric", "accuracy").exit_code == 0
    captioned = Image.open(tmp_path / "g.png")
    assert captioned.height == height + 20, "one more line of text"
    for flags, words in (
        (["--metric", "beauty"], "choose of"),
        (["--label", 3], "not a label"),
        (["--seeds", "77"], "No image"),
    ):
        assert words in str(ask(*flags).exception)


def test_captions_stand_where_a_whole_column_has_the_same() -> None:
    cells = [{"w": w, "label": 1, "label_name": "a", "seed": seed} for w in (0.0, 2.0) for seed in (0, 1)]
    same = [cell | {"caption": f"FD {cell['w']}"} for cell in cells]
    assert list(grid.layout(same, (8, 8)).heads.values()) == ["w = 0\nFD 0.0", "w = 2\nFD 2.0"]
    mixed = [cell | {"caption": f"FD {cell['seed']}"} for cell in cells]
    assert list(grid.layout(mixed, (8, 8)).heads.values()) == ["w = 0", "w = 2"]
