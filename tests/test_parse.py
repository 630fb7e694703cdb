"""What people type is a value with its properties, or refused with a reason; nothing else happens."""

from __future__ import annotations

import math
import os
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guidegen.cli.axes import parse_axes, parse_by
from guidegen.cli.options import parse_size, read_prompts, resolve_labels
from guidegen.errors import UsageError
from guidegen.models.labels import Labels
from guidegen.spec import limits
from guidegen.spec.composition import format_labels, label_parts, main_label, prompt_parts, split_weight
from guidegen.spec.parse import (
    LARGEST_SEED,
    Seeds,
    check_noise,
    format_seeds,
    parse_seeds,
    parse_weight,
    parse_weights,
    whole,
)
from guidegen.spec.shard import parse_shard

LABELS = Labels(
    {0: "goldfish, Carassius auratus", 1: "tabby, tabby cat", 2: "crane", 3: "crane, hoist", 4: "ratio 3:4", 5: ""}
)
ODD = [
    "nan",
    "inf",
    "1e999",
    "-0",
    "１",
    "+1",
    "1_000",
    "0x10",
    " 1 ",
    "9" * 5000,
    "1e-400",
    "٣",
    "²",
    "\0",
    "\x1b[31m",
    "\ud800",
]
PIECES = [
    *ODD,
    *"0123456789",
    ",",
    ":",
    "-",
    ".",
    "@",
    "=",
    "/",
    "x",
    '"',
    "\n",
    "\r",
    "\t",
    "#",
    " AND ",
    "all",
    "tabby",
    "auto",
]
PIECES += ["steps", "eta", "guidance", "apg.eta", "0-9", "0:1:0.1", "207:3", "1e9", "99999999999999999999"]
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
quick = settings(max_examples=200, deadline=None)


def accepted(parse: Callable[[], Any]) -> Any:
    """What a parser gives; None where it refuses."""
    try:
        return parse()
    except UsageError:
        return None


@quick
@given(TEXTS)
@example("0:1e30:1e30")
@example("0:1e999999:1e999999")
@example("sNaN:1:1")
def test_weights_are_finite_and_each_once(text: str) -> None:
    values = accepted(lambda: parse_weights(text))
    if values is not None:
        assert values
        assert all(math.isfinite(value) and str(value) != "-0.0" for value in values)
        assert len(set(values)) == len(values)
        assert parse_weights(",".join(map(str, values))) == values
    one = accepted(lambda: parse_weight(text))
    assert one is None or (math.isfinite(one) and parse_weight(str(one)) == one)


@quick
@given(st.integers(-1000, 1000), st.integers(1, 50), st.integers(0, 200), st.integers(0, 4))
def test_range_of_weights_has_both_ends(start: int, step: int, count: int, decimals: int) -> None:
    a, b, c = (f"{number}e-{decimals}" for number in (start, start + step * count, step))
    values = parse_weights(f"{a}:{b}:{c}")
    assert len(values) == count + 1
    assert (values[0], values[-1]) == (float(a), float(b))
    assert values == [float(f"{start + i * step}e-{decimals}") for i in range(count + 1)]
    assert parse_weights(f"{b}:{a}:-{c}") == values[::-1]


@pytest.mark.parametrize("text", ["0:999999:1,2e6:2e6:1,3e6:3e6:1", ",".join(["0:999999:1"] * 5000)])
def test_list_of_weights_has_an_end(text: str) -> None:
    with pytest.raises(UsageError, match="more than 1,000,000 numbers"):
        parse_weights(text)


@quick
@given(TEXTS)
def test_seeds_of_any_text(text: str) -> None:
    seeds = accepted(lambda: parse_seeds(text))
    if seeds is not None:
        assert 0 < len(seeds) <= sys.maxsize
        assert all(0 <= some.start < some.stop <= LARGEST_SEED + 1 for some in seeds.ranges)
        assert parse_seeds(format_seeds(seeds)) == seeds


@quick
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), min_size=1, max_size=12))
def test_seeds_keep_their_first_places(words: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in words)
    expected = list(dict.fromkeys(seed for first, more in words for seed in range(first, first + more + 1)))
    seeds = parse_seeds(text)
    assert list(seeds) == expected == [seeds[i] for i in range(len(seeds))]
    assert [seeds[-1], *seeds[1:5], *seeds[::-2]] == [expected[-1], *expected[1:5], *expected[::-2]]
    assert [seeds.find(seed) for seed in expected] == list(range(len(expected)))
    assert [seed for seed in range(50) if seed in seeds] == sorted(expected)
    assert Seeds.of(expected) == seeds
    assert parse_seeds(format_seeds(expected)) == seeds
    assert re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", format_seeds(seeds))


def test_seeds_take_no_room() -> None:
    seeds = parse_seeds("5-999999999,0-7")
    assert len(seeds) == 10**9
    assert (seeds[0], seeds[10**9 - 6], seeds[-1]) == (5, 999_999_999, 4)
    assert seeds.find(4) == 10**9 - 1
    assert format_seeds(seeds) == "5-999999999,0-4"
    assert len(parse_seeds(f"1-{LARGEST_SEED}")) == sys.maxsize
    many = parse_seeds(",".join(f"{i}-{i + 100}" for i in range(99_998, -1, -2)))
    assert len(many) == 100_099
    for text in (f"0-{LARGEST_SEED}", f"0-{LARGEST_SEED + 1}", "," * limits.LIST):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(text)


@quick
@given(TEXTS, st.dictionaries(st.sampled_from(["RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"]), TEXTS))
def test_shards_of_any_text(text: str, environment: dict[str, str]) -> None:
    shard = accepted(lambda: parse_shard(text, environment))
    assert shard is None or 0 <= shard.index < shard.count <= sys.maxsize
    number = whole(text)
    assert number is None or (text.isascii() and number == int(text))


