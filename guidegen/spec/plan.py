"""The list of images to draw: a pure function of the flags."""

from __future__ import annotations

import itertools
import json
import math
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, TypeVar, overload

from msgspec import Meta

from guidegen.errors import UsageError, quoted
from guidegen.schema import convert
from guidegen.spec import limits
from guidegen.spec.cell import Cell, Variant, random_index
from guidegen.spec.composition import format_labels, label_parts, main_label
from guidegen.spec.parse import Seeds, format_seeds, parse_seeds, whole
from guidegen.spec.shard import Shard

_T = TypeVar("_T")


@dataclass(frozen=True)
class Plan:
    """What to draw, as the lists whose product the cells are: small however many cells there are.

    Attributes:
        labels: class ids, or mixtures of them; [None] where no label is given.
        seeds: of every label; kept as `Seeds`. With `seeds_per_label` they are counted from `first_seed` of each.
        weights: of every sample.
        classifier_weights: of mode `both`; [None] elsewhere.
        prompts: the texts; None where none are given.
        grid: whether a grid of the weights is wanted.
        guide_weights: of autoguidance, beside `weights`; [None] where there are none.
        by: (axis, values) of each axis of `--by`; crossed with each other and all the others.
        own_weights: (axis of `by`, the weight of each of its values) where each has its own instead of `weights`.
        columns: axes across the grid; none means as `guidegen.report.grid.layout` has it.
        rows: axes down the grid, before those that are not named.
        seeds_per_label: whether no two labels share a seed.
        labels_random: whether each seed has one of the labels, by `random_index`, instead of all of them.

    Raises:
        UsageError: more cells than a sequence can hold, or labels or seeds that `seeds_per_label` cannot keep apart.
    """

    labels: Sequence[int | str | None]
    seeds: Sequence[int]
    weights: Sequence[float]
    classifier_weights: Sequence[float | None] = (None,)
    prompts: Sequence[str] | None = None
    grid: bool = False
    guide_weights: Sequence[float | None] = (None,)
    by: Sequence[tuple[str, Sequence[Any]]] = ()
    own_weights: tuple[str, Sequence[float]] | None = None
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()
    seeds_per_label: bool = False
    labels_random: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", Seeds.of(self.seeds))
        if self.seeds_per_label and self.labels_random:
            raise UsageError("--labels-random gives each seed one label, so --seeds-per-label has nothing to keep apart.")
        if self.seeds_per_label:
            _check_apart(self.labels, Seeds.of(self.seeds))
        if (count := self.samples * self.each) > sys.maxsize:
            raise UsageError(f"These are {count} images, more than 2^63-1: draw fewer seeds, labels or weights.")

    @property
    def samples(self) -> int:
        """How many (prompt, label, seed) of one variant there are, each with all its weights."""
        texts = 1 if self.prompts is None else len(self.prompts)
        labels = 1 if self.labels_random else len(self.labels)
        return math.prod(len(values) for _, values in self.by) * texts * labels * len(self.seeds)

    @property
    def each(self) -> int:
        """The cells of a sample."""
        return (1 if self.own_weights else len(self.weights)) * len(self.classifier_weights) * len(self.guide_weights)

    def variants(self) -> list[Variant]:
        """All combinations of the axes of `by`; the one without any where there are none."""
        axes = [axis for axis, _ in self.by]
        return [tuple(zip(axes, some, strict=True)) for some in itertools.product(*(values for _, values in self.by))]

    def weights_of(self, variant: Variant) -> Sequence[float]:
        """The weights that a variant is drawn at."""
        if self.own_weights is None:
            return self.weights
        axis, weights = self.own_weights
        return [weights[dict(self.by)[axis].index(dict(variant)[axis])]]

    @cached_property
    def _variants(self) -> list[tuple[Variant, Sequence[float]]]:
        """Each with its weights."""
        return [(variant, self.weights_of(variant)) for variant in self.variants()]

    @cached_property
    def _names(self) -> list[tuple[int | None, str | None]]:
        """The label and the mixture of each of the labels."""
        return [(main_label(label), label) if isinstance(label, str) else (label, None) for label in self.labels]

    def first_seed(self, block: int) -> int:
        """What the seeds are counted from, in a block of samples that differ in nothing but the seed."""
        label = self.labels[block % len(self.labels)] if self.seeds_per_label else 0
        return label * limits.SEEDS_OF_A_LABEL if isinstance(label, int) else 0

    def sample(self, number: int) -> tuple[Cell, Sequence[float]]:
        """One of the `samples`, counted prompt by prompt through the variants: its first cell, and its `weights`."""
        block, index_of_seed = divmod(number, len(self.seeds))
        seed = self.first_seed(block) + self.seeds[index_of_seed]
        rest, name = (block, random_index(seed, len(self.labels))) if self.labels_random else divmod(block, len(self.labels))
        which, index = (rest, None) if self.prompts is None else divmod(rest, len(self.prompts))
        prompt = None if self.prompts is None or index is None else self.prompts[index]
        variant, weights = self._variants[which]
        label, mixture = self._names[name]
        wc, wg = self.classifier_weights[0], self.guide_weights[0]
        return Cell(label, seed, weights[0], wc, prompt, index, wg, mixture, variant), weights

    def cell(self, number: int, which: int) -> Cell:
        """One of the `each` cells of a sample."""
        first, weights = self.sample(number)
        which, guide = divmod(which, len(self.guide_weights))
        w, classifier = divmod(which, len(self.classifier_weights))
        return first.at(weights[w], self.classifier_weights[classifier], self.guide_weights[guide])

    def cells_of(self, number: int) -> Iterator[Cell]:
        """All cells of a sample."""
        first, weights = self.sample(number)
        return itertools.starmap(first.at, itertools.product(weights, self.classifier_weights, self.guide_weights))

    def cells(self, shard: Shard | None = None) -> Cells:
        """All cells, or those of one shard: a pure function of the plan.

        The samples, each a (prompt, label, seed) of one variant with all its weights, are dealt out to
        the shards in turn, so that what the weights of one sample share stays in one process.
        """
        samples = range(self.samples)
        return Cells(self, samples[shard.index :: shard.count] if shard else samples)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON holds it: seeds as `--seeds` takes them, and what is not asked for left out."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        asked = {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}
        return json.loads(json.dumps(asked | {"seeds": format_seeds(self.seeds)}))  # type: ignore[no-any-return]


