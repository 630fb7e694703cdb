"""`--labels-random N`: a label a seed, the same in one process, in shards and when a run goes on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from PIL import Image

from guidegen.errors import UsageError
from guidegen.evaluate.features import Reader
from guidegen.evaluate.measure import open_drawn
from guidegen.evaluate.measuring import read_features
from guidegen.runs.images import read_drawn
from guidegen.runs.manifest import read_rows
from guidegen.spec.cell import random_index
from guidegen.spec.plan import Plan, read_plan
from guidegen.spec.shard import Shard


def test_labels_are_uniform_and_a_function_of_the_seed() -> None:
    plan = Plan((3, 5, 7), range(100, 3100), (0.0, 2.0), labels_random=True)
    cells = list(plan.cells())
    assert len(cells) == plan.samples * plan.each == 6000
    counts = Counter(cell.label for cell in cells)
    assert set(counts) == {3, 5, 7}
    assert sum((count - 2000) ** 2 / 2000 / 2 for count in counts.values()) < 14  # chi squared of two degrees, p = 0.001
    assert all(cell.label == (3, 5, 7)[random_index(cell.seed, 3)] for cell in cells)
    more = {cell.seed: cell.label for cell in Plan((3, 5, 7), range(50), (1.0,), labels_random=True).cells()}
    assert {seed: more[seed] for seed in range(20)} == {
        cell.seed: cell.label for cell in Plan((3, 5, 7), range(20), (1.0,), labels_random=True).cells()
    }


def test_cells_are_found_in_shards_and_in_json() -> None:
    plan = Plan((1, 2, 9), range(7), (0.0, 2.0), by=(("steps", (2, 3)),), labels_random=True)
    assert read_plan(plan.as_json()).as_json() == plan.as_json()
    cells = plan.cells()
    assert [cells.find(cell.file) for cell in cells] == list(range(len(cells)))
    missing = next(label for label in (1, 2, 9) if label != cells[0].label)
    assert cells.find(cells[0].file.replace(f"label{cells[0].label:04d}", f"label{missing:04d}")) is None
    shards = [list(plan.cells(Shard(i, 3))) for i in range(3)]
    assert sorted((cell for shard in shards for cell in shard), key=cells.index) == list(cells)
    assert sum(count for _, count in cells.groups()) == len(cells)


def test_a_run_in_shards_and_one_that_goes_on(with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ("sample", "-m", with_null, "--steps", 1, "--deterministic")
    call(*args, "--labels-random", 4, "-o", "whole")
    call(*args, "--labels-random", 8, "-o", "whole")
    for shard in ("0/2", "1/2"):
        call(*args, "--labels-random", 8, "-o", "parts", "--shard", shard)
    call("merge", "parts")
    whole, parts = ({row["file"]: row["sha256"] for row in read_rows(tmp_path / name)} for name in ("whole", "parts"))
    assert whole == parts
    assert len(whole) == 8
    drawn = open_drawn(tmp_path / "parts")
    assert not drawn.missing
    assert (drawn.label_sampling([row["label"] for row in drawn.rows]) or "").startswith("random, of ")
    options = json.loads((tmp_path / "parts/run.json").read_text())
    assert options["plans"][0]["labels_random"] is True
    for wrong in (("--num", 2), ("--seeds", "1-3")):
        refused = call(*args, "--labels-random", 4, *wrong, "-o", "x", code=2)
        assert "one or the other" in str(refused.exception)


def test_a_sweep_with_its_grid(with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn at once, gone on with, in shards and again: the same images and the same grid."""
    monkeypatch.chdir(tmp_path)
    args = ("sweep", "-m", with_null, "--steps", 1, "--deterministic", "-w", "0,2", "--labels-random")
    call(*args, 6, "-o", "whole")

    def files(run: str) -> dict[str, str]:
        return {row["file"]: row["sha256"] for row in read_rows(tmp_path / run)}

    def grid(run: str) -> bytes:
        with Image.open(tmp_path / run / "grid.png") as picture:
            return picture.convert("RGB").tobytes()

    rows = read_rows(tmp_path / "whole")
    assert len(rows) == 12
    label_of = {seed: (0, 1, 2, 3, 4)[random_index(seed, 5)] for seed in range(6)}
    assert all(row["label"] == label_of[row["seed"]] for row in rows)
    first = files("whole")
    (tmp_path / "whole" / next(iter(first))).unlink()
    call(*args, 6, "-o", "whole")
    assert files("whole") == first
    for shard in ("0/2", "1/2"):
        call(*args, 6, "-o", "parts", "--shard", shard)
    call("merge", "parts")
    call("again", "whole", "-o", "again")
    assert files("parts") == files("again") == first
    assert grid("parts") == grid("again") == grid("whole")
    call("verify", "parts")


def test_features_of_shards_outlive_the_merge(with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard leaves its images and a part of the features; merged, nothing is left to be read."""
    monkeypatch.chdir(tmp_path)
    read: list[int] = []
    reader = Reader("sum", "0" * 64, lambda images: read.append(len(images)) or images.flatten(2).float().mean(2))

    def features(shard: Shard | None = None) -> Any:
        drawn = open_drawn(tmp_path / "run")
        (cache,) = read_features(drawn, [reader], 4, lambda _: None, shard)
        return cache.stored([row["sha256"] for row in drawn.rows]) if shard is None else None

    for i in range(2):
        call("sample", "-m", with_null, "--steps", 1, "--labels-random", 8, "-o", "run", "--shard", f"{i}/2")
    for i in range(2):
        features(Shard(i, 2))
    call("merge", "run")
    assert (sum(read), len(list((tmp_path / "run" / "features").iterdir()))) == (8, 2)
    made = features()
    assert sum(read) == 8
    pictures = [np.asarray(read_drawn(tmp_path / "run", row).convert("RGB")) for row in open_drawn(tmp_path / "run").rows]
    np.testing.assert_allclose(made[:].numpy(), np.stack(pictures).mean((1, 2)), rtol=1e-6)


def test_a_number_of_samples() -> None:
    from guidegen.cli.asked import asked_seeds
    from guidegen.cli.flags import SampleOptions

    assert list(asked_seeds(SampleOptions(labels_random=3, seed="5"))) == [5, 6, 7]
    with pytest.raises(UsageError, match="at least 1"):
        asked_seeds(SampleOptions(labels_random=0))
