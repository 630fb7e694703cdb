"""curves.svg and curves.png: each metric over w, several runs on the same axes, and the precision-recall path."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guidegen.evaluate.measure import Drawn
from guidegen.evaluate.metrics import METRICS, Metric, titles_of
from guidegen.report.series import Series, about_series, make_series, shown
from guidegen.runs.files import write_atomically

COLOURS = ("#2563eb", "#d9660a", "#0f8a6d", "#b4237a", "#6d4bd1", "#7a6a00", "#0b7fa8", "#c2412d")
MARKERS = "osD^vPX*"
_STROKES = ("-", "--", ":", "-.")  # the next after all colours
_WIDE_NAME = 36  # letters, past which three names do not fit beside each other
_FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (  # marked, so that no file of another program is overwritten
    ("svg", {"metadata": {"Date": None, "Title": "guidegen"}}),
    ("png", {"dpi": 160, "metadata": {"Software": "guidegen"}}),
)
_INK, FAINT = "#1f2430", "#8a90a0"
STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib carries it
    "font.size": 8.5,
    "axes.edgecolor": "#c5c9d3",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaf0",
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": "#5a6070",
    "ytick.color": "#5a6070",
    "figure.facecolor": "white",
    "svg.hashsalt": "guidegen",  # the same metrics make the same file
    "svg.fonttype": "path",
}


def draw_curves(runs: Sequence[tuple[Drawn, Sequence[Mapping[str, Any]]]], folder: Path) -> list[Path]:
    """Draws curves.svg and curves.png into `folder`; returns their paths.

    Args:
        runs: each with its rows of metrics.
        folder: where; it is there.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = make_series(runs)
    metrics = shown(series)
    with matplotlib.rc_context(STYLE):
        panels: list[Metric | None] = [*metrics]
        if {"precision", "recall"} <= {metric.name for metric in metrics}:
            panels.insert(2, None)  # the path, between the distances and their parts
        rows = -(-len(panels) // 3)
        more = 0.2 * (_legend_size(series)[0] - 1)  # inches
        figure = Figure(figsize=(10, 1.45 + more + 2.55 * rows))
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, 3, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            if panel is None:
                _path(axes, series)
            else:
                _over(axes, panel, series)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        _legend(figure, series)
        height = figure.get_figheight()
        figure.subplots_adjust(
            left=0.065, right=0.985, top=1 - (0.82 + more) / height, bottom=1.02 / height, hspace=0.52, wspace=0.26
        )
        figure.text(0.065, 0.16 / height, about_series(series), fontsize=7.5, color=FAINT, va="bottom", linespacing=1.5)
        return write_figure(figure, folder, "curves")


def write_figure(figure: Any, folder: Path, name: str) -> list[Path]:
    """Writes NAME.svg and NAME.png into `folder`; returns their paths."""
    paths = []
    for kind, settings in _FORMATS:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **settings)
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], buffer.getvalue())
    return paths


def _over(axes: Any, metric: Metric, series: Sequence[Series]) -> None:
    """One metric along x, the best value of each line ringed."""
    best = []
    for i, line in enumerate(series):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        known = [j for j, value in enumerate(line.values(metric)) if value is not None]
        if not known:
            continue
        comparable = [j for j in known if not line.thin(metric)[j]]
        values = [value or 0.0 for value in line.values(metric)]
        low, high = (
            [values[j] + sign * spread for j, spread in enumerate(line.spreads(metric)) if j in comparable]
            for sign in (-1, 1)
        )
        xs = [line.x[j] for j in comparable]
        axes.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(xs, [values[j] for j in comparable], marker, ls=_stroke(i), ms=3.8, color=colour, linewidth=1.6)
        hollow = [j for j in known if j not in comparable]
        axes.plot([line.x[j] for j in hollow], [values[j] for j in hollow], marker, ms=3.8, mfc="white", color=colour)
        index = line.best(metric)
        if index is not None and len(known) > 1:
            ring = {"ms": 9, "mfc": "none", "mew": 1.4, "clip_on": False, "zorder": 5}
            axes.plot(line.x[index], line.values(metric)[index], "o", color=colour, **ring)
            best.append((f"{line.x[index]:g}", colour))
    (title,) = titles_of([metric], [row for line in series for row in line.rows])
    arrow = "lower is better" if metric.better < 0 else "higher is better"
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=17)
    axes.text(0, 1.045, arrow, transform=axes.transAxes, fontsize=7.5, color=FAINT)
    _name_best(axes, series, best)
    axes.set_xlabel(series[0].axis, labelpad=1, fontsize=8.5)
    xs = [x for line in series for x in line.x]
    margin = 0.04 * (max(xs) - min(xs) or 1)
    axes.set_xlim(min(xs) - margin, max(xs) + margin)  # the same in all panels, measured there or not


