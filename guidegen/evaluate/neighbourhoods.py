"""Precision, recall, density and coverage: fidelity and diversity by nearest neighbours in feature space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guidegen.evaluate import standard_errors
from guidegen.evaluate.distances import blocks

PRECISION_NEIGHBOURS = 3
COVERAGE_NEIGHBOURS = 5
MIN_IMAGES = COVERAGE_NEIGHBOURS + 1
_NEAREST = 64  # kept of each image, to find its nearest ones in any half-sample or quarter-sample among


class Neighbourhoods:
    """Precision, recall, density and coverage: which images lie within the nearest-neighbour balls of which others.

    Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991, equations 1 and 2), 3 neighbours.
    Density and coverage: Naeem et al. 2020 (arXiv 2002.09797, equations 4 and 5), 5 neighbours.

    Args:
        reference: features (M, D) to measure against, M at least `MIN_IMAGES`.
    """

    def __init__(self, reference: Tensor):
        self._reference = reference
        radii = neighbour_distances(reference, (PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS))
        self._precision_radius, self._coverage_radius = radii.unbind(1)

    def __call__(self, features: Tensor) -> dict[str, float]:
        """The four of features (N, D), N at least `MIN_IMAGES`; all but density are within [0, 1]."""
        return {name: value for name, (value, _) in self.measure(features, [None] * len(features), ()).items()}

    def measure(
        self, features: Tensor, labels: Sequence[Any], subsamples: Sequence[Tensor]
    ) -> dict[str, tuple[float, float | None]]:
        """The four, each with its standard error.

        Args:
            features: (N, D), N at least `MIN_IMAGES`.
            labels: of the images.
            subsamples: of `standard_errors.subsamples`, for the error of recall; without any it has none.
        """
        own_radius = neighbour_distances(features, (PRECISION_NEIGHBOURS,))[:, 0]
        radii = _radii_of_subsamples(features, subsamples)
        count, points = len(features), len(self._reference)
        precise = torch.zeros(count, dtype=torch.bool)
        inside_of, alone = torch.zeros(2, count, dtype=torch.int64)
        names = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))
        covers, sets, recalled = [], [], torch.zeros(1 + len(subsamples), dtype=torch.int64)
        for part, precision_radius, coverage_radius in zip(
            *map(blocks, (self._reference, self._precision_radius, self._coverage_radius)), strict=True
        ):
            distance = _distances(part, features)  # (m, N)
            precise |= (distance <= precision_radius[:, None]).any(0)
            inside = distance <= coverage_radius[:, None]
            inside_of += inside.sum(0)
            covers.append(inside.sum(1))
            alone += inside[covers[-1] == 1].sum(0)
            sets.append(torch.where(inside, names, 0).sum(1))
            recalled[0] += (distance <= own_radius).any(1).sum()
            for i, (index, radius) in enumerate(zip(subsamples, radii, strict=True), 1):
                recalled[i] += (distance[:, index] <= radius).any(1).sum()
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


def neighbour_distances(features: Tensor, ranks: Sequence[int]) -> Tensor:
    """Distances (N, len(ranks)) of each of (N, D) to its nearest other ones of these ranks, 1 the nearest."""
    found = []
    for part in blocks(features):
        nearest = _distances(part, features).topk(max(ranks) + 1, largest=False).values  # itself comes first, at 0
        found.append(nearest[:, list(ranks)])
    return torch.cat(found)


def _radii_of_subsamples(features: Tensor, subsamples: Sequence[Tensor]) -> list[Tensor]:
    """Distance of each image of each subsample to its third nearest other one there, (n,) a subsample.

    Found among the nearest ones in the whole, and for the few that have too few of them there, anew.
    """
    if not subsamples:
        return []
    kept = min(_NEAREST, len(features))
    found = [_distances(part, features).topk(kept, largest=False) for part in blocks(features)]
    nearest, where = torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])
    radii = []
    for index in subsamples:
        chosen = torch.zeros(len(features), dtype=torch.bool)
        chosen[index] = True
        rank = chosen[where[index]].cumsum(1)  # itself is the first
        radius = nearest[index].gather(1, (rank <= PRECISION_NEIGHBOURS).sum(1, keepdim=True).clamp_max(kept - 1))[:, 0]
        short = rank[:, -1] <= PRECISION_NEIGHBOURS
        if short.any():
            radius[short] = _distances(features[index[short]], features[index]).kthvalue(PRECISION_NEIGHBOURS + 1).values
        radii.append(radius)
    return radii


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double())  # in double, as it goes by way of a matrix product
