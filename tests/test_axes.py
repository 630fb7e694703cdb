"""`sweep --by`: what varies besides w, drawn as the plain commands draw it, kept, shown and measured apart."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from PIL import Image

from guidegen.models import loading
from guidegen.report import grid
from guidegen.spec.axes import axis_value, describe, differences
from guidegen.spec.cell import Cell
from guidegen.spec.plan import Plan, read_plan
from guidegen.spec.shard import Shard

ARGS = ("--label", "0-1", "--num", "2", "--w", "1,3", "--batch-size", "3")
BY = ("--by", "scheduler=ddim,euler", "--by", "steps=2,3")


def images(folder: Path) -> dict[str, str]:
    """file below images/ -> sha256."""
    found = sorted((folder / "images").rglob("*.png"))
    return {str(path.relative_to(folder / "images")): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, with_null: Path) -> Path:
    """Two schedulers, two numbers of steps, two weights, two labels, two seeds."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    call("sweep", "-m", with_null, *ARGS, *BY, "-o", folder, "-q")
    return folder


@pytest.fixture
def run(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "run"))


# --- plans

PLAN = Plan([3, 1], [0, 1, 5], [0.0, 3.0], grid=True, by=(("guidance", ("cfg", "apg")), ("steps", (10, 20))))
CUSTOM = Plan([3], [0, 1], [3.0, 0.6], by=(("guidance", ("cfg", "cfg++")),), own_weights=("guidance", (3.0, 0.6)))


def test_cells_are_the_exact_product() -> None:
    cells = PLAN.cells()
    assert len(cells) == len(set(cells)) == len({cell.file for cell in cells}) == 2 * 3 * 2 * 4
    keys = {(cell.label, cell.seed, cell.w, *(value for _, value in cell.variant)) for cell in cells}
    assert keys == {
        (i, s, w, m, n) for i in (3, 1) for s in (0, 1, 5) for w in (0.0, 3.0) for m in ("cfg", "apg") for n in (10, 20)
    }
    assert [(dict(cell.variant)["guidance"], cell.w) for cell in CUSTOM.cells()] == [("cfg", 3.0)] * 2 + [("cfg++", 0.6)] * 2


@pytest.mark.parametrize("plan", [PLAN, CUSTOM])
def test_plan_with_axes_survives_json_and_is_parted_into_shards(plan: Plan) -> None:
    again = read_plan(json.loads(json.dumps(plan.as_json())))
    assert again == plan
    assert list(again.cells()) == list(plan.cells())
    shards = [plan.cells(Shard(i, 3)) for i in range(3)]
    assert sorted(cell.file for shard in shards for cell in shard) == sorted(cell.file for cell in plan.cells())
    of = {(cell.variant, cell.label, cell.seed): i for i, shard in enumerate(shards) for cell in shard}
    assert all(of[cell.variant, cell.label, cell.seed] == i for i, shard in enumerate(shards) for cell in shard)


def test_files_of_variants_are_safe_and_distinct() -> None:
    plain = Cell(207, 5, 3.0)
    assert plain.file == "images/w3.0/label0207/000005.png"
    variants: list[Any] = [
        (("guidance", "apg"), ("steps", 10)),
        (("interval", "0.3:2"),),
        (("interval", "0.3~2"),),
        (("guidance", "../../own.py:Mine"),),
        (("guidance", "x" * 300),),
        (("guidance", "y" + "x" * 299),),
        (("apg.eta", 0.1234567),),
        (("apg.eta", 0.12345671),),
    ]
    files = [Cell(207, 5, 3.0, variant=variant).file for variant in variants]
    assert files[:2] == [
        "images/guidance=apg,steps=10/w3.0/label0207/000005.png",
        "images/interval=0.3~2/w3.0/label0207/000005.png",
    ]
    assert len({file.lower() for file in files}) == len(files)
    for file in files:
        assert len(file.split("/")) == 5
        assert all(len(part) < 128 and set(part).isdisjoint('\\:*?"<>|') for part in file.split("/"))


