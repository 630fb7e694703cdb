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

PRECISION_NEIGHBOURS = 3
COVERAGE_NEIGHBOURS = 5
MIN_IMAGES = COVERAGE_NEIGHBOURS + 1
_ROWS, _COLUMNS = 256, 8192  # of a matrix of distances
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


def subsamples(labels: Sequence[Any], splits: int) -> list[Tensor]:
    """As `standard_errors.subsamples`; none of so few images that those of a quarter have no third neighbour."""
    enough = len(labels) >= standard_errors.LEAST * (PRECISION_NEIGHBOURS + 1)
    return standard_errors.subsamples(labels, splits) if enough else []


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
        return {name: value for name, (value, _) in self.measure(features, [None] * len(features), ()).items()}

    def measure(
        self, features: Features, labels: Sequence[Any], subsamples: Sequence[Tensor]
    ) -> dict[str, tuple[float, float | None]]:
        """The four, each with its standard error.

        Args:
            features: (N, D), N at least `MIN_IMAGES`.
            labels: of the images.
            subsamples: of `standard_errors.subsamples`, for the error of recall; without any it has none.
        """
        radii = _radii(features, subsamples, self._distances)
        largest = radii.amax(1)
        count, points = len(features), len(self.reference)
        precise = torch.zeros(count, dtype=torch.bool)
        inside_of, alone = torch.zeros(2, count, dtype=torch.int64)
        names = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))
        covers, sets, recalled = [], [], torch.zeros(radii.shape[1], dtype=torch.int64)
        for part, precision_radius, coverage_radius in zip(
            *(blocks(x, _ROWS) for x in (self.reference, self._precision_radius, self._coverage_radius)), strict=True
        ):
            inside = torch.empty(len(part), count, dtype=torch.bool)
            balls = torch.zeros(len(part), radii.shape[1], dtype=torch.int32)
            for i, other in enumerate(blocks(features, _COLUMNS)):
                columns, distance = slice(i * _COLUMNS, i * _COLUMNS + len(other)), self._distances(part, other)
                precise[columns] |= (distance <= precision_radius[:, None]).any(0)
                inside[:, columns] = distance <= coverage_radius[:, None]
                balls += _balls(distance, largest[columns], radii[columns])
            inside_of += inside.sum(0)
            covers.append(inside.sum(1))
            alone += inside[covers[-1] == 1].sum(0)
            sets.append(torch.where(inside, names, 0).sum(1))
            recalled += (balls > 0).sum(0)
        covered = torch.cat(covers)
        recall, *of_subsamples = (recalled.double() / points).tolist()
        error = partial(standard_errors.of_mean, labels=labels, images=range(count))
        return {
            "precision": (float(precise.double().mean()), error(precise.double())),
            "recall": (recall, standard_errors.of_subsamples(of_subsamples)),
            "density": (int(inside_of.sum()) / (COVERAGE_NEIGHBOURS * count), error(inside_of / COVERAGE_NEIGHBOURS)),
            "coverage": (
                float((covered > 0).double().mean()),
                standard_errors.of_union(covered, alone, torch.cat(sets), labels),
            ),
        }


def neighbour_distances(features: Features, ranks: Sequence[int], distances: Distances = distances_fp64) -> Tensor:
    """Distances (N, len(ranks)) of each of (N, D) to its nearest other ones of these ranks, 1 the nearest."""
    return _nearest(features, max(ranks) + 1, distances)[0][:, list(ranks)]  # itself comes first, at 0


def _nearest(features: Features, kept: int, distances: Distances) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, kept) of the nearest ones of each, itself among them, the nearest first."""
    found = []
    for part in blocks(features):
        best: tuple[Tensor, Tensor] | None = None
        for i, other in enumerate(blocks(features, _COLUMNS)):
            distance = distances(part, other)
            near, where = distance.topk(min(kept, len(other)), largest=False)
            where = where + i * _COLUMNS
            if best is not None:
                near, where = torch.cat([best[0], near], 1), torch.cat([best[1], where], 1)
                near, order = near.topk(min(kept, near.shape[1]), largest=False)
                where = where.gather(1, order)
            best = near, where
        assert best is not None
        found.append(best)
    return torch.cat([near for near, _ in found]), torch.cat([where for _, where in found])


def _radii(features: Features, subsamples: Sequence[Tensor], distances: Distances = distances_fp64) -> Tensor:
    """Distances (N, 1 + R) of each image to its third nearest other one, and so in each of R subsamples, -1 out of it.

    Found among the nearest ones in the whole, and for the few that have too few of them there, anew.
    """
    kept = min(_NEAREST if subsamples else PRECISION_NEIGHBOURS + 1, len(features))
    nearest, where = _nearest(features, kept, distances)
    found = torch.full((len(features), 1 + len(subsamples)), -1.0, dtype=nearest.dtype)
    found[:, 0] = nearest[:, PRECISION_NEIGHBOURS]
    for i, index in enumerate(subsamples, 1):
        chosen = torch.zeros(len(features), dtype=torch.bool)
        chosen[index] = True
        rank = chosen[where[index]].cumsum(1)  # itself is the first
        radius = nearest[index].gather(1, (rank <= PRECISION_NEIGHBOURS).sum(1, keepdim=True).clamp_max(kept - 1))[:, 0]
        short = rank[:, -1] <= PRECISION_NEIGHBOURS
        for part in torch.split(short.nonzero()[:, 0], 256):
            radius[part] = distances(features[index[part]], features[index]).kthvalue(PRECISION_NEIGHBOURS + 1).values
        found[index, i] = radius
    return found


def _balls(distance: Tensor, largest: Tensor, radii: Tensor) -> Tensor:
    """In how many of the images' balls each point is (m, R), for each set of radii (N, R), of distances (m, N).

    Only the pairs within the largest of an image's radii are looked at again for each of them.
    """
    found = torch.zeros(len(distance), radii.shape[1], dtype=torch.int32)
    for pairs in torch.split((distance <= largest).nonzero(), _PAIRS):
        point, image = pairs.T
        found.index_add_(0, point, (distance[point, image][:, None] <= radii[image]).int())
    return found
