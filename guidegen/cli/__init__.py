"""The command line: flags become a plan. Loads neither torch nor diffusers before a command needs them."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import Annotated

import typer

from guidegen import __version__
from guidegen.cli import console
from guidegen.cli.convert import register as register_convert
from guidegen.cli.draw import register as register_draw
from guidegen.cli.evaluate import register as register_evaluate
from guidegen.cli.finish import register as register_finish
from guidegen.cli.guidances import register as register_guidances
from guidegen.cli.report import register as register_report
from guidegen.cli.show import register as register_show
from guidegen.errors import GuidegenError
from guidegen.own import blame

app = typer.Typer(
    name="guidegen",
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
register_finish(app)
register_show(app)
register_guidances(app)
register_convert(app)
register_evaluate(app)
register_report(app)


def main() -> None:
    """Runs the command line; turns errors into one or two lines and an exit code."""
    debug = "--debug" in sys.argv
    try:
        app(prog_name="guidegen")
    except GuidegenError as error:
        console.error(error)
        _leave(error.code, debug)
    except KeyboardInterrupt:
        console.error("Interrupted.")
        _leave(130, debug)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        console.error(f"{error.strerror or error}{where}. What was finished is intact; the same command goes on from there.")
        _leave(74, debug)
    except Exception as error:
        if blamed := blame(error):
            console.error(blamed)
            _leave(blamed.code, debug)
        console.error(f"Unexpected {type(error).__name__}: {error}\nRun again with --debug for the traceback.")
        _leave(1, debug)


def _leave(code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # nobody reads standard output any more
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: an interrupted torch can hang or complain on its way out
