# ruff: noqa: F811 (fixtures of another module)
"""Whatever lies in a run directory or in a reference: an exit code of the table, and words, and nothing outside changed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from numpy.lib import format as npy
from PIL import Image
from test_evaluate import SIZE, drawn, network, npz, png, real  # noqa: F401

from guidegen.evaluate.measure import METRICS_FILE
from guidegen.report import grid
from guidegen.report.page import safe_json

FILE = "images/w2.0/label0001/000003.png"
Harm = Callable[[Path], Any]


@pytest.fixture
def run(drawn: Path, tmp_path: Path) -> Path:
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/secret.png").write_bytes(png(np.zeros((SIZE, SIZE, 3), np.uint8)))
    return Path(shutil.copytree(drawn, tmp_path / "run"))


@pytest.fixture(autouse=True)
def answers_soon() -> Iterator[None]:
    """A FIFO that is waited for does not stop the suite."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no answer within a minute"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def rewrite(run: Path, change: Callable[[dict[str, Any]], None], file: str = FILE) -> None:
    lines = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    for row in lines:
        if row["file"] == file:
            change(row)
    (run / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def put(run: Path, data: bytes) -> None:
    """Other bytes in place of an image, with a row that has their hash."""
    (run / FILE).write_bytes(data)
    rewrite(run, lambda row: row.update(sha256=hashlib.sha256(data).hexdigest()))


@cache
def bomb() -> bytes:
    """A PNG of 14,000 x 14,000 grey pixels, more than Pillow takes, in some two hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join([*(packer.compress(bytes(14_001 * 1000)) for _ in range(14)), packer.flush()])
    header = struct.pack(">IIBBBBB", 14_000, 14_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def replaced(make: Harm) -> Harm:
    def harm(run: Path) -> None:
        (run / FILE).unlink()
        make(run / FILE)

    return harm


def linked_folder(run: Path) -> None:
    shutil.move(run / "images/w2.0", run.parent / "beside/w2.0")
    (run / "images/w2.0").symlink_to(run.parent / "beside/w2.0")


def link_out(path: Path) -> None:
    """A link to a file outside that has the very bytes, so that the hash is right."""
    run = path.parents[3]
    secret = run.parent / "beside/secret.png"
    path.symlink_to(secret)
    rewrite(run, lambda row: row.update(sha256=hashlib.sha256(secret.read_bytes()).hexdigest()))


CORRUPT = {
    "other bytes": lambda run: (run / FILE).write_bytes(b"changed"),
    "cut short": lambda run: (run / FILE).write_bytes((run / FILE).read_bytes()[:-40]),
    "empty": lambda run: (run / FILE).write_bytes(b""),
    "gone": replaced(lambda path: None),
    "a directory": replaced(lambda path: path.mkdir()),
    "a FIFO": replaced(lambda path: os.mkfifo(path)),
    "endless": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link in a circle": replaced(lambda path: path.symlink_to(path.name)),
    "a dangling link": replaced(lambda path: path.symlink_to("nowhere.png")),
    "a link out of the run": replaced(link_out),
    "a linked folder": linked_folder,
    "no image, with its hash": lambda run: put(run, b"this is no image"),
    "a cut image, with its hash": lambda run: put(run, (run / FILE).read_bytes()[:-200]),
    "another size, with its hash": lambda run: put(run, png(np.zeros((SIZE, SIZE + 1, 3), np.uint8))),
    "another mode, with its hash": lambda run: put(run, png(np.zeros((SIZE, SIZE), np.uint8))),
    "a bomb, with its hash": lambda run: put(run, bomb()),
    "../ in its row": lambda run: rewrite(run, lambda row: row.update(file="../beside/secret.png")),
    "images/../.. in its row": lambda run: rewrite(run, lambda row: row.update(file="images/../../beside/secret.png")),
    "an absolute path in its row": lambda run: rewrite(run, lambda row: row.update(file="/etc/passwd")),
    "a null byte in its row": lambda run: rewrite(run, lambda row: row.update(file="images/\0.png")),
}


def outside(run: Path) -> dict[str, Any]:
    return {
        str(p): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in run.parent.rglob("*")
        if not p.is_relative_to(run) and p.is_file()
    }


@pytest.mark.parametrize("command", ["grid", "report", "evaluate", "merge"])
@pytest.mark.parametrize("harm", CORRUPT)
def test_a_corrupt_image_is_exit_code_3(
    command: str,
    harm: str,
    run: Path,
    npz: Path,
    network: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (run / "grid.png").write_bytes(b"")
    shutil.copy(npz, run.parent / "beside")
    CORRUPT[harm](run)
    monkeypatch.chdir(run)
    before = outside(run)
    flags = {
        "report": ["-o", run / "report.html"],
        "evaluate": ["--reference", npz, "--features", network, "--judge", network, "--no-curves"],
        "merge": ["--npz", "--tar"],
    }
    result = call(command, run, *flags.get(command, []), code=3)
    assert str(run) in str(result.exception)
    assert any(name in str(result.exception) for name in (FILE, "manifest.jsonl", "images/w2.0/")), result.exception
    assert outside(run) == before
    if command == "grid":
        assert Image.open(run / "grid.png").size > (100, 100), "the others are drawn"
    if command == "report":
        page = (run / "report.html").read_text()
        assert '"image":null' in page or "in its row" in harm
        assert "secret" not in page
    if command == "evaluate":
        assert not (run / METRICS_FILE).exists()
        call("evaluate", run, *flags["evaluate"], "--partial", code=3 if "with its hash" in harm else 0)


def lines(*rows: Any) -> Harm:
    return lambda run: (run / METRICS_FILE).write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )


def edited(change: Callable[[dict[str, Any]], Any]) -> Harm:
    def harm(run: Path) -> None:
        rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
        for row in rows:
            change(row)
        (run / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return harm


METRICS = {
    "torn": lines('{"w": 2.0, "metr'),
    "text": lines("hello", "\x00\x01"),
    "lists": lines([], [[]], 3, None, "x"),
    "deep": lines("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000),
    "no metrics": edited(lambda row: row.pop("metrics")),
    "metrics a list": edited(lambda row: row.update(metrics=[1])),
    "a figure a number": edited(lambda row: row["metrics"].update(recall=3.0)),
    "a figure without value": edited(lambda row: row["metrics"].update(recall={})),
    "a value in words": edited(lambda row: row["metrics"]["recall"].update(value="high")),
    "a value that is not a number": edited(
        lambda row: row["metrics"]["recall"].update(value=float("nan"), spread=float("nan"))
    ),
    "an infinite value": edited(lambda row: row["metrics"]["recall"].update(value=float("inf"), spread=-float("inf"))),
    "all not numbers": edited(lambda row: [f.update(value=float("nan")) for f in row["metrics"].values() if f]),
    "huge counts": edited(lambda row: row["metrics"]["recall"].update(images=10**400)),
    "images in words": edited(lambda row: row.update(images="many")),
    "features null": edited(lambda row: row.update(features=None)),
    "judge a number": edited(lambda row: row.update(judge=4)),
    "reference gone": edited(lambda row: row.pop("reference")),
    "an axis a list": edited(lambda row: row.update(w=[2.0])),
    "an axis an object": edited(lambda row: row.update(extra={"a": [1]})),
    "w not a number": edited(lambda row: row.update(w=float("nan"))),
    "unknown metric": edited(lambda row: row["metrics"].update({"<script>": {"value": 1.0}})),
    "invalid UTF-8": lambda run: (run / METRICS_FILE).write_bytes(b"\xff\xfe{}\n"),
    "nothing": lines(),
}
NOT_A_FILE = {
    "a directory": lambda run: (run / METRICS_FILE).mkdir(),
    "a FIFO": lambda run: os.mkfifo(run / METRICS_FILE),
    "endless": lambda run: (run / METRICS_FILE).symlink_to("/dev/zero"),
}


@pytest.fixture(scope="module")
def evaluated(drawn: Path, real: Any, network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(drawn, tmp_path_factory.mktemp("evaluated") / "run"))
    np.savez(folder.parent / "real.npz", arr_0=real[0], arr_1=np.array(real[1]))
    call(
        "evaluate",
        folder,
        "--reference",
        folder.parent / "real.npz",
        "--features",
        network,
        "--judge",
        network,
        "--no-curves",
    )
    return folder


def data_of(page: str) -> Any:
    found = re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", page, re.DOTALL)
    assert found is not None
    return json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("harm", METRICS)
def test_metrics_of_any_kind_leave_a_page(harm: str, evaluated: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    METRICS[harm](run)
    call("report", run, "-o", tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text())
    if harm in ("a value that is not a number", "an infinite value"):
        (line,) = data["curves"]["series"]
        assert "recall" not in line["values"]
        assert all(value is not None for value in line["values"]["precision"])
    else:
        assert (data["curves"] is None) == (harm not in ("reference gone", "unknown metric"))


def test_one_number_that_is_none_is_a_dash(evaluated: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    rows[1]["metrics"]["recall"]["value"] = float("nan")
    (run / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("report", run, "-o", tmp_path / "page.html")
    (line,) = data_of((tmp_path / "page.html").read_text())["curves"]["series"]
    assert [value is None for value in line["values"]["recall"]] == [False, True, False]
    assert call("grid", run, "--metric", "recall", "-o", tmp_path / "grid.png")


@pytest.mark.parametrize("harm", NOT_A_FILE)
def test_metrics_that_are_no_file(harm: str, run: Path, tmp_path: Path) -> None:
    NOT_A_FILE[harm](run)
    assert METRICS_FILE in str(call("report", run, "-o", tmp_path / "page.html", code=2).exception)


def test_what_is_not_finite_is_null() -> None:
    assert json.loads(safe_json({"a": [float("nan"), 1.5], "b": (float("inf"),)})) == {"a": [None, 1.5], "b": [None]}


def header(shape: Any, kind: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def members(**parts: bytes) -> Harm:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in parts.items():
                archive.writestr(f"{name}.npy", data)

    return make


class Run:
    """What a pickle would do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


IMAGES = np.zeros((9, SIZE, SIZE, 3), np.uint8)
IDS = np.arange(9) % 3


def arrays(**parts: Any) -> Harm:
    return lambda path: np.savez(path, **parts)


def folder(**files: Harm) -> Harm:
    def make(path: Path) -> None:
        path.mkdir()
        for name, write in files.items():
            write(path / name.replace("_", "."))

    return make


def parquet(**columns: Any) -> Harm:
    def make(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), path)

    return make


