"""`--scheduler-opt`: options of a scheduler's class in diffusers, which decide how it walks the noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from guidegen.errors import UsageError, quoted
from guidegen.sampling.schedulers import TRAINED
from guidegen.spec.options import Spacing
from guidegen.spec.parse import parse_like, parse_weight

SPACING = "timestep_spacing"
"""The option that has a flag, `--timestep-spacing`."""
_KINDS = ("use_flow_sigmas", "predict_epsilon", "sigma_data")  # what kind of network it walks, which the checkpoint says
_NONE = ("none", "null")


def split_options(words: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` words as texts by key.

    Raises:
        UsageError: a word that is none, or a key that is given twice.
    """
    options: dict[str, str] = {}
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not (key and equals and text):
            raise UsageError(f"--scheduler-opt takes KEY=VALUE, such as use_karras_sigmas=true; found {quoted(word)}.")
        if key in options:
            raise UsageError(f"--scheduler-opt {key} is given twice.")
        options[key] = text
    return options


def parse_options(scheduler: Any, texts: Mapping[str, str], flow: bool) -> dict[str, Any]:
    """The values of options of a scheduler's class, of the types of their defaults.

    Args:
        scheduler: made without them.
        texts: by key.
        flow: whether the model is flow-matching.

    Raises:
        UsageError: no such option, one that says what the network was trained on, or no value of it.
    """
    cls = type(scheduler)
    known = {name: each.default for name, each in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    values: dict[str, Any] = {}
    for key, text in texts.items():
        flag = "--timestep-spacing" if key == SPACING else f"--scheduler-opt {key}={quoted(text)[1:-1]}"
        if key in (*TRAINED, *_KINDS):
            raise UsageError(f"{flag}: the checkpoint says what its network was trained on, and that cannot be changed.")
        if key == SPACING and (key not in known or flow):
            raise UsageError(f"{flag} has no effect on {cls.__name__} with this checkpoint.")
        if key not in known:
            some = ", ".join(name for name in known if name not in (*TRAINED, *_KINDS)) or "none"
            raise UsageError(f"{flag}: {cls.__name__} has no such option. It has {some}.")
        values[key] = _value(key, known[key], text, flag)
    return values


def _value(key: str, default: Any, text: str, flag: str) -> Any:
    if key == SPACING:
        if text not in tuple(Spacing):
            raise UsageError(f"{flag} {text!r}: choose {', '.join(Spacing)}.")
        return text
    if isinstance(default, int | float):
        return parse_like(default, text, flag)
    if default is None:
        return None if text.lower() in _NONE else _number_or_text(text, flag)
    if not isinstance(default, str):
        raise UsageError(f"{flag}: that option cannot be written as text.")
    return text


def _number_or_text(text: str, flag: str) -> Any:
    try:
        return parse_weight(text, flag)
    except UsageError:
        return text
