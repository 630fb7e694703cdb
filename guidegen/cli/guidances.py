"""`guidegen guidances`: what `--guidance` can be, and how it follows from Bayes' rule."""

from __future__ import annotations

import inspect
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guidegen.cli import console, options

if TYPE_CHECKING:
    from guidegen.scores.methods import Method

CALLS = {"cfg": (2, 0), "classifier": (1, 1), "both": (2, 1)}
"""Network calls and gradients of a step in each mode, the same for every method."""
_WIDE = 120


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("guidances", help="List the guidance methods, or explain one.")(_guidances)


def _guidances(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A method to explain, or a custom file.py:NAME. Default: list all."),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    from guidegen.scores.methods import METHODS, SYMBOLS, find_method

    methods = list(METHODS.values()) if name is None else [find_method(name)[0]]
    if as_json:
        for method in methods:
            console.result(json.dumps({"type": "guidance"} | fields_of(method), ensure_ascii=False))
    elif name is not None:
        console.result(explanation(methods[0]))
    else:
        console.result(derivation(methods) + "\n")
        _table(methods)
        legend = "\n".join(f"  {symbol:<6}{meaning}" for symbol, meaning in SYMBOLS.items())
        console.result(f"\n{legend}\n\n{_costs()}\n`guidegen guidances NAME` explains one, with its options.")


def fields_of(method: Method) -> dict[str, Any]:
    """One method as a row of `--json`."""
    from guidegen.scores.methods import SYMBOLS

    return {
        "name": method.name,
        "line": method.line,
        "formula": method.formula,
        "symbols": SYMBOLS,
        "changes": method.changes or None,
        "options": dict(method.options),
        "modes": list(CALLS),
        "calls": {mode: calls for mode, (calls, _) in CALLS.items()},
        "gradients": {mode: gradients for mode, (_, gradients) in CALLS.items()},
        "source": method.source,
    }


def derivation(methods: list[Method]) -> str:
    """Both modes from Bayes' rule, and which methods change which part."""
    from guidegen.scores.methods import PARTS

    lines = [
        "Bayes' rule in scores:    grad log p(x|y) = grad log p(x) + grad log p(y|x)",
        "Guidance weighs its last term:         s_w = grad log p(x) + w grad log p(y|x)",
        "  w = 0 is the unconditional model, w = 1 the conditional one, w > 1 is sharper.",
        "classifier  A classifier gives that term: u is the model's prediction without a",
        "            label, and c is u moved along the gradient of log p(y|x).",
        "cfg         The model gives it itself, as grad log p(x|y) - grad log p(x):",
        "            u and c are its predictions without and with the label.",
        "both        c is the prediction with the label, moved along the gradient.",
        "Predictions are linear in the score, so guided = u + w (c - u). Methods change",
    ]
    for part, words in PARTS.items():
        names = [method.name for method in methods if method.changes == part]
        names += ["--interval", "--w-schedule"] if part == "w" else []
        lines.append(f"  {words + ':':<24}{', '.join(names)}")
    return "\n".join(lines)


def explanation(method: Method) -> str:
    """All that there is to say of one method."""
    from guidegen.scores.methods import choices

    text = [f"{method.name}: {method.line}"] + ([f"    {method.formula}"] if method.formula else [])
    text += ["", inspect.getdoc(method.gain or method.combine) or "It has no docstring.", ""]
    for option, default in method.options.items():
        words = choices(method, option)
        kind = " or ".join(words) if words else type(default).__name__
        text.append(f"--guidance-opt {option}={default}  ({kind})")
    return "\n".join([*text, *([""] if method.options else []), f"Source: {method.source}", _costs()])


def _costs() -> str:
    return (
        "A step takes in every method: cfg 2 network calls, classifier 1 and a gradient,\n"
        "both 2 and a gradient; of several classifiers one each. What has no weight is\n"
        "not called: u at w = 1, c at w = 0, and outside --interval all but the model."
    )


def _table(methods: list[Method]) -> None:
    if not sys.stdout.isatty():
        console.result("\n".join("\t".join((m.name, m.line, m.formula, m.source)) for m in methods))
        return
    from rich.console import Console
    from rich.table import Table

    screen = Console(highlight=False, markup=False)
    wide = screen.width >= _WIDE
    table = Table(show_header=wide, box=None, pad_edge=False, padding=(0, 2, 1 if not wide else 0, 0))
    table.add_column("name", style="bold", no_wrap=True)
    for title in ("what it does", "formula", "source") if wide else ("",):
        table.add_column(title, overflow="fold", no_wrap=title == "formula")
    for method in methods:
        cells = (method.line, method.formula, method.source)
        table.add_row(*map(console.clean, (method.name, *(cells if wide else ["\n".join(cells)]))))
    screen.print(table)
