"""Signals that end the drawing with all that is finished on disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from time import sleep
from typing import Any

from guidegen.cli import console
from guidegen.errors import StoppedError
from guidegen.runs.locks import Wait

_SECONDS_BETWEEN_TRIES = 0.5


class Signals:
    """SIGTERM and SIGUSR1 end the drawing after the batch in flight, SIGINT after the step; a second one at once."""

    def __init__(self) -> None:
        self._caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background jobs have it
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame: object) -> None:
        if self._caught is not None:
            os._exit(_exit_code(number))
        self._caught = number

    def check(self, *only: int) -> None:
        """Raises StoppedError if a signal came, one of `only` if any are named."""
        if self._caught is not None and (not only or self._caught in only):
            raise StoppedError(f"Stopped by {signal.Signals(self._caught).name}", _exit_code(self._caught) - 128)

    def wait(self) -> None:
        """Waits a little for another process; raises StoppedError if a signal came."""
        self.check()
        sleep(_SECONDS_BETWEEN_TRIES)


def waiting(check: Callable[[], None] = lambda: None, quiet: bool = False) -> Wait:
    """What to do while another process holds a run: note it once, and try again every half second.

    Args:
        check: called each time; raises where a signal ends the command.
        quiet: leave out the note.
    """
    noted = quiet

    def wait(reason: str) -> None:
        nonlocal noted
        if not noted:
            console.note(f"{reason} Waiting for it.")
        noted = True
        check()
        sleep(_SECONDS_BETWEEN_TRIES)

    return wait


def _exit_code(number: int) -> int:
    """SIGUSR1 is a scheduler's way to say that SIGTERM is near: it ends in the same way."""
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)
