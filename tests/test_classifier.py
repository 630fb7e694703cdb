"""Gradients of classifiers: against finite differences, and in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import NAMES, SIZE, tiny_classifier
from torch import Tensor

from guidegen.scores.gradient import NoisyScore, gradient_of_log_probability
from guidegen.scores.interfaces import autocast

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("classes", [2, 1000])
def test_gradient_however_far_the_label_leads_or_trails(classes: int, dtype: torch.dtype | None) -> None:
    """Against the closed form in fp64 at the logits that the network gave: J^T (one-hot - softmax)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((classes, 3 * SIZE * SIZE), generator=generator) / 100
    gaps = [
        sign * gap for gap in (0.0, 10.0, 60.0, 80.0, 83.0, 86.0, 90.0, 103.0, 110.0, 200.0, 1e3, 1e4) for sign in (1, -1)
    ]
    x, columns = images(len(gaps)), torch.arange(len(gaps)) % classes
    bias = torch.zeros(len(gaps), classes).scatter(1, columns[:, None], torch.tensor(gaps)[:, None])
    seen: list[Tensor] = []

    def logits_of(x: Tensor) -> Tensor:
        with autocast(x, dtype):
            logits = torch.nn.functional.linear(x.flatten(1), weight)
        seen.append((logits + bias.to(logits.dtype)).detach())
        return logits + bias.to(logits.dtype)

    gradient = gradient_of_log_probability(logits_of, x, columns, scaled=dtype == torch.float16)
    softmax = seen[0].double().softmax(-1)
    others = softmax.scatter(1, columns[:, None], 0)
    start = (-others).scatter(1, columns[:, None], others.sum(1, keepdim=True))
    expected = (start @ weight.double()).view_as(x)
    assert gradient.isfinite().all()
    largest = expected.abs().amax((1, 2, 3))
    error = (gradient.double() - expected).abs().amax((1, 2, 3))
    # of the weights and the entries at the logits, each rounded to the 11 or 8 bits of the dtype, or sums
    # of a thousand in fp32; below 1e-37 fp32 loses bits and then all of them
    bits = {torch.float16: 11, torch.bfloat16: 8, None: 20}[dtype]
    assert (error <= 2.0 ** (2 - bits) * largest + 1e-37).all(), (error / largest).tolist()
    leads = gaps.index(80.0)
    assert largest[leads] > 1e-37, "small, and yet there"
    assert gradient[leads].abs().max() > 0


@pytest.mark.parametrize("gap", [83.0, 110.0, 1e4, -1e4])
def test_gradient_of_a_network_in_half_precision_is_finite_however_sure_it_is(gap: float) -> None:
    network = tiny_classifier()
    with torch.no_grad():
        [*network.parameters()][-1][0] += gap
    gradient = NoisyScore(network, COLUMNS, torch.float16)(images(3), torch.tensor(300), torch.tensor([0, 1, 4]))
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).tolist() == [gap < 103, *[True] * 2]


def test_logits_that_are_not_finite_are_told_by_the_gradient() -> None:
    """Which guidegen then draws again in fp32; no number is made up."""

    def logits_of(x: Tensor) -> Tensor:
        return (x.flatten(1)[:, :2] * 1e6).half()

    assert not gradient_of_log_probability(logits_of, images(2), torch.tensor([0, 1]), scaled=True).isfinite().any()


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
    from guidegen.models.checkpoint import open_classifier
    from guidegen.models.classifiers.opening import load_classifier

    network, x, t = tiny_classifier(), images(2), torch.tensor([3, 900])
    network.save_pretrained(tmp_path / "classifier")
    info = open_classifier(str(tmp_path / "classifier"))
    assert info.labels.names == {int(label): name for label, name in NAMES.items()}
    again = load_classifier(info, "cpu")
    with torch.no_grad():
        assert torch.equal(again(x, t), network(x, t))
