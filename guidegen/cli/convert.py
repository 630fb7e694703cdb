"""`guidegen convert`: OpenAI guided-diffusion `.pt` to a folder that the other commands open."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from guidegen.cli import console, options
from guidegen.errors import CheckpointError, OutputError, StoppedError, UsageError
from guidegen.models.python_ref import label_names
from guidegen.schema import decode, read_bytes

if TYPE_CHECKING:
    from guidegen.models.convert.adm import Conversion

_WHAT = "What its weights do not show"
_WRITTEN = {"unet", "scheduler", "model_index.json", "config.json", "diffusion_pytorch_model.safetensors"}
_HELP = """Make OpenAI's guided-diffusion checkpoints into folders that sample, sweep and inspect open.

Converts the UNets, class-conditional or not, and the noise-aware classifiers, exactly. The kind and the sizes are found
from the weights; what no weight shows comes from the preset, or from a published file name such as 64x64_diffusion.pt.

A classifier in the folder of its UNet is found there by itself:

- guidegen convert 256x256_diffusion_uncond.pt adm-256

- guidegen convert 256x256_classifier.pt adm-256/classifier

- guidegen sample -m adm-256 --mode classifier --label 207 --w 10
"""


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


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("convert", help=_HELP, short_help="Make a guided-diffusion .pt into a folder.")(_convert)


def _convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .pt of guided-diffusion: a UNet or a classifier.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    preset: Annotated[
        Preset | None,
        typer.Option(
            "--preset", help="The published network that it is; the same for its classifier.", rich_help_panel=_WHAT
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size", min=1, metavar="N", help="Height and width of its images (image_size).", rich_help_panel=_WHAT
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads", min=1, metavar="N", help="Attention heads of every layer (num_heads).", rich_help_panel=_WHAT
        ),
    ] = None,
    head_channels: Annotated[
        int | None,
        typer.Option(
            "--head-channels",
            min=1,
            metavar="N",
            help="Or the channels of each head (num_head_channels).",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    attention_order: Annotated[
        Order | None,
        typer.Option("--attention-order", help="new with use_new_attention_order, else legacy.", rich_help_panel=_WHAT),
    ] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option("--schedule", help="Of the noise (noise_schedule), over 1000 steps.", rich_help_panel=_WHAT),
    ] = None,
    res_blocks: Annotated[
        int | None,
        typer.Option(
            "--res-blocks",
            min=1,
            metavar="N",
            help="ResNet blocks a level, if asked for (num_res_blocks).",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help='Names of its labels, which a .pt lacks, as JSON: {"0": "tench", ...} or ["tench", ...].',
            rich_help_panel=_WHAT,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was converted into DST before.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    if heads and head_channels:
        raise UsageError("--heads and --head-channels say the same thing in two ways. Give one.")
    _check_destination(source, destination, overwrite)
    names = _read_labels(labels) if labels else None
    if not source.is_file():  # before the seconds that torch takes to load
        what = "is a folder" if source.is_dir() else "is not there"
        raise CheckpointError(f"{source} {what}. Name a .pt file of guided-diffusion.")
    from guidegen.models.convert.adm import convert
    from guidegen.models.convert.adm_layout import Choices

    asked = Choices(size, heads, head_channels, attention_order and attention_order.value, schedule and schedule.value)
    with _stoppable():
        made = convert(source, asked, preset and preset.value, res_blocks, names)
        if not quiet:
            console.note(_describe(source, made))
        _write(made, destination)
    console.result(str(destination))


def _check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Raises UsageError where the folder cannot be made without taking something away."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(f"{destination} is a file. Name a folder for the result.")
    there = sorted(path.name for path in destination.iterdir())
    if there and not overwrite:
        raise UsageError(f"{destination} is there and not empty ({there[0]}). Name another folder, or --overwrite it.")
    if others := [name for name in there if name not in _WRITTEN]:
        raise UsageError(f"{destination} holds {', '.join(others[:3])}, which convert did not write. Name another folder.")


def _read_labels(path: Path) -> dict[int, str]:
    where = f"--labels {path}"
    try:
        data = decode(read_bytes(path, UsageError), object, "it", UsageError)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    names = label_names(dict(enumerate(data)) if isinstance(data, list) else data, where, UsageError)
    if not names:
        raise UsageError(f'{where}: should map ids to names, {{"0": "tench", ...}}, or list the names in order.')
    return names


def _describe(source: Path, made: Conversion) -> str:
    layout, choices = made.layout, made.choices
    labels = "unconditional" if layout.labels is None else f"{layout.labels} labels"
    heads = f"{choices.heads} heads" if choices.heads else f"heads of {choices.head_channels} channels"
    facts = [f"{layout.kind} of {choices.size}x{choices.size}", labels, f"levels of {', '.join(map(str, layout.channels))}"]
    facts += [f"{heads} in {choices.attention_order or 'either'} order"]
    if layout.kind == "unet":
        facts += [
            f"{choices.schedule} schedule",
            f"{'learned' if layout.out_channels > layout.in_channels else 'fixed'} variance",
        ]
    else:
        facts += ["attention pool" if layout.pool else "mean pool"]
    return f"{source}: {'; '.join(facts)}"


def _write(made: Conversion, destination: Path) -> None:
    """Writes beside the destination and renames: there is the whole of it, or what was there before."""
    destination = destination.absolute()
    part, old = (destination.with_name(f".{destination.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        made.save(part)
        if destination.exists():
            destination.rename(old)
        part.rename(destination)
    except BaseException as error:
        if old.exists() and not destination.exists():
            old.rename(destination)
        if type(error).__name__ == "SafetensorError":  # how safetensors says that the disk is full
            raise OutputError(f"{destination} cannot be written: {error}. Nothing was changed.") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Makes SIGTERM an error, so that what was begun is cleaned up."""

    def stop(number: int, _: FrameType | None) -> None:
        raise StoppedError("Stopped by SIGTERM. Nothing was written.", number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
