"""What `sample` and `sweep` do with finished images: show them, evaluate them, make a report of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from guidegen.cli.evaluate import check_before, evaluate
from guidegen.cli.evaluate_flags import EvaluateFlags
from guidegen.cli.flags import SampleOptions
from guidegen.cli.output import Output
from guidegen.cli.preview import check_preview, preview
from guidegen.cli.report import write_report
from guidegen.errors import UsageError
from guidegen.runs.manifest import read_rows
from guidegen.runs.ours import refuse_foreign
from guidegen.runs.schema import Row

_AFTER = "Afterwards"

Preview = Annotated[
    bool,
    typer.Option("--preview", help="Show the image or the grid in the terminal.", rich_help_panel=_AFTER),
]
Evaluate = Annotated[
    Path | None,
    typer.Option(
        "--evaluate",
        metavar="REFERENCE",
        help="Evaluate against real images, as `guidegen evaluate --reference` does.",
        rich_help_panel=_AFTER,
    ),
]
Protocol = Annotated[
    str | None,
    typer.Option("--protocol", metavar="NAME", help="As `guidegen evaluate --protocol`.", rich_help_panel=_AFTER),
]
Features = Annotated[
    str | None,
    typer.Option(
        "--features", metavar="ID|DIR", help="Network of the features that --evaluate compares.", rich_help_panel=_AFTER
    ),
]
Judge = Annotated[
    str | None,
    typer.Option("--judge", metavar="ID|DIR", help="Evaluation classifier of --evaluate.", rich_help_panel=_AFTER),
]
Resize = Annotated[
    str | None,
    typer.Option(
        "--resize", metavar="FILTER", help="How --evaluate resizes images of another size.", rich_help_panel=_AFTER
    ),
]
Report = Annotated[
    bool, typer.Option("--report", help="Make report.html in the run, as `guidegen report` does.", rich_help_panel=_AFTER)
]


@dataclass(frozen=True)
class Afterwards:
    """The flags for it."""

    preview: Preview = False
    evaluate: Evaluate = None
    protocol: Protocol = None
    features: Features = None
    judge: Judge = None
    resize: Resize = None
    report: Report = False

    def check(self, output: Output, size: tuple[int, int], flags: SampleOptions) -> None:
        """Refuses, before anything is drawn, what could not be done after it.

        Args:
            output: where the images go.
            size: (height, width) of an image.
            flags: of `sample` or `sweep`.

        Raises:
            UsageError: it cannot be done.
        """
        if self.preview:
            check_preview()
        if (self.evaluate or self.report) and (output.is_file or output.to_stdout):
            raise UsageError(f"--evaluate and --report need a run directory, and -o is {output.path}.")
        if self.evaluate is None and (self.protocol or self.features or self.judge or self.resize):
            raise UsageError("--protocol, --features, --judge and --resize are for --evaluate REFERENCE.")
        if self.report and output.folder:
            refuse_foreign(output.folder / "report.html", flags.force)
        if self.evaluate and output.folder:
            for name in ("curves.svg", "curves.png"):
                refuse_foreign(output.folder / name, flags.force)
        if wanted := self._evaluate_flags(flags):
            check_before(wanted, size)

    def carry_out(self, output: Output, title: str, flags: SampleOptions) -> None:
        """Does what the flags ask for, on the run in `output`.

        Args:
            output: where the images went.
            title: of the grid.
            flags: of `sample` or `sweep`.
        """
        folder = output.folder
        if folder is None or not folder.is_dir():
            return
        if self.preview:
            rows: list[Row] = read_rows(folder)
            preview(folder, rows, title)
        if wanted := self._evaluate_flags(flags):
            evaluate([folder], wanted)
        if self.report:
            write_report([folder], folder / "report.html", quiet=flags.quiet, as_json=flags.json_rows)

    def _evaluate_flags(self, flags: SampleOptions) -> EvaluateFlags | None:
        if self.evaluate is None:
            return None
        return EvaluateFlags(
            self.evaluate,
            protocol=self.protocol,
            features=self.features,
            judge=self.judge,
            resize=self.resize,
            json_rows=flags.json_rows,
            quiet=flags.quiet,
            offline=flags.offline,
        )
