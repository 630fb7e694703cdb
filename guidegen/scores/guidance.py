"""Guidance: several predictions and gradients become one prediction.

By Bayes' rule grad log p(x|y) = grad log p(x) + grad log p(y|x). A weight w on the last term
gives w = 0 unconditional, w = 1 conditional, w > 1 sharper; classifier-free guidance writes the
same term as grad log p(x|y) - grad log p(x). How the two are combined is in `guidegen.scores.methods`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from guidegen.arguments import finite, instance, one_of, several, whole
from guidegen.scores.diffusion import PREDICTION_TYPES, Level, PredictionType, from_x0, score_shift, to_x0
from guidegen.scores.formulas import jointly
from guidegen.scores.methods import METHODS, Combine, Method, Step
from guidegen.scores.methods import classifier_free as classifier_free

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
        """Prediction (B, C, H, W) fp32 from x_t (B, C, H, W) fp32, timestep t () and labels (B,)."""
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
        w_guide: of the network against a weaker one: 0 the weaker one, 1 the network.
    """

    w: float
    w_classifier: float = 0.0
    w_guide: float = 1.0


Pace = Callable[[int, Weights], Weights]
"""From the index of a step, and the weights that were asked for, to those of that step."""


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


class _Needs(NamedTuple):
    """The network calls of one sample at one step: which predictions it takes, as sums over labels.

    Attributes:
        null: the unconditional prediction; empty where it is not needed.
        conditional: the one that the label's own score comes from; empty where it weighs nothing.
        weak: what the weaker network predicts for the same; empty where it is not needed.
        gradients: what the classifier is asked for.
    """

    null: Mixture
    conditional: Mixture
    weak: Mixture
    gradients: Mixture

    def calls(self, cost: Cost) -> int:
        """How many they are; a label that two predictions read is asked for once."""
        network = {label for label, _ in (*self.null, *self.conditional)}
        return len(network) + len(self.weak) + cost.of(label for label, _ in self.gradients)


_WITHOUT: Mixture = ((NULL, 1.0),)


def _needs(weights: Weights, labels: Mixture, targets: Mixture, needs_null: bool) -> _Needs:
    w, w_classifier, w_guide = weights
    rest = 1.0 - math.fsum(weight for _, weight in labels)
    whole = abs(rest) < 1e-9
    conditional = labels if whole else (*labels, (NULL, rest))
    null = w != 1 or (w_classifier != 0 and needs_null)
    weak = w_guide != 1
    strong = w_guide != 0 or w != 1 or w_classifier != 0  # else the weaker network alone is asked for
    return _Needs(
        _WITHOUT if null else (),
        conditional if w != 0 and strong else (),
        (conditional if w != 0 else _WITHOUT) if weak else (),
        targets if w_classifier != 0 else (),
    )


def calls_per_step(
    weights: Weights, cost: Cost = FREE, labels: Mixture = ((0, 1.0),), targets: Mixture = ((0, 1.0),)
) -> int:
    """Network calls of one sample at one step: null, labels, weaker network and gradients, less those of zero weight.

    Args:
        weights: of this step.
        cost: of one gradient; `needs_null` also where the method reads the unconditional prediction beside a gradient.
        labels: that the network is asked for.
        targets: that the classifier is.
    """
    return _needs(weights, labels, targets, cost.needs_null).calls(cost)


class _Sum:
    """For each sample a weighted sum over rows of a table.

    Args:
        terms: (row, weight) pairs of each sample.
        device: where the table is.
    """

    def __init__(self, terms: Sequence[Sequence[tuple[int, float]]], device: torch.device | str):
        most = max(map(len, terms), default=0)
        # Filled up with a row of the sample's own: zero times what another sample made non-finite is no zero.
        full = [[*some, *[(some[0][0], 0.0)] * (most - len(some))] for some in terms]
        self._rows = [torch.tensor([some[n][0] for some in full], dtype=torch.long, device=device) for n in range(most)]
        plain = most == 1 and all(some[0][1] == 1 for some in full)
        self._weights = None if plain else [_column([some[n][1] for some in full], device) for n in range(most)]

    def __call__(self, table: Tensor) -> Tensor:
        """(B, C, H, W) from the table (R, C, H, W)."""
        picked = [table.index_select(0, rows) for rows in self._rows]
        if self._weights is None:
            return picked[0]
        return torch.stack([weight * rows for weight, rows in zip(self._weights, picked, strict=True)]).sum(0)