def bent(path: Path) -> None:
    """A zip whose directory says that an array is of a terabyte."""
    np.savez_compressed(path, arr_0=IMAGES)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(data)


REFERENCES: dict[str, tuple[str, Harm, int, str]] = {
    "pickled images": ("x.npz", arrays(arr_0=np.array([Run()], object)), 5, "pickled"),
    "pickled labels": ("x.npz", arrays(arr_0=IMAGES, arr_1=np.array([Run()] * 9, object)), 5, "pickled"),
    "a pickle": ("x.npz", lambda path: path.write_bytes(pickle.dumps(Run())), 2, "cannot be read as .npz"),
    "a header that lies": ("x.npz", members(arr_0=header((10**9, 32, 32, 3)) + b"few"), 2, "its file has 3 bytes"),
    "a header past all numbers": ("x.npz", members(arr_0=header((2**62, 2**62, 8, 3))), 2, "its file has 0 bytes"),
    "a negative shape": ("x.npz", members(arr_0=header((-1, 16, 16, 3))), 2, "claims to be uint8"),
    "labels that lie": (
        "x.npz",
        members(arr_0=header((1, 1, 1, 3)) + b"abc", arr_1=header((10**12,), "<i8")),
        2,
        "its file",
    ),
    "a header of nothing": ("x.npz", members(arr_0=b"\x93NUMPY\x01\x00\x04\x00((((", arr_1=b""), 2, "cannot be read"),
    "a directory that lies": ("x.npz", bent, 2, "compressed ones"),
    "float images": ("x.npz", arrays(arr_0=IMAGES.astype(np.float32)), 2, "should be uint8"),
    "channels first": ("x.npz", arrays(arr_0=IMAGES.transpose(0, 3, 1, 2)), 2, "should be uint8"),
    "NaN labels": ("x.npz", arrays(arr_0=IMAGES, arr_1=np.array([*IDS[:8], np.nan])), 2, "nan among them"),
    "broken labels": ("x.npz", arrays(arr_0=IMAGES, arr_1=IDS + 0.5), 2, "0.5 among them"),
    "negative labels": ("x.npz", arrays(arr_0=IMAGES, arr_1=IDS - 7), 2, "-7 among them"),
    "huge labels": ("x.npz", arrays(arr_0=IMAGES, arr_1=np.full(9, 2**64 - 1, np.uint64)), 2, "among them"),
    "too few labels": ("x.npz", arrays(arr_0=IMAGES, arr_1=IDS[:5]), 2, "one label for each of the 9"),
    "soft labels": ("x.npz", arrays(arr_0=IMAGES, arr_1=np.full((9, 4), 0.25)), 2, "not one-hot"),
    "no images": ("x.npz", arrays(arr_0=IMAGES[:0]), 2, "no images"),
    "saved without sense": ("x.npz", arrays(features=IMAGES, guidegen=np.array("{")), 2, "not valid JSON"),
    "saved as a list": ("x.npz", arrays(features=IMAGES, guidegen=np.array("[1]")), 2, "not valid"),
    "saved deep": ("x.npz", arrays(features=IMAGES, guidegen=np.array("[" * 10**5)), 2, "not valid|nested"),
    "an npz FIFO": ("x.npz", os.mkfifo, 2, "not a regular file"),
    "a parquet FIFO": ("x.parquet", os.mkfifo, 2, "not a regular file"),
    "a device": ("x.npz", lambda path: path.symlink_to("/dev/zero"), 2, "not a regular file"),
    "a FIFO in a folder": ("x", folder(a_png=os.mkfifo), 2, "a.png is not a regular file"),
    "a folder named as an image": ("x", folder(a_png=lambda path: path.mkdir()), 2, "no images in that folder"),
    "text in a folder": ("x", folder(a_png=lambda path: path.write_text("no")), 2, "a.png cannot be read as an image"),
    "a bomb in a folder": ("x", folder(a_png=lambda path: path.write_bytes(bomb())), 2, "a.png cannot be read"),
    "a link in a circle in a folder": (
        "x",
        folder(a_png=lambda path: path.symlink_to(path.name)),
        2,
        "a.png cannot be read",
    ),
    "a parquet without images": ("x.parquet", parquet(picture=[b"1"]), 2, "has no column image"),
    "numbers in a parquet": ("x.parquet", parquet(image=[1, 2]), 2, "image 0 is not encoded bytes, found int"),
    "nothing in a parquet": ("x.parquet", parquet(image=[None, b"x"]), 2, "image 0 is not encoded bytes"),
    "no images in a parquet": (
        "x.parquet",
        parquet(image=[b"no"] * 9, label=[0] * 9),
        2,
        "image 0 cannot be read as an image",
    ),
    "lists as labels in a parquet": ("x.parquet", parquet(image=[b"no"], label=[[0]]), 2, "among them"),
    "a torn parquet": (
        "x.parquet",
        lambda path: path.write_bytes(b"PAR1" + b"\xff" * 64 + b"PAR1"),
        2,
        "cannot be read as .parquet",
    ),
}


