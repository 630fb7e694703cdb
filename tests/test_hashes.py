"""Hashes of weights that are kept: right, or read again."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guidegen.models import hashes
from guidegen.models.weight_files import weights_sha256


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("GUIDEGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_SETTLED", 0.0)
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each time that files are read."""
    count: list[int] = []
    read = hashes.read_sha256
    monkeypatch.setattr(hashes, "read_sha256", lambda files: count.append(1) or read(files))
    return count


def true_hash(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.json"))


def test_files_are_read_once(files: list[Path], reads: list[int]) -> None:
    assert {hashes.sha256_of(files) for _ in range(3)} == {true_hash(files)}
    assert len(reads) == 1
    assert hashes.sha256_of(files[:1]) == true_hash(files[:1])
    assert hashes.sha256_of(files[::-1]) == true_hash(files[::-1])


def test_a_changed_file_is_read_again(files: list[Path], reads: list[int]) -> None:
    hashes.sha256_of(files)
    times = files[0].stat()
    files[0].write_bytes(b"x" * times.st_size)
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and cp -p do
    assert hashes.sha256_of(files) == true_hash(files)
    other = files[1].with_name("c")
    other.write_bytes(b"y" * files[1].stat().st_size)
    other.replace(files[1])
    assert hashes.sha256_of(files) == true_hash(files)
    assert len(reads) == 3


def test_what_has_just_changed_is_not_kept(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_SETTLED", 60.0)
    hashes.sha256_of(files)
    assert kept(tmp_path) == []
    monkeypatch.setattr(time, "time", lambda: files[0].stat().st_mtime + 100)
    hashes.sha256_of(files)
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\0", b"[]", b'{"states": [], "sha256": "x"}', b'{"states": [[1,2,3,4]], "sha256": 3}', b"[" * 99999],
)
def test_a_damaged_one_is_made_again(data: bytes, files: list[Path], tmp_path: Path) -> None:
    hashes.sha256_of(files)
    (place,) = kept(tmp_path)
    whole = place.read_bytes()
    place.write_bytes(data)
    assert hashes.sha256_of(files) == true_hash(files)
    assert place.read_bytes() == whole


def test_a_pipe_or_a_folder_in_its_place(files: list[Path], tmp_path: Path) -> None:
    hashes.sha256_of(files)
    (place,) = kept(tmp_path)
    for make in (os.mkfifo, os.mkdir):
        place.unlink()
        make(place)
        assert hashes.sha256_of(files) == true_hash(files)


@pytest.mark.parametrize("where", ["", "/dev/null/x", "/proc/nothing"])
def test_where_nothing_can_be_kept(where: str, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDEGEN_CACHE", where)
    assert hashes.sha256_of(files) == true_hash(files)


def test_many_at_once(files: list[Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: hashes.sha256_of(files), range(200))) == {true_hash(files)}
    assert len(kept(tmp_path)) == 1
    assert len(list((tmp_path / "cache").rglob("*.part"))) == 0


def test_the_hash_of_a_checkpoint_is_what_it_was(with_null: Path, files: list[Path], reads: list[int]) -> None:
    folders = [with_null / "unet", with_null / "classifier"]
    weights = [folder / "diffusion_pytorch_model.safetensors" for folder in folders]
    assert {weights_sha256(folders) for _ in range(2)} == {true_hash(weights)}
    assert len(reads) == 1
