from __future__ import annotations

import json

import pytest

from guidegen.errors import UsageError
from guidegen.spec.cell import Cell, fingerprint, mode_weights
from guidegen.spec.parse import format_seeds, parse_seeds, parse_weight, parse_weights
from guidegen.spec.plan import Plan, batches, make_cells, read_plan
from guidegen.spec.shard import Shard, parse_shard


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("3", [3.0]),
        ("0,1,2.5", [0.0, 1.0, 2.5]),
        ("0:1:0.1", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("0:8:4,1", [0.0, 4.0, 8.0, 1.0]),
        ("2:0:-1", [2.0, 1.0, 0.0]),
        ("1,1.0,1e0", [1.0]),
        ("0:1:0.3", [0.0, 0.3, 0.6, 0.9]),
        ("-0.0", [0.0]),
    ],
)
def test_weights(text: str, values: list[float]) -> None:
    assert parse_weights(text) == values
    assert [str(v) for v in parse_weights(text)] == [str(v) for v in values]  # 0.3, not 0.30000000000000004


@pytest.mark.parametrize("text", ["", ",", "nan", "inf", "1:2", "1:2:0", "2:1:1", "0:1:nan", "a", "0:1e9:1e-9", "1:2:3:4"])
def test_weights_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--w"):
        parse_weights(text)


@pytest.mark.parametrize("text", ["nan", "-inf", "three", "", "1,2"])
def test_one_weight_refused(text: str) -> None:
    with pytest.raises(UsageError, match="finite number"):
        parse_weight(text)


def test_seeds() -> None:
    assert list(parse_seeds("0-3,100, 2")) == [0, 1, 2, 3, 100]
    for bad in ("", "3-1", "-1", "a", "1.5", str(2**63), f"0-{2**63 - 1}", "9" * 5000):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(bad)


def test_weights_of_one_sample_are_neighbours() -> None:
    cells = make_cells([1, 2], [0, 1], [0.0, 3.0])
    assert cells[:2] == [Cell(1, 0, 0.0), Cell(1, 0, 3.0)]
    assert len(cells) == len(set(cells)) == 8
    assert [len(batch) for batch in batches(cells, 3)] == [3, 3, 2]


def test_files_are_named_after_the_contract() -> None:
    assert Cell(207, 5, 3.0).file == "images/w3.0/label0207/000005.png"
    assert Cell(None, 1234567, 0.0).file == "images/w0.0/nolabel/1234567.png"
    assert Cell(7, 0, 2.0, 0.5).file == "images/w2.0_c0.5/label0007/000000.png"


def test_what_w_weighs_in_each_mode() -> None:
    assert mode_weights("cfg", Cell(1, 0, 3.0)) == (3.0, 0.0, 1.0)
    assert mode_weights("classifier", Cell(1, 0, 3.0)) == (0.0, 3.0, 1.0)
    assert mode_weights("both", Cell(1, 0, 3.0, 2.0)) == (3.0, 2.0, 1.0)
    assert mode_weights("none", Cell(None, 0, 0.0)) == (0.0, 0.0, 1.0)


def test_fingerprint_depends_on_every_part() -> None:
    assert fingerprint("a", [1]) == fingerprint("a", [1])
    assert len({fingerprint("a", [1]), fingerprint("a", [2]), fingerprint("b", [1])}) == 3


# --- shards

PLAN = Plan([3, 1], [0, 1, 2, 9], [0.0, 3.0], [None], ["a", "b"], grid=True)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 40])
def test_shards_part_the_cells_and_keep_the_weights_of_a_sample_together(count: int) -> None:
    shards = [PLAN.cells(Shard(i, count)) for i in range(count)]
    cells = list(PLAN.cells())
    assert sorted(map(cells.index, (cell for shard in shards for cell in shard))) == list(range(len(cells)))
    owners = {(cell.prompt, cell.label, cell.seed): i for i, shard in enumerate(shards) for cell in shard}
    assert all(owners[cell.prompt, cell.label, cell.seed] == i for i, shard in enumerate(shards) for cell in shard)
    assert max(map(len, shards)) - min(map(len, shards)) <= 2, "one sample more at most"


def test_plan_survives_json_and_is_small() -> None:
    assert list(read_plan(json.loads(json.dumps(PLAN.as_json()))).cells()) == list(PLAN.cells())
    assert len(json.dumps(Plan([1], range(50_000), [3.0]).as_json())) < 200
    both = Plan([None], [5], [1.0], [0.5, 2.0])
    assert list(read_plan(both.as_json()).cells()) == list(both.cells())


@pytest.mark.parametrize("text", ["0-3,100,50", "5", "3,2,1", "0-1,7-9"])
def test_seeds_are_written_as_they_are_read(text: str) -> None:
    assert format_seeds(parse_seeds(text)) == text


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("text", "environment", "index", "count"),
    [
        ("0/1", {}, 0, 1),
        ("3/4", TORCHRUN, 3, 4),
        ("auto", TORCHRUN, 3, 8),
        ("auto", ARRAY, 2, 4),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_STEP": "2"}, 2, 4),
        ("auto", SRUN, 1, 2),
        ("auto", TORCHRUN | SRUN, 3, 8),
        ("auto", ARRAY | SRUN, 5, 8),
        ("auto", ARRAY | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 2, 4),
        ("auto", ARRAY | TORCHRUN, 19, 32),
    ],
)
def test_shard(text: str, environment: dict[str, str], index: int, count: int) -> None:
    assert parse_shard(text, environment) == Shard(index, count)


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        *[(text, {}) for text in ("", "1", "4/4", "-1/4", "0/0", "a/b", "1/2/3", "auto")],
        ("auto", {"RANK": "0"}),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3"}),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": "9"}),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}),
    ],
)
def test_shard_refused(text: str, environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--shard"):
        parse_shard(text, environment)
