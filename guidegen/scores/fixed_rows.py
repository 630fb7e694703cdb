"""Network calls of a fixed number of rows, so that bits do not depend on how many samples share a batch.

Kernels are chosen by the shape of a call: a row's last bits change with the number of rows beside
it, and not with what those rows hold or where among them it stands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from guidegen.scores.gradient import SummedScore
from guidegen.scores.interfaces import Classifier, Denoiser
from guidegen.scores.noise import Level


def in_fixed_rows(size: int, call: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """`call` over `size` rows at a time; the last ones are filled up with copies of a row, whose answers are left out."""
    count = len(rows[0])
    fill = -count % size
    full = [torch.cat([row, row[-1:].expand(fill, *row.shape[1:])]) for row in rows]
    return torch.cat([call(*some) for some in zip(*(torch.split(row, size) for row in full), strict=True)])[:count]


class FixedDenoiser:
    """A denoiser that is called with `size` rows each time."""

    def __init__(self, denoiser: Denoiser, size: int):
        self.denoiser, self.size, self.prediction_type = denoiser, size, denoiser.prediction_type

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """As the denoiser's own."""
        if t.ndim:  # a timestep for each row
            return in_fixed_rows(self.size, self.denoiser, x_t, t, labels)
        return in_fixed_rows(self.size, lambda x, y: self.denoiser(x, t, y), x_t, labels)


class FixedClassifier:
    """A classifier that is called with `size` rows each time."""

    def __init__(self, classifier: Classifier, size: int):
        self.classifier, self.size, self.cost = classifier, size, classifier.cost

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor) -> Tensor:
        """As the classifier's own."""
        return in_fixed_rows(self.size, lambda x, y, n: self.classifier(x, t, y, level, n), x_t, labels, null)


def fixed_classifier(classifier: Classifier, size: int) -> Classifier:
    """A classifier, each of several ones by itself, that is called with `size` rows each time."""
    if isinstance(classifier, SummedScore):
        return SummedScore([FixedClassifier(part, size) for part in classifier.parts])
    return FixedClassifier(classifier, size)