def test_where_settings_stand_along_an_axis() -> None:
    plain: dict[str, Any] = {"guidance": None, "guidance_options": None, "interval": None, "steps": 5, "mode": "cfg"}
    apg = plain | {"guidance": "apg", "guidance_options": {"eta": 0.5}}
    assert [axis_value(axis, plain) for axis in ("guidance", "interval", "steps", "apg.eta")] == ["cfg", "none", 5, None]
    assert [axis_value(axis, apg) for axis in ("guidance", "apg.eta", "cfg.eta")] == ["apg", 0.5, None]
    assert differences([plain, apg, plain]) == ["guidance", "apg.eta"]
    assert describe(("w", "guidance", "steps", "scheduler", "interval"), (3.0, "apg", 10, "DDIMScheduler", "0.3:2")) == (
        "w = 3, apg, steps = 10, scheduler DDIM, interval 0.3:2"
    )


# --- a sweep and the plain commands


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 3), ("euler", 2)])
def test_variant_is_the_same_bytes_as_the_plain_command(
    with_null: Path, swept: Path, tmp_path: Path, scheduler: str, steps: int
) -> None:
    call("sweep", "-m", with_null, *ARGS, "--scheduler", scheduler, "--steps", steps, "-o", "plain", "-q")
    name = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}[scheduler]
    prefix = f"scheduler={name},steps={steps}/"
    mine = {file.removeprefix(prefix): sha for file, sha in images(swept).items() if file.startswith(prefix)}
    assert mine == images(tmp_path / "plain")
    assert len(mine) == 8
    call("sample", "-m", with_null, "--label", 1, "--w", 3, "--scheduler", scheduler, "--steps", steps, "-o", "one.png")
    one = swept / f"images/{prefix}w3.0/label0001/000000.png"
    assert np.abs(pixels(one).astype(int) - pixels(tmp_path / "one.png")).max() <= 1, "one level: another batch"


OWN_METHOD = "def mine(u, c, w, step, *, scale=1.0):\n    return u + w * scale * (c - u)\n"


@pytest.mark.parametrize(
    ("by", "folder", "plain"),
    [
        (["--by", "guidance=cfg,apg,cfg++"], "guidance=cfg", []),
        (["--by", "guidance=cfg,apg,cfg++"], "guidance=cfg++", ["--guidance", "cfg++"]),
        (["--guidance", "apg", "--by", "apg.eta=0,0.5"], "apg.eta=0.5", ["--guidance", "apg", "--guidance-opt", "eta=0.5"]),
        (["--by", "interval=none,30%:80%"], "interval=none", []),
        (["--by", "interval=none,30%:80%"], "interval=30%25~80%25", ["--interval", "30%:80%"]),
        (["--by", "w-schedule=constant,cosine"], "w_schedule=cosine", ["--w-schedule", "cosine"]),
        (["--by", "eta=0,1"], "eta=1.0", ["--eta", "1"]),
        (["--by", "guidance=own.py:mine,cfg"], "guidance=own.py~mine", ["--guidance", "own.py:mine"]),
    ],
)
def test_guidance_along_an_axis_is_the_same_bytes_as_its_flags(
    with_null: Path, tmp_path: Path, by: list[str], folder: str, plain: list[str]
) -> None:
    (tmp_path / "own.py").write_text(OWN_METHOD)
    args = ("sweep", "-m", with_null, "--label", "0-1", "--w", "2", "--steps", 4, "--batch-size", 2, "-q")
    call(*args, *by, "-o", "by")
    call(*args, *plain, "-o", "plain")
    mine = {f.removeprefix(f"{folder}/"): sha for f, sha in images(tmp_path / "by").items() if f.startswith(f"{folder}/")}
    assert mine == images(tmp_path / "plain")
    assert len(mine) == 2
    assert len({row["sha256"] for row in rows_of(tmp_path / "by")}) > len(mine), "the axis does something"
    facts = json.loads(call(*args, *by, "--dry-run", "--json").stdout)
    assert facts["nfe"] == sum(row["nfe"] for row in rows_of(tmp_path / "by"))


