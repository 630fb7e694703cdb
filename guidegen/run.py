"""The run directory: what was drawn, kept so that a crash or a second thought costs nothing.

    RUN/run.json, RUN/manifest.jsonl, RUN/images/w3.0/label0207/000005.png, RUN/grid.png
    and RUN/manifest.I-of-N.jsonl for each shard until `merge` makes one of them

A file is written under a temporary name, synced and renamed, then its row is appended; a row
counts only while its file is there with that hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from guidegen.errors import OutputError, UsageError
from guidegen.plan import Cell, Plan, Settings, Shard, Variant, axis_value, read_plan, variant_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

Row = dict[str, Any]
_SECONDS_FOR_RUN_JSON = 60
_LONGEST_PLAIN_TEXT = 10_000


class Run:
    """A run directory, opened for drawing by one process, or one of its shards.

    Shards need not know of each other: each has a manifest and a lock of its own, run.json is
    written by whoever is first, and no image belongs to two of them.

    Args:
        folder: the directory; made if it is not there.
        settings: of this run. A directory with other settings is refused.
        about: the rest of run.json: checkpoint, versions, command.
        overwrite: start over, deleting what an earlier run left in `folder`.
        plan: what is to be drawn; kept in run.json for `verify` and `merge`.
        shard: which part of it this process draws; None for all.
        variants: the settings of each variant of the plan, where they are not those of the run.

    Raises:
        UsageError: another process draws into it, it holds other settings, or it is no run.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        about: Mapping[str, Any],
        overwrite: bool = False,
        plan: Plan | None = None,
        shard: Shard | None = None,
        variants: Mapping[Variant, Settings] = MappingProxyType({}),
    ):
        self.folder, self.settings, self.variants = folder, settings, variants
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; -o takes a directory, or a file ending in .png, .webp, .jpg or .npz.")
        if folder.is_dir() and not (folder / "run.json").exists() and _has_foreign_files(folder):
            raise UsageError(f"{folder} is not empty and not a run directory; name another one with -o.")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder, shard)
        try:
            _refuse_other_processes(folder, shard)
            with _run_json_lock(folder):
                if overwrite:
                    _wipe(folder)
                _settle(folder, settings, about, plan, variants)
            self._shard = shard
            self._path = folder / _manifest(shard)
            self._manifest = _open_manifest(self._path)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._manifest)
        self._lock.release()

    def finished(self, cells: Collection[Cell]) -> set[Cell]:
        """The cells whose image is on disk with the hash of its row.

        Clears what a process that died left behind: rows of the other cells and temporary files.
        """
        manifests = Manifests(self.folder, self._shard)
        places = manifests.places()
        kept = {cell for cell in cells if cell.file in places and self._is_finished(cell, manifests.read(places[cell.file]))}
        own = {cell.file: cell in kept for cell in cells}
        clear_leftovers(self.folder, {*own, self._path.name} if self._shard else None)
        good = {place for file, place in places.items() if own.get(file, True)}
        self._keep(manifests, good)
        return kept

    def rows(self, cells: Sequence[Cell]) -> Rows:
        """The rows of these cells, which all have one, in this order."""
        return Rows(self.folder, (cell.file for cell in cells), self._shard)

    def _is_finished(self, cell: Cell, row: Row) -> bool:
        if row.get("prompt") != cell.prompt:
            raise _other_prompts(self.folder, row.get("prompt"), cell.prompt)
        return bool(row["status"] == "ok" and file_sha256(self.folder / cell.file) == row["sha256"])

    def _keep(self, manifests: Manifests, places: Collection[int]) -> None:
        """Leaves in the manifest of this process just the rows at these places."""
        if any(row is None or place not in places for place, row in manifests.rows_of(self._path)):
            os.close(self._manifest)
            kept = (encode_row(row) for place, row in manifests.rows_of(self._path) if row and place in places)
            write_atomically(self._path, kept)
            self._manifest = _open_manifest(self._path)

    def write(self, cell: Cell, image: NDArray[Any] | None, label_name: str, nfe: int, dtype: str | None = None) -> Row:
        """Saves one image, or records that it is not finite; returns its row.

        Args:
            cell: which.
            image: uint8 (H, W, C); None where it was not finite.
            label_name: of the cell's label.
            nfe: network calls behind it.
            dtype: what it was drawn in, where that is not the run's.
        """
        row: Row = {
            "file": cell.file,
            "mode": self.settings.mode,
            "w": cell.w,
            "label": cell.label,
            "label_name": label_name,
            "prompt": cell.prompt,
            "seed": cell.seed,
            "nfe": nfe,
            "sha256": None,
            "shape": None,
            "status": "nonfinite",
        }
        if cell.w_classifier is not None:
            row["w_classifier"] = cell.w_classifier
        if cell.w_guide is not None:
            row["w_guide"] = cell.w_guide
        if cell.mixture is not None:
            row["mixture"] = cell.mixture
        row |= dict(cell.variant)
        if dtype is not None:
            row["dtype"] = dtype
        if image is not None:
            settings = self.variants.get(cell.variant, self.settings)
            settings = replace(settings, dtype=dtype) if dtype else settings
            data = encode_png(image, image_metadata(settings, cell, label_name))
            write_atomically(self.folder / cell.file, data)
            row |= {"sha256": hashlib.sha256(data).hexdigest(), "shape": list(image.shape), "status": "ok"}
        _append(self._manifest, encode_row(row))
        return row


