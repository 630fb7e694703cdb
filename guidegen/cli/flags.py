"""The options of `sample` and `sweep`: a field each, whose annotation is the option of Typer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar

import typer

from guidegen.cli import options
from guidegen.models.checkpoint import Access
from guidegen.spec.axes import BY_FLAGS
from guidegen.spec.options import HOW, WHAT, PlainOptions

_W = (
    "0 is unconditional, 1 conditional; larger weights trade diversity for fidelity. It is diffusers' guidance_scale, "
    "Ho & Salimans' 1+w, and ADM's classifier_scale."
)
_W_CLASSIFIER = "Weight of the classifier's gradient in mode both, where --w is that of classifier-free guidance."
_W_GUIDE = "Weight of autoguidance on top of cfg, classifier and both; 1 turns it off. [default: 2 with --guide-model]"


class Mode(StrEnum):
    cfg = "cfg"
    classifier = "classifier"
    both = "both"
    none = "none"
    autoguidance = "autoguidance"


class Input(StrEnum):
    noisy = "noisy"
    denoised = "denoised"


class Gradient(StrEnum):
    exact = "exact"
    detached = "detached"


class Dtype(StrEnum):
    auto = "auto"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass(frozen=True)
class What:
    """What to draw, but for how many."""

    mode: Annotated[
        Mode,
        typer.Option(
            metavar="MODE",
            help="cfg (classifier-free guidance), classifier (a classifier's gradient), both, autoguidance (away from a "
            "weaker model) or none.",
            rich_help_panel=WHAT,
        ),
    ] = Mode.cfg
    w: Annotated[
        str | None,
        typer.Option(
            "--w", "-w", metavar="NUMBER", help=f"Guidance weight: {_W} [default: 3.0; 1 for mixtures]", rich_help_panel=WHAT
        ),
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="LABEL",
            help='Id, name, range or list: 207, "golden retriever", 0-9, all; @FILE or - for standard input. Repeats. '
            "A list with weights, 207:3,281:-1, is one mixture.",
            rich_help_panel=WHAT,
        ),
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text, for text-conditional checkpoints and CLIP-like classifiers; @FILE (one per line) or - for standard "
            "input. Repeats. 'A AND B:0.5' is a mixture.",
            rich_help_panel=WHAT,
        ),
    ] = None
    seed: Annotated[
        str | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="Seed of the first sample, or random; the next ones count up from it. [default: 0]",
            rich_help_panel=WHAT,
        ),
    ] = None
    w_classifier: Annotated[
        str | None,
        typer.Option("--w-classifier", metavar="NUMBER", help=f"{_W_CLASSIFIER} [default: 1]", rich_help_panel=WHAT),
    ] = None
    w_guide: Annotated[
        str | None,
        typer.Option("--w-guide", metavar="NUMBER", help=_W_GUIDE, rich_help_panel=WHAT),
    ] = None


@dataclass(frozen=True)
class Apart:
    """Which seeds the labels have."""

    seeds_per_label: options.SeedsPerLabel = False


@dataclass(frozen=True)
class Draw(Apart, What):
    """What to draw."""

    num: Annotated[
        int | None,
        typer.Option("--num", "-n", metavar="N", help="Samples per label or prompt. [default: 1]", rich_help_panel=WHAT),
    ] = None
    labels_random: Annotated[
        int | None,
        typer.Option("--labels-random", metavar="N", help="N samples, each of a label by its seed.", rich_help_panel=WHAT),
    ] = None
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="LIST", help="Seeds instead of --num and --seed: 0-63,100.", rich_help_panel=WHAT),
    ] = None


@dataclass(frozen=True)
class Source:
    """Which networks to draw with."""

    model: options.Model = None
    classifier: options.ClassifierRef = None
    classifier_input: Annotated[
        Input | None,
        typer.Option(
            "--classifier-input",
            help="What the classifier reads: noisy (x_t and t) or denoised (the estimated clean image). Default: as it was "
            "trained.",
            rich_help_panel=options._MODEL,
        ),
    ] = None
    classifier_gradient: Annotated[
        Gradient | None,
        typer.Option(
            "--classifier-gradient",
            help="Gradient of a classifier of denoised images: exact (through the denoiser) or detached (without the "
            "denoiser's derivative, at half the calls). [default: exact]",
            rich_help_panel=options._MODEL,
        ),
    ] = None
    guide_model: options.GuideRef = None
    null_label: options.NullLabel = None
    variant: options.Variant = None
    offline: options.Offline = False
    allow_pickle: options.AllowPickle = False


@dataclass(frozen=True)
class Sampling:
    """How to draw it."""

    guidance: Annotated[
        str | None,
        typer.Option(
            "--guidance",
            metavar="NAME",
            help="Guidance method: cfg, apg, cfg++, rescale ...; `guidegen guidances` lists them. Or a custom function: "
            "file.py:NAME. [default: cfg]",
            rich_help_panel=HOW,
        ),
    ] = None
    guidance_opt: Annotated[
        list[str] | None,
        typer.Option(
            "--guidance-opt", metavar="KEY=VALUE", help="An option of the guidance method. Repeats.", rich_help_panel=HOW
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", help="Number of sampling steps. Default: the checkpoint's.", rich_help_panel=HOW
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="NAME",
            help="Sampler: ddim, ddpm, dpm++, unipc, euler, heun, edm (where alpha is 1), or a diffusers class. Default: "
            "the checkpoint's.",
            rich_help_panel=HOW,
        ),
    ] = None
    eta: Annotated[
        float | None,
        typer.Option(
            "--eta", metavar="NUMBER", help="Noise of ddim: 0 is deterministic, 1 is as noisy as ddpm.", rich_help_panel=HOW
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Size of the images, as 512 or WIDTHxHEIGHT. Default: the checkpoint's.",
            rich_help_panel=HOW,
        ),
    ] = None
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype",
            help="Precision of the networks. auto is fp16 on CUDA (bf16 for text-to-image pipelines) and fp32 elsewhere.",
            rich_help_panel=HOW,
        ),
    ] = Dtype.auto
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="What is faster on this device and moves pixels by a few levels of 255: --dtype bf16 on a CPU that "
            "multiplies in it; nothing on CUDA, where auto is fp16. The run keeps the --dtype.",
            rich_help_panel=HOW,
        ),
    ] = False
    device: Annotated[
        str,
        typer.Option("--device", metavar="NAME", help="Where to draw: auto, cuda, cuda:1, mps or cpu.", rich_help_panel=HOW),
    ] = "auto"
    batch_size: Annotated[
        str, typer.Option("--batch-size", metavar="N", help="Images drawn at once, or auto.", rich_help_panel=HOW)
    ] = "auto"
    threads: options.Threads = None
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Always call the networks with --batch-size rows, so that not even the last bit depends on shards or "
            "restarts. Give every shard the same --batch-size and --threads.",
            rich_help_panel=HOW,
        ),
    ] = False
    compile_networks: options.Compile = False
    offload: options.OffloadTo = options.Offload.none


@dataclass(frozen=True)
class Output:
    """Where it goes."""

    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="A run directory, or one file: x.png, x.webp or x.jpg (the image, or the grid), x.npz, or - for a PNG "
            "on standard output. Default: a directory in guidegen-runs.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    scale: Annotated[
        int | None,
        typer.Option(
            "--scale",
            metavar="N",
            min=1,
            help="Enlarge the image of -o x.png, or those of a sweep's grid, N times without blur.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Draw part I of N, counted from 0, or auto in a job array or under torchrun (torchrun -m guidegen -- "
            "sample --num 50 ...), accelerate, MPI, srun, SkyPilot or dstack. Then: guidegen merge.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    wait: options.Wait = False
    overwrite: options.Overwrite = False
    force: options.Force = False
    stepwise: Annotated[
        str | None,
        typer.Option(
            "--stepwise",
            metavar="DIR",
            help="Also write the denoised estimate at each step there, as one strip for each image that is drawn.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be drawn, what is there and how long it takes, and stop.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = False


@dataclass(frozen=True)
class Messages:
    """What is printed."""

    json_rows: options.Json = False
    quiet: options.Quiet = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print more about the run.", rich_help_panel=options._TALK)
    ] = False
    debug: options.Debug = False


@dataclass(frozen=True)
class SampleOptions(Messages, Output, PlainOptions, Sampling, Source, Draw):  # the fields of the last come first
    """The options of `sample`."""

    command: ClassVar[str] = "sample"

    @property
    def access(self) -> Access:
        """How checkpoints may be read."""
        return Access(self.offline, self.allow_pickle, self.variant)


@dataclass(frozen=True)
class SweepOptions(SampleOptions):
    """The options of `sweep`: its weights are lists, and axes can be added."""

    command: ClassVar[str] = "sweep"
    with_grid: ClassVar[bool] = True
    w: Annotated[
        str | None,
        typer.Option(
            "--w",
            "-w",
            metavar="LIST",
            help=f"Guidance weights, as 0,1,2.5 or START:STOP:STEP with both ends. {_W} [default: 0,1,2,4,8]",
            rich_help_panel=WHAT,
        ),
    ] = None
    w_classifier: Annotated[
        str | None,
        typer.Option("--w-classifier", metavar="LIST", help=f"{_W_CLASSIFIER} [default: 1]", rich_help_panel=WHAT),
    ] = None
    w_guide: Annotated[
        str | None,
        typer.Option("--w-guide", metavar="LIST", help=_W_GUIDE, rich_help_panel=WHAT),
    ] = None
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="AXIS=LIST",
            help=f"Vary another setting as well: {BY_FLAGS}, or an option of a method "
            "(apg.eta=0,0.5). VALUE@W gives each value its own weight. Repeats.",
            rich_help_panel=WHAT,
        ),
    ] = None
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            metavar="AXIS",
            help="Axis across the grid. [default: w]",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="AXIS,...",
            help="Axes down the grid, outermost first; the others follow.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None


COMMON = ("label", "prompt", "w", "mode", "num", "seed", "out", "model", "classifier", "steps", "scheduler", "guidance")
"""The options that most need, in the order in which the help shows them."""
