"""Guidance methods: each turns an unconditional and a conditional prediction into a guided one.

`conditional` is the network's with the label; in classifier mode it is the unconditional one with
the classifier's gradient added (Bayes' rule), so that every method serves both modes. At w = 0 and
w = 1 each method is the unconditional and the conditional model: there guidegen does not call it
with both, and hands it the one prediction twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from guidegen.scores.diffusion import Level, PredictionType, from_x0, to_x0

Combine = Callable[..., Tensor]
"""(unconditional, conditional, w, step, **options) -> guided; (B, C, H, W) fp32, w (B, 1, 1, 1)."""
Gain = Callable[[Level, Level], float]
"""What w is multiplied by at a step, from the noise level of its input and that of its output."""


@dataclass(frozen=True)
class Step:
    """What a method may read besides the two predictions.

    Attributes:
        x_t: the networks' input (B, C, H, W) fp32.
        level: alpha_t and sigma_t.
        kind: the prediction type of all predictions.
        index: of this evaluation, from 0.
        count: evaluations from noise to image.
        memory: what the method keeps from step to step, of these B samples; empty at index 0.
    """

    x_t: Tensor
    level: Level
    kind: PredictionType
    index: int = 0
    count: int = 1
    memory: dict[str, Tensor] = field(default_factory=dict)

    def to_x0(self, prediction: Tensor) -> Tensor:
        """The denoised estimate that a prediction means."""
        return to_x0(prediction, self.x_t, self.level, self.kind)

    def from_x0(self, x0: Tensor) -> Tensor:
        """The prediction that means a denoised estimate."""
        return from_x0(x0, self.x_t, self.level, self.kind)


@dataclass(frozen=True)
class Method:
    """One entry of `--guidance`.

    Attributes:
        name: of the flag.
        combine: the formula.
        line: what it does, in a few words.
        formula: with u, c, w; plain text.
        source: paper and equation.
        linear: whether it is u + w (c - u) with some w, so that predictions of zero weight can be skipped
            also where a classifier is added to classifier-free guidance.
        gain: multiplies w at each step; None where w stays as it is.
    """

    name: str
    combine: Combine
    line: str
    formula: str
    source: str
    linear: bool = False
    gain: Gain | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """Names and defaults of the options that `--guidance-opt` sets."""
        parameters = inspect.signature(self.combine).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def classifier_free(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step | None = None) -> Tensor:
    """u + w (c - u): Ho & Salimans 2022 (arXiv 2207.12598, eq. 6), their w being ours minus one.

    The weights of u and c sum to one, so it holds in every prediction type. Equals the
    `guidance_scale` of diffusers' pipelines.
    """
    return unconditional + w * (conditional - unconditional)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "cfg",
            classifier_free,
            "the plain one: along the difference of the two predictions",
            "u + w (c - u)",
            "Ho & Salimans 2022, arXiv 2207.12598, eq. 6; Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2",
            linear=True,
        ),
    )
}
