"""Checks of the Python API's arguments: errors that name the argument, what it takes and what was found."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any


def whole(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """A whole number from `least` to `most`.

    Raises:
        TypeError: no whole number.
        ValueError: out of that range.
    """
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} takes whole numbers, found {value!r}.") from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} takes whole numbers from {least}{'' if most is None else f' to {most}'}, found {number}.")
    return number


def several(name: str, values: Any, count: int | None = None, of: str = "label") -> list[Any]:
    """A list of `count` values, one for each of what `of` names; of any number but none where `count` is None.

    Raises:
        TypeError: no list.
        ValueError: too few or too many.
    """
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} takes a list, found {values!r}.")
    found = list(values)
    if count is None and not found:
        raise ValueError(f"{name} is empty.")
    if count is not None and len(found) != count:
        raise ValueError(f"{name} takes one value for each {of}, {count} in all; found {len(found)}.")
    return found


def finite(name: str, value: Any) -> float:
    """A finite number.

    Raises:
        TypeError: no number.
        ValueError: infinite or not a number.
    """
    try:
        number = float("" if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} takes numbers, found {value!r}.") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} takes finite numbers, found {number}.")
    return number


def one_of(name: str, value: Any, known: Collection[Any]) -> None:
    """Raises ValueError where `value` is none of the known ones."""
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(map(str, known))}; found {value!r}.")


def instance(name: str, value: Any, kind: Any, words: str = "") -> None:
    """Raises TypeError where `value` is not of that class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} takes {words or kind.__name__}, found {value!r:.80}.")
