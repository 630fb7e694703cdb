"""The plan against the plain product of its lists, and what is read back as a plan."""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guidegen.errors import UsageError
from guidegen.spec import limits
from guidegen.spec.cell import Cell
from guidegen.spec.composition import main_label
from guidegen.spec.plan import Cells, Plan, listed, make_cells, read_plan
from guidegen.spec.shard import Shard

WEIGHTS = st.lists(st.sampled_from([0.0, 1.0, 3.0, -0.5, 1e-7]), min_size=1, max_size=3, unique=True)
OTHERS = st.one_of(st.just([None]), WEIGHTS)
AXES = [("guidance", ["cfg", "apg"]), ("steps", [5, 10, 20]), ("eta", [0.0, 0.5])]
LABELS = st.one_of(
    st.just([None]),
    st.lists(st.sampled_from([0, 1, 207, "207:3.0,281:-1.0", "1:1.0,2:2.0"]), min_size=1, max_size=4, unique=True),
)


@st.composite
def plans(draw: Any) -> Plan:
    by = [(axis, values[: draw(st.integers(1, 3))]) for axis, values in AXES if draw(st.booleans())]
    own = None
    if by and draw(st.booleans()):
        axis, values = draw(st.sampled_from(by))
        own = (axis, [draw(st.sampled_from([1.0, 2.0])) for _ in values])
    prompts = draw(
        st.one_of(st.none(), st.lists(st.sampled_from(["a", "b AND c:2", "é"]), min_size=1, max_size=3, unique=True))
    )
    seeds = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True))
    weights = sorted(set(own[1])) if own else draw(WEIGHTS)
    labels = draw(LABELS)
    apart = all(isinstance(label, int) for label in labels) and draw(st.booleans())
    others = tuple(draw(OTHERS)), prompts, draw(st.booleans()), tuple(draw(OTHERS))
    return Plan(labels, seeds, weights, *others, by, own, seeds_per_label=apart)


def product(plan: Plan) -> list[tuple[int, Cell]]:
    """The cells in their order, each with the number of its sample."""
    found = []
    numbers = itertools.count()
    for values in itertools.product(*(values for _, values in plan.by)):
        variant = tuple((axis, value) for (axis, _), value in zip(plan.by, values, strict=True))
        weights = plan.weights
        if plan.own_weights:
            axis, own = plan.own_weights
            weights = [own[list(dict(plan.by)[axis]).index(dict(variant)[axis])]]
        texts = [(None, None)] if plan.prompts is None else [(text, i) for i, text in enumerate(plan.prompts)]
        for (text, i), label, seed in itertools.product(texts, plan.labels, plan.seeds):
            number = next(numbers)
            mixture = label if isinstance(label, str) else None
            main = main_label(label) if isinstance(label, str) else label
            seed += label * 100_000 if plan.seeds_per_label else 0
            for w, wc, wg in itertools.product(weights, plan.classifier_weights, plan.guide_weights):
                found.append((number, Cell(main, seed, w, wc, text, i, wg, mixture, variant)))
    return found


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 5), st.data())
def test_cells_are_the_product_and_shards_part_it(plan: Plan, count: int, data: Any) -> None:
    expected = product(plan)
    cells = plan.cells()
    assert list(cells) == [cell for _, cell in expected] == [cells[i] for i in range(len(cells))]
    assert len({cell.file for cell in cells}) == len(cells)
    for index in range(count):
        mine = plan.cells(Shard(index, count))
        assert list(mine) == [cell for number, cell in expected if number % count == index]
        check(mine, data)
    assert not plan.by or list(plan.cells(Shard(0, 1))) == list(cells)


def check(cells: Cells, data: Any) -> None:
    """Everything that a sequence of cells answers, against the list of them."""
    known = list(cells)
    assert len(cells) == len(known)
    assert [cells.find(cell.file) for cell in known] == list(range(len(known)))
    for strange in ("", "x", "images/w1.0/nolabel/000099.png", "images/w9.0/nolabel/000000.png", "images/../0.png"):
        assert cells.find(strange) is None
    assert dict(counted(known)) == {replace(cell, seed=0): count for cell, count in merged(cells)}
    out = data.draw(st.sets(st.integers(0, max(0, len(known) - 1)), max_size=len(known)))
    rest, left = cells.without(out), [cell for i, cell in enumerate(known) if i not in out]
    assert list(rest) == left == [rest[i] for i in range(len(rest))]
    assert [rest.find(cell.file) for cell in left] == list(range(len(left)))
    first, end, step = data.draw(st.tuples(st.integers(-3, 9), st.integers(-3, 30), st.sampled_from([1, 2, -1])))
    assert list(rest[first:end:step]) == left[first:end:step]
    assert list(cells[first:end:step]) == known[first:end:step]
    assert [(variant, list(some)) for variant, some in rest.by_variant()] == [
        (variant, list(some)) for variant, some in itertools.groupby(left, key=lambda cell: cell.variant)
    ]
    assert [cell for window in rest.windows(4) for cell in window] == left
    with pytest.raises(IndexError):
        rest[len(left)]


