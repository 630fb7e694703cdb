"""How many threads a process takes, and how they wait for each other: set before torch and its OpenMP are loaded.

At every barrier OpenMP's threads spin for a while. On a machine with other work that while is another process's,
and a sweep takes several times as long; threads that sleep instead cost little on a quiet one.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from guidegen.errors import UsageError

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How long threads spin: of OpenMP, of the runtime in torch's wheels (libgomp), of Intel's and LLVM's."""
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")


def prepare() -> None:
    """Threads that sleep at barriers, and no more of them than the cgroup's quota feeds, where the user has not said so.

    What the processor affinity allows, OpenMP and MKL see by themselves.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    count = allowed()
    if count < usable() and not any(name in os.environ for name in _COUNTS):
        os.environ["OMP_NUM_THREADS"] = str(count)


def use(count: int | None) -> None:
    """So many threads, in this process and in those that it starts; None leaves them as they are.

    Raises:
        UsageError: more than the process may run on.
    """
    if count is None:
        return
    if count > usable():
        raise UsageError(f"--threads {count}: this process may use {usable()} processors.")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def share(processes: int) -> int | None:
    """The threads of each of some processes on this machine; None for one alone, and where the user has said how many."""
    if processes == 1 or any(name in os.environ for name in _COUNTS):
        return None
    return max(1, allowed() // processes)


def usable() -> int:
    """The processors in this process's affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowed(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The processors of the affinity, or the lowest quota of this process's cgroups rounded up where that is less.

    Args:
        root: where cgroups are mounted: version 2, or 1 with its controllers below.
        own: the file that names this process's.
    """
    return max(1, min([usable(), *(math.ceil(quota) for quota in _quotas(root, own))]))


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """The processors that each cgroup from this process's up to the root may use at once, where there is a limit."""
    for line in _read(own).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        mounts = [root, root / "unified"] if not controllers else [root / "cpu,cpuacct", root / "cpu", root / controllers]
        if controllers and "cpu" not in controllers.split(","):
            continue
        inside = [part for part in path.split("/") if part not in ("", "..")]
        for mount in dict.fromkeys(mounts):
            for depth in range(len(inside), -1, -1):  # in a container the path may be the host's, and the mount its own
                yield from _quota(mount.joinpath(*inside[:depth]))


def _quota(folder: Path) -> Iterator[float]:
    if controls := _read(folder / "cpu.max").split():  # "200000 100000" or "max 100000"
        quota, period = (*controls, "100000")[:2]
    else:
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:  # -1 and max are none
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
