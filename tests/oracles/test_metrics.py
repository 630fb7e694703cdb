"""The metrics against closed forms, against torchmetrics and torch-fidelity called directly, and against loops."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from guidegen.evaluate import distances, diversity, metrics, neighbourhoods
from guidegen.evaluate.cache import FeatureCache

N, M, D = 40, 60, 8


def cloud(seed: int, count: int, width: int = D, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * torch.linspace(0.5, 2, width) + shift


def gaussian(seed: int, mean: Any, covariance: Any, count: int = 50) -> Tensor:
    """Points whose sample mean and sample covariance are these exactly, so that no sampling error is left."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x = x - x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_axis_aligned_gaussians() -> None:
    """Dowson & Landau 1982 for diagonal covariances: |difference of means|^2 + sum (sqrt a - sqrt b)^2."""
    a, b = np.array([1.0, 4.0, 0.25, 9.0]), np.array([2.25, 1.0, 0.25, 16.0])
    mean = np.array([1.0, -2.0, 0.5, 0.0])
    found = distances.FrechetDistance(gaussian(0, np.zeros(4), np.diag(a)))(gaussian(1, mean, np.diag(b)))
    expected = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-6)  # double precision, and the square root of a product loses half


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    """By the symmetric form Tr (A^1/2 B A^1/2)^1/2, whose roots are of symmetric matrices."""

    def root(s: Any) -> Any:
        values, vectors = np.linalg.eigh(s)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    rng = np.random.default_rng(2)
    a, b = (x @ x.T + np.eye(5) for x in rng.normal(size=(2, 5, 5)))
    assert np.abs(a @ b - b @ a).max() > 1
    found = distances.FrechetDistance(gaussian(3, np.zeros(5), a))(gaussian(4, np.ones(5), b))
    assert found == pytest.approx(5 + np.trace(a + b - 2 * root(root(a) @ b @ root(a))), rel=1e-6)


def test_no_distance_from_itself() -> None:
    x = cloud(0, N)
    assert distances.FrechetDistance(x)(x) == pytest.approx(0, abs=1e-9)
    same = neighbourhoods.Neighbourhoods(x)(x)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)


def test_against_torchmetrics_fed_with_images() -> None:
    """torchmetrics given the images and a network of ours, batch by batch, as its manual says; within 1e-3 relative."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Network(nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.double().reshape(len(images), 12, -1).mean(2) / 32

    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, top, (64, 3, 8, 8), generator=generator, dtype=torch.uint8) for top in (255, 200))
    network = Network()
    frechet = FrechetInceptionDistance(network).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(network, subsets=1, subset_size=64)
    for part in range(0, 64, 16):
        for metric in (frechet, kernel):
            metric.update(real[part : part + 16], real=True)
            metric.update(fake[part : part + 16], real=False)
    assert distances.FrechetDistance(network(real))(network(fake)) == pytest.approx(float(frechet.compute()), rel=1e-3)
    assert distances.KernelDistance(network(real))(network(fake)) == pytest.approx(float(kernel.compute()[0]), rel=1e-3)


def test_against_torch_fidelity() -> None:
    """Another library's Fréchet distance, kernel distance, precision and recall from the same features."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity, which needs torchvision, is not installed")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = cloud(0, N), cloud(1, N, shift=0.7)
    statistics = [fid_features_to_statistics(x.double()) for x in (fake, real)]
    (frechet,) = fid_statistics_to_metric(*statistics, verbose=False).values()
    assert distances.FrechetDistance(real)(fake) == pytest.approx(frechet, rel=1e-3)
    kernel = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=N, verbose=False)
    assert distances.KernelDistance(real)(fake) == pytest.approx(kernel["kernel_inception_distance_mean"], rel=1e-3)
    theirs = prc_features_to_metric(fake.double(), real.double(), prc_neighborhood=3, save_cpu_ram=False, verbose=False)
    ours = neighbourhoods.Neighbourhoods(real)(fake)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-3)


