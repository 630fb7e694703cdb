"""A command line as run.json keeps it, which every command that guidegen prints is rendered from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command of guidegen and the options that are not its defaults.

    Attributes:
        name: sample or sweep.
        options: value of each option, by its flag without dashes; a list for one that repeats, True for a switch.
    """

    name: str
    options: Mapping[str, Any]

    def without(self, *flags: str) -> Command:
        """The same without some options, given by their flags without dashes."""
        return replace(self, options={flag: value for flag, value in self.options.items() if flag not in flags})

    def into(self, out: str, read: Mapping[str, list[str]]) -> Command:
        """The same into another `-o`, with what was read from standard input as its words.

        Args:
            out: the run directory.
            read: flag -> the words to give in place of all of its own, if one of them is `-`.
        """
        options = dict(self.options)
        for flag, words in read.items():
            given = options.get(flag, ())
            if "-" in (given if isinstance(given, list | tuple) else [given]):
                options[flag] = words
        return replace(self, options=options | {"out": out})

    def words(self) -> list[str]:
        """The words of the command line."""
        return ["guidegen", self.name, *(word for flag, value in self.options.items() for word in _words(flag, value))]

    def __str__(self) -> str:
        """The line for a POSIX shell."""
        return shlex.join(self.words())

    def as_json(self) -> dict[str, Any]:
        """Its part of run.json."""
        return {"command": self.name, "options": dict(self.options)}


def read_command(about: Mapping[str, Any]) -> Command | None:
    """The command that made a run, from its run.json; None where that does not say."""
    return Command(about["command"], about["options"]) if about.get("command") and "options" in about else None


def read_commands(about: Mapping[str, Any]) -> list[Command | None]:
    """The command of each plan of a run, from its run.json; None where that does not say."""
    if about.get("commands"):
        return [read_command(command) for command in about["commands"]]
    return [read_command(about)] * len(about.get("plans", ()))


def _words(flag: str, value: Any) -> Iterator[str]:
    if value is True:
        yield f"--{flag}"
        return
    for text in map(str, value if isinstance(value, list | tuple) else [value]):
        if text.startswith("-") and text != "-":
            yield f"--{flag}={text}"
        else:
            yield from (f"--{flag}", text)