def _name_best(axes: Any, series: Sequence[Series], best: Sequence[tuple[str, str]]) -> None:
    """`best w  2  1.5` at the right, each in the colour of its line."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    if not best:
        return
    words: list[Any] = [TextArea(f"best {series[0].axis}", textprops={"fontsize": 7.5, "color": FAINT})]
    words += [TextArea(text, textprops={"fontsize": 8.5, "color": colour, "fontweight": "bold"}) for text, colour in best]
    packed = HPacker(children=words, align="baseline", pad=0, sep=5)
    axes.add_artist(
        AnchoredOffsetbox(
            "lower right", child=packed, pad=0, borderpad=0, frameon=False, bbox_to_anchor=(1, 1.035),
            bbox_transform=axes.transAxes,
        )
    )  # fmt: skip


def _path(axes: Any, series: Sequence[Series]) -> None:
    """Precision over recall, a dot for each w, the ends named."""
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=2.5, foreground="white")  # so that a name on a line can be read
    recall, precision = (next(metric for metric in METRICS if metric.name == name) for name in ("recall", "precision"))
    for i, line in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        points = [
            (r, p, x)
            for r, p, x, thin in zip(line.values(recall), line.values(precision), line.x, line.thin(recall), strict=True)
            if r is not None and p is not None and not thin
        ]
        if not points:
            continue
        path = [r for r, _, _ in points], [p for _, p, _ in points]
        axes.plot(*path, color=colour, marker=MARKERS[i % len(MARKERS)], ls=_stroke(i), ms=3.6, linewidth=1.4)
        for r, p, x in {points[0], points[-1]}:
            name = {"fontsize": 8.5, "fontweight": "bold", "color": colour, "path_effects": [halo], "zorder": 6}
            axes.annotate(f"{x:g}", (r, p), (-3, 6 - 16 * (i % 2)), textcoords="offset points", **name)
    axes.set_title("Precision and recall", loc="left", fontsize=10, fontweight="bold", pad=17)
    axes.text(
        0, 1.045, f"the path along {series[0].axis}, its ends named", transform=axes.transAxes, fontsize=7.5, color=FAINT
    )
    axes.set_xlabel("recall", labelpad=1, fontsize=8.5)
    axes.set_ylabel("precision", labelpad=2, fontsize=8.5)
    axes.margins(0.12)


def _stroke(i: int) -> str:
    return _STROKES[i // len(COLOURS) % len(_STROKES)]


def _legend_size(series: Sequence[Series]) -> tuple[int, int]:
    """Rows and columns of the legend."""
    columns = 3 if max(len(line.name) for line in series) <= _WIDE_NAME else 2
    return -(-len(series) // columns), columns


def _legend(figure: Any, series: Sequence[Series]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], ls=_stroke(i), ms=5, label=line.name
        )
        for i, line in enumerate(series)
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.055, 0.995),
        ncols=_legend_size(series)[1],
        frameon=False,
        fontsize=9.5,
    )
