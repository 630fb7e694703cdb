"""A command line as run.json keeps it, which every command that guidegen prints is rendered from."""

from __future__ import annotations

import os
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

    def into(self, out: str, read: Mapping[str, list[str]], source: Mapping[str, Any]) -> Command:
        """The same from anywhere and into another `-o`.

        Args:
            out: the run directory.
            read: flag -> the words to give in place of all of its own, if one of them is `-` or @FILE.
            source: flag -> what to give in place of what names no file that is here.
        """
        options = dict(self.options)
        for flag, words in read.items():
            if any(word == "-" or word.startswith("@") for word in _listed(options.get(flag, ()))):
                options[flag] = words
        for flag, refs in source.items():
            if refs and not all(os.path.exists(os.path.expanduser(word)) for word in _listed(options.get(flag, ()))):
                options[flag] = refs
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


def _listed(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]


def _words(flag: str, value: Any) -> Iterator[str]:
    if value is True:
        yield f"--{flag}"
        return
    for text in _listed(value):
        if text.startswith("-") and text != "-":
            yield f"--{flag}={text}"
        else:
            yield from (f"--{flag}", text)
