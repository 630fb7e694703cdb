"""Precision, recall, density and coverage: fidelity and diversity by nearest neighbours in feature space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from guidegen.evaluate import standard_errors
from guidegen.evaluate.cache import Features
from guidegen.evaluate.distances import blocks
from guidegen.evaluate.standard_errors import Subsamples

PRECISION_NEIGHBOURS = 3
COVERAGE_NEIGHBOURS = 5
MIN_IMAGES = COVERAGE_NEIGHBOURS + 1
_ROWS, _COLUMNS = 1024, 2048  # of a matrix of distances
_PAIRS = 16_384  # of an image and a point of the reference, that are looked at together
_NEAREST = 64  # kept of each image, to find its nearest ones in any half-sample or quarter-sample among

Distances = Callable[[Tensor, Tensor], Tensor]


def distances_fp64(a: Tensor, b: Tensor) -> Tensor:
    """In double, as it goes by way of a matrix product."""
    return torch.cdist(a.double(), b.double())


def squared_distances_fp16(a: Tensor, b: Tensor) -> Tensor:
    """|a|² − 2ab + |b|² in fp16, as guided-diffusion's suite has it, for 2048 features bit by bit as TensorFlow on a CPU.

    In fp32 where that overflows (`DistanceBlock` of its evaluations/evaluator.py).
    """
    x, y = a.half(), b.half()
    product = (x.float() @ y.float().T).half()
    found = (_squared_norms_fp16(x)[:, None] - 2 * product + _squared_norms_fp16(y)).clamp_min(0).float()
    if found.isfinite().all():
        return found
    squares = (z.float().square().sum(1) for z in (a, b))
    return (next(squares)[:, None] - 2 * (a.float() @ b.float().T) + next(squares)).clamp_min(0)


def _squared_norms_fp16(x: Tensor) -> Tensor:
    """(N,) of fp16 (N, D), in the order of Eigen's tree reduction: two halves, each by four packets of eight numbers."""
    squares = nn.functional.pad(x.square(), (0, -x.shape[1] % 64)).reshape(len(x), 2, -(-x.shape[1] // 64), 4, 8)
    fours: Tensor = reduce(torch.add, squares.movedim(2, 0))  # one after the other, each sum rounded
    packets: Tensor = reduce(torch.add, fours.movedim(2, 0))
    halves = packets.float().sum(2).half()
    return halves[:, 0] + halves[:, 1]


def subsamples(labels: Sequence[Any], splits: int) -> Subsamples:
    """As `standard_errors.subsamples`; none of so few images that those of a quarter have no third neighbour."""
    enough = len(labels) >= standard_errors.LEAST * (PRECISION_NEIGHBOURS + 1)
    return standard_errors.subsamples(labels, splits if enough else 0)


class Neighbourhoods:
    """Precision, recall, density and coverage: which images lie within the nearest-neighbour balls of which others.

    Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991, equations 1 and 2), 3 neighbours.
    Density and coverage: Naeem et al. 2020 (arXiv 2002.09797, equations 4 and 5), 5 neighbours.

    Args:
        reference: features (M, D) to measure against, M at least `MIN_IMAGES`.
        distances: of (n, D) to (m, D), as (n, m): `distances_fp64` or `squared_distances_fp16`.
    """

    def __init__(self, reference: Tensor, distances: Distances = distances_fp64):
        self.reference, self._distances = reference, distances
        radii = neighbour_distances(reference, (PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS), self._distances)
        self._precision_radius, self._coverage_radius = radii.unbind(1)

    def __call__(self, features: Features) -> dict[str, float]:
        """The four of features (N, D), N at least `MIN_IMAGES`; all but density are within [0, 1]."""
        return {name: value for name, (value, _) in self.measure(features, [None] * len(features)).items()}

    def measure(
        self, features: Features, labels: Sequence[Any], subsamples: Subsamples | None = None
    ) -> dict[str, tuple[float, float | None]]:
        """The four, each with its standard error.

        Args:
            features: (N, D), N at least `MIN_IMAGES`.
            labels: of the images.
            subsamples: of the images, for the error of recall; without any it has none.
        """
        count, points = len(features), len(self.reference)
        if subsamples is None:
            subsamples = standard_errors.subsamples(labels, 0)
        precise, inside_of = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
        names = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))
        covers, sets, last = torch.zeros(3, points, dtype=torch.int64)
        recalled = torch.zeros(points, 1 + len(subsamples), dtype=torch.bool)
        for start in range(0, count, _ROWS):
            images = slice(start, start + _ROWS)
            mine, radii = features[images], _radii(features, images, subsamples, self._distances)
            largest = radii.amax(1)
            for first in range(0, points, _COLUMNS):
                some = slice(first, first + _COLUMNS)
                distance = self._distances(self.reference[some], mine)
                precise[images] |= (distance <= self._precision_radius[some, None]).any(0)
                inside = distance <= self._coverage_radius[some, None]
                inside_of[images] += inside.sum(0)
                covers[some] += inside.sum(1)
                sets[some] += torch.where(inside, names[images], 0).sum(1)
                last[some] = torch.where(inside.any(1), start + inside.int().argmax(1), last[some])
                recalled[some] |= _in_balls(distance, largest, radii)
        recall, *of_subsamples = recalled.double().mean(0).tolist()
        alone = last[covers == 1].bincount(minlength=count)
        error = partial(standard_errors.of_mean, labels=labels, images=range(count))
        return {
            "precision": (float(precise.double().mean()), error(precise.double())),
            "recall": (recall, standard_errors.of_subsamples(of_subsamples)),
            "density": (int(inside_of.sum()) / (COVERAGE_NEIGHBOURS * count), error(inside_of / COVERAGE_NEIGHBOURS)),
            "coverage": (
                float((covers > 0).double().mean()),
                standard_errors.of_union(covers, alone, sets, labels),
            ),
        }


