"""Help screens: the options that most need, and all of them with `--help-all`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


def hide_types(command: Any, ctx: Any) -> None:
    """Switches take no value, so that their help names no type; arguments are called by their metavars alone."""
    for param in (*command.params, command.get_help_option(ctx)):
        is_argument = param.param_type_name == "argument"
        if is_argument or getattr(param, "is_flag", False):
            param.display_type_rich = lambda ctx: None
        if is_argument and param.metavar:
            param.get_usage_pieces = lambda ctx, name=param.metavar: [name]


def with_short_help(common: Sequence[str]) -> type[TyperCommand]:
    """A class of command whose `--help` shows a few options, without groups.

    Args:
        common: the names of their parameters, in the order in which they are shown.
    """

    class ShortHelp(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            short = copy.copy(self)
            by_name: dict[Any, Any] = {param.name: param for param in self.params}
            short.params = [copy.copy(by_name[name]) for name in (*common, "help_all")]
            for param in short.params:
                param.__dict__["rich_help_panel"] = None
            TyperCommand.format_help(short, ctx, formatter)

    return ShortHelp


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if asked:
        command: Any = ctx.command
        TyperCommand.format_help(command, ctx, ctx.make_formatter())
        raise typer.Exit


@dataclass(frozen=True)
class HelpAll:
    """The option that shows all options, in groups."""

    help_all: Annotated[
        bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show all options and exit.")
    ] = False
