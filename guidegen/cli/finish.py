"""`guidegen verify` and `guidegen merge`: what a run lacks, and one manifest, grid and files of it when it lacks nothing."""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.cli import console, options
from guidegen.cli.afterwards import Afterwards
from guidegen.cli.command import flags_of
from guidegen.cli.drawing import draw_grid, find_failures
from guidegen.cli.lines import print_line
from guidegen.cli.output import exported_rows, write_npz
from guidegen.cli.recovered import label_words
from guidegen.cli.signals import waiting
from guidegen.errors import IncompleteError, UsageError
from guidegen.report import grid
from guidegen.runs.carried import Source
from guidegen.runs.directory import exporting, exports_of
from guidegen.runs.files import write_atomically
from guidegen.runs.images import is_inside, read_drawn_bytes, refusal
from guidegen.runs.locks import alone
from guidegen.runs.manifest import Rows
from guidegen.runs.ours import refuse_foreign
from guidegen.runs.schema import Row, encode_row, read_plans, read_run
from guidegen.runs.status import State, check
from guidegen.runs.wipe import clear_leftovers
from guidegen.schema import convert
from guidegen.spec.cell import Cell, variant_folder
from guidegen.spec.command import Command, read_commands
from guidegen.spec.plan import Plan, listed

_LISTED = 20
_BLOCK = 512  # of a tar file
_RUN = typer.Argument(metavar="RUN", help="A run directory.")


def register(app: typer.Typer) -> None:
    """Adds the two commands."""
    app.command("verify", help="Check a run: what is missing, corrupt, or not part of it.")(_verify)
    app.command("merge", help="Finish a complete run: one manifest, its grid, and .npz or .tar files.")(_merge)


@dataclass(frozen=True)
class _Held:
    """A run directory and what it is to hold.

    Attributes:
        folder: the directory.
        about: its run.json.
        plans: what that says it is to hold.
        cells: of all its plans.
        in_grid: those that a grid shows.
    """

    folder: Path
    about: dict[str, Any]
    plans: list[Plan]
    cells: Sequence[Cell]
    in_grid: Sequence[Cell]

    @property
    def metadata(self) -> dict[str, Any]:
        """What its files carry; the same as where one process drew it."""
        plans = self.about["plans"]
        about: dict[str, Any] = {name: self.about[name] for name in ("settings", "source") if name in self.about}
        return {**about, **({"plan": plans[0]} if len(plans) == 1 else {"plans": plans})}

    @property
    def commanded(self) -> list[tuple[Plan, Command | None]]:
        """Each plan with the command that asked for it; None where run.json does not say."""
        commands = read_commands(self.about)
        known = commands if len(commands) == len(self.plans) else [None] * len(self.plans)
        return list(zip(self.plans, known, strict=True))

    def rows(self, cells: Sequence[Cell]) -> Rows:
        return Rows(self.folder, (cell.file for cell in cells))


def _read(folder: Path) -> _Held:
    about = read_run(folder)
    plans = read_plans(folder, about)

    def cells(only_grids: bool) -> Sequence[Cell]:
        return listed((plan for plan in plans if plan.grid or not only_grids), str(folder))

    return _Held(folder, about, plans, cells(False), cells(True))