@quick
@given(TEXTS)
def test_sizes_of_any_text(text: str) -> None:
    size = accepted(lambda: parse_size(text))
    assert size is None or parse_size(f"{size[1]}x{size[0]}") == size
    assert size is None or min(size) > 0


@quick
@given(TEXTS)
@example("a:" + "1" * 100_000 + "x")
@example("a" + " " * 100_000 + "b")
@example("a:1e308 AND a:1e308")
def test_prompts_of_any_text(text: str) -> None:
    name, weight = split_weight(text)
    assert (name == text) if weight is None else (math.isfinite(weight) and name == name.strip() != "")
    prompts = accepted(lambda: read_prompts([f" {text}"]))
    if prompts is not None:
        parts = prompt_parts(prompts[0])
        assert len(dict(parts)) == len(parts) >= 1
        assert all(math.isfinite(weight) for _, weight in parts)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@quick
@given(st.dictionaries(st.integers(0, 10**9), FINITE, min_size=1, max_size=5))
def test_mixtures_survive_their_text(parts: dict[int, float]) -> None:
    text = format_labels(list(parts.items()))
    assert label_parts(text) == tuple(parts.items())
    assert parts[main_label(text)] == max(parts.values())


@quick
@given(TEXTS)
@example("1:1.2.3")
@example("1:1,1:2")
def test_mixtures_of_any_text(text: str) -> None:
    parts = accepted(lambda: label_parts(text))
    assert parts is None or label_parts(format_labels(parts)) == parts


@quick
@given(st.lists(TEXTS.filter(lambda text: text[:1] not in ("@", "-")), max_size=3))
@example(["a" * 200_000])
@example(['"a\rb"'])
def test_labels_of_any_text(words: list[str]) -> None:
    found = accepted(lambda: resolve_labels(words, LABELS))
    if found is not None:
        assert found
        assert len(set(found)) == len(found)
        for label in found:
            assert all(part in LABELS for part, _ in label_parts(label)) if isinstance(label, str) else label in LABELS


@quick
@given(TEXTS, st.lists(st.tuples(st.sampled_from(["steps", "eta", "apg.eta", "guidance", "w", ""]), TEXTS), max_size=3))
def test_axes_of_any_text(text: str, words: list[tuple[str, str]]) -> None:
    assert all(axis == axis.strip() != "" for axis in accepted(lambda: parse_axes(text)) or ())
    axes = accepted(lambda: parse_by([text, *(f"{name}={values}" for name, values in words)]))
    for axis in axes or ():
        assert axis.name
        assert len(set(axis.texts)) == len(axis.texts) >= 1 or axis.weights
        assert axis.weights is None or len(axis.weights) == len(axis.texts)
        if axis.name == "steps":
            assert all(int(text) >= 1 for text in axis.texts)


def test_range_has_no_weight_of_its_own() -> None:
    with pytest.raises(UsageError, match="one by one"):
        parse_by(["steps=1:5:2@3"])


# --- files and standard input

FILES = [
    (b"\xef\xbb\xbf1\r\n0 # a comment\r\n\t4\tratio 3:4\r\n\r\n# nothing", [1, 0, 4]),
    (b"4", [4]),
    (b"0\tgoldfish, Carassius auratus\n1\ttabby, tabby cat\n", [0, 1]),
    (b"0\r1\r", [0, 1]),
    (b"0:2,1:-1\n2", ["0:2.0,1:-1.0", 2]),
]


@pytest.mark.parametrize(("data", "found"), FILES)
def test_files_of_labels(data: bytes, found: list[int | str], tmp_path: Any) -> None:
    (tmp_path / "labels").write_bytes(data)
    assert resolve_labels([f"@{tmp_path}/labels"], LABELS) == found


@pytest.mark.parametrize("data", [b"", b"\n\n", b"1\0\n", b"\xff\xfe1\0", b"1\n" * (limits.LIST + 1), b"x" * 10**6])
@pytest.mark.parametrize("read", [lambda word: resolve_labels([word], LABELS), lambda word: read_prompts([word])])
def test_files_that_are_no_lists(read: Callable[[str], Any], data: bytes, tmp_path: Any) -> None:
    (tmp_path / "list").write_bytes(data)
    found = accepted(lambda: read(f"@{tmp_path}/list"))
    assert found is None or found == [data.decode()], "a prompt may be long"


@pytest.mark.parametrize("name", ["/dev/zero", "fifo", "folder", "missing", "null\0"])
def test_what_is_no_file_of_a_list(name: str, tmp_path: Any) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for read in (lambda word: resolve_labels([word], LABELS), lambda word: read_prompts([word])):
        with pytest.raises(UsageError, match=r"regular file|directory|cannot be read"):
            read(f"@{tmp_path / name}")


@pytest.mark.parametrize("trial", range(100))
def test_seeds_of_the_same_noise_are_found(trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guidegen.spec.parse.NOISE_SEEDS", 16)
    chance = random.Random(trial)
    starts = [chance.randint(0, 60) for _ in range(chance.randint(1, 3))]
    seeds = Seeds(range(start, start + chance.randint(1, 6)) for start in starts)
    if len({seed % 16 for seed in seeds}) == len(seeds):
        assert check_noise(seeds) is seeds
    else:
        with pytest.raises(UsageError, match="are the same noise") as error:
            check_noise(seeds)
        one, other = map(int, re.findall(r"\d+", str(error.value))[:2])
        assert one != other
        assert one % 16 == other % 16
        assert {one, other} <= set(seeds)
