"""The pictures of the card, in one command: `python -m guidegen.zoo.pictures --data DIR --judge DIR --out DIR`.

Draws grid.png, three labels at five weights, and methods.png, guidance methods at weights of nearly the same accuracy. What
is finished is kept, so the same command goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guidegen.spec.limits import SEEDS_OF_A_LABEL
from guidegen.zoo.drawn import drawn_as, guidegen
from guidegen.zoo.measure import make_ready
from guidegen.zoo.train import CLASSES

GRID = ("--mode", "cfg", "--label", "323,145,817", "--num", 2, "--w", "0,1,2,4,8")
METHODS = {
    "methods": ("--by", "guidance=cfg@2,apg@3,cfg++@0.6"),
    "interval": ("--w", 2.5, "--interval", "0.3:10"),
}
SHOWN = (145, 207, 323, 779)


def main(
    data: Annotated[Path, typer.Option(help="Folder with train*.parquet and val.parquet.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs and the pictures.")],
    judge: Annotated[Path, typer.Option(help="Folder of the evaluation classifier; trained first if it is not there.")],
    num: Annotated[int, typer.Option(help="Samples of each label by each method.")] = 5,
    epochs: Annotated[int, typer.Option(help="Epochs of the evaluation classifier.")] = 12,
) -> None:
    """Draw the grid and the comparison of methods."""
    make_ready(judge, data, epochs)
    guidegen("sweep", *GRID, "-o", out / "grid", "-q")
    guidegen("grid", out / "grid", "-o", out / "grid.png")
    runs = [out / name for name in METHODS]
    for run in runs:
        guidegen("sweep", "--mode", "cfg", *METHODS[run.name], *drawn_as(CLASSES, num, "bf16"), "-o", run)
    reference = ("--reference", data / "val.parquet", "--resize", "box")
    guidegen("evaluate", *runs, *reference, "--features", judge, "--judge", judge, "--no-curves")
    shown = [part for label in SHOWN for part in ("--label", label)]
    metrics = ("--metric", "accuracy", "--metric", "frechet_distance")
    of_shown = ",".join(str(label * SEEDS_OF_A_LABEL) for label in SHOWN)
    guidegen("grid", *runs, *shown, "--seeds", of_shown, *metrics, "-o", out / "methods.png")


if __name__ == "__main__":
    typer.run(main)