def _verify(
    run: Annotated[Path, _RUN],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    held = _read(run)
    state = _check(held)
    stale = _stale(held, state)
    if as_json:
        fields = {"complete": state.complete, "images": len(held.cells), **state._asdict(), "stale": stale}
        print_line("verify", run, run, fields)
    else:
        console.result(_in_words(held, {**state._asdict(), "stale": stale}))
    if stale:
        console.note(f"note: {stale[0]} holds other images than the run has now: make it again with guidegen merge")
    if not state.complete:
        lacks = {*state.missing, *state.corrupt, *state.nonfinite}
        raise _incomplete(held, "is not complete" if lacks else "holds images that are not of its plan", lacks)


def _in_words(held: _Held, found: Mapping[str, list[str]]) -> str:
    good = len(held.cells) - sum(len(found[kind]) for kind in ("missing", "corrupt", "nonfinite"))
    lines = [f"{good} of {len(held.cells)} images are there, each with the hash of its row"]
    for kind, files in found.items():
        lines += [f"{kind}: {file}" for file in files[:_LISTED]]
        if len(files) > _LISTED:
            lines.append(f"{kind}: and {len(files) - _LISTED} more")
    return "\n".join(lines)


def _incomplete(held: _Held, what: str, lacks: Collection[str]) -> IncompleteError:
    """The error, with the commands that draw what is not there."""
    commands = list(dict.fromkeys(map(str, _commands_for(held, set(lacks)))))
    rest = f" To draw the rest: {' && '.join(commands)}" if commands else ""
    return IncompleteError(f"{held.folder} {what}.{rest}")


def _commands_for(held: _Held, lacks: set[str]) -> Iterator[Command]:
    """The command of each plan that lacks any of these files, into the run where it is now, for all shards.

    What was read from a file or a pipe is given as words, and networks that are not found from here by their full path.
    """
    found = convert(held.about.get("source") or {}, Source, held.folder / "run.json", UsageError)
    source = {"model": found.model, "classifier": found.classifier, "guide-model": found.guide_model}
    for plan, command in held.commanded:
        of_plan = lacks.intersection(cell.file for cell in plan.cells()) if lacks else ()
        if command and of_plan:
            read = {"label": label_words(plan.labels) or [], "prompt": list(plan.prompts or ())}
            kept = command.without("shard", "overwrite", "wait", "force", "stepwise", *flags_of(Afterwards))
            yield kept.into(str(held.folder), read, source)
            lacks.difference_update(of_plan)


def _merge(
    run: Annotated[Path, _RUN],
    npz: Annotated[
        bool, typer.Option("--npz", help="Also write w3.0.npz for each weight: images arr_0 (uint8, NHWC) and labels arr_1.")
    ] = False,
    tar: Annotated[
        bool,
        typer.Option(
            "--tar", help="Also write w3.0-00000.tar ... for each weight: WebDataset shards of .png, .cls and .json."
        ),
    ] = False,
    tar_size: Annotated[
        float, typer.Option("--tar-size", metavar="MB", min=0, help="Largest size of one .tar, in megabytes.")
    ] = 1000,
    draw_the_grid: Annotated[bool, typer.Option("--grid/--no-grid", help="Draw the grid of a sweep.")] = True,
    force: options.Force = False,
    wait: options.Wait = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    _read(run)  # before a lock is left in what is no run
    with alone(run, waiting() if wait else None):
        held = _read(run)
        _check_all_there(held)
        pages = _grid_pages(held) if draw_the_grid else None
        for name in grid.page_names(len(pages.pages)) if pages else ():
            refuse_foreign(run / name, force, "guidegen merge:")
        clear_leftovers(run)
        made = [_merge_manifests(held)]
        corrupt: list[str] = []
        if pages:
            made += draw_grid(run, held.rows(held.in_grid), pages, held.metadata, on_corrupt=corrupt.append)
        if npz:
            made += _write_npz(held, force)
        if tar:
            made += _write_tars(held, int(tar_size * 1e6), force)
    if as_json:
        print_line("merge", run, run, {"images": len(held.cells), "files": list(map(str, made))})
    else:
        console.result("\n".join(map(str, made)))
    if corrupt:
        raise refusal(corrupt, len(held.cells), "their cells are crossed out")
    if failures := find_failures(held.rows(held.cells)):
        raise failures


def _check(held: _Held) -> State:
    """What it lacks; an image that a link takes from elsewhere is not its own."""
    state = check(held.folder, held.cells)
    known = {*state.missing, *state.corrupt, *state.nonfinite}
    outside = [cell.file for cell in held.cells if cell.file not in known and not is_inside(held.folder, cell.file)]
    return state._replace(corrupt=[*state.corrupt, *outside])


def _check_all_there(held: _Held) -> None:
    state = _check(held)
    lacking = state.missing + state.corrupt
    if lacking:
        what = f"lacks {len(lacking)} of {len(held.cells)} images, such as {lacking[0]}; nothing was merged"
        raise _incomplete(held, what, lacking)
    if state.extra:
        console.note(f"note: {len(state.extra)} images are not of the plan and are left out, such as {state.extra[0]}")


def _merge_manifests(held: _Held) -> Path:
    """One manifest in the plan's order; those of the shards go when it is on disk."""
    path = held.folder / "manifest.jsonl"
    write_atomically(path, map(encode_row, held.rows(held.cells)))
    for other in held.folder.glob("manifest.*-of-*.jsonl"):
        other.unlink()
    return path


def _grid_pages(held: _Held) -> grid.Layout | None:
    """The grid of its sweeps; None where there is none, or no image."""
    rows = held.rows(held.in_grid)
    shape = next((row["shape"] for row in rows if row["shape"]), None)
    if shape is None:
        return None
    plan, command = [each for each in held.commanded if each[0].grid][-1]
    title = grid.title_of(held.about["settings"], [axis for axis, _ in plan.by])
    scale = command.options.get("scale") if command else None
    return grid.layout(list(rows), shape[:2], plan.columns, scale, title, plan.rows)


def _groups(held: _Held) -> dict[str, list[Cell]]:
    """The cells of each weight, of each variant."""
    cells: dict[str, list[Cell]] = {}
    for cell in held.cells:
        cells.setdefault(",".join(filter(None, (variant_folder(cell.variant), cell.weights))), []).append(cell)
    return cells


def _by_weights(held: _Held) -> Iterator[tuple[str, Rows]]:
    """The rows of each weight, of each variant, that has any image."""
    for name, some in _groups(held).items():
        rows = held.rows(some)
        if any(row["status"] == "ok" for row in rows):
            yield name, rows


def _stale(held: _Held, state: State) -> list[str]:
    """The files for evaluators that hold other images than the run; not of weights that lack any."""
    there = sorted(name for name in exports_of(held.folder) if (held.folder / name).is_file())
    lacking = {*state.missing, *state.corrupt}
    groups = _groups(held)
    stale = []
    for name, files in itertools.groupby(there, lambda name: re.sub(r"(-\d{5})?\.(npz|tar)$", r".\2", name)):
        stem, _, kind = name.rpartition(".")
        cells = groups.get(stem, [])
        if cells and not lacking.isdisjoint(cell.file for cell in cells):
            continue
        of_run = [row for row in (held.rows(cells) if cells else ()) if kind == "npz" or row["status"] == "ok"]
        paths = [held.folder / file for file in files]
        if exported_rows(paths) != of_run:
            stale += [path.name for path in paths]
    return stale


def _write_npz(held: _Held, force: bool) -> list[Path]:
    made = []
    for name, rows in _by_weights(held):
        made.append(held.folder / f"{name}.npz")
        with exporting(made[-1], force) as temporary:
            write_npz(temporary, held.folder, rows, held.metadata)
    return made


def _write_tars(held: _Held, limit: int, force: bool) -> list[Path]:
    """WebDataset shards: KEY.png, .cls (label), .txt (prompt) and .json (row) of each image; equal images, equal bytes."""
    made: list[Path] = []
    for name, rows in _by_weights(held):
        samples = enumerate(row for row in rows if row["status"] == "ok")
        pending = next(samples, None)
        of_name: list[Path] = []
        while pending is not None:
            of_name.append(held.folder / f"{name}-{len(of_name):05d}.tar")
            with (
                exporting(of_name[-1], force) as temporary,
                tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
            ):
                size = 0
                while pending is not None:
                    members = _members(held.folder, *pending)
                    size += sum(_BLOCK + len(data) + -len(data) % _BLOCK for _, data in members)
                    if size > limit and archive.offset:
                        break
                    for member, data in members:
                        archive.addfile(member, io.BytesIO(data))
                    pending = next(samples, None)
        before = {held.folder / export for export in exports_of(held.folder)}
        for stale in (before & set(held.folder.glob(f"{escape(name)}-[0-9][0-9][0-9][0-9][0-9].tar"))) - set(of_name):
            stale.unlink()
        made += of_name
    return made


def _members(folder: Path, key: int, row: Row) -> list[tuple[tarfile.TarInfo, bytes]]:
    files = {"png": read_drawn_bytes(folder, row), "json": encode_row(row).rstrip()}
    if row["label"] is not None:
        files["cls"] = str(row["label"]).encode()
    if row["prompt"] is not None:
        files["txt"] = row["prompt"].encode(errors="replace")
    members = []
    for kind, data in sorted(files.items()):
        member = tarfile.TarInfo(f"{key:06d}.{kind}")
        member.size = len(data)
        members.append((member, data))
    return members
