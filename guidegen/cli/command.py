"""Commands made of dataclasses: each field is a flag, and its annotation the option."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, get_type_hints

import typer


def make_command(run: Callable[..., None], *groups: type) -> Callable[..., None]:
    """A function for `typer.Typer.command`, whose flags are the fields of some dataclasses.

    Args:
        run: called with the typer context and an instance of each group.
        groups: frozen dataclasses. A field whose annotation is no option of typer is not asked for: `run` sets it.
    """

    def command(ctx: typer.Context, **given: Any) -> None:
        values = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
        run(ctx, *({parameter.name: values[parameter.name] for parameter in _parameters(group)} for group in groups))

    own = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [own, *(parameter for group in groups for parameter in _parameters(group))]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(group: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if hasattr(hints[field.name], "__metadata__"):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
            )
