"""The run directory: what was drawn, kept so that a crash or a second thought costs nothing.

    RUN/run.json, RUN/manifest.jsonl, RUN/images/w3.0/label0207/000005.png, RUN/grid.png

A file is written under a temporary name, synced and renamed, then its row is appended; a row
counts only while its file is there with that hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from guidegen.errors import UsageError
from guidegen.plan import Cell, Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

Row = dict[str, Any]


class Run:
    """A run directory, opened for drawing by one process.

    Args:
        folder: the directory; made if it is not there.
        settings: of this run. A directory with other settings is refused.
        about: the rest of run.json: checkpoint, versions, command.
        overwrite: start over, deleting what an earlier run left in `folder`.

    Raises:
        UsageError: another process draws into it, it holds other settings, or it is no run.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: Settings, about: Mapping[str, Any], overwrite: bool = False):
        self.folder, self.settings = folder, settings
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; -o takes a directory, or a file ending in .png, .webp, .jpg or .npz.")
        if folder.is_dir() and not (folder / "run.json").exists() and _has_foreign_files(folder):
            raise UsageError(f"{folder} is not empty and not a run directory; name another one with -o.")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        try:
            if overwrite:
                _wipe(folder)
            _check_settings(folder, settings)
            if not (folder / "run.json").exists():
                text = json.dumps({**about, "settings": asdict(settings)}, indent=2, ensure_ascii=False)
                write_atomically(folder / "run.json", text.encode())
            self._manifest = (folder / "manifest.jsonl").open("ab")
            _clear_leftovers(folder)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manifest.close()
        self._lock.release()

    def finished(self, cells: Iterable[Cell]) -> dict[Cell, Row]:
        """Rows of the cells whose image is on disk with the hash of its row; the other cells' rows are dropped."""
        rows = {row["file"]: row for row in read_rows(self.folder)}
        kept = {}
        for cell in cells:
            row = rows.get(cell.file)
            if row is None:
                continue
            if row["status"] == "ok" and _sha256(self.folder / cell.file) == row["sha256"]:
                kept[cell] = row
            else:
                del rows[cell.file]
        self._rewrite(list(rows.values()))
        return kept

    def _rewrite(self, rows: list[Row]) -> None:
        """Leaves just these rows in the manifest."""
        lines = b"".join(map(_encode_row, rows))
        path = self.folder / "manifest.jsonl"
        if path.read_bytes() != lines:
            self._manifest.close()
            write_atomically(path, lines)
            self._manifest = path.open("ab")

    def write(self, cell: Cell, image: NDArray[Any] | None, label_name: str, nfe: int) -> Row:
        """Saves one image, uint8 (H, W, C), or records a non-finite one as None; returns its row."""
        row: Row = {
            "file": cell.file,
            "mode": self.settings.mode,
            "w": cell.w,
            "label": cell.label,
            "label_name": label_name,
            "prompt": None,
            "seed": cell.seed,
            "nfe": nfe,
            "sha256": None,
            "shape": None,
            "status": "nonfinite",
        }
        if cell.w_classifier is not None:
            row["w_classifier"] = cell.w_classifier
        if image is not None:
            data = encode_png(image, image_metadata(self.settings, cell, label_name))
            write_atomically(self.folder / cell.file, data)
            row |= {"sha256": hashlib.sha256(data).hexdigest(), "shape": list(image.shape), "status": "ok"}
        self._manifest.write(_encode_row(row))
        self._manifest.flush()
        os.fsync(self._manifest.fileno())
        return row


def read_rows(folder: Path) -> list[Row]:
    """Rows of every manifest*.jsonl, torn ones dropped; the last row of a file wins."""
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob("manifest*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and {"file", "status", "sha256"} <= row.keys():
                rows[row["file"]] = row
    return list(rows.values())


def read_run(folder: Path) -> dict[str, Any]:
    """run.json.

    Raises:
        UsageError: `folder` is no run directory.
    """
    try:
        about: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        Settings(**about["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is not a run directory: run.json is missing or not readable.") from error
    return about


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary name in the same folder, fsync, rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def image_metadata(settings: Settings, cell: Cell, label_name: str) -> dict[str, Any]:
    """All that makes the image again, but for where and in what batch it was drawn."""
    return {"settings": asdict(settings), "cell": asdict(cell), "label_name": label_name}


def parameters_line(metadata: Mapping[str, Any], width: int, height: int) -> str:
    """The text that the AUTOMATIC1111 web interface writes and image browsers parse."""
    settings, cell = metadata["settings"], metadata["cell"]
    fields = {
        "Steps": settings["steps"],
        "Sampler": settings["scheduler"],
        "CFG scale": cell["w"],
        "Seed": cell["seed"],
        "Size": f"{width}x{height}",
        "Model hash": settings["model_sha256"][:10],
        "Model": settings["model"],
        "Guidance mode": settings["mode"],
    }
    prompt = metadata["label_name"] or ("" if cell["label"] is None else f"label {cell['label']}")
    return f"{prompt}\n" + ", ".join(f"{key}: {value}" for key, value in fields.items())


def encode_png(image: NDArray[Any], metadata: Mapping[str, Any]) -> bytes:
    """PNG of a uint8 (H, W, 3) or (H, W, 1) image with its metadata as iTXt and tEXt."""
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=png_text(metadata, parameters_line(metadata, *picture.size)))
    return buffer.getvalue()


def png_text(metadata: Mapping[str, Any], parameters: str | None = None) -> Any:
    """PNG text chunks: `guidegen` (JSON) and, for single images, `parameters`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("guidegen", json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    if parameters is not None:
        info.add_text("parameters", parameters)
    return info


def _encode_row(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def _has_foreign_files(folder: Path) -> bool:
    return any(not entry.name.startswith(".") for entry in folder.iterdir())


def _lock(folder: Path) -> Any:
    """An advisory lock that dies with its process."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"Another process is drawing into {folder}. Wait for it, or name another -o.") from None
    return lock


def _wipe(folder: Path) -> None:
    for pattern in ("run.json", "manifest*.jsonl", "grid*.png", "metrics.jsonl", "curves.*", "report.html"):
        for path in folder.glob(pattern):
            path.unlink()
    for made in ("images", "features"):
        shutil.rmtree(folder / made, ignore_errors=True)


def _check_settings(folder: Path, settings: Settings) -> None:
    if not (folder / "run.json").exists():
        return
    there = read_run(folder)["settings"]
    differ = [
        f"{name} {there.get(name)} there, {value} now"
        for name, value in asdict(settings).items()
        if there.get(name) != value
    ]
    if differ:
        raise UsageError(
            f"{folder} holds a run of other settings: {'; '.join(differ)}.\nName another -o, or --overwrite it."
        )


def _clear_leftovers(folder: Path) -> None:
    """A process that died leaves a row without its newline and a temporary file: drop both."""
    manifest = folder / "manifest.jsonl"
    data = manifest.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(manifest, data.rfind(b"\n") + 1)
    for part in folder.rglob(".*.part"):
        part.unlink()
