"""Numbers and lists of them, as people write them on a command line."""

from __future__ import annotations

import math
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from typing import overload

from guidegen.errors import UsageError, quoted
from guidegen.spec import limits

_WHOLE = re.compile(r"[0-9]{1,100}")  # int() takes 4300 digits at most, and other scripts' digits
LARGEST_SEED = 2**63 - 1
NOISE_SEEDS = 2**32
"""Seeds that far apart are the same noise: torch's generator on the CPU takes the low 32 bits."""


def whole(text: str) -> int | None:
    """A whole number in ASCII digits; None for anything else."""
    return int(text) if _WHOLE.fullmatch(text) else None


def whole_range(text: str) -> tuple[int, int] | None:
    """(first, last) of `0-63`; None for anything else."""
    first, _, last = text.partition("-")
    ends = whole(first.strip()), whole(last.strip())
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


def parse_weight(text: str, flag: str = "--w") -> float:
    """One finite number.

    Raises:
        UsageError: it is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{flag} takes a finite number, found {quoted(text)}.")
    return value + 0.0  # -0.0 is 0.0


def parse_weights(text: str, flag: str = "--w") -> list[float]:
    """`0,1,2.5` and `START:STOP:STEP`, both ends included, counted in exact decimals.

    Raises:
        UsageError: not a list of finite numbers, a range that never ends, or more than `limits.LIST`.
    """
    values: list[float] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        values += _range(word, flag) if ":" in word else [parse_weight(word, flag)]
        if len(values) > limits.LIST:
            raise UsageError(f"{flag} {quoted(text)} names more than {limits.LIST:,} numbers.")
    if not values:
        raise UsageError(f"{flag} is empty: give numbers such as 0,1,2.5 or START:STOP:STEP.")
    return list(dict.fromkeys(values))


def _range(word: str, flag: str) -> list[float]:
    try:
        start, stop, step = (Decimal(part) for part in word.split(":"))
        count = (stop - start) / step
        if count.is_finite() and count >= limits.LIST:
            found = f"{flag} {quoted(word)} is {count:.2g} numbers, and a list has {limits.LIST:,} at most"
            raise UsageError(f"{found}: START:STOP:STEP with a larger step, such as 0:8:0.5.")
        if not count.is_finite() or count < 0:
            raise UsageError(f"{flag} {quoted(word)}: the range is empty; check the sign of its step.")
        return [parse_weight(str(start + i * step), flag) for i in range(int(count) + 1)]
    except (ValueError, ArithmeticError):
        raise UsageError(f"{flag} {quoted(word)}: a range is START:STOP:STEP with a step that is not zero.") from None


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_like(default: bool | float, text: str, flag: str) -> bool | float:
    """A text as the type of a default: a switch, a whole number or a finite one.

    Raises:
        UsageError: it is none.
    """
    if isinstance(default, bool):
        if text.lower() not in _TRUE + _FALSE:
            raise UsageError(f"{flag}: give yes or no.")
        return text.lower() in _TRUE
    try:
        number: int | float = type(default)(text)
    except ValueError as error:
        raise UsageError(f"{flag}: give a {'whole ' * isinstance(default, int)}number.") from error
    if not math.isfinite(number):
        raise UsageError(f"{flag}: give a finite number.")
    return number


class Seeds(Sequence[int]):
    """Seeds in the order in which they are drawn, each once, kept as ranges: small however many there are.

    Args:
        ranges: of seeds, rising by one; of those that stand there twice the first counts.

    Raises:
        UsageError: more seeds than a sequence can hold.
    """

    __slots__ = ("_by_start", "_ends", "ranges")

    def __init__(self, ranges: Iterable[range]):
        self.ranges = tuple(_joined(_disjoint([some for some in ranges if some.start < some.stop])))
        self._ends = list(accumulate(some.stop - some.start for some in self.ranges))
        self._by_start: list[tuple[int, int]] = []
        if self._ends and self._ends[-1] > sys.maxsize:
            raise UsageError(f"--seeds: {self._ends[-1]} seeds are too many; give at most 2^63-1 of them.")

    @classmethod
    def of(cls, seeds: Iterable[int]) -> Seeds:
        """These seeds."""
        if isinstance(seeds, Seeds):
            return seeds
        return cls([seeds] if isinstance(seeds, range) and seeds.step == 1 else [range(seed, seed + 1) for seed in seeds])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        position = range(len(self))[index]
        which = bisect_right(self._ends, position)
        return self.ranges[which][position - (self._ends[which - 1] if which else 0)]

    def __iter__(self) -> Iterator[int]:
        for some in self.ranges:
            yield from some

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seeds) and self.ranges == other.ranges

    def __hash__(self) -> int:
        return hash(self.ranges)

    def __contains__(self, seed: object) -> bool:
        return isinstance(seed, int) and self.find(seed) is not None

    def __repr__(self) -> str:
        return f"parse_seeds({format_seeds(self)!r})"

    def find(self, seed: int) -> int | None:
        """The position of a seed; None where it is none of these."""
        self._by_start = self._by_start or sorted((some.start, i) for i, some in enumerate(self.ranges))
        at = bisect_right(self._by_start, (seed, sys.maxsize)) - 1
        which = self._by_start[at][1] if at >= 0 else -1
        if which < 0 or seed not in self.ranges[which]:
            return None
        return (self._ends[which - 1] if which else 0) + seed - self.ranges[which].start


def _disjoint(ranges: Sequence[range]) -> list[range]:
    """The ranges in their order, without what one before them holds."""
    coming = sorted(range(len(ranges)), key=lambda i: ranges[i].start, reverse=True)
    pieces: list[tuple[int, int, int]] = []
    held: list[int] = []  # a heap: the first of the ranges that reach here is on top
    for first, end in pairwise(sorted({edge for some in ranges for edge in (some.start, some.stop)})):
        while coming and ranges[coming[-1]].start <= first:
            heappush(held, coming.pop())
        while held and ranges[held[0]].stop <= first:
            heappop(held)
        if held:
            pieces.append((held[0], first, end))
    return [range(first, end) for _, first, end in sorted(pieces)]


def _joined(ranges: Iterable[range]) -> list[range]:
    joined: list[range] = []
    for some in ranges:
        if joined and joined[-1].stop == some.start:
            joined[-1] = range(joined[-1].start, some.stop)
        else:
            joined.append(some)
    return joined


def parse_seeds(text: str) -> Seeds:
    """`0-63,100`: seeds and ranges of seeds, both ends included.

    Raises:
        UsageError: anything else, or more than `limits.LIST` words.
    """
    if text.count(",") >= limits.LIST:
        raise UsageError(f"--seeds names more than {limits.LIST:,} seeds and ranges.")
    words = [word for part in text.split(",") if (word := part.strip())]
    ends = [_ends(word) for word in words]
    if not ends or max(last for _, last in ends) > LARGEST_SEED:
        raise UsageError(f"--seeds {quoted(text)}: give seeds from 0 to 2^63-1, such as 0-63,100.")
    return Seeds(range(first, last + 1) for first, last in ends)


def check_noise(seeds: Seeds) -> Seeds:
    """The seeds, if no two of them are the same noise.

    Raises:
        UsageError: two are.
    """
    if not seeds.ranges or max(some.stop for some in seeds.ranges) <= NOISE_SEEDS:
        return seeds
    turns = [(some.start % NOISE_SEEDS, some.start, some.stop - some.start) for some in seeds.ranges]
    wrapped = [(0, start + NOISE_SEEDS - low, low + n - NOISE_SEEDS) for low, start, n in turns if low + n > NOISE_SEEDS]
    in_order = sorted([*turns, *wrapped])
    for (low, start, count), (following, other, _) in pairwise(in_order):
        if low + count > following:
            raise UsageError(
                f"Seeds {start + following - low} and {other} are the same noise: torch takes the low 32 bits of a seed. "
                "Give seeds below 4294967296."
            )
    return seeds


def _ends(word: str) -> tuple[int, int]:
    seed = whole(word)
    ends = whole_range(word) if seed is None else (seed, seed)
    if ends is None:
        raise UsageError(f"--seeds: {quoted(word)} is not a seed. Give whole numbers and ranges, such as 0-63,100.")
    if ends[1] < ends[0]:
        raise UsageError(f"--seeds {quoted(word)}: the range ends before it starts.")
    return ends


def format_seeds(seeds: Iterable[int]) -> str:
    """`0-63,100`: what `parse_seeds` reads as these seeds, in this order."""
    ends = ((some.start, some.stop - 1) for some in Seeds.of(seeds).ranges)
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in ends)