class Rows(Sequence[Row]):
    """Rows of some files of a run, in their order, read from the manifests when asked for.

    Eight bytes a row in memory, however long the run.

    Args:
        folder: a run directory.
        files: the files, relative to `folder`; each has a row.
        shard: as in `Manifests`.
    """

    def __init__(self, folder: Path, files: Iterable[str], shard: Shard | None = None):
        self._manifests = Manifests(folder, shard)
        places = self._manifests.places()
        self._at = array("q", (places[file] for file in files))

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self._manifests.read(at) for at in self._at[index]]
        return self._manifests.read(self._at[index])


class Manifests:
    """Every manifest*.jsonl of a run as if they were one file, as long as they are now: a place is an offset into it.

    Args:
        folder: a run directory.
        shard: leaves out the manifests of the shards beside this one, which grow and hold none of its images.
    """

    def __init__(self, folder: Path, shard: Shard | None = None):
        beside = set(folder.glob(f"manifest.*-of-{shard.count}.jsonl")) - {folder / _manifest(shard)} if shard else set()
        self._folder, self._paths = folder, sorted(set(folder.glob("manifest*.jsonl")) - beside)
        sizes = [path.stat().st_size for path in self._paths]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def places(self) -> dict[str, int]:
        """file -> the place of its row; the last one where there are several, torn ones left out."""
        found: dict[str, int] = {}
        for path in self._paths:
            for place, row in self.rows_of(path):
                if row and (row["file"] not in found or self._supersedes(row, self.read(found[row["file"]]))):
                    found[row["file"]] = place
        return found

    def _supersedes(self, row: Row, before: Row) -> bool:
        """Whether a later row stands for its file: unless just the earlier one has the hash of what is there."""
        if before["sha256"] == row["sha256"]:
            return True
        there = file_sha256(self._folder / row["file"])
        return bool(there == row["sha256"] or there != before["sha256"])

    def rows_of(self, path: Path) -> Iterator[tuple[int, Row | None]]:
        """The place and the row of each line of one manifest; None for a torn one."""
        which = self._paths.index(path)
        place, end = self._starts[which : which + 2]
        with path.open("rb") as file:
            for line in file:
                if place + len(line) > end:
                    return
                yield place, _parse(line)
                place += len(line)

    def read(self, place: int) -> Row:
        """The row at a place."""
        which = bisect_right(self._starts, place) - 1
        with self._paths[which].open("rb") as file:
            file.seek(place - self._starts[which])
            row = _parse(file.readline())
        if row is None:
            raise OutputError(f"{self._paths[which]} has changed while it was read. Try again when nobody writes it.")
        return row


def _parse(line: bytes) -> Row | None:
    """The row of a line; None for a torn one."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"file", "status", "sha256"} <= row.keys() else None


def read_rows(folder: Path) -> list[Row]:
    """Rows of every manifest*.jsonl, torn ones dropped; the last row of a file wins."""
    return list(Rows(folder, Manifests(folder).places()))


def with_axes(rows: Iterable[Row], settings: Mapping[str, Any], axes: Iterable[str]) -> list[Row]:
    """The rows, each with its place along all of these axes: of `--by` or else what the run's settings say."""
    rest = {axis: axis_value(axis, settings) for axis in axes}
    return [rest | row for row in rows]


class State(NamedTuple):
    """What a run directory lacks of its plan, and what it has beyond it; files relative to it, in the plan's order.

    Attributes:
        missing: no row, or no image.
        corrupt: an image that is not the one of its row.
        nonfinite: drawn, and recorded as not finite.
        extra: images that the plan does not name.
    """

    missing: list[str]
    corrupt: list[str]
    nonfinite: list[str]
    extra: list[str]


