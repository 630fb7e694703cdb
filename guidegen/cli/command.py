"""Commands made of dataclasses: each field is a flag, and its annotation the option of Typer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import MISSING, fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from guidegen.spec.command import Command


def make_command(run: Callable[..., Any], *groups: type) -> Callable[..., Any]:
    """A function for `typer.Typer.command`, whose flags are the fields of some dataclasses.

    Args:
        run: called with an instance of each group.
        groups: frozen dataclasses, all of whose fields are options of Typer.
    """

    def command(**given: Any) -> Any:
        values = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
        return run(*(group(**{field.name: values[field.name] for field in fields(group)}) for group in groups))

    parameters: dict[str, inspect.Parameter] = {}
    for group in groups:
        for parameter in _parameters(group):
            parameters.setdefault(parameter.name, parameter)  # groups may share a flag
    command.__signature__ = inspect.Signature([*parameters.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return command


def command_of(name: str, *groups: Any) -> Command:
    """The command whose options these are: instances of the dataclasses that it was made of."""
    given: dict[str, Any] = {}
    for group in groups:
        cls: type = type(group)
        hints = _hints(cls)
        for field in fields(group):
            value = getattr(group, field.name)
            if value != field.default and value is not None:
                given[_flag(field.name, hints[field.name])] = str(value) if isinstance(value, Path) else value
    return Command(name, given)


def flags_of(*groups: type) -> set[str]:
    """The long flags of groups, without dashes."""
    return {_flag(field.name, _hints(group)[field.name]) for group in groups for field in fields(group)}


def _flag(name: str, hint: Any) -> str:
    """The long flag of a field, without dashes."""
    (option,) = (each for each in hint.__metadata__ if hasattr(each, "param_decls"))
    flags = (option.default, *(option.param_decls or ()))  # in an annotation the first flag stands as the default
    long = (flag for flag in flags if isinstance(flag, str) and flag.startswith("--"))
    return str(next(long, f"--{name.replace('_', '-')}")).removeprefix("--")


@cache
def _hints(group: Hashable) -> dict[str, Any]:
    """The annotations of a group; several commands have the same groups."""
    return get_type_hints(group, include_extras=True)


def _parameters(group: type) -> Iterator[inspect.Parameter]:
    hints = _hints(group)
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])
