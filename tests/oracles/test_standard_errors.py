"""Every standard error that is reported, against the spread of the metric over many independent samples.

`python tests/oracles/test_standard_errors.py` does it for more sizes and widths, in some minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from guidegen.evaluate import distances, diversity, metrics, neighbourhoods, scores, standard_errors
from guidegen.evaluate.metrics import Measured


class Case(NamedTuple):
    """Gaussian features: `classes` of `each` images, `width` wide, against `real` reference images."""

    classes: int
    each: int
    width: int
    real: int
    shift: float = 0.2
    scale: float = 0.9
    apart: float = 0.0

    def means(self) -> Tensor:
        return torch.randn(self.classes, 1, self.width, generator=torch.Generator().manual_seed(9)) * self.apart

    def reference(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        each = -(-self.real // self.classes)
        return (torch.randn(self.classes, each, self.width, generator=generator) + self.means()).flatten(0, 1)

    def samples(self, count: int) -> Iterator[Measured]:
        generator = torch.Generator().manual_seed(2)
        size, labels = self.classes * self.each, [c for c in range(self.classes) for _ in range(self.each)]
        for i in range(count):
            noise = torch.randn(self.classes, self.each, self.width, generator=generator)
            features = (noise * self.scale + self.shift + self.means()).flatten(0, 1)
            logits = 2 * features[:, 0].double() + torch.tensor(labels) * 0.3
            hashes = [f"{i} {j}" for j in range(size)]
            yield Measured(features, hashes, labels, logits.sigmoid(), (logits > 0.5).double())


def ratios(case: Case, names: Sequence[str], truly: int, reported: int) -> dict[str, float]:
    """Mean of the reported standard error by the standard deviation of the metric over `truly` samples."""
    meter = metrics.Meter(case.reference())
    values: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, list[float]] = {name: [] for name in names}
    for images in case.samples(truly):
        for name, value in fast(meter, images, names).items():
            values[name].append(value)
    for i, images in enumerate(case.samples(8 * reported)):
        if i < reported:
            found = {name: figure["spread"] for name, figure in meter.measure(images, 20).items() if figure}
        elif "precision" not in names:
            break
        else:  # what takes no subsamples, so that their own noise does not count
            found = {n: error for n, (_, error) in meter._neighbourhoods.measure(images.features, images.labels).items()}
        for name in names:
            if found.get(name) is not None:
                errors[name].append(found[name])
    return {n: float(torch.tensor(errors[n]).mean() / torch.tensor(values[n], dtype=torch.float64).std()) for n in names}


def fast(meter: Any, images: Measured, names: Sequence[str]) -> dict[str, float]:
    """The metrics without the detour over torchmetrics, which takes its time; the next test holds it to that."""
    everything = standard_errors.Subsamples(torch.zeros(len(images.labels), 1, dtype=torch.uint8), torch.ones(1, 1).bool())
    found = {
        "frechet_distance": meter._frechet.of_few(images.features),
        "kernel_distance": meter._kernel._of_subsamples(images.features.double(), everything)[0],
        "accuracy": float(images.correct.mean()),
        "confidence": float(images.probability.mean()),
    }
    for name, score in (("vendi_score", diversity.vendi_score), ("pairwise_distance", diversity.pairwise_distance)):
        if name in names:
            found[name] = diversity.mean_over_classes(score, images.features, images.labels) or 0.0
    if {"recall", "coverage"} & {*names}:
        found |= meter._neighbourhoods(images.features)
    return {name: found[name] for name in names}


AGAINST = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
MEANS = ("accuracy", "confidence")
WITHIN = ("vendi_score", "pairwise_distance")
CASES = [
    (Case(1, 200, 8, 500), (*AGAINST, *MEANS)),
    (Case(1, 200, 8, 300, shift=0.0, scale=1.0), AGAINST),  # of the reference's own distribution
    (Case(10, 8, 6, 300, apart=1.0), (*AGAINST, *MEANS)),
    (Case(1, 60, 48, 300, scale=1.1), AGAINST),
    (Case(20, 4, 16, 100, shift=0.8), WITHIN),
    (Case(10, 16, 16, 100, shift=0.8), WITHIN),
    (Case(20, 4, 64, 100, shift=0.3), WITHIN),
    (Case(6, 24, 8, 100, shift=0.0), WITHIN),  # of no direction more than another
    (Case(1, 200, 16, 100, shift=0.0), WITHIN),  # from here on of so many images that no jackknife is needed
    (Case(2, 200, 8, 100, shift=0.8), WITHIN),
]


@pytest.mark.parametrize(("case", "names"), CASES)
def test_reported_standard_errors_are_the_true_ones(case: Case, names: Sequence[str]) -> None:
    """Within 15 %; of that, the 400 and 10 samples know the two to 4 and about 7."""
    found = ratios(case, names, 400, 10)
    wrong = {name: round(ratio, 2) for name, ratio in found.items() if abs(ratio - 1) > 0.15}
    assert not wrong, f"reported by true standard error: {wrong}"


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 200, 16, 500),
        Case(10, 40, 16, 300, apart=1.0),
        Case(1, 1000, 16, 5000, 0.0, 1.0),
        Case(1, 40, 16, 500),
    ],
)
def test_the_error_of_an_extrapolated_distance_is_the_true_one(case: Case) -> None:
    """Within 15 %; of that, the 200 samples know it to 5."""
    distance = distances.FrechetDistance(case.reference())
    found = [scores.extrapolated(distance, images.features, images.labels, True) for images in case.samples(200)]
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.15)


def test_subsamples_are_measured_as_the_metrics_measure_them(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, 16, 24, 100)
    (images,) = case.samples(1)
    reference, features = case.reference(), images.features
    subsamples = standard_errors.subsamples(images.labels, 2)
    indices = [subsamples.members_of(i).nonzero()[:, 0] for i in range(len(subsamples))]
    assert torch.equal(subsamples.members(slice(None)).sum(0), torch.tensor([len(index) for index in indices]))
    frechet, kernel = distances.FrechetDistance(reference), distances.KernelDistance(reference)
    own = frechet.of_subsamples(features, subsamples)
    assert own == pytest.approx([frechet(features[index]) for index in indices], rel=1e-5)
    # with as many reference images as there are, a subset is everything
    half = distances.KernelDistance(reference[:32])
    kernels = half._of_subsamples(features.double(), subsamples)
    offset = [half(features[index]) - k for index, k in zip(indices, kernels, strict=True) if len(index) == 32]
    assert offset == pytest.approx([offset[0]] * 12, rel=1e-9)
    assert kernel.measure(features, subsamples)[0] == kernel(features)
    monkeypatch.setattr(distances, "BLOCK", 10)
    assert half._of_subsamples(features.double(), subsamples) == pytest.approx(kernels, rel=1e-12)
    measure = neighbourhoods.Neighbourhoods(reference)
    assert measure(features) == {
        name: value for name, (value, _) in measure.measure(features, images.labels, subsamples).items()
    }


@pytest.mark.parametrize("kept", [4, 5, 8, 64])
def test_radii_in_subsamples_are_those_of_the_subsamples_alone(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """However few of the nearest images of the whole are looked at first, and in whatever blocks."""
    (images,) = Case(4, 16, 24, 100).samples(1)
    features, subsamples = images.features, standard_errors.subsamples(images.labels, 2)
    monkeypatch.setattr(neighbourhoods, "_NEAREST", kept)
    monkeypatch.setattr(neighbourhoods, "_COLUMNS", 10)
    found = torch.cat([neighbourhoods._radii(features, slice(i, i + 20), subsamples) for i in range(0, 64, 20)])
    torch.testing.assert_close(found[:, 0], neighbourhoods.neighbour_distances(features, (3,))[:, 0])
    for which, radius in enumerate(found[:, 1:].T):
        chosen = subsamples.members_of(which)
        torch.testing.assert_close(radius[chosen], neighbourhoods.neighbour_distances(features[chosen], (3,))[:, 0])
        assert (radius[~chosen] == -1).all()


def test_subsamples_keep_the_balance_of_the_labels() -> None:
    labels = list("abcd") * 5
    found = standard_errors.subsamples(labels, 3)
    assert len(found) == 30
    for i in range(30):
        index, quarter = found.members_of(i).nonzero()[:, 0], i % 10 >= 6
        assert len(set(index.tolist())) == len(index) == (5 if quarter else 10)
        counts = [sum(labels[j] == one for j in index.tolist()) for one in "abcd"]
        assert all(abs(count - (1.25 if quarter else 2.5)) < 1 for count in counts)
    for i in (0, 2, 4):
        assert torch.equal(found.members_of(i), ~found.members_of(i + 1))


def test_of_means_in_closed_form() -> None:
    values = torch.tensor([1.0, 3.0, 10.0, 14.0, 18.0])
    labels = ["a", "a", "b", "b", "b"]
    expected = math.sqrt(2**2 * (2 / 2) + 3**2 * (16 / 3)) / 5  # n_h² s_h² / n_h
    assert standard_errors.of_mean(values, labels, range(5)) == pytest.approx(expected)
    # one image for each of two labels is one draw, whatever is said of it twice
    twice = standard_errors.of_mean(values.repeat(2), [*"cccccddddd"], [*range(5)] * 2)
    assert twice == pytest.approx(float(values.std()) / 5**0.5)
    assert standard_errors.of_mean(values[:1], ["a"], [0]) is None
    # labels of one image each: pooled
    assert standard_errors.of_mean(values, range(5), range(5)) == pytest.approx(float(values.std()) / 5**0.5)


def test_classes_of_the_same_images_are_no_more_than_one() -> None:
    (images,) = Case(1, 8, 6, 20).samples(1)
    score = diversity.pairwise_distance
    once = standard_errors.of_classes([(images.features, "x")], score)
    assert once is not None
    assert standard_errors.of_classes([(images.features, "x")] * 5, score) == pytest.approx(once)
    apart = standard_errors.of_classes([(images.features, str(i)) for i in range(5)], score)
    assert apart == pytest.approx(once / 5**0.5)
    assert standard_errors.of_classes([(images.features[:3], "x")], score) is None


def test_pairwise_distance_has_the_unbiased_variance() -> None:
    """U² less the mean of d_ij d_kl over four different images, which has the mean of the square (n >= 4)."""
    (images,) = Case(1, 6, 5, 20, shift=0.6).samples(1)
    unit = torch.nn.functional.normalize(images.features.double(), dim=1)
    d = (1 - unit @ unit.T).tolist()
    n = range(6)
    apart = [d[i][j] * d[k][m] for i in n for j in n for k in n for m in n if len({i, j, k, m}) == 4]
    variance = diversity.pairwise_distance(images.features) ** 2 - sum(apart) / len(apart)
    found = standard_errors.of_classes([(images.features, 0)], diversity.pairwise_distance)
    assert found == pytest.approx(math.sqrt(variance), rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in (
        *(Case(1, n, d, m) for n, d, m in ((40, 8, 500), (200, 2, 300), (200, 8, 200), (200, 64, 500), (400, 8, 100))),
        Case(20, 4, 8, 400, apart=1.0),
        Case(1, 300, 8, 300, shift=0.0, scale=1.0),
        Case(1, 200, 192, 800),
    ):
        print(case, {name: round(ratio, 2) for name, ratio in ratios(case, AGAINST, 400, 20).items()}, flush=True)
    for width, shift in ((16, 0.8), (64, 0.3), (8, 0.0)):
        for n in (4, 5, 8, 16, 24, 50):
            case = Case(20, n, width, 100, shift=shift)
            print(case, {name: round(ratio, 2) for name, ratio in ratios(case, WITHIN, 300, 10).items()}, flush=True)