def check(folder: Path, cells: Iterable[Cell], hashes: bool = True) -> State:
    """Compares a run directory with what it is to hold.

    Args:
        folder: the directory.
        cells: what it is to hold.
        hashes: also read every image and compare it with the hash in its row.
    """
    manifests = Manifests(folder)
    places = manifests.places()
    state = State([], [], [], [])
    planned = set()
    for cell in cells:
        planned.add(cell.file)
        row = manifests.read(places[cell.file]) if cell.file in places else None
        if row and row["status"] != "ok":
            state.nonfinite.append(cell.file)
        elif row is None or not (folder / cell.file).is_file():
            state.missing.append(cell.file)
        elif row.get("prompt") != cell.prompt or not is_intact(folder, row, hashes):
            state.corrupt.append(cell.file)
    for parent, _, names in os.walk(folder / "images"):
        at = Path(parent).relative_to(folder)
        state.extra.extend(str(at / name) for name in names if not name.startswith(".") and str(at / name) not in planned)
    state.extra.sort()
    return state


def is_intact(folder: Path, row: Row, hashes: bool = True) -> bool:
    """Whether the image of a row is there; with `hashes`, whether it also is the one that was drawn."""
    path: Path = folder / row["file"]
    return file_sha256(path) == row["sha256"] if hashes else path.is_file()


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


def read_plans(folder: Path, about: Mapping[str, Any]) -> list[Plan]:
    """What the run is to hold, from its run.json.

    Raises:
        UsageError: it does not say.
    """
    try:
        plans = [read_plan(plan) for plan in about["plans"]]
    except (KeyError, TypeError, ValueError, UsageError):
        plans = []
    if not plans:
        raise UsageError(f"{folder}/run.json has no plan. The command that drew the run adds it: run that again.")
    return plans


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder to write to; then fsync and rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """The whole file or nothing, from bytes or from parts of them."""
    with atomically(path) as temporary, temporary.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)


def image_metadata(settings: Settings, cell: Cell, label_name: str) -> dict[str, Any]:
    """All that makes the image again, but for where, in what batch and in which sweep it was drawn."""
    return {"settings": asdict(settings), "cell": replace(cell, variant=()).as_json(), "label_name": label_name}


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
    prompt = cell["prompt"] or metadata["label_name"] or ("" if cell["label"] is None else f"label {cell['label']}")
    if settings["negative_prompt"]:
        prompt += f"\nNegative prompt: {settings['negative_prompt']}"
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
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
    info.add_itxt("guidegen", text, zip=len(text) > _LONGEST_PLAIN_TEXT)
    if parameters is not None:
        info.add_text("parameters", parameters)
    return info


def encode_row(row: Row) -> bytes:
    """A line of the manifest."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def file_sha256(path: Path) -> str | None:
    """sha256 of a file; None if it is not there."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def clear_leftovers(folder: Path, files: Collection[str] | None = None) -> None:
    """Deletes the temporary files that dead processes left, of some files or of all: nobody may be writing them."""
    for part in folder.rglob(".*.part"):
        target = part.with_name(part.name.removeprefix(".").rsplit(".", 2)[0])
        if files is None or str(target.relative_to(folder)) in files:
            part.unlink(missing_ok=True)


def _manifest(shard: Shard | None) -> str:
    return f"manifest.{shard}.jsonl" if shard else "manifest.jsonl"


