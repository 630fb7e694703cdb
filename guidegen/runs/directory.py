"""The run directory: what was drawn, kept so that a crash or a second thought costs nothing.

    RUN/run.json, RUN/manifest.jsonl, RUN/images/w3.0/label0207/000005.png, RUN/grid.png
    and RUN/manifest.I-of-N.jsonl for each shard until `merge` makes one of them

A file is written under a temporary name, synced and renamed, then its row is appended; a row
counts only while its file is there with that hash. The parts of this are in `guidegen.runs`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from guidegen.errors import UsageError
from guidegen.runs.files import (
    append,
    atomically,
    find_temporary,
    open_to_append,
    refuse_links,
    unlink_if_abandoned,
    write_atomically,
)
from guidegen.runs.locks import Wait, check_unlocked, lock_run, run_json_lock
from guidegen.runs.manifest import Manifests, Rows, manifest_name
from guidegen.runs.ours import refuse_foreign
from guidegen.runs.png import encode_png, image_metadata
from guidegen.runs.schema import Row, dumps, encode_row, is_plan, read_run, settings_of
from guidegen.runs.status import is_intact, is_of
from guidegen.runs.wipe import wipe
from guidegen.spec.cell import Cell, Variant, variant_folder
from guidegen.spec.plan import Plan, finder
from guidegen.spec.settings import WEIGHT_HASHES, Settings
from guidegen.spec.shard import Shard

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Run:
    """A run directory, opened for drawing by one process, or one of its shards.

    Shards need not know of each other: each has a manifest and a lock of its own, run.json is
    written by whoever is first, and no image belongs to two of them.

    Args:
        folder: the directory; made if it is not there.
        settings: of this run. A directory with other settings is refused.
        about: the rest of run.json: checkpoint, versions, command.
        overwrite: start over, deleting what earlier commands made in `folder`.
        plan: what is to be drawn; kept in run.json for `verify` and `merge`.
        shard: which part of it this process draws; None for all.
        variants: the settings of each variant of the plan, where they are not those of the run.
        wait: called while another process draws into it; None where that is an error.

    Raises:
        UsageError: it holds other settings, or it is no run.
        LockedError: another process draws into it.
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
        wait: Wait | None = None,
    ):
        self.folder, self.settings, self.variants = folder, settings, variants
        self._about = {key: about.get(key) for key in ("source", "convention")}
        _refuse_what_is_no_run(folder)
        self._lock = lock_run(folder, shard, wait)
        try:
            with run_json_lock(folder):
                if overwrite:
                    wipe(folder)
                _settle(folder, settings, about, plan, variants, overwrite)
            self._shard = shard
            self._path = folder / manifest_name(shard)
            self._manifest = open_to_append(self._path)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            os.close(self._manifest)
        finally:
            self._lock.release()

    def finished(self, cells: Iterable[Cell]) -> set[Cell]:
        """The cells whose image is on disk with the hash of its row.

        Clears what a process that died left behind: rows of the other cells and temporary files.

        Args:
            cells: what is to be drawn; gone through once.

        Raises:
            UsageError: the run holds other prompts, or a part of it is a symbolic link or no file.
        """
        manifests = Manifests(self.folder, self._shard)
        offsets = manifests.offsets()
        cell_of = finder(cells)
        drawn = {file: cell for file in offsets if (cell := cell_of(file)) is not None}
        kept = {file: cell for file, cell in drawn.items() if self._is_finished(cell, manifests.read(offsets[file]))}
        for target, part in find_temporary(self.folder):
            if self._shard is None or target == self._path.name or cell_of(target) is not None:
                unlink_if_abandoned(part)
        self._keep(manifests, {offset for file, offset in offsets.items() if file not in drawn or file in kept})
        return set(kept.values())

    def rows(self, cells: Iterable[Cell]) -> Rows:
        """The rows of these cells, which all have one, in this order."""
        return Rows(self.folder, (cell.file for cell in cells), self._shard)

    def _is_finished(self, cell: Cell, row: Row) -> bool:
        if row["prompt"] != cell.prompt:
            raise _other_prompts(self.folder, row["prompt"], cell.prompt)
        return bool(row["status"] == "ok" and is_of(row, cell) and is_intact(self.folder, row))

    def _keep(self, manifests: Manifests, offsets: Collection[int]) -> None:
        """Leaves in the manifest of this process just the rows at these offsets."""
        if any(row is None or offset not in offsets for offset, row in manifests.rows_of(self._path)):
            kept = (encode_row(row) for offset, row in manifests.rows_of(self._path) if row and offset in offsets)
            write_atomically(self._path, kept)
            before, self._manifest = self._manifest, open_to_append(self._path)
            os.close(before)

    def write(self, cell: Cell, image: NDArray[Any] | None, label_name: str, nfe: int, dtype: str | None = None) -> Row:
        """Saves one image, or records that it is not finite; returns its row.

        Args:
            cell: which.
            image: uint8 (H, W, C); None where it was not finite.
            label_name: of the cell's label.
            nfe: network calls behind it.
            dtype: what it was drawn in, where that is not the run's.

        Raises:
            UsageError: its directory is a symbolic link.
            OSError: it cannot be written.
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
            data = encode_png(image, image_metadata(settings, cell, label_name, self._about))
            path = self.folder / row["file"]
            refuse_links(self.folder, path.parent)
            write_atomically(path, data)
            row |= {"sha256": hashlib.sha256(data).hexdigest(), "shape": list(image.shape), "status": "ok"}
        append(self._manifest, encode_row(row), self._path)
        return row


def finished_before(
    folder: Path,
    settings: Settings,
    plan: Plan,
    variants: Mapping[Variant, Settings],
    overwrite: bool,
    shard: Shard | None,
    wait: bool,
) -> list[Cell]:
    """The cells that a run directory already has an image of, by its rows and files; no image is read, no file is made.

    Args:
        folder: the directory; it need not be there.
        settings, plan, variants, overwrite, shard: as `Run` takes them. Hashes of weights that are empty are left open.
        wait: whether another process may draw into it.

    Raises:
        UsageError, LockedError: as `Run` does.
    """
    _refuse_what_is_no_run(folder)
    if not wait:
        check_unlocked(folder, shard)
    if overwrite or not (folder / "run.json").exists():
        return []
    there = read_run(folder)["settings"]
    hashes = {} if settings.model_sha256 else {name: there.get(name) for name in WEIGHT_HASHES}
    variants = {variant: replace(own, **hashes) for variant, own in variants.items()}
    _merged(folder, replace(settings, **hashes), {}, plan, variants)
    manifests, find = Manifests(folder, shard), finder(plan.cells(shard))
    rows = {file: manifests.read(offset) for file, offset in manifests.offsets().items()}
    found = [(find(file), row) for file, row in rows.items() if row["status"] == "ok" and (folder / file).is_file()]
    if other := [(cell, row) for cell, row in found if cell is not None and row["prompt"] != cell.prompt]:
        raise _other_prompts(folder, other[0][1]["prompt"], other[0][0].prompt)
    return [cell for cell, row in found if cell is not None and is_of(row, cell)]


def _refuse_what_is_no_run(folder: Path) -> None:
    """Raises UsageError for a file, a directory of somebody's, and a run of which a part is not what it should be."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; -o takes a directory, or a file ending in .png, .webp, .jpg or .npz.")
    if not folder.is_dir():
        return
    if not (folder / "run.json").exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and not a run directory; name another one with -o.")
    for path in (folder / "run.json", *folder.glob("manifest*.jsonl")):
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path} is not a regular file.")
    for path in (folder / "images", folder / "features"):
        refuse_links(folder, path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file, and a directory is to be there.")


def exports_of(folder: Path) -> list[str]:
    """The files for evaluators that `merge` made in a run, as its run.json names them."""
    return list(read_run(folder).get("exports", ()))


@contextmanager
def exporting(path: Path, force: bool = False) -> Iterator[Path]:
    """`atomically` for a file that is made of a run in its directory: run.json names it first, for `--overwrite`.

    Raises:
        UsageError: a file of somebody's has the name, and `force` is not given.
    """
    with run_json_lock(path.parent):
        about = read_run(path.parent)
        if path.name not in about.get("exports", ()):
            refuse_foreign(path, force, "guidegen merge:")
            _write_run_json(path.parent, about | {"exports": sorted({*about.get("exports", ()), path.name})})
    with atomically(path) as temporary:
        yield temporary


def _settle(
    folder: Path,
    settings: Settings,
    about: Mapping[str, Any],
    plan: Plan | None,
    variants: Mapping[Variant, Settings],
    overwrite: bool,
) -> None:
    """run.json has these settings and variants and, among others, this plan."""
    if overwrite or not (folder / "run.json").exists():
        differences = _differences(settings, variants)
        plans = [plan.as_json()] if plan else []
        there = {**about, "settings": asdict(settings), "plans": plans} | ({"variants": differences} if differences else {})
        _write_run_json(folder, there)
    elif (merged := _merged(folder, settings, about, plan, variants)) is not None:
        _write_run_json(folder, merged)


def _merged(
    folder: Path, settings: Settings, about: Mapping[str, Any], plan: Plan | None, variants: Mapping[Variant, Settings]
) -> dict[str, Any] | None:
    """The run.json that is there with this plan and these variants; None where it has them.

    Raises:
        UsageError: the run is one of other settings or prompts.
    """
    new, differences = [plan.as_json()] if plan else [], _differences(settings, variants)
    there = read_run(folder)
    _check_settings(folder, there["settings"], settings)
    own_there = there.get("variants", {})
    before = {name: settings_of(there["settings"] | changes, folder / "run.json") for name, changes in own_there.items()}
    for variant, own in variants.items():
        if variant_folder(variant) in before:
            _check_settings(folder, asdict(before[variant_folder(variant)]), own)
    old = there.get("plans", [])
    if all(plan in old for plan in new) and differences.keys() <= before.keys():
        return None
    stored = there.get("commands", [])
    commands = stored if len(stored) == len(old) else [_command_in(there)] * len(old)
    commands = [command for plan, command in zip(old, commands, strict=False) if is_plan(plan)]
    old = [plan for plan in old if is_plan(plan)]
    for plan_there in old:
        for text, now in zip(plan_there.get("prompts") or (), (new and new[0].get("prompts")) or (), strict=False):
            if text != now:
                raise _other_prompts(folder, text, now)
    # the same cells in another grid: that one counts now
    kept = [i for i, plan in enumerate(old) if not new or _without_layout(plan) != _without_layout(new[0])]
    there["plans"] = [old[i] for i in kept] + new
    there["commands"] = [commands[i] for i in kept] + [_command_in(about)] * len(new)
    if before or differences:
        there["variants"] = there.get("variants", {}) | differences
    return there


def _command_in(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: about[name] for name in ("command", "options") if name in about}


def _write_run_json(folder: Path, about: Mapping[str, Any]) -> None:
    lines = (f"  {json.dumps(key)}: {dumps(value)}" for key, value in about.items())
    write_atomically(folder / "run.json", "{{\n{}\n}}\n".format(",\n".join(lines)).encode())


def _differences(settings: Settings, variants: Mapping[Variant, Settings]) -> dict[str, dict[str, Any]]:
    """What the settings of each variant have otherwise than the run's."""
    ours = asdict(settings)
    return {
        variant_folder(variant): {name: value for name, value in asdict(own).items() if value != ours[name]}
        for variant, own in variants.items()
        if variant
    }


def _without_layout(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plan.items() if name not in ("columns", "rows")}


def _other_prompts(folder: Path, there: str | None, now: str | None) -> UsageError:
    """Prompts name their folders by their index in the list: two lists do not share a directory."""
    return UsageError(f"{folder} holds other prompts: {there!r} there, {now!r} now.\nName another -o, or --overwrite it.")


def _check_settings(folder: Path, there: Mapping[str, Any], settings: Settings) -> None:
    ours = asdict(settings)
    unknown = {name: None for name in there if name not in ours}  # of a newer version: what it did, this one does not
    differ = [
        f"{name} {there.get(name)} there, {value} now"
        for name, value in (ours | unknown).items()
        if there.get(name) != value
    ]
    if differ:
        raise UsageError(
            f"{folder} holds a run of other settings: {'; '.join(differ)}.\nName another -o, or --overwrite it."
        )
