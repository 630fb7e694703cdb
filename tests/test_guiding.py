"""The phases in which the bundled classifier learns to guide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from photographs import shrink, small_classifier, write_noise

from guidegen.models.classifiers.noisy import NoisyClassifier
from guidegen.zoo import batches, classifier, guiding
from guidegen.zoo import train as recipe

pytest.importorskip("pyarrow")

LABELS = {"1": "goldfish", "207": "golden retriever", "281": "tabby"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_noise(tmp_path / "data")


class Mixture:
    """Two labels, 1 and 3, of Gaussians around images of one colour: what an exact network and classifier say."""

    def __init__(self) -> None:
        self.means, self.deviation = torch.tensor([-0.5, 0.7])[:, None, None, None].expand(2, 3, 4, 4), 0.3
        self.alphas, self.sigmas = batches.alphas_sigmas()

    def logits(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (part[t][:, None] for part in (self.alphas, self.sigmas))
        distances = (x[:, None] - alpha[..., None, None, None] * self.means).square().sum((2, 3, 4))
        return -distances / (alpha * self.deviation).square().add(sigma**2) / 2

    def unet(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> Any:
        """v of the label, or of the mixture."""
        alpha, sigma = (part[t][:, None, None, None] for part in (self.alphas, self.sigmas))
        of_labels = torch.stack([class_labels == 1, class_labels == 3], 1).float()
        p = torch.where((class_labels == 1000)[:, None], self.logits(x, t).softmax(1), of_labels)
        mean = torch.einsum("bk,kchw->bchw", p, self.means)
        eps = sigma * (x - alpha * mean) / ((alpha * self.deviation) ** 2 + sigma**2)
        return SimpleNamespace(sample=(eps - sigma * x) / alpha)


@pytest.fixture
def noised() -> batches.Batches:
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return batches.Batches(images, torch.tensor([1, 3]).repeat(10), 16, 0, "cpu")


def test_an_exact_classifier_has_the_score_of_the_labels(noised: batches.Batches) -> None:
    """By Bayes' rule, to the digits of fp32."""
    exact = Mixture()
    loss = guiding.score_loss(noised, exact.unet, [1, 3])
    assert loss(exact.logits, 0).item() < 1e-4
    assert loss(lambda x, t: 0.5 * exact.logits(x, t), 0).item() > 0.05
    assert loss(lambda x, t: exact.logits(x, t).flip(1), 0).item() > 0.05


def test_without_a_gradient_the_loss_is_what_the_label_adds(noised: batches.Batches) -> None:
    exact = Mixture()
    x, t, _, _, labels = noised(7)
    v, v_null = (exact.unet(x, t, ids).sample for ids in (labels, torch.full_like(labels, 1000)))
    expected = (noised.alpha[t][:, None, None, None] * (v - v_null)).square().sum((1, 2, 3)).mean() / 2
    loss = guiding.score_loss(noised, exact.unet, [1, 3])
    torch.testing.assert_close(loss(lambda x, t: 0 * x.sum((1, 2, 3))[:, None].expand(-1, 2), 7), expected)


