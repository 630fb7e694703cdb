"""What `guidegen convert` asks of a format, and which formats there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import typer

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.discovery import subclasses_in
from guidegen.models.python_ref import label_names
from guidegen.schema import decode, read_bytes

HIDDEN = "What its weights do not show"
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help='Label names, which such files lack, as JSON: {"0": "tench", ...} or ["tench", ...].',
        rich_help_panel=HIDDEN,
    ),
]
Heads = Annotated[
    int | None,
    typer.Option("--heads", min=1, metavar="N", help="Attention heads of every layer (num_heads).", rich_help_panel=HIDDEN),
]


class Converted(Protocol):
    """A converted network, not yet written."""

    def describe(self) -> str:
        """Kind and sizes of the network, in one line."""
        ...

    def save(self, folder: Path) -> None:
        """Writes it into an empty folder, as the other commands open it."""
        ...


class Format(ABC):
    """A checkpoint format of another project. A subclass is found by the module of this package that it is in."""

    name: ClassVar[str]
    expected: ClassVar[str]
    """How an error names a file of this format."""
    help: ClassVar[str]
    """Paragraphs of the help of `guidegen convert`."""
    options: ClassVar[type]
    """A frozen dataclass of its flags: the annotation of each field is an option of Typer. Formats may share a flag."""
    written: ClassVar[frozenset[str]]
    """Names at the top of a folder that `Converted.save` writes."""
    asked_last: ClassVar[bool] = False
    """Whether a file is only of this format if it is of no other."""

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether a file, which may be missing, looks like one of this format; reads no weights."""

    @classmethod
    @abstractmethod
    def convert(cls, path: Path, options: Any) -> Converted:
        """Reads a file.

        Args:
            path: of a file that `matches`.
            options: an instance of `options`.

        Raises:
            CheckpointError: missing, damaged, or not of this format.
            UnsafeError: opening it would run code.
            UsageError: an option is missing or does not fit.
        """


@cache
def formats() -> list[type[Format]]:
    """Every format, in the order in which a file is held against them."""
    found = subclasses_in("guidegen.models.convert", Format)  # type: ignore[type-abstract]
    return sorted(found, key=lambda format: format.asked_last)


def find_format(path: Path) -> type[Format]:
    """The format of a file.

    Raises:
        CheckpointError: it is of none.
    """
    for format in formats():
        if format.matches(path):
            return format
    what = "is a folder" if path.is_dir() else "is of no format that guidegen converts" if path.exists() else "is not there"
    raise CheckpointError(f"{path} {what}. Name {' or '.join(format.expected for format in formats())}.")


def read_label_names(path: Path) -> dict[int, str]:
    """id -> name of labels, from a JSON file with such an object, or with a list of the names in order.

    Raises:
        UsageError: it is something else.
    """
    where = f"--labels {path}"
    try:
        data = decode(read_bytes(path, UsageError), object, "it", UsageError)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    names = label_names(dict(enumerate(data)) if isinstance(data, list) else data, where, UsageError)
    if not names:
        raise UsageError(f'{where}: should map ids to names, {{"0": "tench", ...}}, or list the names in order.')
    return names
