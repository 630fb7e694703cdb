"""OpenAI's guided-diffusion: `.pt` files of UNets and of noise-aware classifiers."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.errors import UsageError
from guidegen.models.convert import adm
from guidegen.models.convert.adm_layout import Choices
from guidegen.models.convert.format import HIDDEN, Format, Heads, Labels, read_label_names

_PANEL = HIDDEN


class Preset(StrEnum):
    s64 = "64"
    s128 = "128"
    s256 = "256"
    s256_uncond = "256-uncond"
    s512 = "512"


class Order(StrEnum):
    legacy = "legacy"
    new = "new"


class Schedule(StrEnum):
    linear = "linear"
    cosine = "cosine"


@dataclass(frozen=True)
class Options:
    """The flags for guided-diffusion."""

    preset: Annotated[
        Preset | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="The published network that it is: 64, 128, 256, 256-uncond or 512; the same for its classifier.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    size: Annotated[
        int | None,
        typer.Option(
            "--size", min=1, metavar="N", help="Height and width of its images (image_size).", rich_help_panel=_PANEL
        ),
    ] = None
    heads: Heads = None
    head_channels: Annotated[
        int | None,
        typer.Option(
            "--head-channels",
            min=1,
            metavar="N",
            help="Or the channels of each head (num_head_channels).",
            rich_help_panel=_PANEL,
        ),
    ] = None
    attention_order: Annotated[
        Order | None,
        typer.Option("--attention-order", help="new with use_new_attention_order, else legacy.", rich_help_panel=_PANEL),
    ] = None
    schedule: Annotated[
        Schedule | None,
        typer.Option("--schedule", help="Noise schedule (noise_schedule), of 1000 steps.", rich_help_panel=_PANEL),
    ] = None
    res_blocks: Annotated[
        int | None,
        typer.Option(
            "--res-blocks",
            min=1,
            metavar="N",
            help="ResNet blocks per level, if an error asks for it (num_res_blocks).",
            rich_help_panel=_PANEL,
        ),
    ] = None
    labels: Labels = None


class GuidedDiffusion(Format):
    """UNets, class-conditional or not, and noise-aware classifiers."""

    name = "guided-diffusion"
    expected = "a .pt of guided-diffusion"
    help = """Of OpenAI's guided-diffusion: UNets, class-conditional or not, and noise-aware classifiers, converted exactly.
Kind and sizes are read from the weights; what the weights do not show comes from --preset, from a published file name such
as 64x64_diffusion.pt, or from the flags below.

A classifier in the folder of its UNet is found there:

- guidegen convert 256x256_diffusion_uncond.pt adm-256

- guidegen convert 256x256_classifier.pt adm-256/classifier

- guidegen sample -m adm-256 --mode classifier --label 207 --w 10"""
    options = Options
    written = frozenset({"unet", "scheduler", "model_index.json", "config.json", "diffusion_pytorch_model.safetensors"})
    asked_last = True

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.suffix == ".pt" or zipfile.is_zipfile(path)  # torch.save writes a zip archive

    @classmethod
    def convert(cls, path: Path, options: Any) -> adm.Conversion:
        o: Options = options
        if o.heads and o.head_channels:
            raise UsageError("--heads and --head-channels mean the same. Give one.")
        names = read_label_names(o.labels) if o.labels else None
        choices = Choices(o.size, o.heads, o.head_channels, o.attention_order, o.schedule)
        return adm.convert(path, choices, o.preset, o.res_blocks, names)
