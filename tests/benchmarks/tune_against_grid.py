"""`guidegen tune` against a fine grid of weights: whether both find the same best, and how many images each took.

    python tests/benchmarks/tune_against_grid.py --reference val.parquet [--mode cfg --mode classifier] [--num 25]
        [--budget 1500] [--steps 20] [--label all] [--judge DIR] [-o DIR]

The grid has 9 weights of NUM seeds of each label, 500 images at each weight with the 20 labels of the bundled checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import table
from table import Row

METRICS = ("frechet_distance", "accuracy")
GRID = "0.5,1,1.5,2,3,4,5,6.5,8"
BETTER = {"frechet_distance": -1, "accuracy": 1}


def guidegen(*words: object) -> list[dict[str, Any]]:
    """The lines of `--json` of a command."""
    line = [sys.executable, "-m", "guidegen", *map(str, words), "--json"]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def compare(mode: str, options: argparse.Namespace) -> Iterator[Row]:
    draw = ("--mode", mode, "--label", options.label, "--steps", options.steps)
    networks = ("--features", options.judge, "--judge", options.judge, "--resize", "box")
    measure = ("--reference", options.reference, *networks)
    grid, tuned = options.out / f"{mode}-grid", options.out / f"{mode}-tune"
    metrics = [word for metric in METRICS for word in ("--metric", metric)]
    search = ("--by", "w=0.5:8", *metrics, "--budget", options.budget)
    (found,) = guidegen("tune", *draw, *search, *measure, "-o", tuned)
    guidegen("sweep", *draw, "-w", GRID, "--num", options.num, "-o", grid, "--quiet")
    rows = guidegen("evaluate", grid, *measure, "--no-curves", "--quiet")
    for one in found["metrics"]:
        name = one["metric"]
        values = {row["w"]: row["metrics"][name] for row in rows}
        best = max(values, key=lambda w: BETTER[name] * values[w]["value"])
        top = values[best]
        errors = {w: 2 * (some["spread"] ** 2 + top["spread"] ** 2) ** 0.5 for w, some in values.items()}
        near = [w for w, some in values.items() if abs(some["value"] - top["value"]) <= errors[w]]
        low, high = one["interval"]["w"]
        same = low <= best <= high or min(near) <= one["best"]["w"] <= max(near)
        images = sum(row["images"] for row in rows)
        yield Row(
            f"tune, {mode}, {name}",
            f"w = {one['best']['w']:g}, {found['spent']:,} images",
            f"grid of {len(rows)}: w = {best:g}, {images:,} images",
            f"{found['spent'] / images:.2f}",
            "",
            f"{'the same best' if same else 'NOT the same best'}: tune {one['value']:.4g}±{one['error']:.2g}, 95 % interval "
            f"{low:g} to {high:g}; grid {top['value']:.4g}±{top['spread']:.2g}, "
            f"within two errors {min(near):g} to {max(near):g}",
        )


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--mode", action="append")
    parser.add_argument("--num", type=int, default=25, help="seeds of each label at each weight of the grid")
    parser.add_argument("--budget", type=int, default=1500, help="images of the search")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--label", default="all")
    parser.add_argument("--judge", default="bundled")
    parser.add_argument("-o", "--out", type=Path, default=Path("tune-against-grid"))
    options = parser.parse_args()
    table.show(row for mode in options.mode or ["cfg", "classifier"] for row in compare(mode, options))


if __name__ == "__main__":
    main()