def test_a_method_of_ones_own_that_has_changed_is_another_setting(with_null: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_METHOD)
    args = ("sweep", "-m", with_null, "--label", 0, "--w", 2, "--steps", 2, "--by", "guidance=cfg,own.py:mine", "-o", "run")
    call(*args, "-q")
    (tmp_path / "own.py").write_text(OWN_METHOD.replace("scale *", "scale * 2 *"))
    assert "other settings: guidance_options" in str(call(*args, code=2).exception)


def test_it_says_where_an_axis_makes_no_difference(with_null: Path, tmp_path: Path) -> None:
    args = ("sweep", "-m", with_null, "--label", 0, "--steps", 3, "--batch-size", 1)
    said = call(*args, "--w", "0,3", "--by", "guidance=cfg,apg", "-o", "run").stderr
    assert "note: at w = 0 variants draw the same images" in said
    assert f"{3 * (1 + 2 * 2)} network calls for 4 images" in said  # that of w = 0 is drawn once
    of = {(row["guidance"], row["w"]): pixels(tmp_path / "run" / row["file"]) for row in rows_of(tmp_path / "run")}
    assert np.array_equal(of["cfg", 0], of["apg", 0])
    assert not np.array_equal(of["cfg", 3], of["apg", 3])
    assert "same images" not in call(*args, "--w", "0,3", "--by", "eta=0,1", "-o", "other").stderr


def test_rows_and_run_json_hold_the_axes(swept: Path) -> None:
    rows, about = rows_of(swept), json.loads((swept / "run.json").read_text())
    assert len(rows) == len(images(swept)) == 32
    assert {(row["scheduler"], row["steps"]) for row in rows} == {
        (name, steps) for name in ("DDIMScheduler", "EulerDiscreteScheduler") for steps in (2, 3)
    }
    assert {(row["w"], row["steps"], row["nfe"]) for row in rows} == {(1, 2, 2), (3, 2, 4), (1, 3, 3), (3, 3, 6)}
    assert about["plans"][0]["by"] == [["scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"]], ["steps", [2, 3]]]
    assert about["variants"]["scheduler=EulerDiscreteScheduler,steps=3"] == {
        "scheduler": "EulerDiscreteScheduler",
        "steps": 3,
    }
    with Image.open(swept / rows[-1]["file"]) as image:
        own = json.loads(image.text["guidegen"])  # type: ignore[attr-defined]
    assert (own["settings"]["scheduler"], own["settings"]["steps"]) == ("EulerDiscreteScheduler", 3)


def test_dry_run_counts_the_calls_of_each_variant(with_null: Path, swept: Path, tmp_path: Path) -> None:
    facts = json.loads(call("sweep", "-m", with_null, *ARGS, *BY, "--dry-run", "--json").stdout)
    rows = rows_of(swept)
    assert (facts["cells"], facts["nfe"]) == (32, sum(row["nfe"] for row in rows))
    for variant in facts["variants"]:
        mine = [row for row in rows if (row["scheduler"], row["steps"]) == (variant["scheduler"], variant["steps"])]
        assert (variant["cells"], variant["nfe"]) == (8, sum(row["nfe"] for row in mine))
    text = call("sweep", "-m", with_null, *ARGS, *BY, "--dry-run").stdout
    assert "scheduler EulerDiscrete, steps = 3: 8 images, 36 calls, 4.5 an image" in text
    assert list(tmp_path.iterdir()) == []


