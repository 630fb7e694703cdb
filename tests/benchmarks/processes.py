"""Whole processes, timed from outside: wall clock and CPU time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from table import Took

GUIDEGEN = (sys.executable, "-m", "guidegen")
SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""How torch's OpenMP waits where nothing is said; guidegen leaves alone what is."""
_OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Running:
    """A process in an empty folder, with the environment of this one but for what says how OpenMP waits."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] = {}, first: Callable[[], None] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        kept = {name: value for name, value in os.environ.items() if name not in _OURS}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._start = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=self._folder.name,
            env=kept | dict(environment),
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            preexec_fn=first,
        )

    def wait(self, codes: Collection[int] = (0,)) -> Took:
        """Until it has ended with one of these codes."""
        _, status, usage = os.wait4(self._process.pid, 0)
        took = Took(time.perf_counter() - self._start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode not in codes:
            self._errors.seek(0)
            sys.exit(self._errors.read().decode(errors="replace"))
        self._errors.close()
        self._folder.cleanup()
        return took


def run(
    command: Sequence[str],
    environment: Mapping[str, str] = {},
    first: Callable[[], None] | None = None,
    codes: Collection[int] = (0,),
) -> Took:
    """Seconds of a command from start to end; `first` is called in its process before it."""
    return Running(command, environment, first).wait(codes)
