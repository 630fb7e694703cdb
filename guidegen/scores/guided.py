"""Guidance over one batch: network calls, their predictions, and the formulas of `guidegen.scores.guidance`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from guidegen.arguments import finite, instance, one_of, several, whole
from guidegen.scores.calls import Needs, StepCalls, cost_with, needs_of
from guidegen.scores.guidance import autoguided, classifier_guided, clipped, jointly
from guidegen.scores.interfaces import FREE, NULL, Classifier, Denoiser, Mixture, Schedule, Step, Weights, as_mixture
from guidegen.scores.methods import METHODS, Combine, Method
from guidegen.scores.noise import PREDICTION_TYPES, Level, score_shift


@dataclass(eq=False, repr=False)
class Guide:
    """All kinds of guidance over one batch, with weights for each sample.

    score = s(x) + w (s(x|y) - s(x)) + w_classifier grad log p(y|x) + (w_guide - 1) (s - s_guiding), which
    covers every mode: classifier-free (w_classifier = 0), classifier (w = 0), both, none, and
    autoguidance, where s - s_guiding is at the condition that the mode draws with. A method other than
    the plain one replaces the first three terms: its conditional prediction is the one
    whose score is that of a weight of one, or what `jointly` makes of both weights. Calls of zero weight are
    skipped; the rest go through each network as one batch. No sample depends on the others.

    Args:
        denoiser: the network.
        labels: B labels or mixtures of labels; `NULL` for none.
        w: B weights of the label's own score.
        w_classifier: B weights of the classifier's gradient.
        classifier: needed where any `w_classifier` is not zero.
        device: where x_t lives.
        classifier_labels: B labels or mixtures as the classifier counts them, where it counts otherwise.
        starts: B names of the noise that each sample starts from, such as its seed: at step 0 samples of
            one start have the same x_t and share their calls.
        guiding: the guiding network; needed where any `w_guide` is not one.
        w_guide: B weights of autoguidance.
        method: how the unconditional and the conditional prediction are combined.
        schedule: the weights of each step; None for the same at all.
        steps: how many evaluations a method can count on.
        clip: keeps the denoised estimate of each prediction within [-clip, clip], before guidance.
        stand_ins: labels (steps, B) that are asked for in place of `NULL`, as `independent_labels` draws them.
        disturbance: what the guiding network's timesteps are multiplied by (steps, B), as `disturbed_times` has it.

    Raises:
        TypeError, ValueError: an argument that cannot be, by its name: a list of another length than `labels`, weights
            that are not finite, labels that a network does not have, a classifier or a guiding network without
            weights or weights without them.
    """

    denoiser: Denoiser
    labels: Sequence[int | Mixture]
    w: Sequence[float]
    w_classifier: Sequence[float] | None = None
    classifier: Classifier | None = None
    device: torch.device | str = "cpu"
    classifier_labels: Sequence[int | Mixture] | None = None
    starts: Sequence[Hashable] | None = None
    _: KW_ONLY
    guiding: Denoiser | None = None
    w_guide: Sequence[float] | None = None
    method: Method = METHODS["cfg"]
    schedule: Schedule | None = None
    steps: int = 1
    clip: float | None = None
    stand_ins: Tensor | None = None
    disturbance: Tensor | None = None

    def __post_init__(self) -> None:
        self._labels = [as_mixture(label) for label in several("labels", self.labels)]
        count = len(self._labels)
        for name, network in (("denoiser", self.denoiser), ("guiding", self.guiding)):
            if network is not None or name == "denoiser":
                one_of(f"{name}.prediction_type", getattr(network, "prediction_type", None), PREDICTION_TYPES)
        instance("method", self.method, Method, "a Method, such as METHODS['apg']")
        self.steps = whole("steps", self.steps, 1)
        if self.clip is not None and finite("clip", self.clip) <= 0:
            raise ValueError(f"clip takes a number above 0, found {self.clip}.")
        self._weights = _weights_of(count, self.w, self.w_classifier, self.w_guide, self.classifier, self.guiding)
        self._cost = cost_with(self.method, self.classifier.cost) if self.classifier is not None else FREE
        targets = self.labels
        if self.classifier_labels is not None:
            targets = several("classifier_labels", self.classifier_labels, count)
        self._targets = [as_mixture(label, "classifier_labels") for label in targets]
        self._starts = None if self.starts is None else several("starts", self.starts, count)
        self._check_labels()
        self._here = [None if each is None else each.to(self.device) for each in (self.stand_ins, self.disturbance)]
        self._step_calls: dict[tuple[bool, tuple[Weights, ...]], StepCalls] = {}
        self._memory: list[dict[str, Any]] = [{} for _ in self._weights]
        self.calls = [0] * count
        """Network calls behind each sample so far."""
        self.made = 0
        """Network calls that were made so far: fewer, where samples share some."""

    def __call__(self, x_t: Tensor, t: Tensor, level: Level, index: int = 0) -> Tensor:
        """The guided prediction (B, C, H, W) fp32 in the denoiser's prediction type.

        Args:
            x_t: (B, C, H, W) fp32.
            t: timestep ().
            level: alpha_t and sigma_t.
            index: of the step, from 0.
        """
        if x_t.ndim != 4 or len(x_t) != len(self._weights):
            raise ValueError(f"x_t is (B, C, H, W) with B = {len(self._weights)}, one a label; found {tuple(x_t.shape)}.")
        calls = self._calls_of(index)
        if index == 0:
            self._memory = [{} for _ in self._weights]
        self.calls = [before + now for before, now in zip(self.calls, calls.calls, strict=True)]
        self.made += calls.made
        rows = self._rows(calls, x_t, t, level, index)
        null, conditional = calls.null(rows), calls.conditional(rows)
        shift = self._gradient(calls, x_t, t, level, null)
        prediction = self._combined(calls, null, conditional, shift, x_t, level, index)
        return (
            prediction if calls.guiding is None else autoguided(prediction, conditional, calls.guiding(rows), calls.w_guide)
        )

    def _needs(self, weights: Sequence[Weights]) -> list[Needs]:
        each = zip(weights, self._labels, self._targets, strict=True)
        return [needs_of(*sample, self._cost.needs_null) for sample in each]

    def _check_labels(self) -> None:
        """Asks the networks, where they know it, whether they have the labels that they will be asked for."""
        for need in self._needs(self._weights):
            for network, asked in (
                (self.denoiser, need.null + need.conditional),
                (self.guiding, need.guiding),
                (self.classifier, need.gradients),
            ):
                if check := getattr(network, "check_labels", None):
                    labels = [label for label, _ in asked]
                    if self.stand_ins is not None and network is not self.classifier:
                        labels = [label for label in labels if label != NULL] + list(set(self.stand_ins.flatten().tolist()))
                    check(labels)

    def _calls_of(self, index: int) -> StepCalls:
        weights = tuple(self.schedule(index, each) if self.schedule else each for each in self._weights)
        shared = index == 0 and self._starts is not None
        key = (shared, weights)
        if key not in self._step_calls:
            starts = self._starts if shared and self._starts is not None else range(len(weights))
            self._step_calls[key] = StepCalls(weights, self._needs(weights), starts, self._cost, self.device)
        return self._step_calls[key]

    def _rows(self, calls: StepCalls, x_t: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
        """What the networks predict, a row a call; those of the guiding network last."""
        made = []
        stand_ins, disturbance = self._here
        for network, samples, labels in (
            (self.denoiser, calls.samples, calls.labels),
            (self.guiding, calls.guiding_samples, calls.guiding_labels),
        ):
            if network is not None and len(samples):
                x_some = x_t.index_select(0, samples)
                if stand_ins is not None:
                    labels = torch.where(labels == NULL, stand_ins[index].index_select(0, samples), labels)
                disturbed = disturbance is not None and samples is calls.guiding_samples
                times = t * disturbance[index].index_select(0, samples) if disturbed else t  # type: ignore[index]
                rows = network(x_some, times, labels)
                made.append(rows if self.clip is None else clipped(rows, x_some, level, network.prediction_type, self.clip))
        return made[0] if len(made) == 1 else torch.cat(made)

    def _gradient(self, calls: StepCalls, x_t: Tensor, t: Tensor, level: Level, null: Tensor) -> Tensor | None:
        """grad log p(y | x_t) of the samples that ask for it; None where none does."""
        if self.classifier is None or not len(calls.guided):
            return None
        x_some, null_some = (table.index_select(0, calls.gradient_samples) for table in (x_t, null))
        return calls.gradient(self.classifier(x_some, t, calls.gradient_labels, level, null_some))

    def _combined(
        self,
        calls: StepCalls,
        null: Tensor,
        conditional: Tensor,
        gradient: Tensor | None,
        x_t: Tensor,
        level: Level,
        index: int,
    ) -> Tensor:
        kind, some = self.denoiser.prediction_type, calls.guided
        if not self.method.linear:
            shift = None if gradient is None else score_shift(gradient, level, kind)
            return self._each_combined(calls, null, conditional, shift, Step(x_t, level, kind, index, self.steps))
        prediction = self.method.combine(null, conditional, calls.w) if any(calls.combined) else null
        if gradient is None:
            return prediction
        before, w_some = prediction.index_select(0, some), calls.w_classifier.index_select(0, some)
        return prediction.index_copy(0, some, classifier_guided(before, gradient, w_some, level, kind))

    def _each_combined(
        self, calls: StepCalls, null: Tensor, conditional: Tensor, shift: Tensor | None, step: Step
    ) -> Tensor:
        """By a method that is not linear: one sample at a time, so that neither bits nor memory depend on the others.

        Where a sample has one prediction alone the method is not asked, and its memory stays as it is: as in
        diffusers' guiders, which leave their momentum untouched where guidance is off.
        """
        made = []
        for i, (w, w_classifier, _) in enumerate(calls.weights):
            # copies, as a method may write into them
            u, c, x_t, total = (each[i : i + 1].clone() for each in (null, conditional, step.x_t, calls.w))
            if not calls.combined[i]:
                made.append(u)
                continue
            combine: Combine = self.method
            if shift is not None and w_classifier != 0:
                n = calls.gradient_of[i]
                u, c, total = jointly(u, c, shift[n : n + 1], total, calls.w_classifier[i : i + 1])
                if w != 0:  # a sum of 0 or 1 is then neither of the two models
                    combine = self.method.combine
            made.append(combine(u, c, total, replace(step, x_t=x_t, memory=self._memory[i])))
        return torch.cat(made)


def _weights_of(
    count: int,
    w: Sequence[float],
    w_classifier: Sequence[float] | None,
    w_guide: Sequence[float] | None,
    classifier: Classifier | None,
    guiding: Denoiser | None,
) -> list[Weights]:
    """The weights of each sample; refuses those without what they weigh, and what is given without weights."""
    lists = [
        [finite(name, value) for value in several(name, [rest] * count if values is None else values, count)]
        for name, values, rest in (("w", w, None), ("w_classifier", w_classifier, 0.0), ("w_guide", w_guide, 1.0))
    ]
    weights = [Weights(*triple) for triple in zip(*lists, strict=True)]
    if classifier is None and any(each.w_classifier for each in weights):
        raise ValueError("w_classifier is not zero, but there is no classifier")
    if guiding is None and any(each.w_guide != 1 for each in weights):
        raise ValueError("w_guide is not one, but there is no guiding network: give guiding")
    if classifier is not None and w_classifier is None:
        raise ValueError("classifier has no effect without w_classifier: give a weight for each label")
    if guiding is not None and w_guide is None:
        raise ValueError("guiding has no effect without w_guide: give a weight for each label")
    return weights
