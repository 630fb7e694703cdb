"""The trade-off of the bundled checkpoint, in one command: `python -m guidegen.zoo.tradeoff --data DIR --out DIR`.

Sweeps both modes, measures them against held-out photographs with an evaluation classifier that never guided, and
writes curves.svg, curves.png, table.md and report.html. A larger --num goes on from a smaller one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.evaluate.measure import open_drawn, read_metrics
from guidegen.zoo.drawn import drawn_as, guidegen
from guidegen.zoo.measure import make_ready
from guidegen.zoo.train import CLASSES

WEIGHTS = "0,0.5,1,1.5,2,3,4,6,8"
MODES = "cfg,classifier"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows of metrics.jsonl as the table of the card, in Markdown."""
    figures = {"Fréchet distance": "frechet_distance"} | {
        name: name for name in ("precision", "recall", "density", "coverage")
    }
    lines = [["mode", "w", "accuracy", *figures], ["---"] * (3 + len(figures))]
    for row in rows:
        of_row = [f"{row['metrics'][name]['value']:.2f}" for name in figures.values()]
        lines.append(
            [row["mode"], f"{row['w']:g}", f"{row['metrics']['accuracy']['value']:.1%}".replace("%", " %"), *of_row]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(
    data: Annotated[Path, typer.Option(help="Folder with train*.parquet and val.parquet.")],
    out: Annotated[Path, typer.Option(help="Folder for the evaluation classifier, the runs, the curves and the report.")],
    num: Annotated[int, typer.Option(help="Samples of each of the labels at each weight.")] = 50,
    modes: Annotated[str, typer.Option("--mode", help="Modes of guidance, with commas.")] = MODES,
    w: Annotated[str, typer.Option("--w", help="Guidance weights.")] = WEIGHTS,
    judge: Annotated[
        Path | None, typer.Option(help="Folder of the evaluation classifier; trained first if it is not there.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the evaluation classifier.")] = 12,
    dtype: Annotated[str, typer.Option(help="Autocast of the networks: auto, fp32, bf16 or fp16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the first sample of each label.")] = 0,
) -> None:
    """Draws, measures and reports; what is finished is kept, so the same command goes on."""
    judge = judge or out / "judge"
    make_ready(judge, data, epochs)
    runs = [out / mode for mode in modes.split(",")]
    for run in runs:
        guidegen("sweep", "--mode", run.name, "--w", w, *drawn_as(CLASSES, num, dtype, seed), "-o", run)
    reference = ("--reference", data / "val.parquet", "--resize", "box")
    guidegen("evaluate", *runs, *reference, "--features", judge, "--judge", judge, "-o", out)
    rows = [row for run in runs for row in read_metrics(open_drawn(run))[0]]
    (out / "table.md").write_text(table(rows), encoding="utf-8")
    guidegen("report", *runs, "-o", out / "report.html")


if __name__ == "__main__":
    typer.run(main)
