"""Methods that are not linear in mode both: finite and continuous as the two weights go through zero."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guidegen import Guide
from guidegen.scores.guidance import jointly
from guidegen.scores.interfaces import Cost, Step
from guidegen.scores.methods import METHODS
from guidegen.scores.noise import PREDICTION_TYPES, Level, PredictionType, score_shift

LEVEL, T = Level(0.6, 0.8), torch.tensor(1.0)
NOT_LINEAR = [name for name, method in METHODS.items() if not method.linear]
X = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))


class Network:
    def __init__(self, kind: PredictionType = "epsilon"):
        self.prediction_type = kind

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x_t * 0.5 + (labels.float()[:, None, None, None] + 1) * 0.3 * torch.sin(3 * x_t)


class Judge:
    cost = Cost(1)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor) -> Tensor:
        return 0.3 * torch.cos(2 * x_t)


def guided(name: str, pairs: list[tuple[float, float]], kind: PredictionType = "epsilon", index: int = 3) -> Tensor:
    """The guided prediction of one x_t at each pair of weights."""
    count = len(pairs)
    w, w_classifier = zip(*pairs, strict=True)
    guide = Guide(Network(kind), [1] * count, w, w_classifier, Judge(), method=METHODS[name], steps=9)
    return guide(X.expand(count, -1, -1, -1), T, LEVEL, index)


def parts(kind: PredictionType) -> tuple[Tensor, Tensor, Tensor]:
    """u, c, and what the gradient adds."""
    network, one = Network(kind), torch.ones(1, dtype=torch.long)
    gradient = Judge()(X, T, one, LEVEL, X)
    return network(X, T, -one), network(X, T, one), score_shift(gradient, LEVEL, kind)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_bounded_and_continuous_as_the_sum_of_the_weights_goes_through_zero(name: str, kind: PredictionType) -> None:
    """Away from where one weight is zero, which is a mode of its own whose methods may step at 0 and 1."""
    near = [-1e-2, -1e-3, -1e-4, -1e-6, 0.0, 1e-6, 1e-4, 1e-3, 1e-2]
    u, c, shift = parts(kind)
    for w in (2.0, -2.0, 0.3, 7.5):
        for index in (0, 3):
            found = guided(name, [(w, -w + each) for each in near], kind, index)
            assert found.isfinite().all()
            # plain guidance is the scale: methods hold back, or (power) weigh by lengths of about 10
            scale = max(each.abs().max().item() for each in (u, c, w * (c - u), w * shift))
            assert found.abs().max() < 60 * scale, (w, index)
            middle = found[near.index(0.0)]
            for each, one in zip(near, found, strict=True):
                assert (one - middle).abs().max() <= 400 * scale * abs(each) + 1e-5 * scale, (w, each, index)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_continuous_along_a_circle_of_weights(name: str) -> None:
    """Every ratio and sign of the two weights: between neighbours a hundredth apart nothing jumps."""
    angles = [2 * math.pi * (i + 0.5) / 628 for i in range(628)]
    found = guided(name, [(3 * math.cos(a), 3 * math.sin(a)) for a in angles])
    assert found.isfinite().all()
    steps = (found - found.roll(1, 0)).flatten(1).abs().amax(1)
    # a smooth path of this length has steps of about length / 628; a jump is as large as the path is wide
    width = (found.amax(0) - found.amin(0)).max()
    assert steps.max() < 0.1 * width, (steps.max(), width, steps.argmax())


weights = st.floats(-20, 20, width=32)


@settings(max_examples=200, deadline=None)
@given(w=weights, w_classifier=weights.filter(bool))
def test_jointly_is_the_plain_sum_of_both(w: float, w_classifier: float) -> None:
    u, c, shift = (part.double() for part in parts("epsilon"))
    base, joint, total = jointly(u, c, shift, torch.tensor(w).view(1, 1, 1, 1), torch.tensor(w_classifier).view(1, 1, 1, 1))
    expected = u + w * (c - u) + w_classifier * shift
    # weights are fp32: 1e-7 of what is added up
    torch.testing.assert_close(base + total * (joint - base), expected, rtol=0, atol=1e-6 * (1 + abs(w) + abs(w_classifier)))
    most = max(part.abs().max().item() for part in (u, c, u + shift))
    span = (c - u - shift).abs().max().item() * 2 * min(abs(w), abs(w_classifier))
    assert joint.abs().max() <= most + span + 1e-6, "never further than what cancels takes it"


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_one_weight_alone_is_the_method_itself(name: str) -> None:
    """To the last bit, at w_classifier = 0 and at w = 0."""
    method = METHODS[name]
    for kind in PREDICTION_TYPES:
        u, c, shift = parts(kind)
        for w in (3.0, 0.5, -2.0, 7.5):
            total = torch.full((1, 1, 1, 1), w)
            assert torch.equal(guided(name, [(w, 0.0)], kind), method(u, c, total, Step(X, LEVEL, kind, 3, 9)))
            assert torch.equal(guided(name, [(0.0, w)], kind), method(u, u + shift, total, Step(X, LEVEL, kind, 3, 9)))
        assert torch.equal(guided(name, [(0.0, 1.0)], kind), u + shift)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_weights_of_one_sign_are_one_conditional_prediction(name: str) -> None:
    """Between the two, as by Bayes' rule for p(y|x)^(w / sum) p'(y|x)^(w' / sum), to the last bit."""
    u, c, shift = parts("epsilon")
    for w, w_classifier in ((3.0, 1.0), (-2.0, -0.5), (1.0, 4.0)):
        total = torch.full((1, 1, 1, 1), w) + w_classifier
        joint = u + w / total * (c - u) + w_classifier / total * shift
        expected = METHODS[name](u, joint, total, Step(X, LEVEL, "epsilon", 3, 9))
        assert torch.equal(guided(name, [(w, w_classifier)]), expected)


@pytest.mark.parametrize("tiny", [1e-30, 1e-42, 1e-60, -1e-42])
def test_weights_that_are_next_to_nothing(tiny: float) -> None:
    for name in NOT_LINEAR:
        assert guided(name, [(0.0, tiny), (tiny, tiny), (tiny, -tiny), (tiny, 0.0), (2.0, tiny)]).isfinite().all(), name
