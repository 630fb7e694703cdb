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
from collections.abc import Mapping
from contextlib import contextmanager

from processes import GUIDEGEN, SPINNING, Running, head, line, run, spread

CASES = ("quiet", "beside a busy process", "two sweeps at once", "on one core, for two threads")


@contextmanager
def busy():  # type: ignore[no-untyped-def]
    """A process that computes all the while."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def round_of(command: list[str], environment: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each case."""
    found = {"quiet": run(command, environment)}
    with busy():
        found["beside a busy process"] = run(command, environment)
    both = [Running(command, environment) for _ in range(2)]
    took = [each.wait() for each in both]
    found["two sweeps at once"] = (max(each.wall for each in took), sum(each.cpu for each in took) / 2)
    one = {min(os.sched_getaffinity(0))}
    found["on one core, for two threads"] = run(command, {**environment, "OMP_NUM_THREADS": "2"}, one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sweep", default="--label 207,281 -n 4 --steps 15 -w 0,1,2,3")
    parser.add_argument("--spin", type=int, nargs="*", default=[], help="other values of GOMP_SPINCOUNT")
    options = parser.parse_args()
    command = [*GUIDEGEN, "sweep", *shlex.split(options.sweep), "-q"]
    kinds: dict[str, Mapping[str, str]] = {"asleep": {}, "spinning": SPINNING}
    kinds |= {f"{count} turns": {"GOMP_SPINCOUNT": str(count)} for count in options.spin}
    run(command)
    rounds = []
    for count in range(options.repeats):
        rounds.append({kind: round_of(command, given) for kind, given in kinds.items()})
        print(f"round {count + 1} of {options.repeats}", file=sys.stderr, flush=True)
    head("threads wait", "case", "wall, s", "times the quiet wall", "CPU, s")
    for kind in kinds:
        for case in CASES:
            found = [each[kind] for each in rounds]
            ratios = spread([each[case][0] / each["quiet"][0] for each in found])
            line(
                kind,
                case,
                spread([each[case][0] for each in found], 1),
                ratios,
                spread([each[case][1] for each in found], 1),
            )
    ratios = [each["asleep"]["quiet"][0] / each["spinning"]["quiet"][0] for each in rounds]
    line("asleep / spinning", "quiet", "", spread(ratios), "")


if __name__ == "__main__":
    main()
