"""Whole processes, timed from outside: wall clock and CPU time, pairs of them in turn, and lines of a Markdown table."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

GUIDEGEN = (sys.executable, "-m", "guidegen")
SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""How torch's OpenMP waits where nothing is said; guidegen leaves alone what is."""
_OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Took(NamedTuple):
    """Seconds of a process and its children."""

    wall: float
    cpu: float


class Running:
    """A process in an empty folder, with the environment of this one but for what says how OpenMP waits."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] = {}, cpus: set[int] | None = None):
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
            preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
        )

    def wait(self) -> Took:
        """Until it has ended well."""
        _, status, usage = os.wait4(self._process.pid, 0)
        took = Took(time.perf_counter() - self._start, usage.ru_utime + usage.ru_stime)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            self._errors.seek(0)
            sys.exit(self._errors.read().decode(errors="replace"))
        self._errors.close()
        self._folder.cleanup()
        return took


def run(command: Sequence[str], environment: Mapping[str, str] = {}, cpus: set[int] | None = None) -> Took:
    """Seconds of a command from start to end."""
    return Running(command, environment, cpus).wait()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (min-max)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def line(*cells: object) -> None:
    """A line of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def head(*cells: str) -> None:
    """The first two lines of a Markdown table."""
    line(*cells)
    line(*("---" for _ in cells))
