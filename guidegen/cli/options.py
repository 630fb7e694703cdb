"""Flags shared by several commands, and what turns their text into values."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from guidegen.checkpoints import Access, AnyClassifier, Checkpoint, open_checkpoint, open_classifier
from guidegen.checkpoints.classifiers import open_classifiers
from guidegen.checkpoints.files import DEFAULT_ACCESS
from guidegen.checkpoints.labels import Labels
from guidegen.errors import UsageError
from guidegen.mixture import format_labels, split_weight
from guidegen.zoo import BUNDLED

_SIZE = re.compile(r"([0-9]{1,9})(?:x([0-9]{1,9}))?")
_MODEL, _OUTPUT, _TALK = "Checkpoint", "Output", "Messages"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="ID|DIR",
        envvar="GUIDEGEN_MODEL",
        help="Folder, hub id (owner/name, owner/name@revision), or file.py:NAME of your own. Default: the bundled one.",
        rich_help_panel=_MODEL,
    ),
]
ClassifierRef = Annotated[
    list[str] | None,
    typer.Option(
        "--classifier",
        "-c",
        metavar="ID|DIR[:W]",
        help="Classifier for the modes classifier and both: noise-aware, a transformers image classifier, or CLIP-like. "
        "Repeats: the gradients are summed, each with its weight W (1). Default: the noise-aware one in the "
        "checkpoint's folder.",
        rich_help_panel=_MODEL,
    ),
]
GuideRef = Annotated[
    str | None,
    typer.Option(
        "--guide-model",
        metavar="ID|DIR|WORD",
        help="Weaker model for autoguidance: a smaller or earlier checkpoint, or its network folder; bundled: the one in "
        "the checkpoint's folder; or made of the model's own network: pag (identity for self-attention) or skip (layers "
        "left out), perhaps with layers: skip:mid_block. Default in mode auto: bundled.",
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
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Which weight files to read where there are several, such as fp16.",
        rich_help_panel=_MODEL,
    ),
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
    model: str | None,
    null_label: int | None = None,
    size: tuple[int, int] | None = None,
    access: Access = DEFAULT_ACCESS,
) -> Checkpoint:
    """Opens the checkpoint that the flags name."""
    return open_checkpoint(model_ref(model), null_label, size, access=access)


def find_classifier(
    refs: Sequence[str] | None,
    checkpoint: Checkpoint,
    input: str | None = None,
    access: Access = DEFAULT_ACCESS,
) -> AnyClassifier | None:
    """Opens the classifiers that the flags name, or the one beside the checkpoint, if any."""
    if not refs:
        bundled = checkpoint.bundled_classifier
        if bundled is None:
            return None
        found = open_classifier(bundled, input, access=access)
        place = f"{checkpoint.ref.partition('@')[0]}/{found.folder.name}"  # on the hub, it is of the checkpoint's commit
        return replace(found, ref=place, revision=checkpoint.revision) if checkpoint.revision else found
    return open_classifiers([_weighted(ref) for ref in refs], input, access)


def _weighted(ref: str) -> tuple[str, float]:
    """`dir:0.5` as ("dir", 0.5); of weight 1 where none is given.

    Raises:
        UsageError: a weight of zero.
    """
    name, weight = (ref, None) if Path(ref).expanduser().is_dir() else split_weight(ref)
    if weight == 0:
        raise UsageError(f"--classifier {ref} weighs nothing: leave it out.")
    return name, 1.0 if weight is None else weight


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of `512` or `768x512`, which is width x height as everywhere else.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"--size takes a number or WIDTHxHEIGHT, such as 512 or 768x512; found {text!r}.")
    return int(match[2] or match[1]), int(match[1])


def read_prompts(words: Iterable[str]) -> list[str]:
    """The texts that `--prompt` names: itself, the lines of @FILE, or those of standard input (-).

    Raises:
        UsageError: none, or a file that cannot be read.
    """
    prompts = [text for word in words for text in (_lines(word, "--prompt") if _names_lines(word) else [word])]
    if not prompts:
        raise UsageError('--prompt names no text. Give one, such as --prompt "a red fox".')
    return list(dict.fromkeys(prompts))


def resolve_labels(words: Iterable[str], labels: Labels) -> list[int | str]:
    """Label ids from `--label`: ids, names, ranges, comma lists, @FILE and - (standard input).

    A comma list in which a part has a weight (`207:3.0,281:-1.0`) is one mixture, as `format_labels` writes it.

    Raises:
        UsageError: unknown, ambiguous, or a file that cannot be read.
    """
    ids: list[int | str] = []
    for word in words:
        for text in _lines(word, "--label") if _names_lines(word) else word.splitlines():
            if labels.knows(text):
                ids += labels.resolve(text)
                continue
            parts = [part for part in next(csv.reader([text], skipinitialspace=True)) if part.strip()]
            weighted = [(part, None) if labels.knows(part) else split_weight(part) for part in parts]
            if any(weight is not None for _, weight in weighted):
                ids.append(_mixture(text, weighted, labels))
            else:
                ids += [label for part in parts for label in labels.resolve(part)]
    if not ids:
        raise UsageError('--label names no label. Give ids or names, such as --label 207 or --label "tabby,0-9".')
    return list(dict.fromkeys(ids))


def _mixture(text: str, weighted: Iterable[tuple[str, float | None]], labels: Labels) -> str:
    parts: dict[int, float] = {}
    for word, weight in weighted:
        found = labels.resolve(word)
        if len(found) != 1 or found[0] in parts:
            raise UsageError(f"--label {text}: a mixture takes single labels, each once; found {word!r}.")
        parts[found[0]] = 1.0 if weight is None else weight
    return format_labels(list(parts.items()))


def _names_lines(word: str) -> bool:
    return word == "-" or word.startswith("@")


def _lines(word: str, flag: str) -> list[str]:
    """The lines of a file (@FILE) or of standard input (-), without blanks and a label's `#` comments."""
    try:
        text = sys.stdin.read() if word == "-" else Path(word[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {word}: cannot read that file: {error}") from None
    lines = (line.partition("#")[0] if flag == "--label" else line for line in text.splitlines())
    return [line.strip() for line in lines if line.strip()]
