"""Rows of metrics as lines to draw: one for each run and each combination of its axes other than w."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guidegen.evaluate.measure import Drawn, key_of, sortable
from guidegen.evaluate.metrics import METRICS, PUBLISHED_METRICS, Metric
from guidegen.spec.axes import describe, run_names

_VENDI = next(metric for metric in METRICS if metric.name == "vendi_score")


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: for the legend.
        run: index of its run.
        at: where it stands along the other axes of its run.
        axis: what runs along x.
        x: values along it, ascending.
        rows: the row of metrics at each.
    """

    name: str
    run: int
    at: Mapping[str, Any]
    axis: str
    x: list[float]
    rows: list[Mapping[str, Any]]

    def values(self, metric: Metric) -> list[float | None]:
        """The metric along the line; None where it was not measured."""
        return [None if (figure := row["metrics"].get(metric.name)) is None else figure["value"] for row in self.rows]

    def spreads(self, metric: Metric) -> list[float]:
        """Its standard errors, 0 where there is none."""
        return [((row["metrics"].get(metric.name) or {}).get("spread")) or 0.0 for row in self.rows]

    def counts(self, metric: Metric) -> list[int]:
        """How many images it was measured on, 0 where it was not."""
        return [((row["metrics"].get(metric.name) or {}).get("images")) or 0 for row in self.rows]

    def thin(self, metric: Metric) -> list[bool]:
        """Where it is not to be compared with the others: of fewer than half as many images, or of fewer a class (Vendi)."""
        counts = self.counts(metric)
        return [
            2 * count < max(counts) or some < max(self.per_class(metric))
            for count, some in zip(counts, self.per_class(metric), strict=True)
        ]

    def per_class(self, metric: Metric) -> list[int]:
        """The fewest images of a class behind a score that grows with them; 0 for all others."""
        if metric.name != "vendi_score":
            return [0] * len(self.rows)
        return [((row["metrics"].get(metric.name) or {}).get("per_class") or [0])[0] for row in self.rows]

    def best(self, metric: Metric) -> int | None:
        """Index of its best value among those that can be compared."""
        known = [
            (metric.better * value, i)
            for i, (value, thin) in enumerate(zip(self.values(metric), self.thin(metric), strict=True))
            if value is not None and not thin
        ]
        return max(known, key=lambda item: (item[0], -item[1]))[1] if known else None


def make_series(runs: Sequence[tuple[Drawn, Sequence[Mapping[str, Any]]]]) -> list[Series]:
    """The lines of several runs, over w, or over the first other number that varies where w does not."""
    names = names_of([drawn for drawn, _ in runs])
    found = []
    for index, (drawn, rows) in enumerate(runs):
        axis = _along(drawn, rows)
        others = [name for name in drawn.axes if name != axis and name != "w"] + ["w"] * (axis != "w")
        lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in rows:
            if isinstance(row.get(axis), (int, float)):
                lines.setdefault(key_of(dict(row), others), []).append(row)
        for key, some in sorted(lines.items(), key=lambda item: sortable(item[0])):
            some.sort(key=lambda row: row[axis])
            varying = [i for i in range(len(others)) if len({other[i] for other in lines}) > 1]
            suffix = describe([others[i] for i in varying], [key[i] for i in varying])
            name = suffix if suffix and len(runs) == 1 else ", ".join(filter(None, (names[index], suffix)))
            at = dict(zip(others, key, strict=True))
            found.append(Series(name, index, at, axis, [float(row[axis]) for row in some], some))
    return found


def names_of(runs: Sequence[Drawn]) -> list[str]:
    """Names that distinguish the runs."""
    swept = {axis for run in runs for axis in run.axes}
    return run_names([run.about["settings"] for run in runs], [run.folder.resolve().name for run in runs], swept)


def shown(series: Sequence[Series]) -> list[Metric]:
    """The metrics that some line has."""
    every = (*METRICS, *PUBLISHED_METRICS)
    return [metric for metric in every if any(value is not None for line in series for value in line.values(metric))]


def _along(drawn: Drawn, rows: Sequence[Mapping[str, Any]]) -> str:
    for axis in drawn.axes:
        values = {row.get(axis) for row in rows}
        if len(values) > 1 and all(isinstance(value, (int, float)) for value in values):
            return axis
    return "w"


def about_series(series: Sequence[Series]) -> str:
    """What the numbers are of: it travels with the curves."""
    rows = [row for line in series for row in line.rows]
    row, x = rows[0], series[0].axis
    lines = [
        f"{_range(row['images'] for row in rows)} images at each {x}; {row['reference']['images']:,} reference images "
        f"({row['reference']['source']}); features: {row['features']['name']}, {row['features']['width']} wide"
    ]
    classifier = row["judge"]
    if classifier:
        accuracy = classifier["accuracy_on_reference"]
        known = f", accuracy {accuracy:.1%} on the reference images" if accuracy is not None else ""
        lines.append(f"evaluation classifier: {classifier['name']}{known}")
    notes = [f"shaded: {row['spread']}"] if row["spread"] else []
    if of := {n for line in series for n in line.per_class(_VENDI) if n}:
        notes.append(f"Vendi score of {_range(of)} images a label")
    pairs = [(line, metric) for line in series for metric in METRICS if any(line.values(metric))]
    few = [n for line, metric in pairs for n, thin in zip(line.counts(metric), line.thin(metric), strict=True) if n and thin]
    if few:
        notes.append(f"hollow: only {_range(few)} distinct images, not comparable")
    return "\n".join((*lines, "; ".join(notes)))


def _range(counts: Iterable[int]) -> str:
    low, *_, high = sorted((*(some := list(counts)), *some))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
