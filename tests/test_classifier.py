"""Gradients of classifiers: against finite differences, and in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import NAMES, SIZE, tiny_classifier
from torch import Tensor

from guidegen.scores.classifier import NoisyScore, gradient_of_log_probability

COLUMNS = {int(label): column for column, label in enumerate(NAMES)}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


def test_gradient_agrees_with_finite_differences() -> None:
    network = tiny_classifier().double()
    x, label, t = images(1).double(), torch.tensor([2]), torch.tensor(300)
    gradient = NoisyScore(network, COLUMNS)(x, t, label).double()

    def log_p(point: Tensor) -> Tensor:
        return network(point, t[None]).log_softmax(-1)[0, 2]

    direction, step = images(1, seed=1).double(), 1e-5
    slope = (log_p(x + step * direction) - log_p(x - step * direction)) / (2 * step)
    # central differences err by step^2; the gradient is returned in fp32
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strength", [1e-5, 1e-2, 1.0, 1e2, 1e5])
def test_half_precision_neither_underflows_nor_overflows(strength: float) -> None:
    """A network whose gradient passes through fp16 at very small and very large scales."""
    weight = torch.randn((5, 3 * SIZE * SIZE), generator=torch.Generator().manual_seed(0)) / 100

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return (gradient * strength).half()

    def logits_of(x: Tensor) -> Tensor:
        return Half.apply(x).flatten(1).float() @ weight.T

    x, columns = images(4), torch.tensor([0, 1, 2, 3])
    leaf = x.clone().requires_grad_()
    exact = (leaf.flatten(1) @ weight.T).log_softmax(-1)[range(4), columns].sum()
    expected = torch.autograd.grad(exact, leaf)[0] * strength
    gradient = gradient_of_log_probability(logits_of, x, columns, scaled=True)
    assert gradient.isfinite().all()
    assert gradient.dtype == torch.float32
    # fp16 keeps 11 bits: an error of 1e-3 of the largest entry of each image, twice that at the small end
    error = ((gradient - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))).max()
    assert error < 2e-3, error


def test_a_sure_classifier_still_has_a_gradient_in_half_precision() -> None:
    """softmax near one-hot: the gradient is of order 1e-10 and its direction still counts."""
    x, columns = images(2) / 10, torch.tensor([0, 0])
    x[:, 0, 0, 0] = 1.0
    weight = torch.zeros(3 * SIZE * SIZE, 2)
    weight[0, 0] = 22.0

    def logits_of(x: Tensor) -> Tensor:
        return (x.flatten(1).half() @ weight.half()).float()

    gradient = gradient_of_log_probability(logits_of, x, columns, scaled=True)
    expected = 22.0 * torch.sigmoid(torch.tensor(-22.0))
    torch.testing.assert_close(gradient[:, 0, 0, 0], expected.expand(2), rtol=0.05, atol=0)


def test_one_sample_that_overflows_does_not_change_the_others() -> None:
    def logits_of(x: Tensor) -> Tensor:
        rows = (x.flatten(1).half() * 30).float()  # fp16 backward: times 30
        return torch.stack([rows.sum(1) * (1 + 1e4 * (x[:, 0, 0, 0] > 0)), rows[:, 0]], dim=1)

    x = torch.full((2, 3, SIZE, SIZE), -0.01)
    x[1, 0, 0, 0] = 0.01
    columns = torch.tensor([0, 0])
    together = gradient_of_log_probability(logits_of, x, columns, scaled=True)
    alone = gradient_of_log_probability(logits_of, x[:1], columns[:1], scaled=True)
    assert together.isfinite().all()
    assert torch.equal(together[0], alone[0])


def test_columns_map_label_ids_to_logits() -> None:
    network, x, t = tiny_classifier(), images(2), torch.tensor(5)
    swapped = NoisyScore(network, {40: 1, 7: 0})(x, t, torch.tensor([40, 7]))
    plain = NoisyScore(network, {0: 0, 1: 1})(x, t, torch.tensor([1, 0]))
    assert torch.equal(swapped, plain)


def test_saved_and_opened_again(tmp_path: Path) -> None:
    from guidegen.checkpoints import open_classifier
    from guidegen.checkpoints.loading import load_classifier

    network, x, t = tiny_classifier(), images(2), torch.tensor([3, 900])
    network.save_pretrained(tmp_path / "judge")
    info = open_classifier(str(tmp_path / "judge"))
    assert info.labels.names == {int(label): name for label, name in NAMES.items()}
    again = load_classifier(info, "cpu")
    with torch.no_grad():
        assert torch.equal(again(x, t), network(x, t))
