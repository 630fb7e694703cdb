from __future__ import annotations

import pytest

from guidegen.errors import UsageError
from guidegen.plan import Cell, batches, fingerprint, make_cells, mode_weights, parse_seeds, parse_weight, parse_weights


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
    assert parse_seeds("0-3,100, 2") == [0, 1, 2, 3, 100]
    for bad in ("", "3-1", "-1", "a", "1.5", str(2**63), "0-99999999999"):
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
    assert mode_weights("cfg", Cell(1, 0, 3.0)) == (3.0, 0.0)
    assert mode_weights("classifier", Cell(1, 0, 3.0)) == (0.0, 3.0)
    assert mode_weights("both", Cell(1, 0, 3.0, 2.0)) == (3.0, 2.0)
    assert mode_weights("none", Cell(None, 0, 0.0)) == (0.0, 0.0)


def test_fingerprint_depends_on_every_part() -> None:
    assert fingerprint("a", [1]) == fingerprint("a", [1])
    assert len({fingerprint("a", [1]), fingerprint("a", [2]), fingerprint("b", [1])}) == 3
