"""A quicker start: what diffusers imports without need is left until it is asked for.

`import diffusers` itself is lazy, but some packages in it import all their modules at once, and through them
transformers and the compiler of torch, which takes longer than one picture does. All names stay where they are.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any


class _OnDemand(SourceFileLoader):
    """A package whose `__init__.py` only imports names from its modules: each module is imported when it is asked for."""

    def exec_module(self, module: ModuleType) -> None:
        source = _imported(ast.parse(self.get_data(self.path)).body)
        if source is None:  # it does more than import
            super().exec_module(module)
            return
        name = module.__name__

        def find(attribute: str) -> Any:
            try:
                if attribute in source:
                    return getattr(importlib.import_module(f"{name}.{source[attribute]}"), attribute)
                return importlib.import_module(f"{name}.{attribute}")
            except ModuleNotFoundError as error:
                if error.name != f"{name}.{attribute}":
                    raise
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

        module.__dict__.update(__getattr__=find, __all__=[*source])


def _imported(body: Sequence[ast.stmt]) -> dict[str, str] | None:
    """From each name to the module that it comes from; None where something else is done than importing names."""
    found: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.If) and not node.orelse and isinstance(node.test, ast.Call):  # if is_torch_available():
            some = _imported(node.body)
        elif isinstance(node, ast.ImportFrom) and all(name.asname is None and name.name != "*" for name in node.names):
            some = {name.name: node.module for name in node.names} if node.level == 1 and node.module else {}
        else:
            some = {} if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
        if some is None:
            return None
        found |= some
    return found


@contextmanager
def without_compiler() -> Iterator[None]:
    """Does not load torch's compiler, a second, for what only tells it which functions to leave alone."""
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    stub: Any = ModuleType(name)
    stub.disable = stub.allow_in_graph = _unchanged
    sys.modules[name] = stub
    try:
        yield
    finally:
        del sys.modules[name]


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, or what makes one, that changes nothing."""
    return _unchanged if function is None else function


class _WithoutCompiler(SourceFileLoader):
    """A module that `without_compiler` loads."""

    def exec_module(self, module: ModuleType) -> None:
        with without_compiler():
            super().exec_module(module)


_LOADERS: dict[str, type[SourceFileLoader]] = {
    "diffusers.models.transformers": _OnDemand,
    "diffusers.models.unets": _OnDemand,
    "diffusers.models.autoencoders": _OnDemand,
    "diffusers.hooks": _OnDemand,
    "diffusers.quantizers": _OnDemand,
    "diffusers.hooks.group_offloading": _WithoutCompiler,
    "diffusers.utils.torch_utils": _WithoutCompiler,
}


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        loader = _LOADERS.get(name)
        spec = PathFinder.find_spec(name, path) if loader else None
        if loader and spec and type(spec.loader) is SourceFileLoader:
            spec.loader = loader(name, spec.loader.path)
        return spec


def install() -> None:
    """Makes imports of diffusers lazy in this process, from now on."""
    sys.meta_path.insert(0, _Finder())
