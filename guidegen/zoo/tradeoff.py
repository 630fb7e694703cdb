"""The trade-off of the bundled checkpoint, in one command: `python -m guidegen.zoo.tradeoff --data DIR --out DIR`.

Sweeps both modes, measures them against held-out photographs under a judge that never guided, and
writes curves.svg, curves.png and report.html. Each label has seeds of its own: at a small w the
images of one seed are nearly the same for every label, and near copies say nothing of diversity.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from guidegen.zoo.measure import make_ready
from guidegen.zoo.train import CLASSES

WEIGHTS = "0,0.5,1,1.5,2,3,4,6,8"


def guidegen(*args: object) -> None:
    """Runs `guidegen ARGS` as a process of its own, and ends with its exit code where it fails."""
    result = subprocess.run([sys.executable, "-m", "guidegen", *map(str, args)])
    if result.returncode:
        raise typer.Exit(result.returncode)


def main(
    data: Annotated[Path, typer.Option(help="Folder with train*.parquet and val.parquet.")],
    out: Annotated[Path, typer.Option(help="Folder for the judge, the runs, the curves and the report.")],
    num: Annotated[int, typer.Option(help="Samples of each of the labels at each weight.")] = 50,
    w: Annotated[str, typer.Option("--w", help="Guidance weights.")] = WEIGHTS,
    judge: Annotated[Path | None, typer.Option(help="Folder of the judge; trained first if not there.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the judge.")] = 12,
) -> None:
    """Draws, measures and reports; what is finished is kept, so the same command goes on."""
    judge = judge or out / "judge"
    make_ready(judge, data, epochs)
    runs = [out / mode for mode in ("cfg", "classifier")]
    for run in runs:
        for i, label in enumerate(CLASSES.split(",")):
            seeds = f"{i * num}-{(i + 1) * num - 1}"
            guidegen("sweep", "--mode", run.name, "--w", w, "--label", label, "--seeds", seeds, "-o", run, "-q")
        guidegen("grid", run)
    reference = ("--reference", data / "val.parquet", "--resize", "box")
    guidegen("evaluate", *runs, *reference, "--features", judge, "--judge", judge, "-o", out)
    guidegen("report", *runs, "-o", out / "report.html")


if __name__ == "__main__":
    typer.run(main)
