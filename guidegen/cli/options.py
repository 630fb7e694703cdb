"""Flags shared by several commands, and what turns their text into values."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.cli import console
from guidegen.errors import UsageError, quoted
from guidegen.models.checkpoint import Access, AnyClassifier, Checkpoint, open_checkpoint, open_classifier
from guidegen.models.classifiers.opening import open_classifiers
from guidegen.models.labels import Labels
from guidegen.models.weight_files import DEFAULT_ACCESS
from guidegen.schema import LARGEST_TEXT, read_bytes
from guidegen.spec import limits
from guidegen.spec.composition import format_labels, prompt_parts, split_weight
from guidegen.spec.options import HOW, WHAT
from guidegen.spec.parse import whole
from guidegen.zoo import BUNDLED

_LINE_END = re.compile(r"\r\n|\n|\r")  # not str.splitlines, which ends lines at a dozen other letters
_LONGEST_SIDE = 2**16
_MODEL, _OUTPUT, _TALK = "Checkpoint", "Output", "Messages"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="ID|DIR",
        envvar="GUIDEGEN_MODEL",
        help="Folder, hub id (owner/name, owner/name@revision), or a custom file.py:NAME. Default: the bundled one.",
        rich_help_panel=_MODEL,
    ),
]
ClassifierRef = Annotated[
    list[str] | None,
    typer.Option(
        "--classifier",
        "-c",
        metavar="ID|DIR[:W]",
        help="Classifier of the modes classifier and both: a noise-aware one, an image classifier of transformers, or a "
        "CLIP-like model. Repeats: gradients are summed, with weights W. Default: the one in the checkpoint's folder.",
        rich_help_panel=_MODEL,
    ),
]
GuideRef = Annotated[
    str | None,
    typer.Option(
        "--guide-model",
        metavar="ID|DIR|WORD",
        help="Guiding model of autoguidance: a smaller or less trained checkpoint or network; bundled (the one in the "
        "checkpoint's folder); or the model itself with identity self-attention (pag), without some layers (skip, "
        "skip:mid_block), or at timesteps with noise (tsg, tsg:0.2). Default in mode autoguidance: bundled.",
        rich_help_panel=_MODEL,
    ),
]
NullLabel = Annotated[
    int | None,
    typer.Option(
        "--null-label",
        metavar="ID",
        help="Class that means 'no label', if the checkpoint does not name it.",
        rich_help_panel=_MODEL,
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.", rich_help_panel=_MODEL)]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Variant of the weight files to read, such as fp16.",
        rich_help_panel=_MODEL,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Accept pickled weights, read with weights_only=True.", rich_help_panel=_MODEL),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait",
        help="Wait while another process draws into the run. Otherwise it is an error (exit code 75).",
        rich_help_panel=_OUTPUT,
    ),
]


def threads_option(panel: str) -> Any:
    """`--threads`, in this panel of a command's help."""
    return typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="Threads on a CPU. Another number can move pixels by one level of 255. Default: OMP_NUM_THREADS, or the cores "
        "that affinity and cgroup allow.",
        rich_help_panel=panel,
    )


Threads = Annotated[int | None, threads_option(HOW)]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the networks with torch.compile: a slow start, then faster steps.",
        rich_help_panel=HOW,
    ),
]


class Offload(StrEnum):
    none = "none"
    model = "model"
    group = "group"