def test_scores_are_matched(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a network that labels do not steer: the gradient fades, which it does not by the other loss alone."""
    shrink(monkeypatch)
    ids = [int(label) for label in LABELS]
    training = classifier.Training(data, tmp_path, ids, 8, 8, 0)
    torch.manual_seed(0)
    unet = recipe.make_unet(8, latent=False)
    torch.nn.init.zeros_(unet.class_embedding.weight)
    unet.save_pretrained(tmp_path / "unet")
    given = classifier.with_negative_class(small_classifier(LABELS))
    torch.nn.init.normal_(given.head.weight, std=30)
    drawn = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.tensor(ids * 2)
    matched = guiding.match_scores(training, given, drawn, 8 * 120)
    other = guiding.train_negatives(training, given, drawn[0], 16 * 120)
    assert len(matched.config.logit_scales) == 21
    loss = guiding.score_loss(batches.Batches(*drawn, 64, 9, "cpu"), unet, ids)
    matched.calibrate([1.0, 1.0])
    other.calibrate([1.0, 1.0])
    assert loss(matched, 0) < loss(other, 0) / 2


def test_what_the_model_drew_is_told_from_photographs(data: Path, tmp_path: Path) -> None:
    """The model draws black images; what is no label of a photograph has the last logit."""
    drawn = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    labels = {"1": "goldfish", "207": "golden retriever"}
    torch.manual_seed(0)
    given = small_classifier(labels)
    network = guiding.train_negatives(classifier.Training(data, tmp_path, [1, 207], 8, 16, 0), given, drawn, 16 * 2 * 200)
    network.calibrate([1.0, 1.0])  # of photographs without anything to learn the scales are 0
    photographs, _ = batches.load_images(data, "train", [1, 207], 8)
    with torch.no_grad():
        p = [network(batches.scaled(some), torch.tensor([1])).softmax(1)[:, -1].mean() for some in (photographs, drawn)]
    assert p[1] > p[0] + 0.4


def test_the_mean_classifier_is_calibrated_whatever_the_others_were(data: Path, tmp_path: Path) -> None:
    training = classifier.Training(data, tmp_path, [1, 207, 281], 8, 4, 0)

    def network(seed: int, scales: list[float] | None = None) -> Any:
        torch.manual_seed(seed)
        return small_classifier(LABELS, logit_scales=scales)

    means = [guiding.mean_classifier(training, [network(1), network(2, scales)]) for scales in (None, [0.3, 0.1])]
    first, second = network(1).state_dict(), network(2).state_dict()
    for name, weight in means[0].state_dict().items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)
    assert len(means[0].config.logit_scales) == 21
    assert means[0].config.logit_scales == means[1].config.logit_scales
    training.calibrate(means[0])
    assert means[0].config.logit_scales == means[1].config.logit_scales


def test_each_round_is_drawn_by_the_classifier_before(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is trained on what all of them drew, with the same photographs left out.

    Then comes the mean of all, and the mean of that before and after its scores are matched.
    """
    shrink(monkeypatch)
    seen: list[tuple[int, int, float]] = []
    averaged: list[int] = []

    def draw_images(checkpoint: Path, run: Path, *settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        head = NoisyClassifier.from_pretrained(checkpoint / "classifier").head.bias
        seen.append((settings[-1], len(head), head.sum().item()))
        return torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.full((4,), 207)

    def split_off(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert seed == 5
        return split(labels, share, seed)

    def mean_classifier(training: classifier.Training, networks: list[Any]) -> Any:
        assert all(network.config.negative_class for network in networks)
        averaged.append(len({network.head.bias.sum().item() for network in networks}))
        return mean(training, networks)

    split, mean = classifier.split_off, guiding.mean_classifier
    monkeypatch.setattr(guiding, "draw_images", draw_images)
    monkeypatch.setattr(guiding, "mean_classifier", mean_classifier)
    monkeypatch.setattr(classifier, "split_off", split_off)
    counts = "unet=4,pretraining=8,classifier=8,drawn=4,negatives=32,scores=8"
    recipe.main(data, tmp_path, classes="1,207,281", size=8, images=counts, batch=4, seed=5)
    assert [(first, logits) for first, logits, _ in seen] == [(20_000, 3), (40_000, 4), (60_000, 4)]
    assert len({total for _, _, total in seen}) == 3
    again = NoisyClassifier.from_pretrained(tmp_path / "classifier").state_dict()
    recipe.main(data, tmp_path, classes="1,207,281", size=8, images=counts, batch=4, seed=5)
    assert seen[3:] == seen[:3]
    assert averaged == [4, 2, 4, 2]
    for name, weight in NoisyClassifier.from_pretrained(tmp_path / "classifier").state_dict().items():
        assert torch.equal(weight, again[name]), name
