"""Classifiers behind the `Classifier` interface of `guidegen.scores.guided`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from guidegen.arguments import instance, one_of, several, whole
from guidegen.scores.interfaces import NULL, Classifier, Cost, Denoiser, autocast
from guidegen.scores.noise import PREDICTION_TYPES, Level, PredictionType, to_x0

_LARGEST_AT_LOGITS = 2.0**10
_LARGEST_SCALE = 2.0**126  # above it fp32 overflows; a gradient that needs more is zero in fp32 anyway
_SCALE_STEP = 2.0**5
_SCALE_TRIES = 6


def gradient_of_log_probability(logits_of: Callable[[Tensor], Tensor], x: Tensor, columns: Tensor, scaled: bool) -> Tensor:
    """grad of log softmax(logits_of(x))[columns] with respect to x, in fp32.

    Backward starts from the gradient at the logits, one-hot minus softmax, in fp32. Half precision
    underflows below 6e-8 and overflows above 65504 inside the network, so with `scaled` each
    sample starts from a power of two times that, at most 2^10 however sure the classifier is, and
    its gradient is divided by it after; where it overflows, backward runs again from a smaller
    one. Each sample has its own scale: the batch around it changes nothing.

    Args:
        logits_of: images (B, *) -> logits (B, K).
        x: images or packed latents (B, *), fp32.
        columns: the column of each sample's label (B,).
        scaled: whether the network runs in fp16.

    Returns:
        (B, *) fp32, zero where it is below what fp32 holds; not finite only where the logits are not or
        no scale makes it so.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = logits_of(leaf)
    if logits.ndim != 2 or len(logits) != len(x):
        raise ValueError(f"a classifier gives logits (B, K), here ({len(x)}, K); found {tuple(logits.shape)}.")
    if columns.shape != (len(x),):
        raise ValueError(f"labels are one a row of x_t, {len(x)} in all; found {tuple(columns.shape)}.")
    if columns.device.type == "cpu" and int(columns.max()) >= logits.shape[1]:
        raise ValueError(f"columns: there is no column {int(columns.max())} in logits of {logits.shape[1]} classes.")
    # one-hot minus softmax; 1 - p as the sum of the others, which does not round to zero when p is near 1
    others = logits.detach().float().softmax(dim=-1).scatter(1, columns[:, None], 0.0)
    start = (-others).scatter(1, columns[:, None], others.sum(dim=1, keepdim=True))
    if not scaled:
        return torch.autograd.grad(logits, leaf, start.to(logits.dtype))[0].float()
    largest = start.abs().amax(dim=1).clamp(min=_LARGEST_AT_LOGITS / _LARGEST_SCALE)
    scale = _LARGEST_AT_LOGITS / largest.log2().ceil().exp2()
    for attempt in range(_SCALE_TRIES):
        scaled_start = (start * scale[:, None]).to(logits.dtype)
        last = attempt == _SCALE_TRIES - 1
        gradient = torch.autograd.grad(logits, leaf, scaled_start, retain_graph=not last)[0].float()
        gradient = gradient / scale.view(-1, *[1] * (x.ndim - 1))
        overflow = ~gradient.flatten(1).isfinite().all(dim=1)
        if not overflow.any():
            break
        scale = torch.where(overflow, scale / _SCALE_STEP, scale)
    return gradient


class _Score:
    """What the three share: the columns of their labels."""

    def __init__(self, columns: Mapping[int, int], autocast: torch.dtype | None):
        one_of("autocast", autocast, (None, torch.float16, torch.bfloat16))
        self.autocast, self._columns = autocast, _Columns(columns)

    def check_labels(self, labels: Iterable[int]) -> None:
        """Raises ValueError where one of the labels has no column."""
        self._columns.check(labels)


class NoisyScore(_Score):
    """grad log p(y | x_t) of a noise-aware classifier, one that takes (x_t, t).

    Args:
        network: `forward(x_t (B, C, H, W), t (B,)) -> logits (B, K)`, such as `NoisyClassifier`;
            trained on the noise schedule of the denoiser that it will guide.
        columns: label id -> column of the logits.
        autocast: fp16 or bf16; None computes in fp32. The softmax is fp32 always.
    """

    cost = Cost(1)

    def __init__(self, network: nn.Module, columns: Mapping[int, int], autocast: torch.dtype | None = None):
        super().__init__(columns, autocast)
        self.network = network.requires_grad_(False)

    def __call__(
        self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level | None = None, null: Tensor | None = None
    ) -> Tensor:
        """grad log p(label | x_t), (B, C, H, W) fp32."""

        def logits_of(x: Tensor) -> Tensor:
            with autocast(x, self.autocast):
                logits: Tensor = self.network(x, t.expand(len(x)))
            return logits

        return gradient_of_log_probability(logits_of, x_t, self._columns(labels), self.autocast == torch.float16)


