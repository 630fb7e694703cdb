"""The limits that keep the package readable; the direction of imports is `lint-imports`' to check."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import guidegen

PACKAGE = Path(guidegen.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 12


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Its lines, those of the docstring aside."""
    docstring = ast.get_docstring(function, clean=False) or ""
    return (function.end_lineno or 0) - function.lineno + 1 - len(docstring.splitlines())


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Its parameters but self and cls."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [each.arg for each in given if each.arg not in ("self", "cls")]


def is_of_config(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether diffusers makes the keys of config.json of its parameters."""
    return any(isinstance(each, ast.Name) and each.id == "register_to_config" for each in function.decorator_list)


def test_files_are_short() -> None:
    assert len(FILES) > 100
    assert {str(path): lines for path in FILES if (lines := len(path.read_text().splitlines())) > LONGEST_FILE} == {}


def test_functions_are_short_and_take_few_parameters() -> None:
    found = list(functions())
    assert len(found) > 1000
    assert [name for name, each in found if not is_of_config(each) and lines_of(each) > LONGEST_FUNCTION] == []
    assert [name for name, each in found if not is_of_config(each) and len(parameters_of(each)) > MOST_PARAMETERS] == []


def test_nothing_passes_on_its_locals() -> None:
    calls = [node for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert len(calls) > 1000
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "locals"]
