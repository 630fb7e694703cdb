from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, settings_of
from PIL import Image
from typer.testing import CliRunner

from guidegen.cli import app
from guidegen.errors import UsageError
from guidegen.evaluate.measure import images_digest, open_drawn, write_metrics
from guidegen.report import grid
from guidegen.report.lettering import width_of
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
    ((block,),) = plan.pages
    assert block.rows == [(207, 0), (207, 1), (281, 0), (281, 1)]
    assert plan.headings == {(207,): "golden retriever", (281,): "tabby"}
    assert list(plan.names.values()) == ["seed 0", "seed 1"] * 2
    positions = plan.positions()
    assert len(set(positions.values())) == 8
    for ((label, _), (w,)), (left, top) in positions.items():
        tile = picture[top : top + 96, left : left + 96]
        assert (tile == COLOURS[label, w]).all()  # 32 pixels, three times as large, without blur


def test_text_is_there_and_inside(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    picture, plan = draw(tmp_path, rows)
    (left, top) = plan.positions()[(207, 0), (0.0,)]
    names = picture[top:, : left - 4]
    heads = picture[: top - 4]
    assert (names < 100).any()
    assert (heads < 100).any()
    assert (picture[:, :4] == 255).all()  # nothing touches the edges
    assert (picture[:4] == 255).all()
    assert (picture[:, -8:] == 255).all()


@pytest.mark.parametrize(("axis", "across", "down"), [("seed", 2, 4), ("label", 2, 4), ("w", 2, 4)])
def test_other_axes(tmp_path: Path, rows: list[dict[str, Any]], axis: str, across: int, down: int) -> None:
    _, plan = draw(tmp_path, rows, columns=[axis])
    assert (len(plan.heads), len(plan.names)) == (across, down)


def test_missing_and_failed_images_stay_empty(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows[0]["status"] = "nonfinite"
    (tmp_path / rows[2]["file"]).unlink()
    picture, plan = draw(tmp_path, rows, scale=2)
    assert plan.sizes.tile == (64, 64)
    left, top = plan.positions()[(207, 0), (0.0,)]
    corner = picture[top : top + 64, left : left + 64]
    assert (corner[10, 40] == 255).all()


def test_large_grids_are_paged_and_too_wide_ones_refused() -> None:
    cells = [{"w": w, "label": 0, "label_name": "x", "seed": s} for w in (0.0, 1.0) for s in range(3000)]
    plan = grid.layout(cells, (256, 256))
    assert len(plan.pages) > 1
    assert sum(len(block.rows) for page in plan.pages for block in page) == 3000
    assert sorted(row for page in range(len(plan.pages)) for row, _ in plan.positions(page)) == sorted(
        (0, seed) for seed in range(3000) for _ in range(2)
    )
    assert all(w * h <= grid.MAX_PIXELS for w, h in map(plan.size, range(len(plan.pages))))
    assert grid.page_names(2) == ["grid-1.png", "grid-2.png"]
    wide = [{"w": float(i), "label": 0, "label_name": "x", "seed": 0} for i in range(2000)]
    with pytest.raises(UsageError, match="megapixels"):
        grid.layout(wide, (512, 512))


def test_single_cell_and_unlabelled(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 7).save(tmp_path / "a.png")
    row = {"file": "a.png", "w": 0.0, "label": None, "label_name": "", "seed": 3, "status": "ok"}
    picture, plan = draw(tmp_path, [row])
    assert plan.sizes.tile == (96, 96)
    assert plan.title == "a title · seed 3"  # what is not named at the side stands above
    ((left, top),) = plan.positions().values()
    assert (picture[top + 5, left + 5] == 7).all()


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
    groups = {key: [row["sha256"] for row in rows] for key, rows in open_drawn(run).groups().items()}
    measured = [
        {"w": key[0], "metrics": {"accuracy": {"value": 0.25 * (i + 1)}}, "images_sha256": images_digest(files)}
        for i, (key, files) in enumerate(groups.items())
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


def cells_of(labels: int = 1, seeds: int = 1, weights: int = 1, **others: Any) -> list[dict[str, Any]]:
    return [
        {"w": float(w), "label": label, "label_name": f"name {label}", "seed": seed, **others}
        for label in range(labels)
        for seed in range(seeds)
        for w in range(weights)
    ]


def test_columns_are_as_wide_as_their_pictures() -> None:
    long = "a method whose name is of many words and would make its column wide"
    cells = [cell | {"guidance": name} for cell in cells_of(weights=2) for name in ("cfg", long, f"{long} indeed")]
    plan = grid.layout(cells, (32, 32), ["guidance"])
    assert plan.sizes.pitch == 96 + 4
    assert all(name.count("\n") <= 1 for name in plan.heads.values())
    assert len(set(plan.heads.values())) == 3
    assert all(width_of(name) <= 96 for name in plan.heads.values())


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_prompts_differ_by_what_is_different(axis: str) -> None:
    start = "a photograph of a golden retriever that sits in the long grass of a meadow in the evening sun, "
    prompts = [f"{start}with a hat", f"{start}beside a blue bicycle", "a cat"]
    cells = [{"w": 1.0, "label": None, "label_name": "", "prompt": prompt, "seed": 0} for prompt in prompts]
    plan = grid.layout(cells, (32, 32), ["prompt"] if axis == "columns" else ["w"])
    names = list((plan.heads if axis == "columns" else plan.names).values())
    shown = [name.replace("\n", " ") for name in names]
    assert shown == ["… with a hat", "… beside a blue bicycle" if axis == "rows" else shown[1], "a cat"]
    assert shown[1].startswith("… beside a blue")


@pytest.mark.parametrize(
    ("cells", "columns", "shape"),
    [
        (cells_of(seeds=200), [], (32, 32)),
        (cells_of(seeds=200), ["w"], (32, 32)),
        (cells_of(seeds=200, weights=2), [], (32, 32)),
        (cells_of(labels=20, seeds=4, weights=5), [], (32, 32)),
        (cells_of(weights=200), [], (32, 32)),
        (cells_of(labels=100), [], (512, 512)),
        (cells_of(seeds=50000), [], (512, 512)),
        (cells_of(seeds=2000, labels=3), [], (64, 64)),
    ],
)
def test_long_strips_become_sheets(cells: list[dict[str, Any]], columns: list[str], shape: tuple[int, int]) -> None:
    plan = grid.layout(cells, shape, columns)
    positions = [position for page in range(len(plan.pages)) for position in plan.positions(page)]
    assert len(set(positions)) == len(positions) == len(cells)
    for page in range(len(plan.pages)):
        width, height = plan.size(page)
        assert width * height <= grid.MAX_PIXELS
        corners = sorted(plan.positions(page).values())
        assert all(x + plan.sizes.tile[0] <= width and y + plan.sizes.tile[1] <= height for x, y in corners)
        assert len(set(corners)) == len(corners)
    assert max(plan.size()) <= 2.2 * min(plan.size())


def test_short_strips_stay_whole() -> None:
    wide = grid.layout(cells_of(weights=9), (512, 512))
    assert len({y for _, y in wide.positions().values()}) == 1
    high = grid.layout(cells_of(labels=9), (512, 512))
    assert len({x for x, _ in high.positions().values()}) == 1


def test_a_contact_sheet_names_its_subject_at_the_top() -> None:
    plan = grid.layout(cells_of(seeds=40), (32, 32), title="model")
    assert plan.title == "model · name 0 · w = 0"
    assert list(plan.heads.values())[:2] == ["seed 0", "seed 1"]
    two = grid.layout(cells_of(seeds=3, labels=2), (32, 32))
    assert list(two.names.values()) == ["name 0", "name 1"]


def test_scale_enlarges_one_file_and_the_grid(with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = ("-m", with_null, "--label", 1, "--steps", 2, "-q")
    for flags in (["-o", "a.png"], ["-o", "b.png", "--scale", 3], ["-o", "b.webp", "--scale", 3]):
        call("sample", *draw, *flags)
    small, large = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert (large == small.repeat(3, 0).repeat(3, 1)).all()
    assert Image.open(tmp_path / "b.webp").size == large.shape[:2][::-1]
    assert "something else" in str(call("sample", *draw, "-o", "b.png", "--scale", 4, code=2).exception)
    assert "--scale" in str(call("sample", *draw, "-o", "run", "--scale", 4, code=2).exception)
    call("sweep", *draw, "--w", "1,2", "-o", "grid", "--scale", 20)
    assert np.asarray(Image.open(tmp_path / "grid" / "grid.png")).shape[1] > 2 * 20 * small.shape[1]
