"""Numbers from the features of drawn images that published tables have beside the Fréchet distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guidegen.evaluate import standard_errors
from guidegen.evaluate.cache import Features
from guidegen.evaluate.distances import BLOCK, FrechetDistance, blocks
from guidegen.evaluate.moments import Sums

_SHUFFLE_SEED = 2020  # torch-fidelity's
_SPLITS = 10
_BANDWIDTH, _SCALE = 10, 1000  # of CMMD
_POINTS = 15


def inception_score(features: Features, head: Tensor, size: int, shuffled: bool) -> tuple[float, float | None]:
    """exp of the mean KL divergence of p(y|x) from p(y) (Salimans et al. 2016, arXiv 1606.03498), a mean over splits.

    Args:
        features: (N, D).
        head: (K, D), to logits.
        size: images of each split but the last, as in guided-diffusion's suite; 0: ten equal splits, as in torch-fidelity.
        shuffled: whether the splits are of shuffled images: those of a run come label by label.

    Returns:
        The score, and its standard error by the influence of each image on the score of its split; None of one image.
    """
    count = len(features)
    order = np.random.RandomState(_SHUFFLE_SEED).permutation(count) if shuffled or not size else np.arange(count)
    ends = [*range(size, count, size), count] if size else [(i + 1) * count // _SPLITS for i in range(_SPLITS)]
    scores, variance, start = [], 0.0, 0
    for end in ends:
        if end > start:
            score, of_split = _split_score(features, head, order[start:end])
            scores.append(score)
            variance += of_split
            start = end
    return sum(scores) / len(scores), math.sqrt(variance) / len(scores) if count > 1 else None


def _split_score(features: Features, head: Tensor, index: Any) -> tuple[float, float]:
    """exp of the mean of KL(p(y|x) ‖ p(y)), and the variance of it: the derivative by an image's weight is its KL times it.

    The derivative by p(y) adds −Σ p(y|x), the same for all images.
    """
    marginal, entropies = torch.zeros(len(head), dtype=torch.float64), []
    for part in np.array_split(index, max(1, len(index) // 512)):
        log = (features[part].double() @ head.T).log_softmax(1)
        marginal += log.exp().sum(0)
        entropies.append((log.exp() * log).sum(1))
    log_marginal = (marginal / len(index)).log()
    kl = []
    for part, entropy in zip(np.array_split(index, max(1, len(index) // 512)), entropies, strict=True):
        kl.append(entropy - (features[part].double() @ head.T).softmax(1) @ log_marginal)
    every = torch.cat(kl)
    score = math.exp(float(every.mean()))
    return score, score**2 * float(every.var()) / len(every) if len(every) > 1 else 0.0


class ClipDistance:
    """1000 times the squared maximum mean discrepancy under exp(−|x − y|²/200), all pairs of each set counted (CMMD).

    Args:
        reference: features (M, D) of unit length.
    """

    def __init__(self, reference: Tensor):
        self._reference = reference
        self._within = float(_kernel_means(reference, reference)[0].mean())

    def measure(self, features: Features, labels: Sequence[Any], splits: int) -> tuple[float, float | None]:
        """The distance of features (N, D) of unit length, and its standard error; without splits there is none.

        The error is that of the influence of each image, less what that counts twice: the part of the variance that
        comes from two images at once, 2/N² times that of the kernel about its means by row and by column.
        """
        count = len(features)
        own, squares = _kernel_means(features, features)
        across, _ = _kernel_means(features, self._reference)
        value = _SCALE * float(own.mean() + self._within - 2 * across.mean())
        first = standard_errors.of_mean(2 * _SCALE * (own - across), labels, range(count)) if splits else None
        if first is None:
            return value, None
        of_itself = (1 - 2 * own + own.mean()).square().sum() / count  # the diagonal, which is no pair
        pairs = float(squares.sum() - 2 * count * own.square().mean() + count * own.mean().square() - of_itself)
        second = 2 * _SCALE**2 * pairs / (count - 1) / count**2
        return value, max(first**2 - second, first**2 / 2) ** 0.5


def _kernel_means(features: Features, others: Features) -> tuple[Tensor, Tensor]:
    """Of each of (N, D) the mean of the kernel with the others, and of its square."""
    found = torch.zeros(2, len(features), dtype=torch.float64)  # at once: what each block keeps scatters the heap
    for x, means in zip(blocks(features), torch.split(found, BLOCK, 1), strict=True):
        for part in blocks(others, 4096):
            kernel = (-torch.cdist(x.double(), part.double()).square() / (2 * _BANDWIDTH**2)).exp()
            means += torch.stack([kernel.sum(1), kernel.square().sum(1)]) / len(others)
    mean, square = found
    return mean, square


def extrapolated(
    distance: FrechetDistance, features: Features, labels: Sequence[Any], with_error: bool
) -> tuple[float, float | None] | None:
    """At infinitely many images: a line in 1/N through those of subsets (Chong & Forsyth 2020, arXiv 1911.07023).

    Of 15 nested random subsets with their share of every label, from a fifth of the images, and of no fewer than the
    features are wide, to all. The line's end is a weighted sum of their distances, in which an image counts by the
    subsets that it is in: the standard error is of the influence of each image, weighed so.

    Returns:
        The distance and its standard error; None of too few images for it.
    """
    count, width = features.shape
    least = max(count // 5, width + 1)
    if count < 1.5 * least:
        return None
    order = standard_errors.balanced_order(labels)
    sizes = torch.linspace(least, count, _POINTS).round().long().tolist()
    sums, values, start = Sums(width, distance.reference.mean), [], 0
    for size in sizes:
        for part in torch.split(order[start:size].sort().values, 4096):
            sums.update(features[part])
        values.append(distance.of_moments(moments := sums.moments()))
        start = size
    end = np.linalg.pinv(np.stack([np.ones(_POINTS), 1 / np.array(sizes)], 1))[0]
    value = float(end @ np.array(values))
    if not with_error:
        return value, None
    weights = torch.zeros(count, dtype=torch.float64)
    for share, size in zip(end.tolist(), sizes, strict=True):
        weights[order[:size]] += share / size
    return value, standard_errors.of_weighted_sum(distance.influence(features, moments), weights, labels)
