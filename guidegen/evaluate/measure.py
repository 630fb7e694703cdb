"""A run against a reference: one row of metrics for each w and each other axis."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from guidegen.errors import UsageError
from guidegen.evaluate.features import Pixels
from guidegen.runs.files import write_atomically
from guidegen.runs.images import CorruptImageError, invalid_rows, is_inside, read_drawn, read_drawn_bytes, refusal
from guidegen.runs.manifest import Rows
from guidegen.runs.schema import Row, dumps, read_plans, read_run
from guidegen.runs.status import check, is_intact
from guidegen.schema import convert, read_bytes
from guidegen.spec.cell import Cell, digest
from guidegen.spec.plan import Plan, finder, listed

METRICS_FILE = "metrics.jsonl"
_NO_PLAN = "run.json has no plan to compare it with, which the command that drew it adds when it is run again"
_NOT_PLAIN = object()
_NOT_AXES = {"file", "label", "label_name", "prompt", "seed", "nfe", "sha256", "shape", "status", "dtype", "w"}


@dataclass(frozen=True)
class Drawn:
    """A run as it is on disk.

    Attributes:
        folder: its directory.
        about: its run.json.
        rows: of the finished images that are there with their hash; those of a run are read when asked for.
        axes: what varies from row to row besides label, prompt and seed; w is always the first.
        missing: what an interrupted or damaged run lacks of its plans, a clause each.
        corrupt: what is wrong with images that were finished and are not there as they were drawn, a sentence each.
    """

    folder: Path
    about: Mapping[str, Any]
    rows: Sequence[Row]
    axes: tuple[str, ...]
    missing: list[str]
    corrupt: list[str]

    @property
    def mode(self) -> str:
        """cfg, classifier, both or none."""
        return str(self.about["settings"]["mode"])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its images."""
        return self.rows[0]["shape"][0], self.rows[0]["shape"][1]

    def read(self, rows: Sequence[Row]) -> Iterator[Pixels]:
        """The images of some rows, uint8 (H, W, 3).

        Raises:
            CorruptImageError: an image is not the one that was drawn.
        """
        return (np.asarray(read_drawn(self.folder, row).convert("RGB")) for row in rows)

    @property
    def in_order(self) -> bool:
        """Whether the order of its images means something: those of a run come label by label."""
        return False

    @property
    def rounding(self) -> str | None:
        """How its pixels were rounded to 8 bits; None where that is not known."""
        return "to the nearest"

    def label_sampling(self, labels: Iterable[Any]) -> str | None:
        """How the labels of some of its images were chosen, which moves a Fréchet distance; None without labels."""
        counts = Counter(label for label in labels if isinstance(label, int))
        if not counts:
            return None
        if any(isinstance(plan, dict) and plan.get("labels_random") for plan in self.about.get("plans", ())):
            return f"random, of {len(counts)} labels"
        return f"balanced, {max(counts.values())} of each" if len(set(counts.values())) == 1 else "of unequal numbers"

    @property
    def features(self) -> Path:
        """Where the features of its images are kept."""
        return self.folder / "features"

    @cached_property
    def label_names(self) -> dict[int, str]:
        """Label id -> name, of what was drawn."""
        return {row["label"]: row["label_name"] or "" for row in self.rows if row["label"] is not None}

    def groups(self) -> dict[tuple[Any, ...], Sequence[Row]]:
        """Values of the axes -> rows, in the order of the values."""
        found: dict[tuple[Any, ...], array[int]] = {}
        for i, row in enumerate(self.rows):
            found.setdefault(key_of(row, self.axes), array("q")).append(i)
        assert isinstance(self.rows, Rows)
        return {key: self.rows.of(found[key]) for key in sorted(found, key=sortable)}


def open_drawn(folder: Path, check_hashes: bool = True) -> Drawn:
    """Reads a run, and what it lacks.

    Args:
        folder: a run directory.
        check_hashes: also read every image and compare its sha256; else it is enough that it is there.

    Raises:
        UsageError: `folder` is no run directory, or holds no finished images.
        CorruptImageError: none of those that it holds is there as it was drawn.
    """
    about, everything = read_run(folder), Rows(folder)
    try:
        plans: list[Plan] = read_plans(folder, about)
    except UsageError:
        plans = []
    cells = listed(plans, str(folder))
    planned = finder(cells)
    bad, lacks = _lacks(folder, plans, cells, check_hashes) if plans else (set(), [_NO_PLAN])
    good, corrupt = array("q"), invalid_rows(folder)
    for i, row in enumerate(everything):
        if plans and planned(row["file"]) is None:
            continue
        there = row["file"] not in bad if plans else row["status"] == "ok" and is_intact(folder, row, check_hashes)
        if there and is_inside(folder, row["file"]):
            good.append(i)
        elif row["status"] == "ok":
            corrupt.append(_wrong_with(folder, row))
    if not good and corrupt:
        raise refusal(corrupt, len(everything), "nothing is left")
    if not good:
        raise UsageError(f"{folder} holds no finished images.")
    if not plans and len(good) < len(everything):
        lacks = [f"{_NO_PLAN}; {len(everything) - len(good)} that were drawn are not finite, gone or changed"]
    rows = everything.of(good)
    axes = axes_of(rows)
    return Drawn(folder, about, rows.with_axes(about["settings"], axes), axes, lacks, corrupt)


def _wrong_with(folder: Path, row: Row) -> str:
    try:
        read_drawn_bytes(folder, row)
    except CorruptImageError as error:
        return str(error)
    return f"{folder / row['file']} is not what its row describes."