def _check_apart(labels: Sequence[int | str | None], seeds: Seeds) -> None:
    """Raises UsageError for labels or seeds that `seeds_per_label` cannot keep apart."""
    each = limits.SEEDS_OF_A_LABEL
    if other := [label for label in labels if not isinstance(label, int)]:
        found = "there is no label" if other[0] is None else f"{quoted(str(other[0]))} is a mixture"
        raise UsageError(f"--seeds-per-label takes single labels, such as --label 0-9: {found}.")
    if (largest := max(label for label in labels if isinstance(label, int))) >= 2**32 // each:
        raise UsageError(f"--seeds-per-label takes labels below {2**32 // each}, found {largest}.")
    if (last := max((some.stop for some in seeds.ranges), default=0)) > each:
        raise UsageError(f"--seeds-per-label takes seeds below {each}; --seed, --num or --seeds ask for {last - 1}.")


class Cells(Sequence[Cell]):
    """Cells of a plan, variants outermost, each made when it is asked for: small however many there are.

    Args:
        plan: whose.
        samples: which of its samples, rising.
        span: from where to where among the cells of these samples; None for all.
        without: positions among them that are left out, rising: eight bytes each.
    """

    def __init__(self, plan: Plan, samples: range, span: range | None = None, without: array[int] | None = None):
        self._plan, self._samples = plan, samples
        self._span = range(len(samples) * plan.each) if span is None else span
        self._without = array("q") if without is None else without

    def __len__(self) -> int:
        return len(self._span) - len(self._without)

    @overload
    def __getitem__(self, index: int) -> Cell: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Cell]: ...
    def __getitem__(self, index: int | slice) -> Cell | Sequence[Cell]:
        wanted = range(len(self))[index]
        if isinstance(wanted, int):
            return self._cell(self._position(wanted))
        if wanted.step != 1:
            return [self._cell(self._position(i)) for i in wanted]
        first = self._position(wanted.start) if wanted else self._span.start
        return self._between(first, self._position(wanted[-1]) + 1 if wanted else first)

    def __iter__(self) -> Iterator[Cell]:
        start = self._span.start
        for end in itertools.chain(self._without, (self._span.stop,)):
            first, each = start // self._plan.each, self._plan.each
            cells = itertools.chain.from_iterable(map(self._plan.cells_of, self._samples[first : -(-end // each)]))
            yield from itertools.islice(cells, start - first * each, end - first * each)
            start = end + 1

    def _cell(self, position: int) -> Cell:
        sample, which = divmod(position, self._plan.each)
        return self._plan.cell(self._samples[sample], which)

    def _position(self, index: int) -> int:
        """Where the cell of an index stands in the span, among those that are left out."""
        start, without = self._span.start, self._without
        return start + index + bisect_right(range(len(without)), index, key=lambda i: without[i] - start - i)

    def _between(self, first: int, end: int) -> Cells:
        """Those from one position to before another."""
        without = self._without[bisect_left(self._without, first) : bisect_left(self._without, end)]
        return Cells(self._plan, self._samples, range(first, end), without)

    def by_variant(self) -> Iterator[tuple[Variant, Cells]]:
        """The cells of each variant that has any."""
        variants = self._plan.variants()
        of_each, each = self._plan.samples // max(1, len(variants)), self._plan.each
        for i, variant in enumerate(variants):
            first, end = (bisect_left(self._samples, number * of_each) * each for number in (i, i + 1))
            if some := self._between(max(first, self._span.start), max(first, min(end, self._span.stop))):
                yield variant, some

    def groups(self) -> Iterator[tuple[Cell, int]]:
        """The first of the cells that differ in nothing but the seed, and how many these are; none may be left out."""
        if self._plan.labels_random:
            yield from ((cell, 1) for cell in self)
            return
        seeds, each = len(self._plan.seeds), self._plan.each
        first, stop = -(-self._span.start // each), self._span.stop // each
        while first < stop:
            block = self._samples[first] // seeds
            end = min(stop, bisect_left(self._samples, (block + 1) * seeds))
            for which in range(each):
                yield self._plan.cell(self._samples[first], which), end - first
            first = end

    def find(self, file: str) -> int | None:
        """The position of the cell whose image stands there; None where it is none of these."""
        folder, _, name = file.rpartition("/")
        at = self._folders.get(folder)
        seed = whole(name.removesuffix(".png"))
        if at is None or seed is None:
            return None
        seed = Seeds.of(self._plan.seeds).find(seed - self._plan.first_seed(at[0]))
        if seed is None:
            return None
        sample, which = at[0] * len(self._plan.seeds) + seed, at[1]
        if sample not in self._samples:
            return None
        position = self._samples.index(sample) * self._plan.each + which
        index = position - self._span.start - bisect_left(self._without, position)
        return index if 0 <= index < len(self) and self[index].file == file else None

    @cached_property
    def _folders(self) -> dict[str, tuple[int, int]]:
        """Folder -> what its cells have but the seed: the number of the first sample in seeds, and which cell of it."""
        return {
            cell.folder: (block, which)
            for block, which in self._blocks()
            for cell in self._of_labels(self._plan.cell(block * len(self._plan.seeds), which))
        }

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """For cells that differ in more than the seed: the number of the first sample in seeds, and which cell of it."""
        seeds = len(self._plan.seeds)
        return itertools.product(range(self._plan.samples // seeds if seeds else 0), range(self._plan.each))

    def of_one_seed(self) -> Iterator[Cell]:
        """The cells of the plan that differ in more than the seed, each with the one that its seeds are counted from."""
        for block, which in self._blocks():
            yield from self._of_labels(
                replace(self._plan.cell(block * len(self._plan.seeds), which), seed=self._plan.first_seed(block))
            )

    def _of_labels(self, cell: Cell) -> list[Cell]:
        """The cell; with random labels one of each, as the label goes with the seed."""
        if not self._plan.labels_random:
            return [cell]
        return [replace(cell, label=label, mixture=mixture) for label, mixture in self._plan._names]

    def windows(self, size: int) -> Iterator[Sequence[Cell]]:
        """Consecutive parts of at most this size."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def without(self, indices: Iterable[int]) -> Cells:
        """All but those at these positions, which are of cells of which none is left out yet."""
        return Cells(self._plan, self._samples, self._span, array("q", sorted(self._span[index] for index in indices)))


def finder(cells: Iterable[Cell]) -> Callable[[str], Cell | None]:
    """From the file of an image to its cell, if it is one of these; `Cells` are not gone through for it."""
    if not isinstance(cells, Cells):
        return {cell.file: cell for cell in cells}.get
    some = cells  # for the type checker

    def find(file: str) -> Cell | None:
        position = some.find(file)
        return None if position is None else some[position]

    return find


def listed(plans: Iterable[Plan], what: str) -> Sequence[Cell]:
    """The cells of several plans, each once; of one plan as `Cells`.

    Args:
        plans: the plans.
        what: who has them, for the message.

    Raises:
        UsageError: more of them than `limits.LISTED_CELLS`.
    """
    plans = list(plans)
    if (count := sum(len(plan.cells()) for plan in plans)) > limits.LISTED_CELLS:
        raise UsageError(
            f"{what} is to hold {count:,} images, and this goes through {limits.LISTED_CELLS:,} at most. "
            "Draw smaller runs, each with seeds of its own (--seeds)."
        )
    every = itertools.chain.from_iterable(plan.cells() for plan in plans)
    return plans[0].cells() if len(plans) == 1 else list(dict.fromkeys(every))


_Axis = Annotated[str, Meta(min_length=1)]
_Value = int | float | str | bool | None
_Weight = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
_Label = Annotated[int, Meta(ge=0, le=2**63 - 1)] | str | None


@dataclass(frozen=True)
class _Stored:
    """A plan as `Plan.as_json` writes it."""

    seeds: str
    labels: Annotated[list[_Label], Meta(min_length=1, max_length=limits.LIST)]
    weights: Annotated[list[_Weight], Meta(min_length=1, max_length=limits.LIST)]
    classifier_weights: Annotated[tuple[_Weight | None, ...], Meta(min_length=1, max_length=limits.LIST)] = (None,)
    prompts: Annotated[list[str], Meta(min_length=1, max_length=limits.LIST)] | None = None
    grid: bool = False
    guide_weights: Annotated[tuple[_Weight | None, ...], Meta(min_length=1, max_length=limits.LIST)] = (None,)
    by: tuple[tuple[_Axis, Annotated[tuple[_Value, ...], Meta(min_length=1)]], ...] = ()
    own_weights: tuple[_Axis, tuple[_Weight, ...]] | None = None
    columns: tuple[_Axis, ...] = ()
    rows: tuple[_Axis, ...] = ()
    seeds_per_label: bool = False
    labels_random: bool = False


def read_plan(data: Any, where: object = "The plan") -> Plan:
    """The plan that `Plan.as_json` wrote.

    Args:
        data: what JSON gave.
        where: names it in the message.

    Raises:
        UsageError: it is none.
    """
    stored = convert(data, _Stored, where, UsageError)
    given: dict[str, Any] = {field.name: getattr(stored, field.name) for field in fields(stored)}
    lists = {name: some for name, some in given.items() if isinstance(some, list | tuple) and name != "own_weights"}
    lists |= {axis: [*map(str, values)] for axis, values in stored.by} | {"by": [axis for axis, _ in stored.by]}
    own_axis, own = stored.own_weights or ("", ())
    numbers = itertools.chain(
        stored.weights, stored.classifier_weights, stored.guide_weights, own, *dict(stored.by).values()
    )
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise UsageError(f"{where} is not valid: a number in it is not finite.")
    if twice := [name for name, some in lists.items() if len(set(some)) < len(some)]:
        raise UsageError(f"{where} is not valid: {quoted(twice[0])} names a value twice.")
    if stored.own_weights and len(own) != len(dict(stored.by).get(own_axis, ())):
        raise UsageError(f"{where} is not valid: own_weights are not one for each value of an axis.")
    if math.prod(len(values) for _, values in stored.by) > limits.COMBINATIONS:
        raise UsageError(f"{where} is not valid: its axes have more than {limits.COMBINATIONS:,} combinations.")
    for label in stored.labels:
        if isinstance(label, str) and format_labels(label_parts(label)) != label:
            raise UsageError(f"{where} is not valid: {quoted(label)} is not how a mixture is written.")
    return Plan(**given | {"seeds": parse_seeds(stored.seeds)})


def batches(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def make_cells(
    labels: Sequence[int | str | None],
    seeds: Sequence[int],
    weights: Sequence[float],
    classifier_weights: Sequence[float | None] = (None,),
    prompts: Sequence[str] | None = None,
    guide_weights: Sequence[float | None] = (None,),
) -> list[Cell]:
    """The product, weights innermost: the weights of one (label, seed) share a batch. A label that is text is a mixture."""
    return list(Plan(labels, seeds, weights, classifier_weights, prompts, guide_weights=guide_weights).cells())
