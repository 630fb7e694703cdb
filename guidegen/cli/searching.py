"""The processes of a search: each draws and measures what no other does, until the search has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from guidegen.cli import console
from guidegen.cli.settings_drawn import SettingJobs
from guidegen.cli.signals import Signals
from guidegen.errors import StoppedError
from guidegen.spec.axes import describe
from guidegen.spec.command import Command

if TYPE_CHECKING:
    from guidegen.tune.measuring import Measurer
    from guidegen.tune.rounds import Evaluation, Progress, Search
    from guidegen.tune.space import Setting
    from guidegen.tune.study import Study

_WAITS_BEFORE_NOTE = 60
_PARENT = "GUIDEGEN_TUNE_PARENT"
"""In the environment of a worker: the process that started it, without which it ends."""


class Work:
    """One process's part of a search.

    Args:
        jobs: what draws.
        study: what all processes share.
        search: what is to be drawn next.
        measurer: what measures.
        quiet: whether to print nothing.
    """

    def __init__(self, jobs: SettingJobs, study: Study, search: Search, measurer: Measurer, quiet: bool):
        self.jobs, self.study, self.search, self._measurer, self._quiet = jobs, study, search, measurer, quiet
        self.axes = [each.name for each in jobs.space.dimensions]

    def until_the_end(self, signals: Signals) -> None:
        """Draws and measures what the search asks for, until it has ended.

        Raises:
            StoppedError: a signal came, or the process that started this worker is gone.
        """
        parent, waited = os.environ.get(_PARENT), 0
        while True:
            progress = self.search.progress(self.study.evaluations())
            if progress.reason:
                return
            if parent and os.getppid() != int(parent):
                raise StoppedError("The process that started this one is gone", 15)
            if any(self._evaluate(setting, progress, signals) for setting in progress.todo):
                waited = 0
                continue
            signals.wait()
            waited += 1
            if waited == _WAITS_BEFORE_NOTE and not self._quiet:
                console.note(f"waiting for other processes that draw into {self.jobs.folder}")

    def _evaluate(self, setting: Setting, progress: Progress, signals: Signals) -> bool:
        """Draws and measures a setting of the last round; False where another process does."""
        seeds = progress.rounds[-1].seeds
        before = max((each.seeds for each in progress.rounds[:-1] if setting in each.settings), default=0)
        with self.jobs.drawing(setting, before, seeds, signals) as rows:
            if rows is None:
                return False
            one = self.study.find(setting, seeds)
            if one is None:
                one = self._measurer(setting, self.axes, seeds, rows())
                self.study.add(one)
                self._note(one)
        return True

    def _note(self, one: Evaluation) -> None:
        if not self._quiet:
            values = ", ".join(f"{name} {value:.4g}±{one.errors[name]:.2g}" for name, value in one.values.items())
            console.note(f"{describe(self.axes, one.setting)}: {values}, {one.images:,} images")


def is_worker() -> bool:
    """Whether this process is one of those that another one started."""
    return _PARENT in os.environ


@contextmanager
def workers(count: int, command: Command, device: str) -> Iterator[None]:
    """The other processes of `--workers`, which end with the search, or with this process.

    Args:
        count: of all processes, this one included.
        command: of this one.
        device: that was asked for.
    """
    started = []
    words = command.without("workers", "json", "quiet", "verbose", "device").words()[1:]
    for i in range(1, count):
        environment = os.environ | {_PARENT: str(os.getpid())}
        line = [sys.executable, "-m", "guidegen", *words, "--quiet", "--device", _device_of(i, device)]
        started.append(subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL))
    try:
        yield
        for process in started:
            if process.wait():
                console.note(f"note: a worker ended with exit code {process.returncode}; the others did its part")
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _device_of(worker: int, device: str) -> str:
    """The CUDA devices in turn, where none is named."""
    import torch

    count = torch.cuda.device_count() if device == "auto" else 0
    return f"cuda:{worker % count}" if count > 1 else device
