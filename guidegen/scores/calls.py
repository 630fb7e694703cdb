"""Which network calls one step of a batch needs, and how their answers are put together. Equal calls are one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from guidegen.scores.interfaces import FREE, NULL, Cost, Mixture, Weights
from guidegen.scores.method import Method


class Needs(NamedTuple):
    """The network calls of one sample at one step: which predictions it takes, as sums over labels.

    Attributes:
        null: the unconditional prediction; empty where it is not needed.
        conditional: the one that the label's own score comes from; empty where it weighs nothing.
        guiding: what the guiding network predicts for the same; empty where it is not needed.
        gradients: what the classifier is asked for.
    """

    null: Mixture
    conditional: Mixture
    guiding: Mixture
    gradients: Mixture

    def calls(self, cost: Cost) -> int:
        """How many they are; a label that two predictions read is asked for once."""
        network = {label for label, _ in (*self.null, *self.conditional)}
        return len(network) + len(self.guiding) + cost.of(label for label, _ in self.gradients)


_WITHOUT: Mixture = ((NULL, 1.0),)


def needs_of(weights: Weights, labels: Mixture, targets: Mixture, needs_null: bool) -> Needs:
    w, w_classifier, w_guide = weights
    rest = 1.0 - math.fsum(weight for _, weight in labels)
    whole = abs(rest) < 1e-9
    conditional = labels if whole else (*labels, (NULL, rest))
    null = w != 1 or (w_classifier != 0 and needs_null)
    guiding = w_guide != 1
    strong = w_guide != 0 or w != 1 or w_classifier != 0  # else the guiding network alone is asked for
    return Needs(
        _WITHOUT if null else (),
        conditional if w != 0 and strong else (),
        (conditional if w != 0 else _WITHOUT) if guiding else (),
        targets if w_classifier != 0 else (),
    )


def calls_per_step(
    weights: Weights, cost: Cost = FREE, labels: Mixture = ((0, 1.0),), targets: Mixture = ((0, 1.0),)
) -> int:
    """Network calls of one sample at one step: null, labels, guiding network and gradients, less those of zero weight.

    Args:
        weights: of this step.
        cost: of one gradient; `needs_null` also where the method reads the unconditional prediction beside a gradient.
        labels: that the network is asked for.
        targets: that the classifier is.
    """
    return needs_of(weights, labels, targets, cost.needs_null).calls(cost)


class WeightedSum:
    """For each sample a weighted sum over rows of a table.

    Args:
        terms: (row, weight) pairs of each sample.
        device: where the table is.
    """

    def __init__(self, terms: Sequence[Sequence[tuple[int, float]]], device: torch.device | str):
        most = max(map(len, terms), default=0)
        # Filled up with a row of the sample's own: zero times what another sample made non-finite is no zero.
        full = [[*some, *[(some[0][0], 0.0)] * (most - len(some))] for some in terms]
        self._rows = [on_device([some[n][0] for some in full], torch.long, device) for n in range(most)]
        plain = most == 1 and all(some[0][1] == 1 for some in full)
        self._weights = None if plain else [column([some[n][1] for some in full], device) for n in range(most)]

    def __call__(self, table: Tensor) -> Tensor:
        """(B, C, H, W) from the table (R, C, H, W)."""
        picked = [table.index_select(0, rows) for rows in self._rows]
        if self._weights is None:
            return picked[0]
        return torch.stack([weight * rows for weight, rows in zip(self._weights, picked, strict=True)]).sum(0)


class StepCalls:
    """Which calls one step makes, and how their answers are put together.

    Equal calls, those of one network, start and label, are one.

    Args:
        weights: of each sample.
        needs: of each sample.
        starts: a name of each sample's x_t.
        cost: of one gradient.
        device: where x_t lives.
    """

    def __init__(
        self,
        weights: Sequence[Weights],
        needs: Sequence[Needs],
        starts: Sequence[Hashable],
        cost: Cost,
        device: torch.device | str,
    ):
        strong: dict[tuple[Hashable, int], int] = {}  # (start, label) -> a sample that has it
        guiding: dict[tuple[Hashable, int], int] = {}
        gradients: dict[tuple[Hashable, int], int] = {}
        for table, part in ((strong, "null"), (strong, "conditional"), (guiding, "guiding"), (gradients, "gradients")):
            for i, need in enumerate(needs):
                for label, _ in getattr(need, part):
                    table.setdefault((starts[i], label), i)
        row_of = {(False, *key): n for n, key in enumerate(strong)}
        row_of |= {(True, *key): n + len(strong) for n, key in enumerate(guiding)}
        gradient_row = {key: n for n, key in enumerate(gradients)}

        def index(values: Iterable[int]) -> Tensor:
            return on_device(list(values), torch.long, device)

        def terms(i: int, part: Mixture, is_guiding: bool = False) -> list[tuple[int, float]]:
            return [(row_of[is_guiding, starts[i], label], weight) for label, weight in part]

        self.samples, self.labels = index(strong.values()), index(label for _, label in strong)
        self.guiding_samples, self.guiding_labels = index(guiding.values()), index(label for _, label in guiding)
        self.gradient_samples, self.gradient_labels = index(gradients.values()), index(label for _, label in gradients)
        # A sample with one prediction only takes it for all, whose differences are then zero.
        nulls, conditionals, guidings = [], [], []
        for i, need in enumerate(needs):
            null, conditional, other = terms(i, need.null), terms(i, need.conditional), terms(i, need.guiding, True)
            nulls.append(null or conditional or other)
            conditionals.append(conditional or null or other)
            guidings.append(other or conditionals[-1])
        self.null, self.conditional = WeightedSum(nulls, device), WeightedSum(conditionals, device)
        self.guiding = WeightedSum(guidings, device) if guiding else None
        self.weights = weights
        self.combined = [bool(need.null and (need.conditional or need.gradients)) for need in needs]
        guided = [i for i, need in enumerate(needs) if need.gradients]
        self.gradient_of = {i: n for n, i in enumerate(guided)}
        self.guided = index(guided)
        self.gradient = WeightedSum(
            [[(gradient_row[starts[i], label], weight) for label, weight in needs[i].gradients] for i in guided], device
        )
        self.w, self.w_classifier, self.w_guide = (column(values, device) for values in zip(*weights, strict=True))
        self.calls = [need.calls(cost) for need in needs]
        self.made = len(strong) + len(guiding) + cost.of(label for _, label in gradients)


def cost_with(method: Method, cost: Cost) -> Cost:
    """A gradient's cost under a method: one that is not linear reads the unconditional prediction beside it."""
    return cost._replace(needs_null=cost.needs_null or not method.linear)


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A vector on a device whose queue of work is not waited for."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def column(values: Sequence[float], device: torch.device | str) -> Tensor:
    return on_device(values, torch.float32, device)[:, None, None, None]
