"""The hub: one commit for plan and weights, and errors of the network. A server on this machine stands in for it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_unet

from guidegen.errors import CheckpointError, GuidegenError
from guidegen.models.checkpoint import Access, open_checkpoint

Command = Callable[..., Any]
COMMITS = {"a" * 40: 0, "b" * 40: 1}


class Hub(ThreadingHTTPServer):
    """A repository `someone/tiny` of two commits, whose main moves to the second once the first was asked for."""

    def __init__(self, folders: dict[str, Path]):
        self.folders, self.main, self.asked = folders, next(iter(folders)), set[str]()
        super().__init__(("127.0.0.1", 0), _Handler)

    def files(self, commit: str) -> dict[str, Path]:
        folder = self.folders[commit]
        return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None: ...

    def answer(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "someone", "tiny"] and parts[4:5] in (["revision"], ["tree"]):
            commit = self.server.main if parts[5] == "main" else parts[5]
            files = self.server.files(commit)
            if parts[4] == "tree":
                found: Any = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0"} for n, p in files.items()]
            else:
                found = {"id": "someone/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            self.send(json.dumps(found).encode(), {"Content-Type": "application/json"})
        elif parts[:3] == ["someone", "tiny", "resolve"]:
            commit, name = parts[3], "/".join(parts[4:])
            self.server.asked.add(commit)
            self.server.main = list(self.server.folders)[-1]  # somebody pushes while we read
            data = self.server.files(commit)[name].read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self.send(data, {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})
        else:
            self.send(b"", {}, 404)

    def send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(with_null: Path, tmp_path: Path) -> Iterator[Hub]:
    other = Path(shutil.copytree(with_null, tmp_path / "other"))
    tiny_unet(seed=1, num_class_embeds=6).save_pretrained(other / "unet")
    server = Hub(dict(zip(COMMITS, (with_null, other), strict=True)))
    thread = threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_plan_and_weights_come_from_one_commit(
    mode: str, hub: Hub, guidegen: Command, environment: dict[str, str], tmp_path: Path
) -> None:
    """Though main moves between the two; the classifier beside the network is of that commit too."""
    online = {key: value for key, value in environment.items() if key != "HF_HUB_OFFLINE"}
    env = online | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    flags = ("sample", "-m", "someone/tiny", "--label", 1, "--steps", 2, "--mode", mode, "-o", "run")
    done = guidegen(*flags, env=env)
    assert done.returncode == 0, done.stderr
    first = next(iter(hub.folders))
    assert hub.asked == {first}
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert first in json.dumps(about)
    weights = hub.files(first)["unet/diffusion_pytorch_model.safetensors"].read_bytes()
    assert hashlib.sha256(weights).hexdigest() in json.dumps(about)
    offline = guidegen(*flags[:-1], "again", "--offline", env=env | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr


def test_a_moved_branch_of_the_cache_does_not_mix_either(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, (first, second) = tmp_path / "cache" / "models--someone--tiny", hub.folders
    for commit, folder in hub.folders.items():
        shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    main = repo / "refs" / "main"
    main.write_text(first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    access = Access(offline=True)
    checkpoint = open_checkpoint("someone/tiny", access=access)
    main.write_text(second)
    checkpoint.download(access)
    assert checkpoint.revision == first
    assert {folder.parent.name for folder in checkpoint.part_folders.values()} == {first}
    assert open_checkpoint("someone/tiny", access=access).revision == second


def _errors() -> list[BaseException]:
    """One of each kind that the installed HTTP clients have for a network that is not there."""
    found: list[BaseException] = [TimeoutError("timed out"), ConnectionResetError("reset"), OSError("no route")]
    for name, kinds in {
        "httpx2": ("ConnectError", "ReadTimeout", "RemoteProtocolError", "ProxyError"),
        "httpx": ("ConnectError", "ReadTimeout"),
        "requests": ("ConnectionError", "Timeout", "exceptions.ChunkedEncodingError"),
    }.items():
        try:
            module = __import__(name)
        except ImportError:
            continue
        for kind in kinds:
            cls = module
            for part in kind.split("."):
                cls = getattr(cls, part)
            found.append(cls("nobody answers\nat all"))
    return found


@pytest.mark.parametrize("error", _errors(), ids=lambda e: f"{type(e).__module__}.{type(e).__name__}")
def test_errors_of_the_network_are_errors_of_the_checkpoint(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match="could not be downloaded") as found:
        open_checkpoint("someone/tiny")
    assert "\n" not in str(found.value)


def test_a_full_disk_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(OSError, match="No space"):
        open_checkpoint("someone/tiny")


def test_nobody_answers(guidegen: Command, environment: dict[str, str], tmp_path: Path) -> None:
    env = {key: value for key, value in environment.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = guidegen("inspect", "someone/tiny", env=env)
    assert done.returncode == 4
    assert done.stderr.startswith("error: someone/tiny")
    assert done.stderr.count("\n") <= 2


@pytest.mark.parametrize("ref", ["~nobody-of-that-name/x", "x" * 5000, "a\0b", "/dev/null/x"])
def test_what_is_no_path(ref: str) -> None:
    with pytest.raises(GuidegenError) as found:
        open_checkpoint(ref)
    assert found.value.code == 4
    assert len(str(found.value)) < 6000
