"""Guidance: several predictions and gradients become one prediction.

By Bayes' rule grad log p(x|y) = grad log p(x) + grad log p(y|x). A weight w on the last term
gives w = 0 unconditional, w = 1 conditional, w > 1 sharper; classifier-free guidance writes the
same term as grad log p(x|y) - grad log p(x).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from guidegen.scores.diffusion import Level, PredictionType, score_shift

NULL = -1
"""The condition "none": each denoiser maps it to its own null label."""


class Denoiser(Protocol):
    """One network call. `prediction_type` says what it predicts."""

    prediction_type: PredictionType

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from x_t (B, C, H, W) fp32, timestep t () and labels (B,)."""
        ...


class Cost(NamedTuple):
    """What one gradient of a classifier takes.

    Attributes:
        calls: network calls of its own.
        needs_null: whether it reads the unconditional prediction too.
    """

    calls: int
    needs_null: bool = False


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


def classifier_free(unconditional: Tensor, conditional: Tensor, w: Tensor) -> Tensor:
    """u + w (c - u): Ho & Salimans 2022 (arXiv 2207.12598, eq. 6), their w being ours minus one.

    The weights of u and c sum to one, so it holds in every prediction type. Equals the
    `guidance_scale` of diffusers' pipelines.
    """
    return unconditional + w * (conditional - unconditional)


def classifier_guided(prediction: Tensor, gradient: Tensor, w: Tensor, level: Level, kind: PredictionType) -> Tensor:
    """score + w grad log p(y|x_t): Dhariwal & Nichol 2021 (arXiv 2105.05233, algorithm 2).

    Our w over an unconditional model is their classifier scale s.
    """
    return prediction + w * score_shift(gradient, level, kind)


def _needs_null(w: float, w_classifier: float, cost: Cost) -> bool:
    return w != 1 or (w_classifier != 0 and cost.needs_null)


def calls_per_step(w: float, w_classifier: float, cost: Cost = FREE) -> int:
    """Network calls of one sample at one step: null, label and gradient, less those of zero weight."""
    return _needs_null(w, w_classifier, cost) + (w != 0) + (w_classifier != 0) * cost.calls


class _Calls(NamedTuple):
    """R network calls that answer A needs, of which the equal ones are one call.

    Attributes:
        samples: which sample each call is of (R,).
        labels: and which label (R,).
        answers: the call that answers each need (A,); None where each has its own.
    """

    samples: Tensor
    labels: Tensor
    answers: Tensor | None

    def spread(self, made: Tensor) -> Tensor:
        """From what the R calls returned to what the A needs asked for."""
        return made if self.answers is None else made.index_select(0, self.answers)


