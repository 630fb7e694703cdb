"""The run directory in the hands of others: full disks, starting over, temporary files, links, and files that are none."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, settings_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import guidegen.runs.directory as runs
from guidegen.cli import output
from guidegen.errors import UsageError
from guidegen.runs.directory import Run
from guidegen.runs.files import atomically
from guidegen.runs.manifest import read_rows
from guidegen.runs.png import png_text
from guidegen.runs.schema import read_plans, read_run
from guidegen.runs.status import check
from guidegen.runs.wipe import clear_leftovers
from guidegen.spec.cell import Cell
from guidegen.spec.plan import Plan
from guidegen.spec.shard import Shard

ARGS = ("--label", "0-1", "--num", 2, "--w", "0,3", "--steps", 1, "-o", "run")
CELLS = [Cell(0, seed, 1.0) for seed in range(3)]
PIXELS = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(folder: Path, cells: list[Cell] = CELLS) -> Path:
    """A run with these images."""
    with Run(folder, settings_of(), {}, plan=Plan([0], [0, 1, 2], [1.0])) as run:
        for cell in cells:
            run.write(cell, PIXELS, "", 1)
    return folder


def tear(folder: Path) -> bytes:
    """What a crash leaves at the end of a manifest; returns all of it."""
    with (folder / "manifest.jsonl").open("ab") as file:
        file.write(b'{"file": "imag')
    return (folder / "manifest.jsonl").read_bytes()


# --- a full disk


def test_disk_that_is_full_while_the_manifest_is_rewritten_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "run")
    before = tear(folder)
    descriptors = len(os.listdir("/proc/self/fd"))

    def full(path: Path, data: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_atomically", full)
        with pytest.raises(OSError, match="No space left") as found, Run(folder, settings_of(), {}) as run:
            run.finished(CELLS)
    assert found.value.errno == 28
    assert (folder / "manifest.jsonl").read_bytes() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with Run(folder, settings_of(), {}) as run:  # the lock is free again
        assert run.finished(CELLS) == set(CELLS)


RESUMED_ON_A_FULL_DISK = """
set -e
mount -t tmpfs -o size=256k tmpfs /mnt
cp -r run /mnt/run
dd if=/dev/zero of=/mnt/filler bs=1k 2>/dev/null || true
code=0; "$@" >out 2>err || code=$?
echo $code; ls -A /mnt/run/images/w3.0/label0000; cat /mnt/run/manifest.jsonl >manifest
rm /mnt/filler
"$@"
"""


def test_resuming_on_a_file_system_that_is_full_leaves_the_manifest_as_it_was(
    with_null: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    args = ("sample", "-m", with_null, "--label", "0", "--num", 3, "--steps", 1)
    call(*args, "-o", "run")
    lines = (tmp_path / "run/manifest.jsonl").read_bytes()
    padding = lines.splitlines(keepends=True)[0] * 30  # superseded: as large as no rest of a page takes
    (tmp_path / "run/manifest.jsonl").write_bytes(padding + lines)
    before = tear(tmp_path / "run")
    command = [sys.executable, "-m", "guidegen", *map(str, args), "-o", "/mnt/run"]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", RESUMED_ON_A_FULL_DISK, "sh", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    err = Path("err").read_text()
    assert result.stdout == "74\n000000.png\n000001.png\n000002.png\n/mnt/run\n", result.stderr + err
    assert "No space left on device: /mnt/run/manifest.jsonl" in err
    assert Path("out").read_text() == ""
    assert Path("manifest").read_bytes() == before


# --- starting over


def mine(folder: Path) -> dict[str, bytes]:
    """Files of the user's in a run."""
    files = {
        "notes.txt": b"notes",
        "w9.0.npz": b"an array of the user's",
        "data-00000.tar": b"a tar",
        "w9.0-00000.tar": b"another",
        "grid-final.png": b"a picture",
        "images/notes.txt": b"more notes",
        "features/notes.txt": b"and more",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".run.json.lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def merged(model: Path, folder: Path) -> None:
    """A run with all that commands make in one, and what dead processes leave."""
    call("sweep", "-m", model, *ARGS, "--shard", "0/2")
    call("sweep", "-m", model, *ARGS, "--shard", "1/2")
    call("merge", "run", "--npz", "--tar", "--tar-size", 0.003)
    for name in ("metrics.jsonl", "curves.svg", "curves.png", "report.html", "grid-1.png", "manifest.1-of-2.jsonl"):
        (folder / name).write_text("")
    (folder / "features").mkdir()
    (folder / "features/0123456789abcdef.npz").write_text("")
    (folder / "features/0123456789abcdef-0123456789abcdef.npy").write_text("")
    for name in (".grid.png.4194304.part", "images/w3.0/label0000/.000000.png.4194304-abcdef01.part"):
        (folder / name).write_text("")


def test_overwrite_leaves_nothing_of_earlier_commands_and_all_of_the_users(with_null: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    merged(with_null, folder)
    exports = {path.name for kind in ("*.npz", "*.tar") for path in folder.glob(kind)}
    assert {"w0.0.npz", "w3.0.npz", "w0.0-00000.tar", "w3.0-00001.tar"} <= exports
    assert set(read_run(folder)["exports"]) == exports
    foreign = mine(folder)
    call("sample", "-m", with_null, "--label", 1, "--steps", 1, "-o", "run", "--overwrite")
    there = contents(folder)
    assert {name: there.pop(name, None) for name in foreign} == foreign
    assert set(there) == {"run.json", "manifest.jsonl", "images/w3.0/label0001/000000.png"}
    assert "exports" not in read_run(folder)


def test_exports_are_known_by_what_is_in_them_where_run_json_is_damaged(with_null: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    merged(with_null, folder)
    foreign = mine(folder)
    (folder / "run.json").write_text("{")
    call("sample", "-m", with_null, "--label", 1, "--steps", 1, "-o", "run", "--overwrite")
    there = contents(folder)
    assert {name: there.pop(name, None) for name in foreign} == foreign
    assert set(there) == {"run.json", "manifest.jsonl", "images/w3.0/label0001/000000.png"}


@pytest.mark.parametrize("after", [0, 1, 3, 8])
def test_overwrite_that_fails_midway_is_repaired_by_the_same_command(
    with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    folder = tmp_path / "run"
    merged(with_null, folder)
    foreign = mine(folder)
    again = ("sample", "-m", with_null, "--label", 1, "--steps", 1, "-o", "run", "--overwrite")
    unlink, deleted = Path.unlink, []

    def failing(self: Path, missing_ok: bool = False) -> None:
        if len(deleted) == after:
            raise OSError(5, "Input/output error", str(self))
        deleted.append(self)
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        with pytest.raises(OSError, match="Input/output"):
            Run(folder, settings_of(), {}, overwrite=True)
    call(*again)
    there = contents(folder)
    assert {name: there.pop(name, None) for name in foreign} == foreign
    assert set(there) == {"run.json", "manifest.jsonl", "images/w3.0/label0001/000000.png"}


def test_merge_replaces_its_own_tars_and_leaves_those_of_others(with_null: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    call("sweep", "-m", with_null, *ARGS)
    call("merge", "run", "--tar", "--tar-size", 0.003)
    assert (folder / "w3.0-00001.tar").exists()
    (folder / "w3.0-00007.tar").write_text("mine")
    call("merge", "run", "--tar")
    assert sorted(path.name for path in folder.glob("w3.0-*.tar")) == ["w3.0-00000.tar", "w3.0-00007.tar"]
    with tarfile.open(folder / "w3.0-00000.tar") as archive:
        assert len(archive.getnames()) == 4 * 3


# --- temporary files


def hold(path: Path, ready: Any, end: Any) -> None:
    with atomically(path) as temporary:
        temporary.write_bytes(b"half")
        ready.set()
        end.wait(60)
        temporary.write_bytes(b"whole")


@pytest.mark.parametrize("shard", [None, Shard(0, 2)])
def test_temporary_file_of_a_living_process_is_not_touched(tmp_path: Path, shard: Shard | None) -> None:
    folder = made(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder / CELLS[0].file, ready, end))
    process.start()
    assert ready.wait(60)
    with Run(folder, settings_of(), {}, shard=shard) as run:
        run.finished(CELLS)
    clear_leftovers(folder)
    end.set()
    process.join(60)
    assert process.exitcode == 0
    assert (folder / CELLS[0].file).read_bytes() == b"whole"
    assert not list(folder.rglob("*.part"))


def test_temporary_files_of_dead_processes_go_whoever_has_their_number_now(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(folder / CELLS[0].file, ready, context.Event()))
    process.start()
    assert ready.wait(60)
    (part,) = (folder / "images").rglob("*.part")
    process.kill()
    process.join(60)
    own = part.with_name(f".000001.png.{os.getpid()}-01234567.part")  # as where each container counts from one
    own.touch()
    alive = part.with_name(f".000002.png.{os.getppid()}.part")
    alive.touch()
    with Run(folder, settings_of(), {}) as run:
        run.finished(CELLS)
    assert list(folder.rglob("*.part")) == [alive]


def test_own_temporary_files_of_other_threads_are_not_touched(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    with atomically(folder / "grid.png") as temporary:
        temporary.write_bytes(b"grid")
        clear_leftovers(folder)
    assert (folder / "grid.png").read_bytes() == b"grid"


# --- links and files that are none


def test_a_run_is_never_written_through_a_link(with_null: Path, tmp_path: Path) -> None:
    call("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", "run")
    (tmp_path / "outside").mkdir()
    (tmp_path / "run/images").rename(tmp_path / "moved")
    (tmp_path / "run/images").symlink_to(tmp_path / "outside")
    again = ("sample", "-m", with_null, "--label", "0-1", "--steps", 1, "-o", "run")
    for flags in ([], ["--overwrite"]):
        assert "images is a symbolic link" in str(call(*again, *flags, code=2).exception)
    (tmp_path / "run/images").unlink()
    (tmp_path / "moved").rename(tmp_path / "run/images")
    (tmp_path / "run/images/w3.0/label0001").symlink_to(tmp_path / "outside")
    assert "label0001 is a symbolic link" in str(call(*again, code=2).exception)
    assert list((tmp_path / "outside").iterdir()) == []
    part = tmp_path / "outside/.000000.png.4194304.part"
    part.touch()
    (made(tmp_path / "read", []) / "images").symlink_to(tmp_path / "outside")
    clear_leftovers(tmp_path / "read")
    part.unlink()
    with Run(tmp_path / "api", settings_of(), {}) as run:
        (tmp_path / "api/images").symlink_to(tmp_path / "outside")
        with pytest.raises(UsageError, match="symbolic link"):
            run.write(CELLS[0], PIXELS, "", 1)
    assert list((tmp_path / "outside").iterdir()) == []


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


COMMANDS = [("grid", "run"), ("verify", "run"), ("merge", "run")]


@pytest.mark.parametrize("harm", [fifo, directory, device])
@pytest.mark.parametrize("name", ["run.json", "manifest.jsonl", "manifest.0-of-2.jsonl"])
def test_what_is_no_file_where_one_should_be_is_told(tmp_path: Path, harm: Callable[[Path], None], name: str) -> None:
    folder = made(tmp_path / "run")
    harm(folder / name)
    for command in COMMANDS:
        assert name in str(call(*command, code=2).exception)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=name):
            Run(folder, settings_of(), {}, overwrite=overwrite)


def test_manifest_that_is_a_link_is_read_and_not_written(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    link(folder / "manifest.jsonl")
    assert len(read_rows(folder)) == 3
    with pytest.raises(UsageError, match="regular file"):
        Run(folder, settings_of(), {})


@pytest.mark.parametrize("harm", [fifo, directory, device])
def test_what_is_no_file_where_an_image_should_be_is_corrupt_or_missing(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = made(tmp_path / "run")
    harm(folder / CELLS[1].file)
    assert CELLS[1].file in [*check(folder, CELLS).missing, *check(folder, CELLS).corrupt]
    with Run(folder, settings_of(), {}) as run:
        assert run.finished(CELLS) == {CELLS[0], CELLS[2]}


GOOD: dict[str, Any] = {"settings": vars(settings_of()), "plans": [Plan([0], [0, 1, 2], [1.0]).as_json()]}
BAD: list[tuple[str, Any]] = [
    *(
        (f"settings.{key}", value)
        for key, value in [("mode", 7), ("mode", "x"), ("steps", "9"), ("steps", 0), ("steps", 1.5)]
    ),
    *(
        (f"settings.{key}", value)
        for key, value in [("model", None), ("model", []), ("eta", "x"), ("size", [8]), ("size", 8)]
    ),
    *(("settings", value) for value in (None, [], 1, "x", {})),
    *(("plans", value) for value in (None, 1, {}, "x", [None], [[]])),
    *(("variants", value) for value in (None, [], {"a": 1}, {"a": {"steps": "x"}}, {"a": {"mode": "x"}})),
    *(
        ("exports", value)
        for value in (1, [1], ["../x.npz"], ["/etc/x.tar"], ["a/b.npz"], ["..npz"], ["run.json"], ["a\0.npz"])
    ),
    *(("command", value) for value in ([1], 1, {})),
    *(("options", value) for value in ("x", [1], None, {"w": {}}, {"w": [1]})),
    *(("checkpoint", value) for value in (1, [], {"path": 1})),
    *(("versions", value) for value in (1, [], {"torch": 1})),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_run_json_of_other_types_is_told_in_a_line(tmp_path: Path, key: str, value: Any) -> None:
    folder = made(tmp_path / "run")
    about = json.loads(json.dumps(GOOD))
    where = about
    for part in key.split(".")[:-1]:
        where = where[part]
    where[key.split(".")[-1]] = value
    (folder / "run.json").write_text(json.dumps(about))
    for command in COMMANDS:
        message = str(call(*command, code=2).exception)
        assert "run.json is not valid" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"\0",
            b"{",
            b"null",
            b"[]",
            b"7",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"NaN",
            b'{"settings": NaN}',
        ),
        json.dumps(GOOD | {"settings": GOOD["settings"] | {"eta": 1}}).replace('"eta": 1', '"eta": 1e999').encode(),
        json.dumps(GOOD | {"settings": GOOD["settings"] | {"steps": 1}})
        .replace('"steps": 1', '"steps": 1' + "0" * 5000)
        .encode(),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_run_json_that_is_no_json_is_told_in_a_line(tmp_path: Path, data: bytes) -> None:
    folder = made(tmp_path / "run")
    (folder / "run.json").write_bytes(data)
    for command in COMMANDS:
        message = str(call(*command, code=2).exception)
        assert "run.json is n" in message
        assert "\n" not in message


PLAN = GOOD["plans"][0]
BAD_PLANS: list[dict[str, Any]] = [
    *({**PLAN, "seeds": value} for value in ("", "x", "3-1", 7, None, "0-99999999999999999999")),
    *({**PLAN, "labels": value} for value in ([], [-1], ["x"], [1.5], [[]], None, "0")),
    *({**PLAN, "weights": value} for value in (["x"], None, 1, [None])),
    *({**PLAN, "by": value} for value in ([1], [["steps"]], [["steps", 1]], [["steps", [[]]]], {})),
    *({**PLAN, "own_weights": value} for value in (1, ["guidance", [1.0]], ["guidance"])),
    *({**PLAN, "prompts": value} for value in ([1], "x", {})),
    {"labels": [0]},
]


@pytest.mark.parametrize("plan", BAD_PLANS)
def test_plan_that_is_none_is_told_and_replaced_by_the_command_that_draws(tmp_path: Path, plan: dict[str, Any]) -> None:
    folder = made(tmp_path / "run")
    (folder / "run.json").write_text(json.dumps(GOOD | {"plans": [plan]}))
    for command in COMMANDS[1:]:
        message = str(call(*command, code=2).exception)
        assert "no plan" in message
        assert "\n" not in message
    made(folder)
    assert read_run(folder)["plans"] == GOOD["plans"]


def test_whole_numbers_in_a_plan_name_the_folders_of_its_weights(tmp_path: Path) -> None:
    (plan,) = read_plans(tmp_path, GOOD | {"plans": [PLAN | {"weights": [1]}]})
    assert [cell.file for cell in plan.cells()] == [cell.file for cell in CELLS]


def test_settings_of_a_newer_version_can_be_read_and_not_drawn_into(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    about = read_run(folder)
    about["settings"]["newer"] = 3
    (folder / "run.json").write_text(json.dumps(about))
    call("verify", "run")
    with pytest.raises(UsageError, match="newer 3 there, None now"):
        made(folder)


def test_row_that_is_none_is_dropped_told_by_verify_and_its_image_drawn_again(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"seed": 1', b'"seed": "1"')
    (folder / "manifest.jsonl").write_bytes(b"".join([lines[0], b"\0\xff\n", lines[1], b"x" * (17 << 20) + b"\n", lines[2]]))
    facts = json.loads(call("verify", "run", "--json", code=3).stdout)
    assert facts["missing"] == [CELLS[1].file]
    assert facts["invalid"] == ["manifest.jsonl: 3 lines, the first is line 2"]
    assert "invalid: manifest.jsonl: 3 lines" in call("verify", "run", code=3).stdout
    with Run(folder, settings_of(), {}) as run:
        assert run.finished(CELLS) == {CELLS[0], CELLS[2]}
        run.write(CELLS[1], PIXELS, "", 1)
    facts = json.loads(call("verify", "run", "--json").stdout)
    assert (facts["complete"], facts["invalid"]) == (True, [])


def test_rows_that_say_other_things_than_their_cells_do_not_count(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    text = (folder / "manifest.jsonl").read_text().replace('"seed": 2', '"seed": 7')
    (folder / "manifest.jsonl").write_text(text)
    assert check(folder, CELLS).corrupt == [CELLS[2].file]
    with Run(folder, settings_of(), {}) as run:
        assert run.finished(CELLS) == set(CELLS[:2])


def test_plan_of_ten_million_seeds_is_read_at_once(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    (folder / "run.json").write_text(json.dumps(GOOD | {"plans": [PLAN | {"seeds": "0-9999999"}]}))
    began = time.monotonic()
    call("grid", "run")
    assert time.monotonic() - began < 20


def test_command_that_is_no_text_is_kept_and_read(tmp_path: Path) -> None:
    prompt = "a \udcff fox\x1b\0"
    cell = Cell(None, 0, 1.0, prompt=prompt, prompt_index=0)
    for _ in range(2):
        with Run(tmp_path / "run", settings_of(), {"command": "sample", "options": {"prompt": ["\udcff"]}}) as run:
            if not run.finished([cell]):
                row = run.write(cell, PIXELS, prompt, 1)
    assert read_run(tmp_path / "run")["options"] == {"prompt": ["\udcff"]}
    assert read_rows(tmp_path / "run") == [row]
    with Image.open(tmp_path / "run" / cell.file) as image:
        assert json.loads(image.text["guidegen"])["cell"]["prompt"] == prompt  # type: ignore[attr-defined]


# --- files that carry their plan


def test_large_metadata_leaves_an_image_that_opens(tmp_path: Path) -> None:
    for count in (10, 20_000, 200_000):
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=png_text({"rows": ["images"] * count}))
        with Image.open(tmp_path / "x.png") as image:
            assert len(json.loads(image.text["guidegen"])["rows"]) == count  # type: ignore[attr-defined]


def png(path: Path, text: str, packed: bool = False) -> None:
    info = PngInfo()
    info.add_itxt("guidegen", text, zip=packed)
    Image.new("RGB", (8, 8)).save(path, "PNG", pnginfo=info)


def npz(path: Path, plan: str = "{}", rows: bytes = b"", **others: Any) -> None:
    arrays = {"guidegen": np.array(plan), "guidegen_rows": np.frombuffer(zlib.compress(rows), np.uint8)} | others
    np.savez_compressed(path, **arrays)


def lying_header(path: Path) -> None:
    npz(path)
    with zipfile.ZipFile(path, "w") as archive, archive.open("guidegen_rows.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**13,)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]


FILES: list[tuple[str, Callable[[Path], None]]] = [
    *((f"x{kind}", lambda path: path.write_bytes(b"")) for kind in (".png", ".npz", ".jpg", ".webp")),
    *((f"x{kind}", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 99)) for kind in (".png", ".npz", ".jpg")),
    *((f"x{kind}", fifo) for kind in (".png", ".npz", ".jpg")),
    *((f"x{kind}", device) for kind in (".png", ".npz")),
    *(
        ("x.png", lambda path, text=text: png(path, text))
        for text in ("", "7", "[]", "{}", "NaN", '{"rows": [7]}', "[" * 99_999)
    ),
    ("x.png", lambda path: png(path, '{"rows": [{"file": 1}]}')),
    ("x.png", lambda path: png(path, "x" * (1 << 24), packed=True)),
    ("x.npz", lambda path: npz(path, "[]")),
    ("x.npz", lambda path: npz(path, rows=b"7\n")),
    ("x.npz", lambda path: npz(path, rows=b"\n" * (1 << 25))),
    ("x.npz", lambda path: npz(path, guidegen=np.zeros(1 << 27, np.uint8))),
    ("x.npz", lying_header),
]


@pytest.mark.parametrize(("name", "make"), FILES)
def test_file_that_is_none_of_ours_is_left_alone(
    with_null: Path, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    before = os.lstat(tmp_path / name)[:7], os.lstat(tmp_path / name).st_mtime_ns
    began = time.monotonic()
    assert name in str(call("sample", "-m", with_null, "--label", 0, "--steps", 1, "-o", name, code=2).exception)
    assert time.monotonic() - began < 20
    assert (os.lstat(tmp_path / name)[:7], os.lstat(tmp_path / name).st_mtime_ns) == before


def test_bombs_are_not_unpacked() -> None:
    with pytest.raises(ValueError, match="too large"):
        output.unpack(zlib.compress(b"\0" * 1000), 999)
    assert output.unpack(zlib.compress(b"\0" * 1000), 1000) == b"\0" * 1000


def test_partial_directory_of_a_file_goes_without_what_is_not_ours(with_null: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 0, "--num", 2, "--steps", 1, "-o", "x.npz")
    call(*args)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    (tmp_path / "x.npz").rename(tmp_path / "y.npz")
    made_before = tmp_path / "x.npz.partial"
    call(*args[:-1], made_before)
    (made_before / "notes.txt").write_text("mine")
    call(*args)
    assert [path.name for path in made_before.iterdir()] == ["notes.txt"]
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
