"""The guide's terms on the Gaussian mixture, whose scores are known in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_gaussian_mixture import LEVELS, Mixture, Posterior, points
from torch import Tensor

from guidegen.scores.calls import calls_per_step
from guidegen.scores.guidance import classifier_free, clipped
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import NULL, Step, Weights
from guidegen.scores.methods import Method
from guidegen.scores.noise import PREDICTION_TYPES, Level, PredictionType, to_score, to_x0

T = torch.tensor(0)
EXACT = {"rtol": 1e-8, "atol": 1e-8}
"""Everything is fp64 but the weights, which are exact in fp32 here: rounding only."""


def halved(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step) -> Tensor:
    """A method that is linear, though guidegen does not know it."""
    return classifier_free(unconditional, conditional, w)


UNKNOWN = Method("unknown", halved, "", "", "")


def scores(mixture: Mixture, x: Tensor, *labels: int) -> list[Tensor]:
    return [mixture.score(x, torch.full((len(x),), label)).double() for label in labels]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_mixture_of_labels_is_the_product_of_experts(kind: PredictionType, mode: str) -> None:
    mixture, x, level = Mixture(kind), points(4), LEVELS[1]
    mixture.level = level
    labels = ((0, 3.0), (2, -1.0))
    if mode == "cfg":
        guide = Guide(mixture, [labels] * 4, [1.0, 0.0, 0.5, 2.0])
    else:
        guide = Guide(mixture, [labels] * 4, [0.0] * 4, [1.0, 0.0, 0.5, 2.0], Posterior(mixture))
    null, first, second = scores(mixture, x, NULL, 0, 2)
    w = torch.tensor([1.0, 0.0, 0.5, 2.0]).double()[:, None, None, None]
    # p(x) p(y1|x)^3 p(y2|x)^-1, each factor to the power of w
    expected = null + w * (3 * (first - null) - (second - null))
    torch.testing.assert_close(to_score(guide(x, T, level), x, level, kind), expected, **EXACT)
    # the null one and two labels or two gradients, at w = 1 too: 3 c1 - c2 - u; at w = 0 the null one alone
    assert guide.calls == [3, 1, 3, 3]


def test_mixture_whose_weights_sum_to_one_needs_no_unconditional_call_at_w_one() -> None:
    mixture, x = Mixture("epsilon"), points(2)
    mixture.level = LEVELS[1]
    guide = Guide(mixture, [((0, 0.5), (1, 0.5)), 2], [1.0, 1.0])
    first, second, third = scores(mixture, x, 0, 1, 2)
    expected = torch.stack([(first[0] + second[0]) / 2, third[1]])
    torch.testing.assert_close(to_score(guide(x, T, LEVELS[1]), x, LEVELS[1], "epsilon"), expected, **EXACT)
    assert guide.calls == [2, 1]
    assert mixture.rows == 3


def test_what_is_not_finite_stays_with_its_sample() -> None:
    mixture, x = Mixture("epsilon"), points(2)
    mixture.level = LEVELS[1]
    x[0] = torch.nan
    guided = Guide(mixture, [0, ((0, 2.0), (1, -3.0))], [2.0, 2.0])(x, T, LEVELS[1])
    assert guided[0].isnan().all()
    assert guided[1].isfinite().all()


class Weaker(Mixture):
    """The same mixture, whose scores are half as strong."""

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * super().__call__(x, t, labels)


@pytest.mark.parametrize("mode", ["autoguidance", "cfg", "classifier"])
def test_autoguidance_adds_the_difference_of_the_networks(mode: str) -> None:
    strong, guiding, x, level = Mixture("epsilon"), Weaker("epsilon"), points(4), LEVELS[2]
    strong.level = guiding.level = level
    w_guide = [0.0, 1.0, 2.5, 3.0]
    w = {"autoguidance": [1.0] * 4, "cfg": [1.0, 2.0, 2.0, 0.0], "classifier": [0.0] * 4}[mode]
    w_classifier = [2.0] * 4 if mode == "classifier" else [0.0] * 4
    guide = Guide(strong, [0, 1, 2, 0], w, w_classifier, Posterior(strong), guiding=guiding, w_guide=w_guide)
    plain = Guide(strong, [0, 1, 2, 0], w, w_classifier, Posterior(strong))(x, T, level)
    condition = torch.tensor([label if each else NULL for label, each in zip([0, 1, 2, 0], w, strict=True)])
    better, worse = strong(x, T, condition), guiding(x, T, condition)
    expected = plain + (torch.tensor(w_guide).double()[:, None, None, None] - 1) * (better - worse)
    torch.testing.assert_close(guide(x, T, level), expected, **EXACT)
    # auto: the guiding one alone at 0, the strong one alone at 1
    assert guide.calls == {"autoguidance": [1, 1, 2, 2], "cfg": [1, 2, 3, 2], "classifier": [3, 2, 3, 3]}[mode]


def test_autoguidance_needs_its_network() -> None:
    with pytest.raises(ValueError, match="guiding network"):
        Guide(Mixture("epsilon"), [0], [1.0], w_guide=[2.0])


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_method_that_guidegen_does_not_know_to_be_linear_gets_the_same_conditional_score(kind: PredictionType) -> None:
    mixture, x, level = Mixture(kind), points(6), LEVELS[1]
    mixture.level = level
    labels, w, w_classifier = [0, 1, 2, 0, 1, 2], [0.0, 1.0, 3.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 2.0, 3.0, -2.0]
    known = Guide(mixture, labels, w, w_classifier, Posterior(mixture))
    unknown = Guide(mixture, labels, w, w_classifier, Posterior(mixture), method=UNKNOWN)
    torch.testing.assert_close(unknown(x, T, level), known(x, T, level), rtol=1e-6, atol=1e-6)  # weights are divided in fp32
    assert known.calls == [1, 1, 2, 2, 2, 3]
    assert unknown.calls == [1, 1, 2, 3, 2, 3], "it reads the unconditional prediction beside a gradient"


def test_method_has_its_memory_for_one_trajectory_and_knows_the_step() -> None:
    seen: list[tuple[int, int, float]] = []

    def counting(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step) -> Tensor:
        step.memory["sum"] = step.memory.get("sum", 0.0) + w.item()
        seen.append((step.index, step.count, step.memory["sum"]))
        return conditional

    mixture, x = Mixture("epsilon"), points(2)
    mixture.level = LEVELS[1]
    guide = Guide(mixture, [0, 1], [2.0, 3.0], method=replace(UNKNOWN, combine=counting), steps=3)
    for index in (0, 1, 2, 0):
        guide(x, T, LEVELS[1], index)
    each = [(0, 3, 2.0), (0, 3, 3.0), (1, 3, 4.0), (1, 3, 6.0), (2, 3, 6.0), (2, 3, 9.0), (0, 3, 2.0), (0, 3, 3.0)]
    assert seen == each, "one sample at a time, each with a memory of its own"


def test_schedule_sets_the_weights_and_the_calls_of_each_step() -> None:
    mixture, x = Mixture("epsilon"), points(2)
    mixture.level = LEVELS[1]
    plain = {w: Guide(mixture, [0, 1], [w, w])(x, T, LEVELS[1]) for w in (0.0, 1.0, 6.0)}
    guide = Guide(
        mixture, [0, 1], [3.0, 3.0], schedule=lambda index, weights: weights._replace(w=(0.0, 1.0, 2 * weights.w)[index])
    )
    for index, w in enumerate((0.0, 1.0, 6.0)):
        torch.testing.assert_close(guide(x, T, LEVELS[1], index), plain[w])
    assert guide.calls == [1 + 1 + 2] * 2


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("level", [*LEVELS, Level(0.3, 0.7)])
def test_clip_keeps_the_denoised_estimate_in_range_and_nothing_else(kind: PredictionType, level: Level) -> None:
    prediction, x = points(8, 1), points(8, 2)
    before = to_x0(prediction, x, level, kind)
    after = to_x0(clipped(prediction, x, level, kind, 1.0), x, level, kind)
    torch.testing.assert_close(after, before.clamp(-1, 1), **EXACT)


def test_guide_clips_before_it_adds_the_gradient() -> None:
    mixture, x, level = Mixture("epsilon"), points(4), LEVELS[1]
    mixture.level = level
    classifier = Posterior(mixture)
    labels = [0, 1, 2, 0]
    bound = 0.1  # below the estimates of these points, so that it does something
    guided = Guide(mixture, labels, [0.0] * 4, [4.0] * 4, classifier, clip=bound)(x, T, level)
    alone = Guide(mixture, labels, [0.0] * 4, clip=bound)(x, T, level)
    gradient = classifier(x, T, torch.tensor(labels), level, x)
    moved = to_score(guided, x, level, "epsilon") - to_score(alone, x, level, "epsilon")
    torch.testing.assert_close(moved, 4 * gradient, **EXACT)
    assert to_x0(alone, x, level, "epsilon").abs().max() <= bound + 1e-9
    assert to_x0(guided, x, level, "epsilon").abs().max() > bound


def test_calls_per_step_of_every_kind() -> None:
    assert calls_per_step(Weights(3.0)) == 2
    assert calls_per_step(Weights(1.0)) == calls_per_step(Weights(0.0)) == 1
    assert calls_per_step(Weights(3.0, w_guide=2.0)) == 3
    assert calls_per_step(Weights(1.0, w_guide=0.0)) == 1
    assert calls_per_step(Weights(2.0), labels=((0, 1.0), (1, 1.0), (2, -1.0))) == 4
