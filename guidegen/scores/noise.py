"""Noise levels and prediction types: x_t = alpha_t x_0 + sigma_t eps.

Every sign and scale that relates a network's prediction to the score grad log p(x_t) is here.
Variance preserving models have alpha^2 + sigma^2 = 1; flow matching has alpha = 1 - sigma; variance exploding ones
and EDM's have alpha = 1.
Sources: Song et al. 2021 (arXiv 2011.13456) for scores, Salimans & Ho 2022 (2202.00512) for v.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction", "flow")


class Level(NamedTuple):
    """alpha_t and sigma_t of one step: how much signal and how much noise x_t holds."""

    alpha: float
    sigma: float


def to_x0(prediction: Tensor, x_t: Tensor, level: Level, kind: PredictionType) -> Tensor:
    """The denoised estimate of x_0, the posterior mean E[x_0 | x_t].

    Args:
        prediction: the network's output (B, C, H, W).
        x_t: its input (B, C, H, W).
        level: alpha_t and sigma_t.
        kind: what the network predicts: eps, x_0, v = alpha eps - sigma x_0, or eps - x_0.
    """
    alpha, sigma = level
    match kind:
        case "epsilon":
            return (x_t - sigma * prediction) / alpha
        case "sample":
            return prediction
        case "v_prediction":
            return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
        case "flow":
            return (x_t - sigma * prediction) / (alpha + sigma)


def from_x0(x0: Tensor, x_t: Tensor, level: Level, kind: PredictionType) -> Tensor:
    """The prediction that means `x0`: the inverse of `to_x0`, same shapes."""
    alpha, sigma = level
    match kind:
        case "epsilon":
            return (x_t - alpha * x0) / sigma
        case "sample":
            return x0
        case "v_prediction":
            return (alpha * x_t - (alpha**2 + sigma**2) * x0) / sigma
        case "flow":
            return (x_t - (alpha + sigma) * x0) / sigma


def to_score(prediction: Tensor, x_t: Tensor, level: Level, kind: PredictionType) -> Tensor:
    """grad log p(x_t) = -eps / sigma (2011.13456, section 3.3; Tweedie's formula)."""
    return (level.alpha * to_x0(prediction, x_t, level, kind) - x_t) / level.sigma**2


def score_shift(gradient: Tensor, level: Level, kind: PredictionType) -> Tensor:
    """What to add to a prediction so that its score grows by `gradient`.

    For epsilon this is the -sigma g of Dhariwal & Nichol 2021 (arXiv 2105.05233, algorithm 2);
    the others follow from `to_score`, which is linear in the prediction.

    Args:
        gradient: grad log p(y | x_t) with respect to x_t (B, C, H, W).
        level: alpha_t and sigma_t.
        kind: the prediction type of the network.
    """
    alpha, sigma = level
    if alpha == 0:  # x_t is noise alone and says nothing of y: g = 0, and 0/0 has no limit to take
        return gradient * 0
    match kind:
        case "epsilon":
            return -sigma * gradient
        case "sample":
            return (sigma**2 / alpha) * gradient
        case "v_prediction":
            return -(sigma * (alpha**2 + sigma**2) / alpha) * gradient
        case "flow":
            return -(sigma * (alpha + sigma) / alpha) * gradient
