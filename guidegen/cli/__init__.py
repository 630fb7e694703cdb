"""The command line: flags become a plan. Loads neither torch nor diffusers before a command needs them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from guidegen import __version__
from guidegen.cli import console, threads
from guidegen.cli.again import register as register_again
from guidegen.cli.convert import register as register_convert
from guidegen.cli.draw import register as register_draw
from guidegen.cli.evaluate import register as register_evaluate
from guidegen.cli.finish import register as register_finish
from guidegen.cli.guidances import register as register_guidances
from guidegen.cli.help import hide_types
from guidegen.cli.ls import register as register_ls
from guidegen.cli.presets import register as register_presets
from guidegen.cli.report import register as register_report
from guidegen.cli.show import register as register_show
from guidegen.cli.submit import register as register_submit
from guidegen.cli.tune import register as register_tune
from guidegen.errors import GuidegenError, UsageError, quoted
from guidegen.models import lazy
from guidegen.python_file import blame

_OF_PARSER = {
    r"^Invalid value for '(--[\w-]+)'( / '-\w')?": r"\1",
    "Value error, ": "",
    "Input should be a valid integer, unable to parse string as an integer": "{found} is not a whole number",
    "Unable to parse input string as an integer, exceeded maximum size": "{found} is too large",
    "Input should be a valid number, unable to parse string as a number": "{found} is not a number",
    "Input should be greater than or equal to (\\S+)": r"{found} is below \1, the least that it takes",
    r"^Got unexpected extra argument(?:\(s\)|s)? \((.*)\)": r"Extra argument: \1",
}
"""What typer and pydantic say, and what it is called here; {found} is what was given."""
_MAY_BE_EMPTY = ("--prompt", "-p", "--negative-prompt")


class _Commands(TyperGroup):
    """The commands. Refuses for all of them an empty word, such as a shell variable that is not set leaves.

    What the parser says of a wrong flag, in which that stands, is cleaned like all errors.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        flag = ""
        for word in args[1:]:
            name, equals, value = word.partition("=")
            if name.startswith("--") and equals:
                flag, word = name, value
            if not word.strip() and flag not in _MAY_BE_EMPTY:
                raise UsageError(f"{flag or 'An argument'} is empty: give it a value, or leave it out.")
            flag = word if word.startswith("-") else ""
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        hide_types(self, ctx)
        super().format_help(ctx, formatter)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            hide_types(command, ctx)
        return command

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        console.check_text(args)
        with _cleaned():
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _cleaned():
            return super().invoke(ctx)


@contextmanager
def _cleaned() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # click's, or the one that typer has of its own
            error.__dict__["message"] = console.clean(str(getattr(error, "message", "")))
        raise


app = typer.Typer(
    name="guidegen",
    cls=_Commands,
    help=(
        "Guided samples from pretrained diffusion checkpoints.\n\n"
        "The guidance weight w steers the score: w = 0 is unconditional, w = 1 is plain conditional, "
        "w > 1 trades diversity for fidelity."
    ),
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"guidegen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None: ...


register_draw(app)
register_tune(app)
register_again(app)
register_finish(app)
register_show(app)
register_guidances(app)
register_convert(app)
register_evaluate(app)
register_report(app)
register_ls(app)
register_presets(app)
register_submit(app)


def main() -> None:
    """Runs the command line; turns errors into one or two lines and an exit code."""
    console.guard()
    threads.prepare()
    lazy.install()
    debug = "--debug" in sys.argv
    try:
        code = app(prog_name="guidegen", standalone_mode=False)
    except GuidegenError as error:
        console.error(error)
        _leave(error.code, debug)
    except KeyboardInterrupt:
        console.error("Interrupted.")
        _leave(130, debug)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        console.error(f"{error.strerror or error}{where}.")
        _leave(74, debug)
    except Exception as error:
        if type(error).__name__ == "Abort":  # what the parser makes of a KeyboardInterrupt
            console.error("Interrupted.")
            _leave(130, debug)
        if _is_of_parser(error):
            _leave(2, debug)
        if blamed := blame(error):
            console.error(blamed)
            _leave(blamed.code, debug)
        console.error(f"Unexpected {type(error).__name__}: {error}\nRun again with --debug for the traceback.")
        _leave(1, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _is_of_parser(error: Any) -> bool:
    """Prints what the parser of the command line refuses; False for other errors."""
    if not hasattr(error, "format_message"):
        return False
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "guidegen"
        message = re.sub(r"\S{100,}", lambda word: f"{word[0][:80]}…", error.format_message().removesuffix("."))
        for theirs, ours in _OF_PARSER.items():
            message = re.sub(theirs, ours, message)
        message = message.replace("{found}", quoted(_found(getattr(getattr(error, "param", None), "opts", ()))))
        console.error(f"{message}{'' if message[-1:] in '.?!' else '.'} See `{command} --help`.")
    return True


def _found(flags: Sequence[str]) -> str:
    """What the command line gives for an option, the last time."""
    found = ""
    for word, after in pairwise([*sys.argv[1:], ""]):
        flag, equals, value = word.partition("=")
        found = (value if equals else after) if flag in flags else found
    return found


def _leave(code: int, debug: bool) -> None:
    if debug:
        console.show_traceback()
    with suppress(OSError):  # nobody reads standard output any more
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: an interrupted torch can hang or complain on its way out