class _Layout:
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
        needs: Sequence[_Needs],
        starts: Sequence[Hashable],
        cost: Cost,
        device: torch.device | str,
    ):
        strong: dict[tuple[Hashable, int], int] = {}  # (start, label) -> a sample that has it
        weak: dict[tuple[Hashable, int], int] = {}
        gradients: dict[tuple[Hashable, int], int] = {}
        for table, part in ((strong, "null"), (strong, "conditional"), (weak, "weak"), (gradients, "gradients")):
            for i, need in enumerate(needs):
                for label, _ in getattr(need, part):
                    table.setdefault((starts[i], label), i)
        place = {(False, *key): n for n, key in enumerate(strong)}
        place |= {(True, *key): n + len(strong) for n, key in enumerate(weak)}
        gradient_place = {key: n for n, key in enumerate(gradients)}

        def index(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.long, device=device)

        def terms(i: int, part: Mixture, is_weak: bool = False) -> list[tuple[int, float]]:
            return [(place[is_weak, starts[i], label], weight) for label, weight in part]

        self.samples, self.labels = index(strong.values()), index(label for _, label in strong)
        self.weak_samples, self.weak_labels = index(weak.values()), index(label for _, label in weak)
        self.gradient_samples, self.gradient_labels = index(gradients.values()), index(label for _, label in gradients)
        # A sample with one prediction only takes it for all, whose differences are then zero.
        nulls, conditionals, weaks = [], [], []
        for i, need in enumerate(needs):
            null, conditional, other = terms(i, need.null), terms(i, need.conditional), terms(i, need.weak, True)
            nulls.append(null or conditional or other)
            conditionals.append(conditional or null or other)
            weaks.append(other or conditionals[-1])
        self.null, self.conditional = _Sum(nulls, device), _Sum(conditionals, device)
        self.weak = _Sum(weaks, device) if weak else None
        self.weights = weights
        self.combined = [bool(need.null and (need.conditional or need.gradients)) for need in needs]
        guided = [i for i, need in enumerate(needs) if need.gradients]
        self.gradient_of = {i: n for n, i in enumerate(guided)}
        self.guided = index(guided)
        self.gradient = _Sum(
            [[(gradient_place[starts[i], label], weight) for label, weight in needs[i].gradients] for i in guided], device
        )
        self.w, self.w_classifier, self.w_guide = (_column(column, device) for column in zip(*weights, strict=True))
        self.calls = [need.calls(cost) for need in needs]
        self.made = len(strong) + len(weak) + cost.of(label for _, label in gradients)


