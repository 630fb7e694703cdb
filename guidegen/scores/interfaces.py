"""What guidance combines: denoisers, gradients of classifiers, and the weights of a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from guidegen.arguments import finite, whole
from guidegen.scores.noise import Level, PredictionType, from_x0, to_x0

NULL = -1
"""The condition "none": each denoiser maps it to its own null label."""


Mixture = tuple[tuple[int, float], ...]
"""Labels with a weight each, negative ones included: the sum over them of weight times (score with the label - without).

Liu et al. 2022 (arXiv 2206.01714, eq. 11); one label of weight 1 is that label.
"""


class Denoiser(Protocol):
    """One network call. `prediction_type` says what it predicts."""

    prediction_type: PredictionType

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from x_t (B, C, H, W) fp32, timestep t () and labels (B,).

        Where alpha is 1 at every step the timestep is sigma.
        """
        ...


class Cost(NamedTuple):
    """What one gradient of a classifier takes.

    Attributes:
        calls: network calls of its own.
        needs_null: whether the unconditional prediction is read too.
        others: calls of the other classifiers, where it stands for several: label n is the one with index
            n modulo their number.
    """

    calls: int
    needs_null: bool = False
    others: tuple[int, ...] = ()

    def of(self, labels: Iterable[int]) -> int:
        """Network calls of the gradients of these labels."""
        each = (self.calls, *self.others)
        return sum(each[label % len(each)] for label in labels)


FREE = Cost(0)


class Classifier(Protocol):
    """The gradient of a classifier. `cost` says what one takes."""

    cost: Cost

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor) -> Tensor:
        """grad log p(label | x_t) (B, C, H, W) fp32.

        Args:
            x_t: (B, C, H, W) fp32.
            t: timestep ().
            labels: (B,).
            level: alpha_t and sigma_t.
            null: the unconditional prediction (B, C, H, W) where `cost.needs_null`, else any.
        """
        ...


class Weights(NamedTuple):
    """How much each term weighs for one sample at one step.

    Attributes:
        w: of the label's own score: 0 without it, 1 as it is.
        w_classifier: of the classifier's gradient.
        w_guide: of autoguidance: 0 the guiding network, 1 the network.
    """

    w: float
    w_classifier: float = 0.0
    w_guide: float = 1.0


Schedule = Callable[[int, Weights], Weights]
"""From the index of a step, and the weights that were asked for, to those of that step."""


def as_mixture(label: int | Mixture, name: str = "labels") -> Mixture:
    """A label as the mixture of itself alone.

    Raises:
        TypeError: neither a label nor a mixture.
        ValueError: a mixture of none, or with a weight that is not finite.
    """
    if hasattr(label, "__index__"):
        return ((whole(name, label, NULL), 1.0),)
    if not isinstance(label, tuple | list) or not all(isinstance(part, tuple | list) and len(part) == 2 for part in label):
        raise TypeError(f"{name} takes label ids, NULL, and mixtures ((id, weight), ...); found {label!r}.")
    if not label:
        raise ValueError(f"{name}: a mixture of no labels.")
    return tuple((whole(name, part, NULL), finite(name, weight)) for part, weight in label)


def autocast(x: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on the device of `x`; None computes in fp32."""
    return torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@dataclass(frozen=True)
class Step:
    """What a method may read besides the two predictions.

    Attributes:
        x_t: the networks' input (B, C, H, W) fp32.
        level: alpha_t and sigma_t.
        kind: the prediction type of all predictions.
        index: of this evaluation, from 0.
        count: evaluations from noise to image.
        memory: what the method keeps from step to step. Guidance calls a method with one sample at a time, each of
            which has its own memory: empty at first, and untouched at steps where the sample has nothing to
            combine (a weight of 0 or 1, an interval that is off).
    """

    x_t: Tensor
    level: Level
    kind: PredictionType
    index: int = 0
    count: int = 1
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def has_x0(self) -> bool:
        """Whether predictions and denoised estimates are one to one: not at pure noise or none."""
        return self.level.sigma != 0 and (self.level.alpha != 0 or self.kind != "epsilon")

    def to_x0(self, prediction: Tensor) -> Tensor:
        """The denoised estimate that a prediction means."""
        return to_x0(prediction, self.x_t, self.level, self.kind)

    def from_x0(self, x0: Tensor) -> Tensor:
        """The prediction that means a denoised estimate."""
        return from_x0(x0, self.x_t, self.level, self.kind)
