"""What `tune` found: a table in lines, and a plot of each metric's curve with its band and where the samples went."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from guidegen.errors import UsageError
from guidegen.evaluate.metrics import METRICS
from guidegen.report.curves import COLOURS, FAINT, MARKERS, STYLE, write_figure
from guidegen.runs.ours import is_ours
from guidegen.runs.schema import loads
from guidegen.schema import convert, read_bytes
from guidegen.spec.axes import axis_of, describe, named
from guidegen.tune.result import FILE

_TITLES = {metric.name: metric.title for metric in METRICS} | {"nfe": "Network calls an image"}
_LISTED = 8
_MOST_LINES = 10_000
_LARGEST_PLOT = 8 << 20


def lines_of(result: Mapping[str, Any]) -> Iterator[str]:
    """The best of each metric, its interval, and what cannot be told from it."""
    yield (
        f"{result['spent']:,} images of {result['budget']:,} ({result['ended']}); the last round compares settings at "
        f"{result['images']:,} images each; errors are over images, the reference held fixed"
    )
    for one in result["metrics"]:
        better = "less" if one["better"] < 0 else "more"
        best = describe(list(one["best"]), list(one["best"].values()))
        yield f"{one['metric']} ({better} is better): best at {best}: {one['value']:.4g}±{one['error']:.2g}"
        for axis, (low, high) in one["interval"].items():
            yield f"  95 % interval of the best {axis_of(axis).title}: {low:g} to {high:g}"
        ties = [describe(list(at), list(at.values())) for at in one["ties"]]
        more = f" and {len(ties) - _LISTED} more" if len(ties) > _LISTED else ""
        yield f"  cannot be told from it: {'; '.join(ties[:_LISTED]) or 'none of the settings drawn'}{more}"
        if one["metric"] == "frechet_distance" and result["images"] <= result["width"]:
            yield (
                f"  warning: {result['images']:,} images are too few for a covariance of {result['width']:,} features: "
                "it is too large, more so where images differ more; give a larger --budget"
            )
        if one["metric"] != "nfe":
            for axis in one["at_end"]:
                yield f"  warning: the best may lie beyond the end of the range of {axis_of(axis).title}: widen it"
    if result["front"]:
        both = " and ".join(one["metric"] for one in result["metrics"])
        yield f"Pareto front of {both}:"
        last = {str(one["at"]): one for one in result["samples"] if one["images"] == result["images"]}
        for at in result["front"]:
            values = ", ".join(f"{value:.4g}" for value in last[str(at)]["values"].values())
            yield f"  {describe(list(at), list(at.values()))}: {values}"


@dataclass(frozen=True)
class _Found:
    """What the report reads of tune.json."""

    lines: Annotated[list[str], Meta(max_length=_MOST_LINES)]


def shown_tuning(folder: Path) -> dict[str, Any] | None:
    """The plot of a run as a data URI, and its lines; None where no search was made in it, or its files are not whole."""
    plot = folder / "tune.svg"
    try:
        found = convert(loads(read_bytes(folder / FILE, UsageError)), _Found, FILE, UsageError)
        image = read_bytes(plot, UsageError, _LARGEST_PLOT) if is_ours(plot) else b""
    except (UsageError, ValueError):
        return None
    return (
        {"image": f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}", "lines": found.lines} if image else None
    )


def draw_tuning(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws tune.svg and tune.png into `folder`; returns their paths.

    Args:
        result: as tune.json has it.
        folder: where; it is there.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = result["metrics"]
    along = _along(result)
    arms = list(dict.fromkeys(_arm(one["at"], along) for one in result["samples"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(metrics), 4.4))
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, len(metrics), squeeze=False, sharex="col", height_ratios=(4, 1))
        for (curve, spent), one in zip(grid.T, metrics, strict=True):
            _curve(curve, result, one, along, arms)
            _spent(spent, result, along, arms)
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        caption = (
            f"filled, with a band of 95 %: {result['images']:,} images each; hollow: fewer, not comparable; grey: the best"
        )
        figure.text(0.02, 0.015, caption, fontsize=7, color=FAINT)
        return write_figure(figure, folder, "tune")


def _along(result: Mapping[str, Any]) -> str | None:
    """The first axis of numbers."""
    for axis, values in result["axes"].items():
        if all(isinstance(value, int | float) for value in values):
            return str(axis)
    return None


def _arm(at: Mapping[str, Any], along: str | None) -> str:
    """What is not along x and is no number: a colour each."""
    return ", ".join(named(axis, value) for axis, value in at.items() if axis != along and not isinstance(value, float))


def _position(at: Mapping[str, Any], along: str | None, arms: Sequence[str]) -> float:
    return float(at[along]) if along else float(arms.index(_arm(at, along)))


def _curve(axes: Any, result: Mapping[str, Any], one: Mapping[str, Any], along: str | None, arms: Sequence[str]) -> None:
    """The values with their errors, those of fewer images hollow, and the band of 95 % about the curve."""
    plain = along is not None and sum(isinstance(value, float) for value in one["best"].values()) <= 1
    for i, arm in enumerate(arms):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        line = sorted(
            (p["at"][along], p["value"], p["error"]) for p in one["curve"] if plain and _arm(p["at"], along) == arm
        )
        if line:
            x, y, error = zip(*line, strict=True)
            low, high = ([v + sign * 1.96 * e for v, e in zip(y, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(x, y, color=colour, linewidth=1.6, label=arm or None)
        for sample in (s for s in result["samples"] if _arm(s["at"], along) == arm):
            last = sample["images"] == result["images"]
            style = {
                "fmt": marker,
                "ms": 4,
                "color": colour,
                "mfc": colour if last else "white",
                "alpha": 1 if last else 0.4,
            }
            at = _position(sample["at"], along, arms)
            axes.errorbar(at, sample["values"][one["metric"]], 1.96 * sample["errors"][one["metric"]], **style)
    best = _position(one["best"], along, arms)
    axes.plot(best, one["value"], "o", ms=9, mfc="none", mew=1.4, color=COLOURS[0], zorder=5)
    if along in one["interval"]:
        axes.axvspan(*one["interval"][along], color=FAINT, alpha=0.12, linewidth=0)
    axes.set_title(_TITLES[one["metric"]], loc="left", fontsize=10, fontweight="bold")
    if along and len(arms) > 1 and plain:
        axes.legend(frameon=False, fontsize=7.5)


def _spent(axes: Any, result: Mapping[str, Any], along: str | None, arms: Sequence[str]) -> None:
    """Images of each setting."""
    most: dict[tuple[float, str], int] = {}
    for one in result["samples"]:
        key = _position(one["at"], along, arms), _arm(one["at"], along)
        most[key] = max(one["images"], most.get(key, 0))
    for (x, arm), images in most.items():
        axes.vlines(x, 0, images, color=COLOURS[arms.index(arm) % len(COLOURS)], linewidth=3)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("images")
    axes.set_xlabel(axis_of(along).title if along else "")
    if along is None:
        axes.set_xticks(range(len(arms)), [arm[:24] for arm in arms], rotation=20, ha="right")