def neighbour_distances(features: Features, ranks: Sequence[int], distances: Distances = distances_fp64) -> Tensor:
    """Distances (N, len(ranks)) of each of (N, D) to its nearest other ones of these ranks, 1 the nearest."""
    nearest = [_nearest(part, features, max(ranks) + 1, distances)[0] for part in blocks(features, _ROWS)]
    return torch.cat(nearest)[:, list(ranks)]  # itself comes first, at 0


def _nearest(
    part: Tensor, features: Features, kept: int, distances: Distances, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distances and indices (n, kept) of the nearest of features (N, D) to (n, D), the nearest first.

    `among` (N,) bool: which of them to look at, None for all.
    """
    near, where = torch.empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64)
    for start in range(0, len(features), _COLUMNS):
        distance = distances(part, features[start : start + _COLUMNS])
        if among is not None:
            distance[:, ~among[start : start + _COLUMNS]] = torch.inf
        new, index = distance.topk(min(kept, distance.shape[1]), largest=False)
        near, where = torch.cat([near.to(new.dtype), new], 1), torch.cat([where, index + start], 1)
        near, order = near.topk(min(kept, near.shape[1]), largest=False)
        where = where.gather(1, order)
    return near, where


def _radii(features: Features, images: slice, subsamples: Subsamples, distances: Distances = distances_fp64) -> Tensor:
    """Distances (n, 1 + R) of some images to their third nearest other ones, and so in each of R subsamples, -1 out of it.

    Found among the nearest ones in the whole, and for the few that have too few of them there, anew.
    """
    mine, own = features[images], subsamples.members(images)
    kept = min(_NEAREST if len(subsamples) else PRECISION_NEIGHBOURS + 1, len(features))
    nearest, where = _nearest(mine, features, kept, distances)
    found = torch.full((len(mine), 1 + len(subsamples)), -1.0, dtype=nearest.dtype)
    found[:, 0] = nearest[:, PRECISION_NEIGHBOURS]
    short = torch.zeros_like(own)
    for rows in torch.split(torch.arange(len(mine)), 64):
        rank = subsamples.members(where[rows].flatten()).view(len(rows), kept, -1).cumsum(1)  # itself is the first
        position = (rank <= PRECISION_NEIGHBOURS).sum(1).clamp_max(kept - 1)
        found[rows, 1:] = torch.where(own[rows], nearest[rows].gather(1, position), -1)
        short[rows] = own[rows] & (rank[:, -1] <= PRECISION_NEIGHBOURS)
    for which in short.any(0).nonzero()[:, 0].tolist():
        rows, among = short[:, which], subsamples.members_of(which)
        found[rows, 1 + which] = _nearest(mine[rows], features, PRECISION_NEIGHBOURS + 1, distances, among)[0][:, -1]
    return found


def _in_balls(distance: Tensor, largest: Tensor, radii: Tensor) -> Tensor:
    """Whether points are in any of the images' balls (m, R), for each set of radii (n, R), of distances (m, n).

    Only the pairs within the largest of an image's radii are looked at again for each of them.
    """
    found = torch.zeros(len(distance), radii.shape[1], dtype=torch.int32)
    for pairs in torch.split((distance <= largest).nonzero(), _PAIRS):
        point, image = pairs.T
        found.index_add_(0, point, (distance[point, image][:, None] <= radii[image]).int())
    return found > 0
