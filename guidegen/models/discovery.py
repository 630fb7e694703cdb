"""Classes that are found by the module they are in, so that adding one is adding a file."""

from __future__ import annotations

from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules
from typing import TypeVar

T = TypeVar("T")


def subclasses_in(package: str, base: type[T]) -> list[type[T]]:
    """The subclasses of `base`, abstract ones aside, that the modules of a package define, in the order of their names."""
    names = [f"{package}.{module.name}" for module in iter_modules(import_module(package).__path__)]
    return [
        value
        for name in names
        for value in vars(import_module(name)).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == name and not isabstract(value)
    ]
