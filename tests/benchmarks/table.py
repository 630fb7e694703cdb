"""The table that all benchmarks share: a row a question, our way and the other timed in turn.

Every ratio is ours over the other's, the median of the pairs: below 1 is faster, or less.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch


class Took(NamedTuple):
    """Seconds of some work, or of a process and its children; of a process its peak memory in MiB."""

    wall: float
    cpu: float
    peak: float = 0.0


class Row(NamedTuple):
    """What stands in a line, as it is shown."""

    measured: str
    ours: str
    other: str = ""
    ratio: str = ""
    spread: str = ""
    conditions: str = ""

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


HEAD = (Row("measured", "ours", "the other way", "ours / other", "least to most", "pairs, conditions"), Row(*6 * ["---"]))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a script's command line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def machine() -> str:
    """Where the figures come from."""
    load = os.getloadavg()[0]
    threads = torch.get_num_threads()
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads} threads, load {load:.1f}, "
        f"torch {torch.__version__}"
    )


def show(rows: Iterable[Row]) -> None:
    """Prints the table, each row once it is known."""
    for line in (machine(), "", *HEAD):
        print(line, flush=True)
    for row in rows:
        print(row, flush=True)


def clock(work: Callable[[], object]) -> Took:
    """What one call takes, on a GPU until it is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start, cpu = time.perf_counter(), _cpu()
    work()
    wait()
    return Took(time.perf_counter() - start, _cpu() - cpu)


def _cpu() -> float:
    """Seconds of CPU time of this process and of children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(work: Callable[[], object]) -> float:
    """The same, wall clock alone."""
    return clock(work).wall


def turns(pairs: int, *works: Callable[[], Took]) -> list[tuple[Took, ...]]:
    """So many times all of them, in turn."""
    found = []
    for index in range(pairs):
        found.append(tuple(work() for work in works))
        print(f"{index + 1} of {pairs}", file=sys.stderr, flush=True)
    return found


def ratios_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Median, least and largest of the ratios of the pairs."""
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (min-max)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def paired(
    measured: str, pairs: Sequence[tuple[float, float]], other: str, conditions: str, unit: str = "s", digits: int = 2
) -> Row:
    """A row of numbers of ours and of the other way, called `other`."""
    ours, theirs = (f"{statistics.median(column):,.{digits}f} {unit}" for column in zip(*pairs, strict=True))
    median, least, most = ratios_of(pairs)
    many = f"{len(pairs)} pairs" if len(pairs) > 1 else "1 pair"
    rest = ", ".join(filter(None, (many, conditions)))
    return Row(measured, ours, f"{other}: {theirs}", f"{median:.2f}", f"{least:.2f} to {most:.2f}", rest)


def timed(measured: str, pairs: Sequence[tuple[Took, Took]], other: str, conditions: str) -> Row:
    """A row of wall-clock times; among the conditions the ratio of the CPU times, which other processes disturb less."""
    cpu = spread([ours.cpu / theirs.cpu for ours, theirs in pairs])
    return paired(measured, [(ours.wall, theirs.wall) for ours, theirs in pairs], other, f"{conditions}; CPU time {cpu}")
