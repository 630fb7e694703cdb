"""Guidance methods: each turns an unconditional and a conditional prediction into a guided one.

`conditional` is the network's with the label; in classifier mode it is the unconditional one with
the classifier's gradient added (Bayes' rule), so that every method serves both modes. At w = 0 and
w = 1 each method is the unconditional and the conditional model: there guidegen does not call it
with both, and hands it the one prediction twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from guidegen.errors import UsageError, first_line
from guidegen.python_file import blamed, read_python_ref, refuse_custom, split_python_ref
from guidegen.scores.interfaces import Step
from guidegen.scores.noise import Level
from guidegen.spec.parse import parse_like

Combine = Callable[..., Tensor]
"""(unconditional, conditional, w, step, **options) -> guided; (B, C, H, W) fp32, w (B, 1, 1, 1)."""
Gain = Callable[[Level, Level], float]
"""What w is multiplied by at a step, from the noise level of its input and that of its output."""


@dataclass(frozen=True)
class Method:
    """One entry of `--guidance`.

    Attributes:
        name: of the flag.
        combine: the formula.
        line: what it does, in a few words.
        formula: plain text, in the terms of `SYMBOLS`.
        source: paper and equation.
        changes: which part of u + w (c - u): one of `PARTS`; nothing for the plain one.
        linear: whether it is u + w (c - u) with some w, so that predictions of zero weight can be skipped
            also where a classifier is added to classifier-free guidance.
        gain: multiplies w at each step; None where w stays as it is.
        images: whether it reads the layout of an image (B, C, H, W), which packed tokens do not have.
    """

    name: str
    combine: Combine
    line: str
    formula: str
    source: str
    changes: str = ""
    linear: bool = False
    gain: Gain | None = None
    images: bool = False

    @property
    def options(self) -> Mapping[str, Any]:
        """Names and defaults of the options that `--guidance-opt` sets."""
        parameters = inspect.signature(self.combine).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def __call__(self, unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step, **options: Any) -> Tensor:
        """The guided prediction, with samples of w = 0 and w = 1 being the two models themselves.

        `combine` alone may differ there (a threshold, a first step of zero), and would make the image
        of one cell depend on the weights of the cells beside it.
        """
        guided = self.combine(unconditional, conditional, w, step, **options)
        return torch.where(w == 1, conditional, torch.where(w == 0, unconditional, guided))


PARTS = {"w": "the weight", "difference": "the difference c - u", "u": "where it starts, u", "result": "the result"}
"""What of u + w (c - u) a method changes."""
SYMBOLS = {
    "u, c": "the unconditional and the conditional prediction",
    "d": "c - u",
    "g": "u + w d",
    "x0( )": "the denoised image that a prediction means",
    "r": "sigma / alpha, r' after the step",
    "s": "a percentile of |x0(g)|",
    "v": "the main direction of u and c",
}
"""What the formulas of `METHODS` mean."""

METHODS: dict[str, Method] = {}
"""By the name of the flag: what `method` has registered."""


def method(name: str, formula: str, source: str, *, line: str | None = None, **others: Any) -> Callable[[Combine], Combine]:
    """Makes the function that it decorates an entry of `METHODS`.

    Args:
        name, formula, source, others: as the attributes of `Method`.
        line: what it does; None takes the first line of its docstring.
    """

    def register(combine: Combine) -> Combine:
        first = (inspect.getdoc(combine) or "").splitlines()[0].removesuffix(".")
        METHODS[name] = Method(name, combine, line or first[:1].lower() + first[1:], formula, source, **others)
        return combine

    return register


def find_method(ref: str, options: Mapping[str, str] | None = None) -> tuple[Method, dict[str, Any]]:
    """The method behind `--guidance` and the options of `--guidance-opt` as its function takes them.

    It is tried once on a few numbers, so that an option out of range is refused before a model is loaded.

    Args:
        ref: a name of `METHODS`, or `path/to/file.py:NAME`, whose file is then run: a function
            `(unconditional, conditional, w, step, *, option=default) -> guided`.
        options: name -> text.

    Returns:
        The method, and those options that were given, of the type of their defaults.

    Raises:
        UsageError: no such method or option, a value of the wrong type, or one that the method cannot take.
    """
    method = _own_method(ref) if split_python_ref(ref) else METHODS.get(ref.lower())
    if method is None:
        close = get_close_matches(ref.lower(), METHODS, 1, 0.5)
        asked = f"Did you mean {close[0]}?" if close else f"There are {', '.join(METHODS)}."
        raise UsageError(f"--guidance {ref}: no such method. {asked} `guidegen guidances` lists them.")
    values = {name: _value(method, name, text) for name, text in (options or {}).items()}
    _try(method, values)
    return method, values


def _own_method(ref: str) -> Method:
    function = read_python_ref(ref, object, UsageError)
    if not callable(function):
        raise UsageError(f"{ref} is a {type(function).__name__}; it should be a function.")
    with blamed(ref, UsageError, function):
        line = (inspect.getdoc(function) or "custom").splitlines()[0]
        method = Method(ref, _own_combine(ref, function), line, "", ref.rpartition(":")[0])
        required = [name for name, default in method.options.items() if default is inspect.Parameter.empty]
    if required:
        raise refuse_custom(ref, UsageError, function, f"give {', '.join(required)} a default.")
    return method


def _own_combine(ref: str, function: Combine) -> Combine:
    """A custom function as a `Combine`: what it raises, or gives that is no prediction, is a `UsageError`."""

    @wraps(function)
    def combine(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step, **options: Any) -> Tensor:
        with blamed(ref, UsageError, function, drawing=True):
            guided: Any = function(unconditional, conditional, w, step, **options)
        if not isinstance(guided, Tensor):
            raise refuse_custom(ref, UsageError, function, f"gives a {type(guided).__name__}; it should be a tensor.")
        asked, found = ((tuple(x.shape), x.dtype, x.device.type) for x in (conditional, guided))
        if found != asked:
            message = f"gives {' '.join(map(str, found))} for predictions of {' '.join(map(str, asked))}."
            raise refuse_custom(ref, UsageError, function, message)
        return guided

    return combine


def choices(method: Method, name: str) -> tuple[str, ...]:
    """The words that an option of text takes; () for any, and for options that are numbers."""
    try:
        return get_args(get_type_hints(method.combine).get(name))
    except Exception:  # names that a custom function imports for type checkers alone
        return ()


def _value(method: Method, name: str, text: str) -> Any:
    """An option's text as the type of its default."""
    flag = f"--guidance-opt {name}={text}"
    if name not in method.options:
        known = ", ".join(f"{key}={default}" for key, default in method.options.items())
        raise UsageError(f"{flag}: {method.name} has {f'no such option. It has {known}' if known else 'no options'}.")
    default = method.options[name]
    if isinstance(default, int | float):
        return parse_like(default, text, flag)
    if (words := choices(method, name)) and text not in words:
        raise UsageError(f"{flag}: give {' or '.join(words)}.")
    return text


def _try(method: Method, options: Mapping[str, Any]) -> None:
    """Guides a picture of 8x8 numbers once; what is wrong with an option or with a custom function shows."""
    unconditional, conditional, x_t = torch.randn((3, 2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    step = Step(x_t, Level(0.8, 0.6), "epsilon", index=9, count=10)
    given = " ".join(f"{name}={value}" for name, value in options.items())
    asked = f"--guidance {method.name}{' --guidance-opt ' * bool(given)}{given}"
    before = (unconditional.clone(), conditional.clone(), x_t.clone())
    try:
        guided = method.combine(unconditional, conditional, torch.full((2, 1, 1, 1), 3.0), step, **options)
    except UsageError as error:
        raise UsageError(f"{asked}: {error}") from error
    except Exception as error:
        raise UsageError(f"{asked}: {type(error).__name__}: {first_line(error)}") from error
    if not all(map(torch.equal, before, (unconditional, conditional, x_t))):
        raise UsageError(f"{asked}: changes its inputs in place; it should leave them as they are.")
    if not guided.isfinite().all():
        raise UsageError(f"{asked}: gives numbers that are not finite.")