def test_kernel_distance_is_the_unbiased_sum_over_pairs() -> None:
    """Gretton et al. 2012, equation 3, in loops; with equal counts a subset is everything, and nothing is random."""
    real, fake = cloud(0, 12), cloud(1, 12, shift=0.5)

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        values = [
            (float(x @ y) / D + 1) ** 3
            for i, x in enumerate(a.double())
            for j, y in enumerate(b.double())
            if i != j or not same
        ]
        return sum(values) / len(values)

    expected = mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake, False)
    assert distances.KernelDistance(real)(fake) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (distances.KernelDistance(cloud(0, M))(cloud(1, N)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shift", [0.0, 0.8, 3.0, 50.0])
def test_neighbourhoods_by_their_definitions(shift: float) -> None:
    real, fake = cloud(0, M).numpy(), cloud(1, N, shift=shift).numpy()

    def radius(x: Any, k: int) -> list[float]:
        return [sorted(math.dist(p, q) for j, q in enumerate(x) if j != i)[k - 1] for i, p in enumerate(x)]

    real3, real5, fake3 = radius(real, 3), radius(real, 5), radius(fake, 3)
    between = [[math.dist(x, y) for y in fake] for x in real]
    expected = {
        "precision": sum(any(between[i][j] <= real3[i] for i in range(M)) for j in range(N)) / N,
        "recall": sum(any(between[i][j] <= fake3[j] for j in range(N)) for i in range(M)) / M,
        "density": sum(between[i][j] <= real5[i] for i in range(M) for j in range(N)) / (5 * N),
        "coverage": sum(any(between[i][j] <= real5[i] for j in range(N)) for i in range(M)) / M,
    }
    assert neighbourhoods.Neighbourhoods(torch.from_numpy(real))(torch.from_numpy(fake)) == pytest.approx(
        expected, abs=1e-12
    )
    if shift == 0.8:
        assert all(0 < value < 2 for value in expected.values())
    if shift == 50:
        assert set(expected.values()) == {0}


def test_precision_and_recall_in_fp16_are_those_of_the_suite() -> None:
    """What guided-diffusion's `ManifoldEstimator` gave for these features in TensorFlow 2.21 on a CPU."""
    rng = np.random.default_rng(7)
    real, fake = (torch.from_numpy(np.abs(rng.normal(size=(200, 2048))).astype(np.float32) * 0.5) for _ in range(2))

    def measured(scale: float, distances: neighbourhoods.Distances) -> tuple[float, float]:
        found = neighbourhoods.Neighbourhoods(real * scale, distances)(fake * scale)
        return found["precision"], found["recall"]

    assert measured(1, neighbourhoods.squared_distances_fp16) == (0.565, 0.555)
    assert measured(1, neighbourhoods.distances_fp64) == (0.545, 0.545)
    assert measured(20, neighbourhoods.squared_distances_fp16) == (0.545, 0.545)  # fp16 overflows, so in fp32


def test_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = cloud(0, M), cloud(1, N)
    whole = neighbourhoods.Neighbourhoods(real)(fake)
    monkeypatch.setattr(neighbourhoods, "_ROWS", 7)
    monkeypatch.setattr(neighbourhoods, "_COLUMNS", 7)
    assert neighbourhoods.Neighbourhoods(real)(fake) == whole


def test_on_disk_as_in_memory(tmp_path: Path) -> None:
    """With classes of few images and of many, which are measured in other ways."""
    fake = cloud(1, 260, 8, shift=0.8)
    labels = ["many"] * 210 + ["few"] * 50
    cache = FeatureCache(tmp_path / "features", "0" * 64)
    files = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(260)]
    for some in (slice(100, 260), slice(0, 100)):
        cache.write({file: ("0" * 32, row.numpy()) for file, row in zip(files[some], fake[some], strict=True)})
    known = torch.rand(260, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    meter = metrics.Meter(cloud(0, M, 8))
    kept, stored = (
        meter.measure(metrics.Measured(features, files, labels, known, known), 2) for features in (fake, cache.stored(files))
    )
    assert kept == stored
    assert all(figure and figure["spread"] for figure in kept.values())


def test_vendi_score_in_closed_form() -> None:
    assert diversity.vendi_score(torch.ones(6, 3)) == pytest.approx(1)
    assert diversity.vendi_score(torch.eye(5)) == pytest.approx(5)
    cosine = 0.3  # the eigenvalues of K/2 are (1 ± cosine) / 2
    pair = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
    low, high = (1 - cosine) / 2, (1 + cosine) / 2
    expected = math.exp(-low * math.log(low) - high * math.log(high))
    assert diversity.vendi_score(pair * 7) == pytest.approx(expected, rel=1e-6)


def test_pairwise_distance_by_its_definition() -> None:
    x = cloud(0, 9)
    pairs = [1 - float(torch.cosine_similarity(x[i], x[j], 0)) for i in range(9) for j in range(9) if i != j]
    assert diversity.pairwise_distance(x) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    classes = ["a"] * 4 + ["b"] * 4 + ["c"]
    means = [diversity.pairwise_distance(x[:4]), diversity.pairwise_distance(x[4:8])]
    assert diversity.mean_over_classes(diversity.pairwise_distance, x, classes) == pytest.approx(sum(means) / 2)
    assert diversity.mean_over_classes(diversity.pairwise_distance, x[8:], classes[8:]) is None


@pytest.mark.parametrize(("count", "width"), [(40, 8), (40, 64)])
def test_vendi_score_by_either_matrix(monkeypatch: pytest.MonkeyPatch, count: int, width: int) -> None:
    """The definition with the N x N kernel matrix, whichever side is smaller; rounding alone between them."""
    x = cloud(3, count, width, shift=0.4).double()
    unit = x / x.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / count).clamp_min(1e-300)
    monkeypatch.setattr(diversity, "blocks", lambda x: torch.split(x, 7))
    assert diversity.vendi_score(x) == pytest.approx(math.exp(-float((eigenvalues * eigenvalues.log()).sum())), rel=1e-9)


def test_one_image_drawn_for_several_labels_counts_once() -> None:
    real = cloud(0, M)
    fake = cloud(1, 10)
    repeated = fake.repeat(4, 1)
    nan = torch.full((40,), math.nan)
    hashes = [str(i % 10) for i in range(40)]
    images = metrics.Measured(repeated, hashes, [str(i // 10) for i in range(40)], nan, nan)
    found = metrics.Meter(real).measure(images, 0)
    assert found["recall"] is not None
    assert found["recall"]["value"] == neighbourhoods.Neighbourhoods(real)(fake)["recall"] > 0
    assert found["recall"]["images"] == 10
    assert found["accuracy"] is None
    assert found["vendi_score"] is not None
    assert found["vendi_score"]["value"] == pytest.approx(diversity.vendi_score(fake))
    assert found["vendi_score"]["images"] == 40