OffloadTo = Annotated[
    Offload,
    typer.Option(
        "--offload",
        help="For text-to-image pipelines that are larger than the device's memory: keep on it only the network that works "
        "(model), or only its layer (group).",
        rich_help_panel=HOW,
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Also overwrite files that guidegen did not make.", rich_help_panel=_OUTPUT),
]
SeedsPerLabel = Annotated[
    bool,
    typer.Option(
        "--seeds-per-label",
        help="Give each label its own seeds, as diversity metrics need: those asked for, plus 100,000 times its id.",
        rich_help_panel=WHAT,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Start over; without it, finished images are kept.", rich_help_panel=_OUTPUT),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.", rich_help_panel=_TALK)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no notes.", rich_help_panel=_TALK)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_TALK)]


def model_ref(model: str | None) -> str:
    """The checkpoint asked for, or the bundled one."""
    console.check_text([model or ""])  # it may come from the environment
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
        where = f"{checkpoint.ref.partition('@')[0]}/{found.folder.name}"  # on the hub, it is of the checkpoint's commit
        return replace(found, ref=where, revision=checkpoint.revision) if checkpoint.revision else found
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
    sides = [whole(side) or 0 for side in text.strip().lower().split("x", 1)]
    if not all(0 < side <= _LONGEST_SIDE for side in sides):
        raise UsageError(
            f"--size {quoted(text)}: give WIDTHxHEIGHT or one number, of 1 to {_LONGEST_SIDE} pixels, as 768x512 or 512."
        )
    return sides[-1], sides[0]


def read_prompts(words: Iterable[str]) -> list[str]:
    """The texts that `--prompt` names: itself, the lines of @FILE, or those of standard input (-).

    Raises:
        UsageError: none, more than `limits.LIST`, or a file that cannot be read.
    """
    prompts = [text for word in words for text in (_lines(word, "--prompt") if _names_lines(word) else [word])]
    if not prompts:
        raise UsageError('--prompt names no text. Give one, such as --prompt "a red fox".')
    for prompt in prompts:
        prompt_parts(prompt)
    return list(dict.fromkeys(prompts))


def resolve_labels(words: Iterable[str], labels: Labels) -> list[int | str]:
    """Label ids from `--label`: ids, names, ranges, comma lists, @FILE and - (standard input).

    A comma list in which a part has a weight (`207:3.0,281:-1.0`) is one mixture, as `format_labels` writes it.

    Raises:
        UsageError: unknown, ambiguous, more than `limits.LIST`, or a file that cannot be read.
    """
    texts = (text for word in words for text in (_lines(word, "--label") if _names_lines(word) else word.splitlines()))
    ids: dict[int | str, None] = {}
    count = 0
    for text in dict.fromkeys(texts):
        some = _labels_of(text, labels)
        ids |= dict.fromkeys(some)
        count += len(some)
        if count > limits.LIST:
            raise UsageError(f"--label names more than {limits.LIST:,} labels.")
    if not ids:
        raise UsageError('--label names no label. Give ids or names, such as --label 207 or --label "tabby,0-9".')
    return list(ids)


def _labels_of(text: str, labels: Labels) -> list[int | str]:
    """The labels of one line: a name, a list, or a mixture."""
    if labels.knows(text):
        return [*labels.resolve(text)]
    try:
        parts = [part for part in next(csv.reader([text], skipinitialspace=True)) if part.strip()]
    except csv.Error as error:
        raise UsageError(f"--label {quoted(text)} is no list of labels: {error}.") from None
    weighted = [(part, None) if labels.knows(part) else split_weight(part) for part in parts]
    if any(weight is not None for _, weight in weighted):
        return [_mixture(text, weighted, labels)]
    return [label for part in dict.fromkeys(parts) for label in labels.resolve(part)]


def _mixture(text: str, weighted: Iterable[tuple[str, float | None]], labels: Labels) -> str:
    parts: dict[int, float] = {}
    for word, weight in weighted:
        found = labels.resolve(word)
        if len(found) != 1 or found[0] in parts:
            raise UsageError(f"--label {quoted(text)}: a mixture takes single labels, each once; found {quoted(word)}.")
        parts[found[0]] = 1.0 if weight is None else weight
    return format_labels(list(parts.items()))


def _names_lines(word: str) -> bool:
    return word == "-" or word.startswith("@")


def _lines(word: str, flag: str) -> list[str]:
    """The lines of a file (@FILE) or of standard input (-) but blank ones.

    Of `--label` without `#` comments, and of `ID<TAB>NAME`, as `guidegen labels` prints it, the id.

    Raises:
        UsageError: there is no such file, it is no text, or it is longer than a list can be.
    """
    where = f"{flag} {quoted(word)}"
    try:
        data = _standard_input(where) if word == "-" else read_bytes(Path(word[1:]), UsageError)
    except UsageError as error:
        raise UsageError(str(error) if word == "-" else f"{flag} @FILE: {error}") from None
    if data.count(b"\n") > limits.LIST:
        raise UsageError(f"{where} has more than {limits.LIST:,} lines.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not text in UTF-8: {error}.") from None
    if "\0" in text:
        raise UsageError(f"{where} is not text: it holds null bytes.")
    lines = map(_label_line, _LINE_END.split(text)) if flag == "--label" else _LINE_END.split(text)
    return [line.strip() for line in lines if line.strip()]


def _label_line(line: str) -> str:
    line = line.partition("#")[0].strip()
    first, tab, _ = line.partition("\t")
    return first if tab and whole(first.strip()) is not None else line


def _standard_input(where: str) -> bytes:
    """All of it: not a terminal's, which would look like a hang, and no more of it than of a file."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError(f"{where}: standard input is closed; pipe a list into it.")
    if sys.stdin.isatty():
        raise UsageError(f"{where}: standard input is a terminal; pipe a list into it.")
    try:
        data = sys.stdin.buffer.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise UsageError(f"{where}: standard input cannot be read: {error.strerror or error}.") from None
    if len(data) > LARGEST_TEXT:
        raise UsageError(f"{where}: standard input has more than {LARGEST_TEXT:,} bytes, or no end.")
    return data