@pytest.mark.parametrize("harm", REFERENCES)
def test_a_reference_of_any_kind_is_refused(harm: str, run: Path, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make, code, words = REFERENCES[harm]
    monkeypatch.chdir(run.parent)
    make(run.parent / name)
    before = outside(run)
    flags = ("--reference", name, "--features", network, "--judge", network, "--reference-labels", "all", "--no-curves")
    result = call("evaluate", "run", *flags, code=code)
    assert any(word in str(result.exception) for word in words.split("|")), result.exception
    assert not (run.parent / "harmed").exists()
    assert not (run / METRICS_FILE).exists()
    assert outside(run) == before


@pytest.mark.parametrize("labels", [IDS, IDS[:, None], np.eye(3, dtype=np.uint8)[IDS], np.eye(3)[IDS], IDS.astype(float)])
def test_labels_in_other_shapes_are_understood(labels: Any, run: Path, network: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", arr_0=rng.integers(0, 255, IMAGES.shape, np.uint8), arr_1=labels)
    flags = ("--features", network, "--judge", network, "--no-curves", "--halves", 0, "--reference-labels", "0,2")
    call("evaluate", run, "--reference", tmp_path / "x.npz", *flags)
    (row, *_) = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    assert row["reference"]["images"] == 6


def test_a_corrupt_image_of_a_run_that_is_the_reference(run: Path, drawn: Path, network: Path) -> None:
    (run / FILE).write_bytes(b"changed")
    result = call("evaluate", drawn, "--reference", run, "--features", network, "--judge", network, "--no-curves", code=3)
    assert FILE in str(result.exception)


def test_kept_features_of_any_kind_are_made_again(run: Path, npz: Path, network: Path) -> None:
    flags = ("--reference", npz, "--features", network, "--judge", network, "--no-curves", "--halves", 2, "--json")
    first = call("evaluate", run, *flags).stdout
    for make in (
        members(identity=b"x"),
        bent,
        lambda path: path.write_bytes(b""),
        arrays(identity=np.array([Run()], object)),
    ):
        for kept in list((run / "features").iterdir()):
            kept.unlink()
            make(kept.with_suffix(".npz"))
            kept.with_suffix(".npz").rename(kept)
        assert call("evaluate", run, *flags).stdout == first


@pytest.mark.parametrize("axis", ["w_guide", "w_classifier"])
def test_no_weight_is_another_cell_than_minus_one(axis: str, tmp_path: Path) -> None:
    cells = []
    for i, weight in enumerate((None, -1.0, 2.0, -3.0)):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        cell = {"w": 1.0, "label": 0, "label_name": "a", "seed": 0, "status": "ok", "file": f"{i}.png", axis: weight}
        cells.append(cell)
    plan = grid.layout(cells, (8, 8), scale=1)
    assert [key[plan.row_axes.index(axis)] for key in plan.names] == [None, -3.0, -1.0, 2.0]
    picture = np.asarray(grid.draw(tmp_path, cells, plan, 0))
    shown = [int(picture[top + 4, left + 4, 0]) for left, top in plan.positions().values()]
    assert shown == [0, 180, 60, 120]
