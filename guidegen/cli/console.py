"""Standard error for people: messages and progress. Results go to standard output elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

_SECONDS_BETWEEN_LINES = 30.0
_stdout_open = True


def stderr() -> Console:
    """A console on standard error, wide enough off a terminal never to fold a line."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def error(message: object) -> None:
    """An error, one or two lines."""
    stderr().print(f"[bold red]error:[/] {escape(str(message))}")


def note(message: str) -> None:
    """Something to know, not an error."""
    stderr().print(escape(message))


def result(line: str) -> None:
    """One line on standard output."""
    result_bytes(line.encode(sys.stdout.encoding or "utf-8", "replace") + b"\n")


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

    def __init__(self, steps: int, images: int, bar: Any = None, plain: bool = False):
        self._steps, self._images, self._bar = steps, images, bar
        self._done = self._drawn = 0
        self._began = self._told = time.monotonic()
        self._plain = plain
        self._task = bar.add_task("drawing", total=steps, count=f"0/{images}") if bar else None

    def step(self, cells: int) -> None:
        """`cells` images are one step further."""
        self._done += cells
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif self._plain and time.monotonic() - self._told > _SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            left = (self._told - self._began) * (self._steps - self._done) / max(1, self._done)
            note(f"{self._drawn}/{self._images} images, {100 * self._done // self._steps} %, about {left:.0f} s left")

    def image(self) -> None:
        """One more image is on disk."""
        self._drawn += 1
        if self._bar:
            self._bar.update(self._task, count=f"{self._drawn}/{self._images}")


@contextmanager
def progress(steps: int, images: int, quiet: bool) -> Iterator[Progress]:
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
        with Bar(*columns, console=console, transient=True) as bar:
            yield Progress(steps, images, bar)
