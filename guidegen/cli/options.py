"""Flags shared by several commands, and what turns their text into values."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from guidegen.checkpoints import Checkpoint, ClassifierInfo, open_checkpoint, open_classifier
from guidegen.checkpoints.labels import Labels
from guidegen.errors import UsageError
from guidegen.zoo import BUNDLED

_MODEL, _OUTPUT, _TALK = "Checkpoint", "Output", "Messages"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="ID|DIR",
        envvar="GUIDEGEN_MODEL",
        help="Folder, or hub id (owner/name, owner/name@revision). Default: the bundled checkpoint.",
        rich_help_panel=_MODEL,
    ),
]
ClassifierRef = Annotated[
    str | None,
    typer.Option(
        "--classifier",
        "-c",
        metavar="ID|DIR",
        help="Classifier for the modes classifier and both: noise-aware, or a transformers image classifier. "
        "Default: the noise-aware one in the checkpoint's folder.",
        rich_help_panel=_MODEL,
    ),
]
NullLabel = Annotated[
    int | None,
    typer.Option(
        "--null-label",
        metavar="ID",
        help="The class that means no label, where the checkpoint does not say.",
        rich_help_panel=_MODEL,
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use the hub's cache alone; never the network.", rich_help_panel=_MODEL)
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Accept .bin weights, read with weights_only=True.", rich_help_panel=_MODEL),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.", rich_help_panel=_TALK)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.", rich_help_panel=_TALK)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_TALK)]


def model_ref(model: str | None) -> str:
    """The checkpoint asked for, or the bundled one."""
    return model or str(BUNDLED)


def find_checkpoint(
    model: str | None, null_label: int | None, offline: bool, allow_pickle: bool = False, weights: bool = False
) -> Checkpoint:
    """Opens the checkpoint that the flags name."""
    return open_checkpoint(model_ref(model), null_label, weights, offline, allow_pickle)


def find_classifier(
    ref: str | None,
    checkpoint: Checkpoint,
    input: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    weights: bool = False,
) -> ClassifierInfo | None:
    """Opens the classifier that the flags name, or the one beside the checkpoint, if any."""
    ref = ref or checkpoint.bundled_classifier
    return open_classifier(ref, input, weights, offline, allow_pickle) if ref else None


def resolve_labels(words: Iterable[str], labels: Labels) -> list[int]:
    """Label ids from `--label`: ids, names, ranges, comma lists, @FILE and - (standard input).

    Raises:
        UsageError: unknown, ambiguous, or a file that cannot be read.
    """
    ids: list[int] = []
    for word in words:
        for text in _lines(word):
            if labels.knows(text):
                ids += labels.resolve(text)
                continue
            for part in next(csv.reader([text], skipinitialspace=True)):
                if part.strip():
                    ids += labels.resolve(part)
    if not ids:
        raise UsageError('--label names no label. Give ids or names, such as --label 207 or --label "tabby,0-9".')
    return list(dict.fromkeys(ids))


def _lines(word: str) -> list[str]:
    """What one --label stands for: itself, or the lines of a file or of standard input."""
    if word == "-":
        text = sys.stdin.read()
    elif word.startswith("@"):
        try:
            text = Path(word[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--label {word}: cannot read that file: {error}") from None
    else:
        return word.splitlines()
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]
