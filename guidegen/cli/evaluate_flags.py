"""The flags of `guidegen evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from guidegen.cli import options

_AGAINST, _HOW = "What to measure against", "How to measure"


@dataclass(frozen=True)
class EvaluateFlags:
    """The flags, a field each."""

    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="PATH",
            help="Real images: a folder, .npz (arr_0, arr_1), .parquet (image, label), another run, or a file of "
            "--save-reference. With --protocol also statistics: .npz (mu, sigma) or EDM2's .pkl. Needed but for --check.",
            rich_help_panel=_AGAINST,
        ),
    ] = None
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="NAME",
            help="Measure as published tables do: adm (FID, sFID, Inception Score, precision, recall), edm2 (FID, "
            "FD-DINOv2), fidelity, pytorch-fid or clean-fid (FID against mu and sigma), cmmd. Default: by --features.",
            rich_help_panel=_AGAINST,
        ),
    ] = None
    reference_labels: Annotated[
        str,
        typer.Option(
            "--reference-labels",
            metavar="LIST",
            help="Labels to keep: run (those of the run), all, or ids such as 1,5-9.",
            rich_help_panel=_AGAINST,
        ),
    ] = "run"
    resize: Annotated[
        str | None,
        typer.Option(
            "--resize",
            metavar="FILTER",
            help="Resize images of another size to that of the run after a centre crop: box, bilinear, hamming, bicubic, "
            "lanczos or nearest. Without it they are an error, and --protocol resizes each as it does the run's.",
            rich_help_panel=_AGAINST,
        ),
    ] = None
    save_reference: Annotated[
        Path | None,
        typer.Option(
            "--save-reference",
            metavar="FILE",
            help="Save the features of the reference for reuse; with --protocol its statistics, as other tools read them: "
            ".npz, of edm2 .pkl.",
            rich_help_panel=_AGAINST,
        ),
    ] = None
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="ID|DIR",
            help="Network that makes the features: an image model of transformers or timm, bundled, or inception "
            "(the distance is then the FID). Default: bundled.",
            rich_help_panel=_HOW,
        ),
    ] = None
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="ID|DIR",
            help="Evaluation classifier, which measures how often an image shows its label; choose one that did not guide. "
            "Default: bundled.",
            rich_help_panel=_HOW,
        ),
    ] = None
    halves: Annotated[
        int,
        typer.Option(
            "--halves",
            metavar="N",
            min=0,
            help="Random splits into half-samples and quarter-samples, for the standard errors of distances and recall; "
            "0: no standard errors.",
            rich_help_panel=_HOW,
        ),
    ] = 20
    inception: Annotated[
        Path | None,
        typer.Option(
            "--inception",
            metavar="PTH",
            help="Weights of Inception for --protocol and --features inception. Default: torch-fidelity's, downloaded once.",
            rich_help_panel=_HOW,
        ),
    ] = None
    vit: Annotated[
        str | None,
        typer.Option(
            "--vit",
            metavar="ID|DIR",
            help="DINOv2 of --protocol edm2 or CLIP of cmmd. Default: facebook/dinov2-large, "
            "openai/clip-vit-large-patch14-336.",
            rich_help_panel=_HOW,
        ),
    ] = None
    extrapolate: Annotated[
        bool,
        typer.Option(
            "--extrapolate",
            help="With --protocol: also the Fréchet distances at infinitely many images, from a line in 1/N.",
            rich_help_panel=_HOW,
        ),
    ] = False
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class", help="Free form: also the figures of each label, in per_class.jsonl.", rich_help_panel=_HOW
        ),
    ] = False
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N|auto",
            help="Only make the features of every N-th image, into the run; evaluate without --shard when all are made.",
            rich_help_panel=_HOW,
        ),
    ] = None
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only say whether the networks of --protocol have the published weights, and what they make of a "
            "test picture.",
            rich_help_panel=_HOW,
        ),
    ] = False
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Measure an incomplete or damaged run by the images that it has; otherwise it is refused.",
            rich_help_panel=_HOW,
        ),
    ] = False
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Images read at once.", rich_help_panel=_HOW)
    ] = 64
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cuda, cuda:1, mps or cpu.", rich_help_panel=_HOW)
    ] = "auto"
    threads: Annotated[int | None, options.threads_option(_HOW)] = None
    curves: Annotated[
        bool, typer.Option("--curves/--no-curves", help="Draw curves.svg and curves.png.", rich_help_panel=options._OUTPUT)
    ] = True
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="For the curves. Default: the first run.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    force: options.Force = False
    offline: options.Offline = False
    allow_pickle: options.AllowPickle = False
    json_rows: options.Json = False
    quiet: options.Quiet = False
    debug: options.Debug = False