class DenoisedScore(_Score):
    """grad log p(y | x0(x_t)) of a classifier of clean images, through the denoised estimate.

    x0(x_t) = E[x_0 | x_t] of the unconditional denoiser, and the gradient runs back through it, as in
    Bansal et al. 2023 (arXiv 2302.07121, eq. 7). p(y | E[x_0|x_t]) stands in for p(y | x_t): an
    approximation that is exact only without noise.

    Args:
        network: `forward(images (B, C, H, W) in [-1, 1]) -> logits (B, K)`, its own resizing included.
        columns: label id -> column of the logits.
        denoiser: the network that is being guided.
        autocast: fp16 or bf16; None computes in fp32. The softmax is fp32 always.
    """

    cost = Cost(2)

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        columns: Mapping[int, int],
        denoiser: Denoiser,
        autocast: torch.dtype | None = None,
    ):
        super().__init__(columns, autocast)
        self.network, self.denoiser = network, denoiser
        if check := getattr(denoiser, "check_labels", None):
            check([NULL])

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor | None = None) -> Tensor:
        """grad log p(label | x0(x_t)) with respect to x_t, (B, C, H, W) fp32."""

        def logits_of(x: Tensor) -> Tensor:
            prediction = self.denoiser(x, t, torch.full_like(labels, NULL))
            x0 = to_x0(prediction, x, level, self.denoiser.prediction_type)
            with autocast(x, self.autocast):
                return self.network(x0)

        return gradient_of_log_probability(logits_of, x_t, self._columns(labels), self.autocast == torch.float16)


class DetachedScore(_Score):
    """`DenoisedScore` with the denoiser's own derivative left out: d x0 / d x_t = 1 / alpha.

    x0 = (x_t - sigma eps) / alpha with eps held fixed. It reads the unconditional prediction that
    guidance has at hand, so it costs one call of the classifier and no memory for the denoiser.

    Args:
        network: `forward(images (B, C, H, W) in [-1, 1]) -> logits (B, K)`, its own resizing included.
        columns: label id -> column of the logits.
        prediction_type: of the denoiser.
        autocast: fp16 or bf16; None computes in fp32. The softmax is fp32 always.
    """

    cost = Cost(1, needs_null=True)

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        columns: Mapping[int, int],
        prediction_type: PredictionType,
        autocast: torch.dtype | None = None,
    ):
        super().__init__(columns, autocast)
        one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        self.network, self.prediction_type = network, prediction_type

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor) -> Tensor:
        """grad log p(label | x0) / alpha, (B, C, H, W) fp32; 0 at alpha = 0, where x_t says nothing of the label."""
        if level.alpha == 0:
            return torch.zeros_like(x_t)

        def logits_of(x0: Tensor) -> Tensor:
            with autocast(x0, self.autocast):
                return self.network(x0)

        x0 = to_x0(null, x_t, level, self.prediction_type)
        scaled = self.autocast == torch.float16
        return gradient_of_log_probability(logits_of, x0, self._columns(labels), scaled) / level.alpha


class SummedScore:
    """Several classifiers behind one interface.

    grad log of a product of experts, each to the power of its weight v_j: sum_j v_j grad log p_j(y|x_t)
    (Hinton 2002, Neural Computation 14(8), eq. 1; as scores: Liu et al. 2022, arXiv 2206.01714, eq. 11).
    The sum is a mixture of labels: of K classifiers, the one with index j is asked for its label n as
    label n K + j, whose weight in the mixture is v_j. Each thus answers for labels of its own, and at its own cost.

    Args:
        parts: the K classifiers.
    """

    def __init__(self, parts: Sequence[Classifier]):
        self.parts = tuple(parts)
        self.cost = summed_cost([part.cost for part in parts])

    def check_labels(self, labels: Iterable[int]) -> None:
        """Raises ValueError where the classifier that a label asks has none of it."""
        for label in labels:
            if check := getattr(self.parts[label % len(self.parts)], "check_labels", None):
                check([label // len(self.parts)])

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor) -> Tensor:
        """grad log p_j(label n | x_t) of each row's own classifier, (B, C, H, W) fp32; labels (B,) are n K + j."""
        count = len(self.parts)
        gradient = torch.empty_like(x_t)
        for j, part in enumerate(self.parts):
            rows = (labels % count == j).nonzero()[:, 0]
            if len(rows):
                some = [each.index_select(0, rows) for each in (x_t, labels // count, null)]
                gradient[rows] = part(some[0], t, some[1], level, some[2]).to(gradient.dtype)
        return gradient


def summed_cost(costs: Sequence[Cost]) -> Cost:
    """What gradients of several classifiers take, each its own."""
    return Cost(costs[0].calls, any(cost.needs_null for cost in costs), tuple(cost.calls for cost in costs[1:]))


class _Columns:
    """Label ids (B,) to columns of the logits (B,), on whatever device the ids are."""

    def __init__(self, columns: Mapping[int, int]):
        instance("columns", columns, Mapping, "a mapping of label ids to columns")
        several("columns", columns)
        self._known = {whole("columns", label): whole("columns", column) for label, column in columns.items()}
        self._table = torch.zeros(max(self._known) + 1, dtype=torch.long)
        for label, column in self._known.items():
            self._table[label] = column

    def check(self, labels: Iterable[int]) -> None:
        """Raises ValueError where one of the labels has no column."""
        if missing := [label for label in labels if label not in self._known]:
            raise ValueError(
                f"labels: the classifier does not know {missing[0]}; its columns are of {len(self._known)} labels."
            )

    def __call__(self, labels: Tensor) -> Tensor:
        if labels.device.type == "cpu":  # elsewhere reading them would wait for the device; `Guide` has asked
            self.check(labels.tolist())
        self._table = self._table.to(labels.device)
        return self._table[labels]
