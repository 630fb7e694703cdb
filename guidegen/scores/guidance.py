"""Guidance: several predictions and gradients become one prediction.

By Bayes' rule grad log p(x|y) = grad log p(x) + grad log p(y|x). A weight w on the last term
gives w = 0 unconditional, w = 1 conditional, w > 1 sharper; classifier-free guidance writes the
same term as grad log p(x|y) - grad log p(x). Other ways to combine the two are in `guidegen.scores.methods`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guidegen.scores.interfaces import Step
from guidegen.scores.noise import Level, PredictionType, from_x0, score_shift, to_x0


def classifier_guided(prediction: Tensor, gradient: Tensor, w: Tensor, level: Level, kind: PredictionType) -> Tensor:
    """score + w grad log p(y|x_t): Dhariwal & Nichol 2021 (arXiv 2105.05233, algorithm 2).

    Our w over an unconditional model is their classifier scale s.
    """
    return prediction + w * score_shift(gradient, level, kind)


def autoguided(prediction: Tensor, strong: Tensor, weak: Tensor, w: Tensor) -> Tensor:
    """prediction + (w - 1) (strong - weak): Karras et al. 2024 (arXiv 2406.02507, eq. 3) where `prediction` is `strong`."""
    return prediction + (w - 1) * (strong - weak)


def clipped(prediction: Tensor, x_t: Tensor, level: Level, kind: PredictionType, bound: float) -> Tensor:
    """The prediction whose denoised estimate is that of `prediction`, kept within [-bound, bound].

    Classifier guidance was published with this clip before the gradient is added (Dhariwal & Nichol
    2021, the code of their algorithm 2); a clip after it undoes what a strong gradient does.
    """
    return from_x0(to_x0(prediction, x_t, level, kind).clamp(-bound, bound), x_t, level, kind)


def classifier_free(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step | None = None) -> Tensor:
    """Moves along the difference of the two predictions: u + w (c - u).

    Ho & Salimans 2022 (arXiv 2207.12598, eq. 6), their w being ours minus one. The weights of u and
    c sum to one, so it holds in every prediction type. Equals the `guidance_scale` of diffusers'
    pipelines.
    """
    return unconditional + w * (conditional - unconditional)


def jointly(
    unconditional: Tensor, conditional: Tensor, shift: Tensor, w: Tensor, w_classifier: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both kinds of guidance as one (u, c, w) for a method: u + w (c - u) is the plain sum of both.

    With d = c - u of the network and s = `shift` of the classifier, the sum is u + w d + w_classifier s. Of one sign,
    the weights make a conditional prediction between those of the network and of the classifier, u + d and u + s, at
    a weight of w + w_classifier. Of opposite signs they would divide by a sum near zero: there what cancels, their
    harmonic mean h, is plain guidance from one conditional prediction to the other, h (d - s), that moves u and c
    alike, and the method has the rest. Finite and continuous in both weights but where both are zero.

    Args:
        unconditional: u (B, C, H, W).
        conditional: c (B, C, H, W); any where w is 0.
        shift: what the classifier's gradient at weight one adds to a prediction (B, C, H, W).
        w: of the label's own score (B, 1, 1, 1).
        w_classifier: of the classifier's gradient (B, 1, 1, 1), not 0 where w is.
    """
    size = (w.abs() + w_classifier.abs()).clamp(min=torch.finfo(w.dtype).tiny)
    label, classifier = w.abs() / size, w_classifier.abs() / size
    joint = classifier_free(unconditional, conditional, label) + classifier * shift
    opposed = w.sign() * w_classifier.sign() < 0
    aside = torch.where(opposed, 2 * w * classifier * (conditional - unconditional - shift), 0)
    return unconditional + aside, joint + aside, w + w_classifier