class Guide:
    """All kinds of guidance over one batch, with weights for each sample.

    score = s(x) + w (s(x|y) - s(x)) + w_classifier grad log p(y|x) + (w_guide - 1) (s - s_weak), which
    covers every mode: classifier-free (w_classifier = 0), classifier (w = 0), both, none, and
    autoguidance, where s - s_weak is at the condition that the mode draws with. A method other than
    the plain one takes the place of the first three terms: its conditional prediction is the one
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
        weak: the weaker network; needed where any `w_guide` is not one.
        w_guide: B weights of the network against the weaker one.
        method: how the unconditional and the conditional prediction are combined.
        pace: the weights of each step; None for the same at all.
        steps: how many evaluations a method can count on.
        clip: keeps the denoised estimate of each prediction within [-clip, clip], before guidance.

    Raises:
        TypeError, ValueError: an argument that cannot be, by its name: a list of another length than `labels`, weights
            that are not finite, labels that a network does not have, a classifier or a weaker network without
            weights or weights without them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        labels: Sequence[int | Mixture],
        w: Sequence[float],
        w_classifier: Sequence[float] | None = None,
        classifier: Classifier | None = None,
        device: torch.device | str = "cpu",
        classifier_labels: Sequence[int | Mixture] | None = None,
        starts: Sequence[Hashable] | None = None,
        *,
        weak: Denoiser | None = None,
        w_guide: Sequence[float] | None = None,
        method: Method = METHODS["cfg"],
        pace: Pace | None = None,
        steps: int = 1,
        clip: float | None = None,
    ):
        self._labels = [as_mixture(label) for label in several("labels", labels)]
        count = len(self._labels)
        for name, network in (("denoiser", denoiser), ("weak", weak)):
            if network is not None or name == "denoiser":
                one_of(f"{name}.prediction_type", getattr(network, "prediction_type", None), PREDICTION_TYPES)
        instance("method", method, Method, "a Method, such as METHODS['apg']")
        self.denoiser, self.classifier, self.weak, self.device = denoiser, classifier, weak, device
        self.method, self.pace, self.steps = method, pace, whole("steps", steps, 1)
        self.clip = clip
        if clip is not None and finite("clip", clip) <= 0:
            raise ValueError(f"clip takes a number above 0, found {clip}.")
        self._weights = _weights_of(count, w, w_classifier, w_guide, classifier, weak)
        self._cost = cost_with(method, classifier.cost) if classifier is not None else FREE
        targets = labels if classifier_labels is None else several("classifier_labels", classifier_labels, count)
        self._targets = [as_mixture(label, "classifier_labels") for label in targets]
        starts = None if starts is None else several("starts", starts, count)
        self._check_labels()
        self._starts = starts
        self._layouts: dict[tuple[bool, tuple[Weights, ...]], _Layout] = {}
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
        layout = self._layout(index)
        if index == 0:
            self._memory = [{} for _ in self._weights]
        self.calls = [before + now for before, now in zip(self.calls, layout.calls, strict=True)]
        self.made += layout.made
        rows = self._rows(layout, x_t, t, level)
        null, conditional = layout.null(rows), layout.conditional(rows)
        shift = self._gradient(layout, x_t, t, level, null)
        prediction = self._combined(layout, null, conditional, shift, x_t, level, index)
        return prediction if layout.weak is None else autoguided(prediction, conditional, layout.weak(rows), layout.w_guide)

    def _needs(self, weights: Sequence[Weights]) -> list[_Needs]:
        each = zip(weights, self._labels, self._targets, strict=True)
        return [_needs(*sample, self._cost.needs_null) for sample in each]

    def _check_labels(self) -> None:
        """Asks the networks, where they can tell, whether they have the labels that they will be asked for."""
        for need in self._needs(self._weights):
            for network, asked in (
                (self.denoiser, need.null + need.conditional),
                (self.weak, need.weak),
                (self.classifier, need.gradients),
            ):
                if check := getattr(network, "check_labels", None):
                    check([label for label, _ in asked])

    def _layout(self, index: int) -> _Layout:
        weights = tuple(self.pace(index, each) if self.pace else each for each in self._weights)
        shared = index == 0 and self._starts is not None
        key = (shared, weights)
        if key not in self._layouts:
            starts = self._starts if shared and self._starts is not None else range(len(weights))
            self._layouts[key] = _Layout(weights, self._needs(weights), starts, self._cost, self.device)
        return self._layouts[key]

    def _rows(self, layout: _Layout, x_t: Tensor, t: Tensor, level: Level) -> Tensor:
        """What the networks predict, a row a call; those of the weaker one last."""
        made = []
        for network, samples, labels in (
            (self.denoiser, layout.samples, layout.labels),
            (self.weak, layout.weak_samples, layout.weak_labels),
        ):
            if network is not None and len(samples):
                x_some = x_t.index_select(0, samples)
                rows = network(x_some, t, labels)
                made.append(rows if self.clip is None else clipped(rows, x_some, level, network.prediction_type, self.clip))
        return made[0] if len(made) == 1 else torch.cat(made)

    def _gradient(self, layout: _Layout, x_t: Tensor, t: Tensor, level: Level, null: Tensor) -> Tensor | None:
        """grad log p(y | x_t) of the samples that ask for it; None where none does."""
        if self.classifier is None or not len(layout.guided):
            return None
        x_some, null_some = (table.index_select(0, layout.gradient_samples) for table in (x_t, null))
        return layout.gradient(self.classifier(x_some, t, layout.gradient_labels, level, null_some))

    def _combined(
        self,
        layout: _Layout,
        null: Tensor,
        conditional: Tensor,
        gradient: Tensor | None,
        x_t: Tensor,
        level: Level,
        index: int,
    ) -> Tensor:
        kind, some = self.denoiser.prediction_type, layout.guided
        if not self.method.linear:
            shift = None if gradient is None else score_shift(gradient, level, kind)
            return self._each_combined(layout, null, conditional, shift, Step(x_t, level, kind, index, self.steps))
        prediction = self.method.combine(null, conditional, layout.w) if any(layout.combined) else null
        if gradient is None:
            return prediction
        before, w_some = prediction.index_select(0, some), layout.w_classifier.index_select(0, some)
        return prediction.index_copy(0, some, classifier_guided(before, gradient, w_some, level, kind))

    def _each_combined(self, layout: _Layout, null: Tensor, conditional: Tensor, shift: Tensor | None, step: Step) -> Tensor:
        """By a method that is not linear: one sample at a time, so that neither bits nor memory depend on the others.

        Where a sample has one prediction alone the method is not asked, and its memory stays as it is: as in
        diffusers' guiders, which leave their momentum untouched where guidance is off.
        """
        made = []
        for i, (w, w_classifier, _) in enumerate(layout.weights):
            # copies, as a method may write into them
            u, c, x_t, total = (each[i : i + 1].clone() for each in (null, conditional, step.x_t, layout.w))
            if not layout.combined[i]:
                made.append(u)
                continue
            combine: Combine = self.method
            if shift is not None and w_classifier != 0:
                n = layout.gradient_of[i]
                u, c, total = jointly(u, c, shift[n : n + 1], total, layout.w_classifier[i : i + 1])
                if w != 0:  # a sum of 0 or 1 is then neither of the two models
                    combine = self.method.combine
            made.append(combine(u, c, total, replace(step, x_t=x_t, memory=self._memory[i])))
        return torch.cat(made)


def cost_with(method: Method, cost: Cost) -> Cost:
    """A gradient's cost under a method: one that is not linear reads the unconditional prediction beside it."""
    return cost._replace(needs_null=cost.needs_null or not method.linear)


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


def _weights_of(
    count: int,
    w: Sequence[float],
    w_classifier: Sequence[float] | None,
    w_guide: Sequence[float] | None,
    classifier: Classifier | None,
    weak: Denoiser | None,
) -> list[Weights]:
    """The weights of each sample; refuses those without what they weigh, and what is given without weights."""
    lists = [
        [finite(name, value) for value in several(name, [rest] * count if values is None else values, count)]
        for name, values, rest in (("w", w, None), ("w_classifier", w_classifier, 0.0), ("w_guide", w_guide, 1.0))
    ]
    weights = [Weights(*triple) for triple in zip(*lists, strict=True)]
    if classifier is None and any(each.w_classifier for each in weights):
        raise ValueError("w_classifier is not zero, but there is no classifier")
    if weak is None and any(each.w_guide != 1 for each in weights):
        raise ValueError("w_guide is not one, but there is no weaker network: give weak")
    if classifier is not None and w_classifier is None:
        raise ValueError("classifier has no effect without w_classifier: give a weight for each label")
    if weak is not None and w_guide is None:
        raise ValueError("weak has no effect without w_guide: give a weight for each label")
    return weights


def _column(values: Sequence[float], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None, None]
