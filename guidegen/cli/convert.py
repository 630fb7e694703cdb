"""`guidegen convert`: a checkpoint of another project to a folder that the other commands open."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from guidegen.cli import console, options
from guidegen.cli.command import make_command
from guidegen.cli.lines import print_made
from guidegen.errors import OutputError, StoppedError, UsageError
from guidegen.models.convert.format import Converted, Format, find_format, formats

_SHORT = "Convert a checkpoint of another project into a folder."


@dataclass(frozen=True)
class _Paths:
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The file to convert: .pt, .pth, .pkl or .safetensors.")]
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")]


@dataclass(frozen=True)
class _Flags:
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in DST.")] = False
    as_json: options.Json = False
    quiet: options.Quiet = False
    debug: options.Debug = False


def register(app: typer.Typer) -> None:
    """Adds the command; each format adds its flags and its part of the help."""
    command = make_command(_run, _Paths, *(format.options for format in formats()), _Flags)
    help = "\n\n".join(
        [
            "Convert a checkpoint of another project into a folder that sample, sweep and inspect open.",
            *(format.help for format in formats()),
        ]
    )
    app.command("convert", help=help, short_help=_SHORT)(command)


def _run(paths: _Paths, *groups: Any) -> None:
    *given, flags = groups
    format = find_format(paths.source)
    chosen = _options_of(format, given)
    _check_destination(paths.destination, flags.overwrite, format.written)
    with _stoppable():
        made = format.convert(paths.source, chosen)
        if not flags.quiet:
            console.note(f"{paths.source}: {made.describe()}")
        _write(made, paths.destination)
    print_made("file", paths.destination, None, flags.as_json)


def _options_of(format: type[Format], given: Sequence[Any]) -> Any:
    """The options of a format among those of all formats; raises UsageError where one of another format was given."""
    chosen = given[formats().index(format)]
    known = {field.name for field in fields(chosen)}
    for group in given:
        for field in fields(group):
            if field.name not in known and getattr(group, field.name) != field.default:
                raise UsageError(f"--{field.name.replace('_', '-')} is not an option for {format.name}.")
    return chosen


def _check_destination(destination: Path, overwrite: bool, written: Collection[str]) -> None:
    """Raises UsageError where the folder could not be made without removing files that `convert` did not write."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(f"{destination} is a file. Name a folder for the result.")
    there = sorted(path.name for path in destination.iterdir())
    if there and not overwrite:
        raise UsageError(f"{destination} is there and not empty ({there[0]}). Name another folder, or --overwrite it.")
    if others := [name for name in there if name not in written]:
        raise UsageError(f"{destination} holds {', '.join(others[:3])}, which convert did not write. Name another folder.")


def _write(made: Converted, destination: Path) -> None:
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
