"""A sweep under a cgroup's CPU quota: the threads that guidegen takes by it against two threads.

python tests/benchmarks/quota.py [--repeats 5] [--processors 1] [--sweep "--label 207,281 -n 4 --steps 15 -w 0,1,2,3"]

Makes a cgroup of version 1 or 2 for the sweeps and removes it, which takes root; elsewhere it says why there are no rows.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import table
from processes import GUIDEGEN, SPINNING, run
from table import Row, timed, turns

ROOT = Path("/sys/fs/cgroup")
PERIOD = 100_000
ASKS = "from guidegen.cli import threads; print(threads.allowed())"


@contextmanager
def cgroup(processors: float) -> Iterator[Path]:
    """A cgroup with that quota. Raises OSError where none can be made."""
    version_1 = (ROOT / "cpu").is_dir()
    folder = (ROOT / "cpu" if version_1 else ROOT) / f"guidegen-benchmark-{os.getpid()}"
    folder.mkdir()
    try:
        quota = round(processors * PERIOD)
        if version_1:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (folder / "cpu.max").write_text(f"{quota} {PERIOD}")
        yield folder
    finally:
        folder.rmdir()


def rows(options: argparse.Namespace) -> Iterator[Row]:
    command = [*GUIDEGEN, "sweep", *shlex.split(options.sweep), "-q"]
    try:
        with cgroup(options.processors) as folder:
            enter = partial((folder / "cgroup.procs").write_text, "0")
            ask = [sys.executable, "-c", ASKS]
            count = subprocess.run(ask, preexec_fn=enter, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
            two = {"OMP_NUM_THREADS": "2"}
            environments = ({}, two, two | SPINNING)
            found = turns(options.repeats, *(partial(run, command, environment, enter) for environment in environments))
    except OSError as error:
        print(f"no cgroup with a CPU quota can be made here: {error}", file=sys.stderr)
        return
    measured = f"a sweep under a CPU quota of {options.processors:g}, by itself {count} thread"
    for index, other in ((1, "two threads asleep"), (2, "two threads spinning")):
        yield timed(measured, [(each[0], each[index]) for each in found], other, f"{os.cpu_count()} cores")


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processors", type=float, default=1.0)
    parser.add_argument("--sweep", default="--label 207,281 -n 4 --steps 15 -w 0,1,2,3")
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
