"""Custom Python files: run once, and blamed by file and line for whatever goes wrong in them."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import inspect
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any, NamedTuple

from guidegen.errors import CheckpointError, GuidegenError, StoppedError, first_line, is_out_of_memory
from guidegen.schema import read_bytes

_LONGEST = 300


class _File(NamedTuple):
    """A file that was run, and its bytes then."""

    source: bytes
    module: ModuleType


_files: dict[Path, _File] = {}


def split_python_ref(ref: str) -> tuple[Path, str] | None:
    """(file, name) of `path/to/file.py:NAME`; None for anything else."""
    path, _, name = ref.rpartition(":")
    return (Path(path), name) if path.endswith(".py") and name.isidentifier() else None


def read_python_ref(ref: str, kind: type, error: type[GuidegenError] = CheckpointError) -> Any:
    """The object that `path/to/file.py:NAME` names, an instance of `kind`.

    The file is run: it is yours, and was named by its path. It is run once, and again only where it has
    changed. Modules beside it can be imported, after everything that is installed. What it prints goes
    to standard error.

    Raises:
        error: no such file or name, it is something else, or the file itself raises or exits.
    """
    file, name = split_python_ref(ref) or (Path(ref), "")
    module = _run(file, error).module
    with blamed(ref, error):  # a module may have a __getattr__
        found = getattr(module, name, None)
    if found is None or not isinstance(found, kind):
        what = "is not there" if found is None else f"is a {type(found).__name__}"
        wanted = "a function" if kind is object else f"a guidegen.{kind.__name__}"
        raise error(f"{ref} {what}; it should be {wanted}.")
    return found


def python_sha256(ref: str, version: str = "") -> str:
    """Identity of what a Python file defines: its file as it was run, and what it says of its weights."""
    file, name = split_python_ref(ref) or (Path(ref), "")
    return hashlib.sha256(_run(file, CheckpointError).source + f":{name}:{version}".encode()).hexdigest()


def _run(file: Path, error: type[GuidegenError]) -> _File:
    path = _resolved(file)
    if not path.is_file():
        raise error(f"No Python file at {file}. Name one as path/to/file.py:NAME.")
    source = read_bytes(path, error)
    known = _files.get(path)
    if known is None or known.source != source:
        known = _files[path] = _File(source, _execute(file, path, source, error))
    return known


def _execute(file: Path, path: Path, source: bytes, error: type[GuidegenError]) -> ModuleType:
    """Runs a file as a module under a name of its own, by which dataclasses and pickles find it."""
    name = f"guidegen_own_{hashlib.sha256(bytes(path) + source).hexdigest()[:16]}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)
    try:
        with blamed(f"{file}:", error):
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def blamed(ref: str, error: type[GuidegenError], what: Any = None, drawing: bool = False) -> Iterator[None]:
    """Turns whatever custom code raises or exits with into an error with its file and line.

    What it prints goes to standard error. Signals pass as they are.

    Args:
        ref: `path/to/file.py:NAME`.
        error: what is raised.
        what: the function that is called, whose line stands in where no line of the file was reached.
        drawing: whether memory that is short passes too, for the batch to be halved.
    """
    with _interrupts() as came, redirect_stdout(sys.stderr):
        try:
            yield
        except BaseException as problem:
            interrupted = isinstance(problem, KeyboardInterrupt) and came
            if interrupted or isinstance(problem, StoppedError) or (drawing and is_out_of_memory(problem)):
                raise
            raise error(f"{_location(ref, problem, what)}: {_message(problem)}") from problem


def blame(problem: BaseException) -> GuidegenError | None:
    """The error of a custom file that an exception went through unwatched, as in a backward pass; None for others."""
    own = {str(path) for path in _files}
    lines = [(f.f_code.co_filename, line) for f, line in walk_tb(problem.__traceback__) if f.f_code.co_filename in own]
    return CheckpointError(f"{lines[-1][0]}:{lines[-1][1]}: {_message(problem)}") if lines else None


def refuse_custom(ref: str, error: type[GuidegenError], what: Any, message: str) -> GuidegenError:
    """The error that custom code gives what it should not, with the line where it is made."""
    line = _line_of(what, str(_resolved(Path(ref.rpartition(":")[0]))))
    return error(f"{ref.rpartition(':')[0]}:{line}: {message}" if line else f"{ref}: {message}")


def _location(ref: str, problem: BaseException, what: Any) -> str:
    """`file:line` of an error: the innermost line of the file that it went through."""
    file = ref.rpartition(":")[0]
    path = str(_resolved(Path(file)))
    lines = [line for frame, line in walk_tb(problem.__traceback__) if frame.f_code.co_filename == path]
    if isinstance(problem, SyntaxError) and problem.filename == path:
        lines.append(problem.lineno or 1)
    line = lines[-1] if lines else _line_of(what, path)
    return f"{file}:{line}" if line else ref


def _line_of(what: Any, path: str) -> int | None:
    """Where a function, a class or what an object does when it is called is defined; None outside of that file."""
    try:
        if not (inspect.isroutine(what) or inspect.isclass(what)):
            what = getattr(type(what), "forward", None) or type(what).__call__
        what = inspect.unwrap(what.__init__ if inspect.isclass(what) else what)
        return int(what.__code__.co_firstlineno) if what.__code__.co_filename == path else None
    except Exception:  # a builtin, or an object that answers to nothing
        return None


def _message(problem: BaseException) -> str:
    """The message of an exception, in one line with its class."""
    kind = type(problem).__name__
    try:
        text = first_line(problem)
        if isinstance(problem, SystemExit):
            text = f"it exits with {problem.code!r}"
    except BaseException:  # an exception whose text raises another
        text = kind
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text if isinstance(problem, GuidegenError) else kind if text == kind else f"{kind}: {text}"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C, as distinct from a KeyboardInterrupt that code raises of itself: the signals that came."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    main = threading.current_thread() is threading.main_thread()
    watched = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if watched:
        signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        if watched:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _resolved(file: Path) -> Path:
    try:
        return file.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, no such user
        return file.absolute()
