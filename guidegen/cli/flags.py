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
    "0 is unconditional, 1 conditional, more is sharper. It is diffusers' guidance_scale, Ho & Salimans' 1+w, and ADM's "
    "classifier_scale."
)
_W_CLASSIFIER = "Mode both: weight of the classifier's gradient; --w then weighs the label's own score."
_W_GUIDE = "Weight of autoguidance on top of cfg, classifier or both; 1 adds nothing. In mode autoguidance it is --w."


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
class Draw:
    """What to draw."""

    mode: Annotated[
        Mode,
        typer.Option(
            metavar="MODE",
            help="cfg: with the label against without. classifier: a classifier's gradient. both, or none. "
            "autoguidance: the model against a weaker version of it.",
            rich_help_panel=WHAT,
        ),
    ] = Mode.cfg
    w: Annotated[
        str | None,
        typer.Option("--w", metavar="NUMBER", help=f"Guidance weight: {_W} [default: 3.0]", rich_help_panel=WHAT),
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="LABEL",
            help='Id, name, range or list: 207, "golden retriever", 0-9, all; @FILE or - for standard input. Repeats. '
            "With weights, 207:3,281:-1, a list is one mixture.",
            rich_help_panel=WHAT,
        ),
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text, for text-conditional checkpoints and CLIP-like classifiers; @FILE (a line each) or - for standard "
            "input. Repeats. 'A AND B:0.5' is a mixture.",
            rich_help_panel=WHAT,
        ),
    ] = None
    num: Annotated[
        int | None, typer.Option("--num", "-n", help="Samples of each label or prompt. [default: 1]", rich_help_panel=WHAT)
    ] = None
    seed: Annotated[
        int | None, typer.Option("--seed", help="First seed; the others count up. [default: 0]", rich_help_panel=WHAT)
    ] = None
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="LIST", help="Seeds instead of --num and --seed: 0-63,100.", rich_help_panel=WHAT),
    ] = None
    w_classifier: Annotated[
        str | None,
        typer.Option("--w-classifier", metavar="NUMBER", help=f"{_W_CLASSIFIER} [default: 1]", rich_help_panel=WHAT),
    ] = None
    w_guide: Annotated[
        str | None,
        typer.Option(
            "--w-guide", metavar="NUMBER", help=f"{_W_GUIDE} [default: 2 with --guide-model]", rich_help_panel=WHAT
        ),
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
            help="noisy: it reads x_t and t. denoised: it reads the estimated clean image. Default: what it was made for.",
            rich_help_panel=options._MODEL,
        ),
    ] = None
    classifier_gradient: Annotated[
        Gradient | None,
        typer.Option(
            "--classifier-gradient",
            help="On denoised input. exact: through the denoiser. detached: as if the noise in x_t were known, at half "
            "the calls. [default: exact]",
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
            help="The method: cfg (plain), apg, cfg++, rescale ...; `guidegen guidances` lists them. file.py:NAME runs a "
            "custom function. [default: cfg]",
            rich_help_panel=HOW,
        ),
    ] = None
    guidance_opt: Annotated[
        list[str] | None,
        typer.Option("--guidance-opt", metavar="KEY=VALUE", help="An option of the method. Repeats.", rich_help_panel=HOW),
    ] = None
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the scheduler. Default: the checkpoint's.", rich_help_panel=HOW)
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="NAME",
            help="ddim, ddpm, dpm++, unipc, euler, heun, or another diffusers class that fits. Default: the checkpoint's.",
            rich_help_panel=HOW,
        ),
    ] = None
    eta: Annotated[
        float | None, typer.Option("--eta", help="ddim: 0 deterministic, 1 as noisy as ddpm.", rich_help_panel=HOW)
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Size of the images: 512 or 768x512. Default: the checkpoint's.",
            rich_help_panel=HOW,
        ),
    ] = None
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Autocast. auto: fp16 on CUDA, fp32 elsewhere.", rich_help_panel=HOW)
    ] = Dtype.auto
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cuda, cuda:1, mps or cpu.", rich_help_panel=HOW)
    ] = "auto"
    batch_size: Annotated[
        str, typer.Option("--batch-size", metavar="N", help="Images at once: auto, or a number.", rich_help_panel=HOW)
    ] = "auto"
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Call the networks with --batch-size rows each time, so that not even last bits depend on shards, "
            "restarts or the batch; give every shard the same --batch-size.",
            rich_help_panel=HOW,
        ),
    ] = False
    compile_networks: Annotated[
        bool, typer.Option("--compile", help="torch.compile the networks: slow start, faster steps.", rich_help_panel=HOW)
    ] = False


@dataclass(frozen=True)
class Output:
    """Where it goes."""

    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="Run directory, or one file: x.png, x.webp, x.jpg (an image, or a "
            "sweep's grid), x.npz, or - for PNG on standard output. Default: guidegen-runs/NAME.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Draw part I of N, counted from 0; auto: as torchrun, accelerate or SLURM say. Then: guidegen merge.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    wait: options.Wait = False
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start over. Otherwise finished images are kept.", rich_help_panel=options._OUTPUT),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be drawn and what it costs; load no weights.", rich_help_panel=options._OUTPUT
        ),
    ] = False


@dataclass(frozen=True)
class Messages:
    """What is printed."""

    json_rows: options.Json = False
    quiet: options.Quiet = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=options._TALK)] = False
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
    w: Annotated[
        str | None,
        typer.Option(
            "--w",
            metavar="LIST",
            help=f"Guidance weights: 0,1,2.5 and START:STOP:STEP, both ends included. {_W} [default: 0,1,2,4,8]",
            rich_help_panel=WHAT,
        ),
    ] = None
    w_classifier: Annotated[
        str | None,
        typer.Option("--w-classifier", metavar="LIST", help=f"{_W_CLASSIFIER} [default: 1]", rich_help_panel=WHAT),
    ] = None
    w_guide: Annotated[
        str | None,
        typer.Option("--w-guide", metavar="LIST", help=f"{_W_GUIDE} [default: 2 with --guide-model]", rich_help_panel=WHAT),
    ] = None
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="AXIS=LIST",
            help=f"Vary this too, crossed with all else: {BY_FLAGS}, or an option "
            "of a method (apg.eta=0,0.5). VALUE@W gives each value a weight of its own. Repeats.",
            rich_help_panel=WHAT,
        ),
    ] = None
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            metavar="AXIS",
            help="The axis across the grid. [default: w]",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="AXIS,...",
            help="Axes down the grid, outermost first; those that are not named follow.",
            rich_help_panel=options._OUTPUT,
        ),
    ] = None
