"""A sweep on a crowded machine: beside a busy process, beside a second sweep, and on one core.

python tests/benchmarks/crowd.py [--repeats 3] [--sweep "--label 207,281 -n 4 --steps 15 -w 0,1,2,3"]

Each round times all of them in turn, as guidegen waits by itself (asleep), as torch's OpenMP does where nothing is
said (spinning), and with what `--spin` asks for. Ratios are to the quiet time of the same round and kind of waiting.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import table
from processes import GUIDEGEN, SPINNING, Running, run
from table import Row, Took, timed

CASES = ("alone", "beside a busy process", "beside another", "on one core with two threads")


@contextmanager
def busy() -> Iterator[None]:
    """A process that computes all the while."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def round_of(command: list[str], environment: Mapping[str, str]) -> dict[str, Took]:
    """Wall and CPU seconds of each case."""
    found = {"alone": run(command, environment)}
    with busy():
        found["beside a busy process"] = run(command, environment)
    both = [Running(command, environment) for _ in range(2)]
    took = [each.wait() for each in both]
    found["beside another"] = Took(max(each.wall for each in took), sum(each.cpu for each in took) / 2)
    one = {min(os.sched_getaffinity(0))}
    found["on one core with two threads"] = run(
        command, {**environment, "OMP_NUM_THREADS": "2"}, lambda: os.sched_setaffinity(0, one)
    )
    return found


def rows(options: argparse.Namespace) -> Iterator[Row]:
    command = [*GUIDEGEN, "sweep", *shlex.split(options.sweep), "-q"]
    kinds: dict[str, Mapping[str, str]] = {"asleep": {}, "spinning": SPINNING}
    kinds |= {f"{count} turns": {"GOMP_SPINCOUNT": str(count)} for count in options.spin}
    run(command)
    rounds = []
    for count in range(options.repeats):
        rounds.append({kind: round_of(command, given) for kind, given in kinds.items()})
        print(f"round {count + 1} of {options.repeats}", file=sys.stderr, flush=True)
    for case in CASES[1:]:
        pairs = [(each["asleep"][case], each["asleep"]["alone"]) for each in rounds]
        yield timed(f"a sweep {case}", pairs, "alone", "on two cores")
    for kind in kinds:
        for case in CASES if kind != "asleep" else ():
            pairs = [(each["asleep"][case], each[kind][case]) for each in rounds]
            yield timed(f"a sweep {case}, threads asleep", pairs, kind, "on two cores")


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sweep", default="--label 207,281 -n 4 --steps 15 -w 0,1,2,3")
    parser.add_argument("--spin", type=int, nargs="*", default=[], help="other values of GOMP_SPINCOUNT")
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