class Guide:
    """Both kinds of guidance over one batch, with a weight for each sample.

    score = s(x) + w (s(x|y) - s(x)) + w_classifier grad log p(y|x), which covers every mode:
    classifier-free (w_classifier = 0), classifier (w = 0), both, and none. Calls of zero weight
    are skipped: the conditional one at w = 0, the unconditional one at w = 1, the gradient at
    w_classifier = 0. The rest go through the denoiser as one batch.

    Args:
        denoiser: the network.
        labels: B labels; `NULL` for none.
        w: B weights of the label's own score.
        w_classifier: B weights of the classifier's gradient.
        classifier: needed where any `w_classifier` is not zero.
        device: where x_t lives.
        classifier_labels: B labels as the classifier counts them, where it counts otherwise.
        starts: B names of the noise that each sample starts from, such as its seed, for `first`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        labels: Sequence[int],
        w: Sequence[float],
        w_classifier: Sequence[float] | None = None,
        classifier: Classifier | None = None,
        device: torch.device | str = "cpu",
        classifier_labels: Sequence[int] | None = None,
        starts: Sequence[Hashable] | None = None,
    ):
        self.denoiser, self.classifier = denoiser, classifier
        w_classifier = w_classifier or [0.0] * len(labels)
        if classifier is None and any(w_classifier):
            raise ValueError("w_classifier is not zero, but there is no classifier")
        cost = classifier.cost if classifier is not None else FREE
        targets = labels if classifier_labels is None else classifier_labels
        null_rows = [i for i, pair in enumerate(zip(w, w_classifier, strict=True)) if _needs_null(*pair, cost)]
        label_rows = [i for i, weight in enumerate(w) if weight != 0]
        gradient_rows = [i for i, weight in enumerate(w_classifier) if weight != 0]
        null_at = {i: n for n, i in enumerate(null_rows)}
        label_at = {i: n + len(null_rows) for n, i in enumerate(label_rows)}

        def index(rows: list[int]) -> Tensor:
            return torch.tensor(rows, dtype=torch.long, device=device)

        def weights(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None, None]

        def calls(samples: list[int], labels: list[int], starts: Sequence[Hashable]) -> _Calls:
            needs = [(starts[i], label) for i, label in zip(samples, labels, strict=True)]
            made = {need: n for n, need in reversed(list(enumerate(needs)))}  # the first of those that are equal
            made = dict(sorted(made.items(), key=lambda item: item[1]))
            place = {need: n for n, need in enumerate(made)}
            answers = index([place[need] for need in needs]) if len(made) < len(needs) else None
            return _Calls(index([samples[n] for n in made.values()]), index([labels[n] for n in made.values()]), answers)

        rows, row_labels = null_rows + label_rows, [NULL] * len(null_rows) + [labels[i] for i in label_rows]
        gradient_labels = [targets[i] for i in gradient_rows]
        apart = range(len(labels))
        starts = apart if starts is None else starts
        self._network, self._network_first = calls(rows, row_labels, apart), calls(rows, row_labels, starts)
        # A sample with one call only takes it for both terms, whose difference is then zero.
        self._null_place = index([null_at.get(i, label_at.get(i, 0)) for i in range(len(labels))])
        self._label_place = index([label_at.get(i, null_at.get(i, 0)) for i in range(len(labels))])
        self._mixed = not null_at.keys().isdisjoint(label_at)
        self._w = weights(w)
        self._gradient_rows = index(gradient_rows)
        self._gradients = calls(gradient_rows, gradient_labels, apart)
        self._gradients_first = calls(gradient_rows, gradient_labels, starts)
        self._gradient_w = weights([w_classifier[i] for i in gradient_rows])
        self.shared = len(rows) - len(self._network_first.samples)
        """Network calls that `first` makes fewer than any other step."""
        self.shared += (len(gradient_rows) - len(self._gradients_first.samples)) * cost.calls
        self.calls = [calls_per_step(*pair, cost) for pair in zip(w, w_classifier, strict=True)]
        """Network calls of each sample at each step."""

    def __call__(self, x_t: Tensor, t: Tensor, level: Level) -> Tensor:
        """The guided prediction (B, C, H, W) fp32 at one step, in the denoiser's prediction type."""
        return self._predict(x_t, t, level, self._network, self._gradients)

    def first(self, x_t: Tensor, t: Tensor, level: Level) -> Tensor:
        """The same at the first step, where samples of one start have the same x_t and share their calls."""
        return self._predict(x_t, t, level, self._network_first, self._gradients_first)

    def _predict(self, x_t: Tensor, t: Tensor, level: Level, network: _Calls, gradients: _Calls) -> Tensor:
        rows = network.spread(self.denoiser(x_t.index_select(0, network.samples), t, network.labels))
        prediction = null = rows.index_select(0, self._null_place)
        if self._mixed:
            prediction = classifier_free(null, rows.index_select(0, self._label_place), self._w)
        if len(self._gradient_rows) and self.classifier is not None:
            x_some, null_some = x_t.index_select(0, gradients.samples), null.index_select(0, gradients.samples)
            gradient = gradients.spread(self.classifier(x_some, t, gradients.labels, level, null_some))
            some = self._gradient_rows
            guided = classifier_guided(
                prediction.index_select(0, some), gradient, self._gradient_w, level, self.denoiser.prediction_type
            )
            prediction = prediction.index_copy(0, some, guided)
        return prediction
