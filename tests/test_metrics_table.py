"""The table that `guidegen evaluate` prints on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from guidegen.cli.metrics_table import print_table
from guidegen.evaluate.metrics import METRICS

HEAD = ["run", "w", "images", *(metric.title for metric in METRICS)]
ROWS = [
    [f"a-run-whose-name-is-long-{i}", f"{w:g}", "1,000", *[f"{100.25 + n * w:.5g}±0.012" for n in range(len(METRICS))]]
    for i in (0, 1)
    for w in (0, 1, 2.5, 8)
]


def printed(width: int, rows: list[list[str]] = ROWS) -> list[str]:
    stream = io.StringIO()
    print_table([HEAD, *rows], Console(file=stream, width=width, highlight=False, markup=False))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_it_is_turned_where_it_does_not_fit(width: int) -> None:
    lines = printed(width)
    assert max(map(len, lines)) <= width
    blocks = sum(line.startswith("run ") for line in lines)
    for title in HEAD:
        assert sum(line.startswith(f"{title} ") for line in lines) == blocks, "never broken"
    text = " ".join(lines)
    assert all(figure.replace("±", " ±") in text for row in ROWS for figure in row[1:])
    assert "…" not in text


def test_it_has_a_line_for_each_weight_where_it_fits() -> None:
    lines = printed(300)
    assert len(lines) == 1 + len(ROWS)
    assert lines[0].split()[:3] == ["run", "w", "images"]