def counted(cells: list[Cell]) -> dict[Cell, int]:
    found: dict[Cell, int] = {}
    for cell in cells:
        found[replace(cell, seed=0)] = found.get(replace(cell, seed=0), 0) + 1
    return found


def merged(cells: Cells) -> list[tuple[Cell, int]]:
    groups = [(cell, count) for _, some in cells.by_variant() for cell, count in some.groups()]
    assert groups == list(cells.groups())
    return groups


@settings(max_examples=60, deadline=None)
@given(plans())
def test_plans_survive_json(plan: Plan) -> None:
    stored = json.loads(json.dumps(plan.as_json()))
    again = read_plan(stored)
    assert list(again.cells()) == list(plan.cells())
    assert read_plan(again.as_json()) == again
    assert listed([plan, again], "run") == list(plan.cells())


GOOD = Plan([1, "1:1.0,2:2.0"], [0, 1], [1.0, 2.0], by=(("steps", (5, 10)),), own_weights=("steps", (1.0, 2.0))).as_json()
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(JSON, st.tuples(st.sampled_from(sorted(GOOD)), JSON)))
def test_whatever_is_read_is_a_plan_or_refused(data: Any) -> None:
    stored = copy.deepcopy(GOOD) | {data[0]: data[1]} if isinstance(data, tuple) else data
    try:
        plan = read_plan(stored)
    except UsageError:
        return
    cells = list(itertools.islice(plan.cells(), 100))
    assert cells
    assert len({cell.file for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": [0, 1]},
        {"seeds": list(range(10**6))},
        {"seeds": "-1"},
        {"seeds": ""},
        {"seeds": None},
        {"seeds": ",".join("1" * (10**6 + 1))},
        {"labels": []},
        {"labels": [1, 1]},
        {"labels": [-1]},
        {"labels": ["tabby"]},
        {"labels": ["1:1,2:2"]},
        {"by": [["steps", [5, "5"]]]},
        {"labels": [True]},
        {"weights": [float("nan")]},
        {"weights": ["1"]},
        {"weights": [10**400]},
        {"own_weights": ["steps", [1.0]]},
        {"own_weights": ["eta", [1.0, 2.0]]},
        {"by": [["steps", [5, 10]], ["steps", [5, 10]]]},
        {"by": [["steps", [float("inf"), 10]]]},
        {"by": [["steps", [[5], [10]]]]},
        {"prompts": []},
        {"prompts": [None]},
        {"grid": "yes"},
        {"columns": "w"},
        {"seeds_per_label": True},
        {"seeds_per_label": True, "labels": [None]},
        {"seeds_per_label": True, "labels": [1, 42949]},
        {"seeds_per_label": True, "labels": [1], "seeds": "0,100000"},
        {"seeds_per_label": "yes"},
    ],
)
def test_plans_refused(changes: dict[str, Any]) -> None:
    assert read_plan(GOOD)
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"plan is not valid|--seeds|no mixture"):
        read_plan(GOOD | changes)
    assert time.monotonic() - began < 10


def test_plan_of_a_milliard_is_small_and_quick() -> None:
    plan = read_plan({"labels": [1, 2], "seeds": "0-999999999", "weights": [1.0, 3.0]})
    cells = plan.cells(Shard(1, 3))
    assert len(plan.cells()) == 4 * 10**9
    assert len(cells) == (2 * 10**9 + 1) // 3 * 2
    last = cells[-1]
    assert (last.label, last.w) == (2, 3.0)
    assert cells.find(last.file) == len(cells) - 1
    rest = cells.without([0, 5, len(cells) - 1])
    assert len(rest) == len(cells) - 3
    assert rest[0] == cells[1]
    assert rest[-1] == cells[-2]
    assert rest[10**9 : 10**9 + 3][1] == cells[10**9 + 3]
    assert sum(count for _, count in cells.groups()) == len(cells)
    with pytest.raises(UsageError, match="goes through 2,000,000 at most"):
        listed([plan], "run")
    with pytest.raises(UsageError, match="2\\^63"):
        Plan(list(range(10)), range(1, sys.maxsize), [1.0])


def test_seeds_of_a_label_are_its_own_whatever_other_labels_there_are() -> None:
    few = list(Plan([7, 3], [5, 0], [1.0], seeds_per_label=True).cells())
    more = set(Plan([42948, 0, 3, 8, 7], [5, 0, 9], [1.0], seeds_per_label=True).cells())
    assert [cell.seed for cell in few] == [700_005, 700_000, 300_005, 300_000]
    assert more.issuperset(few)
    noises = {cell.seed % 2**32 for cell in more}  # what torch's generator takes of a seed on the CPU
    assert len(noises) == len(more) == 15


def test_make_cells_is_the_product() -> None:
    cells = make_cells([1, "1:1.0,2:2.0"], [3, 1], [0.0, 2.0], [None, 1.0], ["a", "b"], [1.0, 2.0])
    assert cells == [
        cell for _, cell in product(Plan([1, "1:1.0,2:2.0"], [3, 1], [0.0, 2.0], [None, 1.0], ["a", "b"], False, [1.0, 2.0]))
    ]
    assert limits.LISTED_CELLS > len(cells) == 64
