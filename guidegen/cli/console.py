"""What people read: messages and progress on standard error, results on standard output.

Names, prompts, paths and errors of libraries are somebody else's text: no control character of
theirs reaches a terminal.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from guidegen.errors import UsageError, quoted

_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that turn the direction of writing, and bytes that are no text."""
_SECONDS_BETWEEN_LINES = 30.0
_stdout_open = True


def stderr() -> Console:
    """A console on standard error, wide enough off a terminal never to fold a line."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def clean(text: str, keep: str = "\n\t") -> str:
    """Text that a terminal shows and does not obey: control characters as `\\x1b`, but for those to keep."""
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def check_text(words: Iterable[str]) -> None:
    """Raises UsageError for words of a command line whose bytes are not UTF-8: they could not be kept in JSON."""
    for word in words:
        if not word.isascii() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UsageError(f"{quoted(word)} is not UTF-8: rename the file, or set a UTF-8 locale such as LANG=C.UTF-8.")


def guard() -> None:
    """Standard streams that take any text, and none of it from the logs and warnings of libraries as it came."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def cleaned_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        with suppress(TypeError, ValueError):  # arguments that do not fit: logging itself says so
            record.msg, record.args = clean(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(cleaned_record)
    warnings.formatwarning = lambda *args, **kwargs: clean(format_warning(*args, **kwargs))


def error(message: object) -> None:
    """An error, one or two lines."""
    stderr().print(Text.assemble(("error:", "bold red"), " ", clean(str(message))))


def note(message: str) -> None:
    """Something to know, not an error."""
    stderr().print(Text(clean(message)))


def show_traceback() -> None:
    """The traceback of the error that is being handled."""
    sys.stderr.write(clean(traceback.format_exc()))


def result(line: str) -> None:
    """One line on standard output: as it is in a pipe or a file, cleaned on a terminal."""
    line = clean(line) if sys.stdout.isatty() else line
    encoding = sys.stdout.encoding or "utf-8"
    try:
        data = line.encode(encoding, "surrogateescape")  # the bytes of a path as they are
    except UnicodeEncodeError:
        data = line.encode(encoding, "backslashreplace")
    result_bytes(data + b"\n")


def result_bytes(data: bytes) -> None:
    """Bytes on standard output. A reader that has gone away (`| head -1`) is not an error."""
    global _stdout_open
    if not _stdout_open:
        return
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        _stdout_open = False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Steps and images done: a bar on a terminal, elsewhere a plain line every 30 seconds."""

    def __init__(self, steps: int, images: int, bar: Any = None, plain: bool = False, what: str = "drawing"):
        self._steps, self._images, self._bar = steps, images, bar
        self._done = self._drawn = 0
        self._began = self._printed = time.monotonic()
        self._plain = plain
        self._task = bar.add_task(what, total=steps, count=f"0/{images}") if bar else None

    def step(self, cells: int) -> None:
        """`cells` images are one step further."""
        self._done += cells
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif self._plain and time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            left = (self._printed - self._began) * (self._steps - self._done) / max(1, self._done)
            note(f"{self._drawn}/{self._images} images, {100 * self._done // self._steps} %, about {left:.0f} s left")

    def image(self) -> None:
        """One more image is on disk."""
        self._drawn += 1
        if self._bar:
            self._bar.update(self._task, count=f"{self._drawn}/{self._images}")

    def images(self, count: int) -> None:
        """So many images are done, of one step each."""
        for _ in range(count):
            self.image()
        self.step(count)


@contextmanager
def progress(steps: int, images: int, quiet: bool, what: str = "drawing") -> Iterator[Progress]:
    """Shows progress of `images` images over `steps` steps in all."""
    console = stderr()
    if quiet or not images:
        yield Progress(max(1, steps), images)
    elif not console.is_terminal:
        yield Progress(steps, images, plain=True)
    else:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]} images"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console, transient=True, refresh_per_second=4) as bar:
            yield Progress(steps, images, bar, what=what)