def test_networks_are_loaded_once(with_null: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    load = loading.load_network
    monkeypatch.setattr(loading, "load_network", lambda *args: loaded.append(args) or load(*args))
    call("sweep", "-m", with_null, "--label", 0, "--w", 2, *BY, "-o", "run", "-q")
    assert len(loaded) == 1


def test_a_stopped_sweep_goes_on_and_verify_knows_what_it_lacks(with_null: Path, run: Path, swept: Path) -> None:
    lost = rows_of(run)[5]["file"]
    (run / lost).unlink()
    lacks = json.loads(call("verify", "run", "--json", code=3).stdout)
    assert (lacks["complete"], lacks["images"], lacks["missing"], lacks["extra"]) == (False, 32, [lost], [])
    kept = {path: path.stat().st_mtime_ns for path in (run / "images").rglob("*.png")}
    call("sweep", "-m", with_null, *ARGS, *BY, "-o", "run", "-q")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    call("verify", "run")
    assert images(run).keys() == images(swept).keys()


def test_more_variants_join_a_run_and_other_settings_do_not(with_null: Path, run: Path, swept: Path) -> None:
    call("sweep", "-m", with_null, *ARGS, "--by", "steps=4", "--by", "scheduler=ddim", "-o", "run", "-q")
    assert images(swept).items() <= images(run).items()
    assert len(images(run)) == 40
    call("verify", "run")
    about = json.loads((run / "run.json").read_text())
    about["variants"]["scheduler=DDIMScheduler,steps=2"]["eta"] = 0.5
    (run / "run.json").write_text(json.dumps(about))
    refused = str(call("sweep", "-m", with_null, *ARGS, *BY, "-o", "run", code=2).exception)
    assert "other settings: eta 0.5 there, None now" in refused


def test_default_directory_is_of_the_cells_and_not_of_the_grid(with_null: Path) -> None:
    args = ("sweep", "-m", with_null, "--label", 0, "--w", 2, "-q")
    made = {call(*args, *BY, *grid_of).stdout for grid_of in ([], ["--columns", "steps"], ["--rows", "seed"])}
    assert len(made) == 1
    folder = Path(made.pop().strip()).parent
    assert len(json.loads((folder / "run.json").read_text())["plans"]) == 1
    spelled = ("--by", "scheduler=DDIMScheduler,euler,ddim", "--by", "steps=2:3:1,3")
    assert Path(call(*args, *spelled).stdout.strip()).parent == folder
    assert Path(call(*args, "--by", "steps=2,3").stdout.strip()).parent != folder


def test_merged_shards_are_the_same_bytes_as_one_process(with_null: Path, tmp_path: Path) -> None:
    args = ("sweep", "-m", with_null, *ARGS, *BY, "--deterministic", "--columns", "steps", "-q")
    call(*args, "-o", "whole")
    for i in range(3):
        call(*args, "-o", "parts", "--shard", f"{i}/3")
    for folder in ("whole", "parts"):
        call("merge", folder, "--npz", "--tar")

    def everything(folder: str) -> dict[str, bytes]:
        found = [path for path in (tmp_path / folder).rglob("*") if path.is_file() and not path.name.startswith(".")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in (p.relative_to(tmp_path) for p in found)}

    whole, parts = everything("whole"), everything("parts")
    whole.pop("run.json"), parts.pop("run.json")
    assert whole == parts
    assert "scheduler=DDIMScheduler,steps=2,w3.0.npz" in whole
    assert len([name for name in whole if name.endswith(".npz")]) == 8


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--by", "scheduler=ddim,euler", "--by", "eta=0,1"], "at scheduler=euler eta=0.0: --eta is for ddim"),
        (["--by", "steps=5", "--eta", "1", "--scheduler", "euler"], "--eta is for ddim"),
        (["--by", "scheduler=ddim,nonsense"], "at scheduler=nonsense: --scheduler 'nonsense': no such scheduler"),
        (["--by", "steps=5,5000"], "at steps=5000: --steps 5000"),
        (["--by", "steps=2.5"], "whole numbers from 1"),
        (["--by", "eta=0,2"], "--eta is from 0 to 1"),
        (["--by", "steps"], "give values after the ="),
        (["--by", "steps="], "give values after the ="),
        (["--by", "w=1,2"], "a flag of its own, which takes a list: --w"),
        (["--by", "seed=1,2"], "a flag of its own, which takes a list: --seeds"),
        (["--by", "cfg-scale=1"], "Choose guidance, interval"),
        (["--by", "steps=2,3", "--steps", "4"], "stands instead of --steps"),
        (["--by", "steps=2", "--by", "steps=3"], "stands there twice"),
        (["--by", "steps=2@1,3"], "or none of them"),
        (["--by", "steps=2@1,2@3"], "stands there twice"),
        (["--by", "steps=2@1,3@nan"], "finite number"),
        (["--by", "steps=2@1", "--w", "3"], "--w is given too"),
        (["--by", "steps=2@1", "--by", "scheduler=ddim@2"], "not those of two"),
        (["--by", "guidance=cfg,apg", "--by", "apg.eta=0,1"], "at guidance=cfg apg.eta=0: apg.eta has no effect on"),
        (["--by", "apg.eta=0,1"], "apg.eta has no effect on --guidance cfg"),
        (["--guidance", "apg", "--by", "apg.colour=0"], "at apg.colour=0: "),
        (["--guidance", "apg", "--by", "apg.eta=0", "--guidance-opt", "eta=1"], "instead of --guidance-opt eta"),
        (["--by", "guidance=cfg,aqg"], "at guidance=aqg: --guidance aqg: no such method"),
        (["--by", "guidance=cfg,apg", "--mode", "none"], "at guidance=apg: --guidance apg combines"),
        (["--by", "interval=none,0:inf"], "interval none and interval 0:inf are the same"),
        (["--by", "w-schedule=constant,loud"], "at w-schedule=loud: "),
        (["--by", "steps=2", "--columns", "colour"], "--columns 'colour': choose of w, "),
        (["--by", "steps=2", "--rows", "guidance"], "--rows 'guidance': choose of w, "),
        (["--by", "steps=2", "--columns", "steps", "--rows", "w,steps"], "across (--columns) and down (--rows)"),
        (["--columns", "w,w"], "stands there twice"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    with_null: Path, tmp_path: Path, flags: list[str], word: str
) -> None:
    assert word in str(call("sweep", "-m", with_null, "--label", 0, *flags, "-o", "run", code=2).exception)
    assert list(tmp_path.iterdir()) == []


def test_axes_are_for_sweep(with_null: Path) -> None:
    for flags in (["--by", "steps=2"], ["--columns", "w"], ["--rows", "w"]):
        assert f"No such option: {flags[0]}" in call("sample", "-m", with_null, "--label", 0, *flags, code=2).stderr


# --- grids


def layout_of(run: Path, **options: Any) -> grid.Layout:
    return grid.layout(rows_of(run), (8, 8), **options)


def test_every_axis_is_named_and_any_stands_across_or_down(swept: Path) -> None:
    plain = layout_of(swept)
    assert list(plain.heads.values()) == ["w = 1", "w = 3"]
    assert plain.row_axes == ("label", "seed", "scheduler", "steps")
    assert list(plain.names)[:3] == [
        (0, 0, "DDIMScheduler", 2),
        (0, 0, "DDIMScheduler", 3),
        (0, 0, "EulerDiscreteScheduler", 2),
    ]
    across = layout_of(swept, columns=("steps",), rows=("scheduler", "w"))
    assert list(across.heads.values()) == ["steps = 2", "steps = 3"]
    assert across.row_axes == ("scheduler", "w", "label", "seed")
    both = layout_of(swept, columns=("scheduler", "steps"))
    heads = [name.replace("\n", " ") for name in both.heads.values()]
    assert heads[1] == "scheduler DDIM steps = 3"
    assert heads[2].startswith("scheduler EulerDisc")
    assert heads[2].endswith("steps = 2")
    assert all(len(pages.heads) * len(pages.names) == 32 for pages in (plain, across, both))
    one = grid.layout([row for row in rows_of(swept) if row["steps"] == 2], (8, 8), title="t")
    assert one.title == "t · steps = 2"


def test_the_grid_of_a_run_has_its_axes_again_and_the_tiles_are_the_files(with_null: Path, run: Path) -> None:
    call("sweep", "-m", with_null, *ARGS, *BY, "--columns", "steps", "--rows", "scheduler,label,w", "-o", "run", "-q")
    first = pixels(run / "grid.png")
    (run / "grid.png").unlink()
    call("grid", "run")
    assert np.array_equal(pixels(run / "grid.png"), first)
    plan = layout_of(run, columns=("steps",), rows=("scheduler", "label", "w"), title=grid.title_of({
        "model": with_null.name, "mode": "cfg", "scheduler": "", "steps": 0}, ("scheduler", "steps")))  # fmt: skip
    assert first.shape[:2][::-1] == plan.size()
    positions, (width, height) = plan.positions(), plan.sizes.tile
    for row in rows_of(run):
        left, top = positions[(row["scheduler"], row["label"], row["w"], row["seed"]), (row["steps"],)]
        tile = first[top : top + height : height // 8, left : left + width : width // 8]
        assert np.array_equal(tile, pixels(run / row["file"])), row["file"]


def test_values_with_weights_of_their_own_stand_beside_each_other(with_null: Path, tmp_path: Path) -> None:
    call("sweep", "-m", with_null, "--label", "0-1", "--by", "steps=3@2,2@4", "-o", "run", "-q")
    rows = rows_of(tmp_path / "run")
    assert [(row["steps"], row["w"]) for row in rows] == [(3, 2.0), (3, 2.0), (2, 4.0), (2, 4.0)]
    plan = layout_of(tmp_path / "run")
    assert list(plan.heads.values()) == ["steps = 2\nw = 4", "steps = 3\nw = 2"]
    assert len(plan.names) == 2, "a row for each label"
    call("verify", "run")
    call("sample", "-m", with_null, "--label", "0-1", "--w", 4, "--steps", 2, "-o", "plain", "-q")
    assert (
        images(tmp_path / "plain").items()
        == {
            file.removeprefix("steps=2/"): sha
            for file, sha in images(tmp_path / "run").items()
            if file.startswith("steps=2/")
        }.items()
    )


def test_several_runs_stand_in_one_grid(with_null: Path, swept: Path, tmp_path: Path) -> None:
    args = ("sweep", "-m", with_null, "--label", "0-1", "--steps", 2, "-q")
    call(*args, "--w", "0,3", "-o", "a")
    call(*args, "--w", "2", "--mode", "classifier", "-o", "b")
    call("grid", "a", "b", "-o", "both.png")
    both = pixels(tmp_path / "both.png")
    (cells,) = [json.loads(Image.open("both.png").text["guidegen"])["runs"]]  # type: ignore[attr-defined]
    assert [one["mode"] for one in cells] == ["cfg", "classifier"]
    assert both.shape[1] > 3 * 96
    found = []
    for folder, w in (("a", 0.0), ("a", 3.0), ("b", 2.0)):
        tile = pixels(tmp_path / folder / f"images/w{w}/label0001/000000.png")
        large = tile.repeat(12, 0).repeat(12, 1)
        windows = np.lib.stride_tricks.sliding_window_view(both[-112:-16], (96, 96, 3))[0, :, 0]
        places = [x for x, window in enumerate(windows) if np.array_equal(window, large)]
        assert len(places) == 1, (folder, w)
        found += places
    assert found == sorted(found), "in this order"
    call("grid", "a", swept, "-o", "more.png")
    assert "name its file" in str(call("grid", "a", "b", code=2).exception)
