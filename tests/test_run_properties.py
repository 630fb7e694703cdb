"""Properties of manifests, rows and resuming, whatever stands in the files."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from conftest import settings_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guidegen.runs.directory import Run
from guidegen.runs.manifest import Manifests, read_rows
from guidegen.runs.schema import encode_row, parse_row
from guidegen.runs.status import check
from guidegen.spec.cell import Cell

FILES = [f"images/w1.0/nolabel/{seed:06d}.png" for seed in range(4)]
FEW = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def row_of(file: str = FILES[0], **others: Any) -> dict[str, Any]:
    """A row that is valid, but for what `others` make of it."""
    row = {"file": file, "mode": "cfg", "w": 1.0, "label": None, "label_name": "", "prompt": None, "seed": 0, "nfe": 4}
    return row | {"sha256": "0" * 64, "shape": [8, 8, 3], "status": "ok"} | others


def numbered(file: str, number: int) -> dict[str, Any]:
    """A row that is told from others of its file; the image is of none of them, so the last one counts."""
    return row_of(file, nfe=number, sha256=f"{number:064x}")


JUNK = [
    *(b"", b"\0\xff\xfe", b"{", b"null", b"[]", b"7", b'{"file": "images/w1.0/nolabel/000000.png"}', b"[" * 5000),
    *(encode_row(row_of(w=float(w)))[:-1] for w in ("nan", "inf")),
    *(encode_row(row_of(**{key: value}))[:-1] for key, value in [("seed", -1), ("seed", 2**63), ("label", "x"), ("w", "3")]),
    *(
        encode_row(row_of(file))[:-1]
        for file in ("/etc/passwd.png", "images/../x.png", "images/a\0.png", "x.png", "images//.png")
    ),
    *(encode_row(row_of(sha256=value))[:-1] for value in (None, "0" * 63, "0" * 64 + "\n", 7)),
    *(encode_row(row_of(shape=value))[:-1] for value in (None, [8, 8], [0, 8, 3], [8, 8, "3"])),
    *(encode_row(row_of(status=value))[:-1] for value in ("nonfinite", "fine", None)),
    *(encode_row(row_of(steps=value))[:-1] for value in ([], {}, float("nan"))),
    *(encode_row(row_of()).replace(b"1.0,", w + b",")[:-1] for w in (b"1e999", b"1" + b"0" * 400, b"9" * 5000)),
    encode_row(row_of(mixture="x"))[:-1],
]


def test_what_is_no_row_is_none_and_a_row_with_an_axis_of_its_own_is_one() -> None:
    assert [line for line in JUNK if parse_row(line + b"\n") is not None] == []
    for row in (row_of(), row_of(steps=10, guidance="apg"), row_of(sha256=None, shape=None, status="nonfinite", w_guide=2)):
        assert parse_row(encode_row(row)) == row
        assert parse_row(encode_row(row)[:-1]) is None, "torn"


LINES = st.one_of(
    st.builds(lambda i, number: encode_row(numbered(FILES[i], number)), st.integers(0, 3), st.integers(1, 99)),
    st.sampled_from(JUNK).map(lambda line: line + b"\n"),
    st.binary(max_size=20).map(lambda data: data.replace(b"\n", b" ") + b"\n"),
)
SHARES = st.tuples(st.lists(LINES, max_size=6), st.integers(1, 30) | st.none())
"""Lines of one manifest, and how much of a last row a crash left after them."""


@FEW
@given(st.lists(SHARES, min_size=1, max_size=3))
def test_places_are_those_of_the_last_row_of_each_file_whatever_stands_between(shares: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, model, junk = Path(name), dict[str, Any](), 0
        names = [f"manifest.{i}-of-3.jsonl" for i in range(len(shares))]
        for manifest, (lines, torn) in zip(names, shares, strict=True):
            rest = [encode_row(row_of())[:torn]] if torn else []
            (folder / manifest).write_bytes(b"".join([*lines, *rest]))
            rows = [parse_row(line) for line in (*lines, *rest)]
            model |= {row["file"]: row for row in rows if row}
            junk += any(row is None for row in rows)
        manifests = Manifests(folder)
        assert {file: manifests.read(place) for file, place in manifests.offsets().items()} == model
        assert {row["file"]: row for row in read_rows(folder)} == model
        assert len(manifests.invalid()) == junk


@settings(FEW, max_examples=200)
@given(
    st.text(st.characters(exclude_categories=())),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(0, 2**63 - 1),
)
def test_a_row_comes_back_as_it_was_whatever_its_text(prompt: str, w: float, seed: int) -> None:
    row = row_of(prompt=prompt, w=w, seed=seed, label_name=prompt, guidance=prompt)
    line = encode_row(row)
    assert line.count(b"\n") == 1
    assert line.decode()  # UTF-8, also of halves of surrogate pairs
    assert parse_row(line) == row
    assert parse_row(line[:-1]) is None


# --- going on

CELLS = [Cell(label, seed, w) for label in (None, 3) for seed in (0, 1) for w in (0.0, 2.5)]


def draw(folder: Path, cells: list[Cell]) -> list[Cell]:
    """What the command does: what is not finished is drawn, of pixels that depend on the cell alone."""
    with Run(folder, settings_of(), {}) as run:
        kept = run.finished(cells)
        for cell in cells:
            if cell not in kept:
                seed = int(hashlib.sha256(cell.file.encode()).hexdigest()[:8], 16)
                run.write(cell, np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8), "", 1)
        return list(kept)


@cache
def undisturbed() -> Path:
    """The run when nothing happens to it."""
    folder = Path(tempfile.mkdtemp())
    draw(folder, CELLS)
    atexit.register(shutil.rmtree, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def swap(path: Path) -> None:
    path.write_bytes(b"another picture")


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def gone(path: Path) -> None:
    path.unlink()


FOREIGN = {
    "notes.txt": b"mine",
    "images/readme.md": b"mine too",
    "w3.0.npz": b"a file of the user's",
    "features/mine.npz": b"x",
}
DAMAGE = st.lists(
    st.tuples(st.integers(0, 7), st.sampled_from([cut, swap, link, gone])), max_size=3, unique_by=lambda it: it[0]
)


@FEW
@given(
    st.sets(st.integers(0, 7)), DAMAGE, st.sets(st.integers(0, 7), max_size=3), st.sampled_from([None, *JUNK]), st.booleans()
)
def test_whatever_was_finished_torn_or_damaged_the_rest_is_drawn_to_the_same_bytes(
    first: set[int], damage: list[Any], torn: set[int], junk: bytes | None, cut_last: bool
) -> None:
    whole = undisturbed()
    with tempfile.TemporaryDirectory() as name, patch("os.fsync"):  # which takes most of the time, and changes nothing here
        folder = Path(name) / "run"
        draw(folder, [cell for i, cell in enumerate(CELLS) if i in first])
        damaged = {CELLS[i] for i, harm in damage if i in first and (harm(folder / CELLS[i].file) or True)}
        manifest = folder / "manifest.jsonl"
        lines = manifest.read_bytes().splitlines(keepends=True)
        files = [json.loads(line)["file"] for line in lines]
        broken = {files[i] for i in torn if i < len(lines)}
        lines = [line[:40] + b"\n" if file in broken else line for line, file in zip(lines, files, strict=True)]
        if junk is not None:
            lines.insert(len(lines) // 2, junk + b"\n")
        if cut_last and lines:
            broken |= set(files[-1:])
            lines[-1] = lines[-1][:-5]
        manifest.write_bytes(b"".join(lines))
        for file, data in FOREIGN.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(data)
        kept = draw(folder, CELLS)
        assert {cell.file for cell in kept} == {CELLS[i].file for i in first if CELLS[i] not in damaged} - broken
        there = contents(folder)
        assert {file: there.pop(file) for file in FOREIGN} == FOREIGN
        assert there.pop("manifest.jsonl").count(b"\n") == len(CELLS)
        assert {row["file"]: row for row in read_rows(folder)} == {row["file"]: row for row in read_rows(whole)}
        wanted = contents(whole)
        assert all(there[file] == data for file, data in wanted.items() if file != "manifest.jsonl")
        state = check(folder, CELLS)
        assert state == ([], [], [], ["images/readme.md"], [])