def _open_manifest(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


def _append(manifest: int, line: bytes) -> None:
    """Adds a row to the manifest and syncs it. One that does not fit, as on a full disk, leaves nothing of itself."""
    size = os.fstat(manifest).st_size
    try:
        while line:
            line = line[os.write(manifest, line) :]
        os.fsync(manifest)
    except OSError:
        os.ftruncate(manifest, size)
        raise


def _has_foreign_files(folder: Path) -> bool:
    return any(not entry.name.startswith(".") for entry in folder.iterdir())


def _try_lock(path: Path) -> Any:
    """An advisory lock that dies with its process; None where another process holds it.

    Another process that only looks whether it is held lets go at once: hence the second's patience.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.3, poll_interval=0.02)
    except Timeout:
        return None
    return lock


def _lock(folder: Path, shard: Shard | None = None) -> Any:
    lock = _try_lock(folder / (f".lock.{shard}" if shard else ".lock"))
    if lock is None:
        what = f"shard {shard.index}/{shard.count} of {folder}" if shard else f"{folder}"
        raise UsageError(
            f"Another process is drawing into {what}. Wait for it, or name another -o.\n"
            "Several processes share a run with --shard."
        )
    return lock


def _refuse_other_processes(folder: Path, shard: Shard | None) -> None:
    """Processes that cut the same plan in other ways would draw the same images at once."""
    mine = f".lock.{shard}" if shard else ".lock"
    for path in sorted(folder.glob(".lock*")):
        if path.name == mine or (shard and path.name.endswith(f"-of-{shard.count}")):
            continue
        lock = _try_lock(path)
        if lock is None:
            part = path.name.removeprefix(".lock").removeprefix(".") or "all of it"
            raise UsageError(
                f"Another process is drawing into {folder} ({part}). Wait for it, or name another -o.\n"
                "Processes that share a run have the same N in --shard I/N."
            )
        lock.release()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the run directory against all who draw into it.

    Raises:
        UsageError: one of them does.
    """
    lock = _lock(folder)
    try:
        _refuse_other_processes(folder, None)
        yield
    finally:
        lock.release()


@contextmanager
def _run_json_lock(folder: Path) -> Iterator[None]:
    """One process at a time may look at run.json and write it: a matter of milliseconds."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".run.json.lock")
    try:
        lock.acquire(timeout=_SECONDS_FOR_RUN_JSON)
    except Timeout:
        raise OutputError(f"{folder}/run.json has been held by another process for a minute. Try again.") from None
    try:
        yield
    finally:
        lock.release()


def _wipe(folder: Path) -> None:
    for pattern in ("run.json", "manifest*.jsonl", "grid*.png", "metrics.jsonl", "curves.*", "report.html"):
        for path in folder.glob(pattern):
            path.unlink()
    for made in ("images", "features"):
        shutil.rmtree(folder / made, ignore_errors=True)


def _settle(
    folder: Path, settings: Settings, about: Mapping[str, Any], plan: Plan | None, variants: Mapping[Variant, Settings]
) -> None:
    """run.json has these settings and variants and, among others, this plan."""
    new = [plan.as_json()] if plan else []
    differences = {variant_folder(variant): _difference(settings, own) for variant, own in variants.items() if variant}
    if not (folder / "run.json").exists():
        there = {**about, "settings": asdict(settings), "plans": new} | ({"variants": differences} if differences else {})
    else:
        there = read_run(folder)
        _check_settings(folder, there["settings"], settings)
        before = {name: Settings(**there["settings"] | changes) for name, changes in there.get("variants", {}).items()}
        for variant, own in variants.items():
            if variant_folder(variant) in before:
                _check_settings(folder, asdict(before[variant_folder(variant)]), own)
        old = there.get("plans", [])
        if all(plan in old for plan in new) and differences.keys() <= before.keys():
            return
        for plan_there in old:
            for text, now in zip(plan_there.get("prompts", ()), new[0].get("prompts", ()) if new else (), strict=False):
                if text != now:
                    raise _other_prompts(folder, text, now)
        # the same cells in another grid: that one counts now
        there["plans"] = [plan for plan in old if not new or _without_layout(plan) != _without_layout(new[0])] + new
        if before or differences:
            there["variants"] = there.get("variants", {}) | differences
    lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in there.items())
    write_atomically(folder / "run.json", "{{\n{}\n}}\n".format(",\n".join(lines)).encode())


def _difference(settings: Settings, own: Settings) -> dict[str, Any]:
    """What a variant's settings have otherwise than the run's."""
    ours = asdict(settings)
    return {name: value for name, value in asdict(own).items() if value != ours[name]}


def _without_layout(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plan.items() if name not in ("columns", "rows")}


def _other_prompts(folder: Path, there: str | None, now: str | None) -> UsageError:
    """Prompts name their folders by their place in the list: two lists do not share a directory."""
    return UsageError(f"{folder} holds other prompts: {there!r} there, {now!r} now.\nName another -o, or --overwrite it.")


def _check_settings(folder: Path, there: Mapping[str, Any], settings: Settings) -> None:
    differ = [
        f"{name} {there.get(name)} there, {value} now"
        for name, value in asdict(settings).items()
        if there.get(name) != value
    ]
    if differ:
        raise UsageError(
            f"{folder} holds a run of other settings: {'; '.join(differ)}.\nName another -o, or --overwrite it."
        )