def _lacks(folder: Path, plans: Sequence[Plan], cells: Sequence[Cell], hashes: bool) -> tuple[set[str], list[str]]:
    """The images of the plans, which are of these cells, that are not there as they were drawn; and the same in words."""
    state = check(folder, cells, hashes)
    lacks = [
        f"{len(files)} of {len(cells)} images {what}, such as {files[0]}"
        for files, what in (
            (state.missing, "are missing"),
            (state.corrupt, "have changed since they were drawn"),
            (state.nonfinite, "came out non-finite"),
        )
        if files
    ]
    if state.extra:
        lacks.append(f"{len(state.extra)} images are not of its plan and are left out, such as {state.extra[0]}")
    sharded = any(folder.glob("manifest.*-of-*.jsonl"))  # whose grid is made when they are merged
    if not sharded and any(plan.grid for plan in plans) and not any(folder.glob("grid*.png")):
        lacks.append("its sweep has not come to its grid")
    return {*state.missing, *state.corrupt, *state.nonfinite}, lacks


def axes_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """w, and every other key with one plain value a row that is not the same in all rows."""
    values: dict[str, Counter[Any]] = {}
    count = 0
    for row in rows:
        count += 1
        for key, value in row.items():
            if key not in _NOT_AXES:
                plain = isinstance(value, str | int | float | bool | None)
                values.setdefault(key, Counter())[value if plain else _NOT_PLAIN] += 1
    for found in values.values():
        if found.total() < count:
            found[None] += count - found.total()  # of the rows without it
    return ("w", *(key for key, found in values.items() if len(found) > 1 and _NOT_PLAIN not in found))


def key_of(row: Row, axes: Sequence[str]) -> tuple[Any, ...]:
    """The values of a row along `axes`."""
    return tuple(row.get(axis) for axis in axes)


def sortable(values: Sequence[Any]) -> tuple[Any, ...]:
    """Numbers before words, missing ones first."""
    return tuple((value is not None, isinstance(value, str), value if value is not None else 0) for value in values)


def images_digest(files: Iterable[str]) -> str:
    """Of a set of images, by the sha256 of their files: metrics are of just these."""
    return digest(sorted(files))[:16]


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = METRICS_FILE) -> None:
    """The metrics of a run, in it; those of an earlier evaluation are replaced."""
    lines = "".join(dumps(finite(row)) + "\n" for row in rows)
    write_atomically(folder / name, lines.encode())


@dataclass(frozen=True)
class _Figure:
    """A metric's value, as `Meter` makes it."""

    value: float | None
    spread: float | None = None
    images: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    per_class: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Network:
    """The network that made the features."""

    name: str = "features"
    sha256: str | None = None
    width: int = 0
    inception: bool = False


@dataclass(frozen=True)
class _ClassifierAbout:
    """The evaluation classifier."""

    name: str
    sha256: str | None = None
    accuracy_on_reference: float | None = None


@dataclass(frozen=True)
class _ReferenceAbout:
    """What was measured against."""

    source: str = "a reference"
    images: int = 0
    sha256: str | None = None


@dataclass(frozen=True)
class _ProtocolNetwork:
    """A network of a protocol."""

    name: str
    published: bool
    sha256: str | None = None
    preprocessing: str = ""


@dataclass(frozen=True)
class _Protocol:
    """Whose numbers these are."""

    name: str
    networks: list[_ProtocolNetwork]


@dataclass(frozen=True)
class _MetricsRow:
    """A line of metrics.jsonl; the axes are beside these, under their names."""

    metrics: dict[str, _Figure | None]
    images_sha256: str
    images: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    distinct: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    spread: str | None = None
    features: _Network = field(default_factory=_Network)
    judge: _ClassifierAbout | None = None
    reference: _ReferenceAbout = field(default_factory=_ReferenceAbout)
    protocol: _Protocol | None = None


def read_metrics(drawn: Drawn) -> tuple[list[dict[str, Any]], int]:
    """Metrics of the images that are there now, and how many lines were of others, or no rows, and are left out.

    A number that is not finite is None, as if it had not been measured.

    Raises:
        UsageError: metrics.jsonl is no regular file, or too large to be one.
    """
    path = drawn.folder / METRICS_FILE
    if not path.exists():
        return [], 0
    lines = read_bytes(path, UsageError).splitlines()
    now = {key: images_digest(row["sha256"] for row in rows) for key, rows in drawn.groups().items()}
    rows = []
    for line in lines:
        row = _metrics_row(line)
        if row is not None and now.get(key_of(row, drawn.axes)) == row["images_sha256"]:
            rows.append(row)
    return rows, len(lines) - len(rows)


def _metrics_row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics with all that it should say; None for what is none."""
    try:
        row = finite(json.loads(line))  # the standard library's, which also reads the NaN that it writes
        known = asdict(convert(row, _MetricsRow, "", UsageError))
        if known["protocol"] is None:
            del known["protocol"]
    except (ValueError, RecursionError, UsageError):
        return None
    if not all(isinstance(value, str | int | float | bool | None) for key, value in row.items() if key not in known):
        return None
    figures = {name: figure for name, figure in row["metrics"].items() if figure is None or figure["value"] is not None}
    unmeasured = dict.fromkeys(row["metrics"].keys() - figures.keys())
    return {**known, **row, "metrics": {**row["metrics"], **figures, **unmeasured}}


def finite(value: Any) -> Any:
    """JSON's value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
