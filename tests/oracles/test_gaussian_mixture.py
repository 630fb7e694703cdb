"""Guidance against a Gaussian mixture, whose scores and classifier are known in closed form.

p(x_0) = sum_y pi_y N(mu_y, s^2 I), so p(x_t | y) = N(alpha mu_y, (alpha^2 s^2 + sigma^2) I), and
grad log p(y | x_t) = score(x_t | y) - score(x_t) by Bayes' rule.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from guidegen.sampling.loop import sample
from guidegen.sampling.schedulers import make_scheduler, noise_levels
from guidegen.scores.gradient import DenoisedScore, SummedScore
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import NULL, Cost
from guidegen.scores.noise import PREDICTION_TYPES, Level, PredictionType, from_x0, score_shift, to_score, to_x0

MEANS = torch.tensor([[-0.6, 0.2], [0.5, 0.5], [0.3, -0.7]]).double()
PRIOR = torch.tensor([0.5, 0.2, 0.3]).double()
SPREAD = 0.2
SHAPE = (2, 1, 1)  # two numbers, as an image of two channels and one pixel
LEVELS = [Level(0.999, math.sqrt(1 - 0.999**2)), Level(0.8, 0.6), Level(0.1, math.sqrt(0.99))]
UNIT_ALPHA = [Level(1.0, 0.02), Level(1.0, 0.7), Level(1.0, 80.0)]
"""Those of variance exploding models and EDM."""


class Mixture:
    """The exact denoiser; one level at a time, set by `follow`."""

    def __init__(self, kind: PredictionType):
        self.prediction_type = kind
        self.level = LEVELS[0]
        self.rows = 0

    def log_joint(self, x: Tensor) -> Tensor:
        """log pi_y p(x_t | y), (B, K)."""
        variance = self.level.alpha**2 * SPREAD**2 + self.level.sigma**2
        distance = ((x.flatten(1)[:, None] - self.level.alpha * MEANS) ** 2).sum(-1)
        return PRIOR.log() - distance / (2 * variance) - math.log(2 * math.pi * variance)

    def score(self, x: Tensor, labels: Tensor) -> Tensor:
        """grad log p(x_t | label), of p(x_t) where the label is NULL, by autograd on the log density."""
        with torch.enable_grad():
            leaf = x.double().detach().requires_grad_()
            joint = self.log_joint(leaf)
            chosen = joint.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            log_p = torch.where(labels == NULL, joint.logsumexp(1), chosen)
            return torch.autograd.grad(log_p.sum(), leaf)[0]

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.rows += len(x)
        return from_x0(self.posterior_mean(x.double(), labels), x.double(), self.level, self.prediction_type)

    def posterior_mean(self, x: Tensor, labels: Tensor) -> Tensor:
        """E[x_0 | x_t, label]: that of each Gaussian, weighed by p(y | x_t) where the label is NULL."""
        alpha, sigma = self.level
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        means = MEANS + gain * (x.flatten(1)[:, None] - alpha * MEANS)  # (B, K, 2)
        one = torch.nn.functional.one_hot(labels.clamp(min=0), len(MEANS)).double()
        weights = torch.where((labels == NULL)[:, None], self.log_joint(x).softmax(1), one)
        return (weights[:, :, None] * means).sum(1).view_as(x)


class Posterior:
    """The exact classifier of the mixture, by autograd on the log posterior."""

    cost = Cost(1)

    def __init__(self, mixture: Mixture):
        self.mixture, self.rows = mixture, 0

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor) -> Tensor:
        self.rows += len(x)
        with torch.enable_grad():
            leaf = x.double().detach().requires_grad_()
            log_p = self.mixture.log_joint(leaf).log_softmax(1).gather(1, labels[:, None])
            return torch.autograd.grad(log_p.sum(), leaf)[0]


def follow(guide: Guide, mixture: Mixture) -> Guide:
    """Tells the mixture the level of each step before the guide calls it."""

    class Following:
        def __call__(self, x: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
            mixture.level = level
            return guide(x, t, level, index)

    return Following()  # type: ignore[return-value]


def make_guide(mixture: Mixture, mode: str, labels: list[int], w: list[float]) -> Guide:
    zero = [0.0] * len(w)
    if mode == "cfg":
        return Guide(mixture, labels, w)
    return Guide(mixture, labels, zero, w, Posterior(mixture))


def points(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("level", LEVELS + UNIT_ALPHA)
def test_predictions_and_scores_are_inverse(kind: PredictionType, level: Level) -> None:
    mixture, x = Mixture(kind), points(16)
    mixture.level = level
    labels = torch.full((16,), NULL)
    prediction = mixture(x, torch.tensor(0), labels)
    torch.testing.assert_close(from_x0(to_x0(prediction, x, level, kind), x, level, kind), prediction, rtol=1e-9, atol=1e-9)
    # fp64 and a division by sigma^2 >= 0.002: 1e-9 leaves room for rounding only
    torch.testing.assert_close(to_score(prediction, x, level, kind), mixture.score(x, labels), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("level", [*LEVELS, *UNIT_ALPHA, Level(0.3, 0.7)])  # the last one is of flow matching
def test_shift_adds_the_gradient_to_the_score(kind: PredictionType, level: Level) -> None:
    prediction, x, gradient = points(8, 1), points(8, 2), points(8, 3)
    before = to_score(prediction, x, level, kind)
    after = to_score(prediction + score_shift(gradient, level, kind), x, level, kind)
    torch.testing.assert_close(after - before, gradient, rtol=1e-9, atol=1e-9)


def test_shift_at_pure_noise_is_zero_not_infinite() -> None:
    for kind in PREDICTION_TYPES:
        assert score_shift(points(2), Level(0.0, 1.0), kind).abs().max() == 0


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("level", [*LEVELS, *UNIT_ALPHA, Level(0.3, 0.7)])
def test_classifier_guidance_and_cfg_are_the_same_score(kind: PredictionType, level: Level) -> None:
    mixture, x = Mixture(kind), points(12)
    mixture.level = level
    labels, w = [0, 1, 2] * 4, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 2.5, 4.0, 10.0, -1.0, 3.0]
    t = torch.tensor(0)
    free = make_guide(mixture, "cfg", labels, w)(x, t, level)
    guided = make_guide(mixture, "classifier", labels, w)(x, t, level)
    # weights are fp32 inside the guide, everything else fp64; 3.0, 0.5 ... are exact in both
    torch.testing.assert_close(guided, free, rtol=1e-9, atol=1e-9)
    expected = mixture.score(x, torch.full((12,), NULL)).double()
    conditional = mixture.score(x, torch.tensor(labels))
    expected = expected + torch.tensor(w).double()[:, None, None, None] * (conditional - expected)
    torch.testing.assert_close(to_score(free, x, level, kind), expected, rtol=1e-8, atol=1e-8)


def test_both_adds_the_two() -> None:
    mixture, x, t = Mixture("epsilon"), points(4), torch.tensor(0)
    mixture.level = level = LEVELS[1]
    labels = [0, 1, 2, 0]
    both = Guide(mixture, labels, [2.0] * 4, [1.5] * 4, Posterior(mixture))(x, t, level)
    same = Guide(mixture, labels, [3.5] * 4)(x, t, level)  # with an exact classifier the weights add up
    torch.testing.assert_close(both, same, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_two_exact_classifiers_are_one(kind: PredictionType) -> None:
    """p(y|x)^0.3 p(y|x)^0.7 = p(y|x), at one level and all the way down."""
    mixture, x, t = Mixture(kind), points(6), torch.tensor(0)
    classifiers = [Posterior(mixture), Posterior(mixture)]
    labels, w, zero = [0, 1, 2, 0, 1, 2], [1.0, 1.0, 1.0, 2.5, 0.0, -1.0], [0.0] * 6
    targets = [((2 * label, 0.3), (2 * label + 1, 0.7)) for label in labels]
    several = Guide(mixture, labels, zero, w, SummedScore(classifiers), classifier_labels=targets)
    for mixture.level in LEVELS:
        one = make_guide(mixture, "classifier", labels, w)(x, t, mixture.level)
        # 0.3 and 0.7 are fp32 in the guide
        torch.testing.assert_close(several(x, t, mixture.level), one, rtol=1e-6, atol=1e-6)
    assert several.calls == [3 * (1 + 2 * (weight != 0)) for weight in w]
    assert classifiers[0].rows == classifiers[1].rows == 3 * 5
    down = [follow(guide, mixture) for guide in (several, make_guide(mixture, "classifier", labels, w))]
    drawn = [sample(guide, schedule(kind), list(range(6)), SHAPE, steps=20) for guide in down]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-5, atol=1e-5)


def test_product_of_two_classifiers_has_its_closed_form() -> None:
    """Experts for different labels: score + sum_j v_j (score given y_j - score), a negative weight included."""
    mixture, x, t = Mixture("epsilon"), points(8), torch.tensor(0)
    score = SummedScore([Posterior(mixture), Posterior(mixture), Posterior(mixture)])
    targets = [((0 * 3, 0.5), (1 * 3 + 1, 2.0), (2 * 3 + 2, -0.75))] * 8
    guide = Guide(mixture, [NULL] * 8, [0.0] * 8, [1.5] * 8, score, classifier_labels=targets)
    for mixture.level in LEVELS:
        found = to_score(guide(x, t, mixture.level), x, mixture.level, "epsilon")
        plain = mixture.score(x, torch.full((8,), NULL))
        experts = [mixture.score(x, torch.full((8,), label)) - plain for label in range(3)]
        expected = plain + 1.5 * (0.5 * experts[0] + 2.0 * experts[1] - 0.75 * experts[2])
        # all weights are exact in fp32; scores are of order 1 / sigma^2 <= 500
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_noisy_and_denoised_classifiers_add_up() -> None:
    """Against autograd on 0.5 log p(y|x_t) + 2 log p(y|E[x_0|x_t]), in closed form."""

    def clean_logits(x0: Tensor) -> Tensor:
        return -((x0.flatten(1)[:, None] - MEANS) ** 2).sum(-1) / (2 * SPREAD**2) + PRIOR.log()

    mixture, x, t = Mixture("epsilon"), points(6), torch.tensor(0)
    labels, columns = torch.tensor([0, 1, 2, 2, 1, 0]), {0: 0, 1: 1, 2: 2}
    score = SummedScore([Posterior(mixture), DenoisedScore(clean_logits, columns, mixture)])
    targets = [((2 * label, 0.5), (2 * label + 1, 2.0)) for label in labels.tolist()]
    guide = Guide(mixture, [NULL] * 6, [0.0] * 6, [3.0] * 6, score, classifier_labels=targets)
    for mixture.level in LEVELS:
        found = to_score(guide(x, t, mixture.level), x, mixture.level, "epsilon")
        leaf = x.clone().requires_grad_()
        noisy = mixture.log_joint(leaf).log_softmax(1)
        denoised = clean_logits(mixture.posterior_mean(leaf, torch.full((6,), NULL))).log_softmax(1)
        log_p = (0.5 * noisy + 2.0 * denoised).gather(1, labels[:, None]).sum()
        expected = mixture.score(x, torch.full((6,), NULL)) + 3.0 * torch.autograd.grad(log_p, leaf)[0]
        # DenoisedScore answers in fp32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert guide.calls == [3 * (1 + 1 + 2)] * 6


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_calls_of_zero_weight_are_skipped(mode: str) -> None:
    mixture = Mixture("epsilon")
    classifier = Posterior(mixture)
    w = [0.0, 1.0, 3.0]
    guide = Guide(mixture, [0, 1, 2], w) if mode == "cfg" else Guide(mixture, [0, 1, 2], [0.0] * 3, w, classifier)
    guide(points(3), torch.tensor(0), LEVELS[1])
    assert guide.calls == ([1, 1, 2] if mode == "cfg" else [1, 2, 2])
    assert (mixture.rows, classifier.rows) == ((4, 0) if mode == "cfg" else (3, 2))
    assert mixture.rows + classifier.rows == sum(guide.calls)


def schedule(kind: PredictionType) -> object:
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="trailing")


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_both_modes_draw_the_same_samples(kind: PredictionType, w: float) -> None:
    drawn = []
    for mode in ("cfg", "classifier"):
        mixture = Mixture(kind)
        guide = follow(make_guide(mixture, mode, [0, 1, 2, 0], [w] * 4), mixture)
        # a flow that starts at alpha = 0 shows the classifier nothing there, so one that starts beside it
        walker = make_scheduler({"prediction_type": "flow_prediction"}, "unipc") if kind == "flow" else schedule(kind)
        drawn.append(sample(guide, walker, [0, 1, 2, 3], SHAPE, steps=20))
    # the same numbers in another order of operations, twenty steps of fp64 from fp32 noise
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_w1_is_the_exact_conditional_flow(kind: PredictionType) -> None:
    """For one Gaussian the probability-flow ODE is affine: x_0 = mu + s (x_T - alpha mu) / spread_T."""
    scheduler, label, count = schedule(kind), 1, 64
    scheduler.set_timesteps(1000)  # type: ignore[attr-defined]
    first = noise_levels(scheduler)[0]
    mixture = Mixture(kind)
    guide = follow(make_guide(mixture, "cfg", [label] * count, [1.0] * count), mixture)
    drawn = sample(guide, scheduler, list(range(count)), SHAPE, steps=1000).flatten(1)
    noise = torch.cat([torch.randn((1, 2), generator=torch.Generator().manual_seed(i)) for i in range(count)]).double()
    spread = math.sqrt(first.alpha**2 * SPREAD**2 + first.sigma**2)
    exact = MEANS[label] + SPREAD * (noise - first.alpha * MEANS[label]) / spread
    # a first-order solver with 1000 steps: the error is of order 1/1000 of the data's range, and
    # the flow's last step ends at t = 1/1000 for DDIM
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_w0_and_w1_have_the_exact_moments(mode: str) -> None:
    count = 3000
    for w, share in ((0.0, PRIOR), (1.0, torch.tensor([0.0, 0.0, 1.0]).double())):
        mixture = Mixture("epsilon")
        guide = follow(make_guide(mixture, mode, [2] * count, [w] * count), mixture)
        drawn = sample(guide, schedule("epsilon"), list(range(count)), SHAPE, steps=100).flatten(1)
        mean = share @ MEANS
        centred = MEANS - mean
        covariance = SPREAD**2 * torch.eye(2) + centred.T @ (share[:, None] * centred)
        # the standard error of a mean is sd/sqrt(3000) <= 0.011 here; four of them, and 0.01 for the solver
        torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.055)
        torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0, atol=0.055)


def test_larger_w_makes_the_label_likelier() -> None:
    likelihood = []
    for w in (0.0, 1.0, 2.0, 4.0):
        mixture = Mixture("epsilon")
        guide = follow(make_guide(mixture, "classifier", [1] * 256, [w] * 256), mixture)
        drawn = sample(guide, schedule("epsilon"), list(range(256)), SHAPE, steps=30)
        mixture.level = Level(1.0, 0.0)
        likelihood.append(mixture.log_joint(drawn).log_softmax(1)[:, 1].exp().mean().item())
    assert likelihood == sorted(likelihood)
    assert likelihood[0] < 0.3
    assert likelihood[-1] > 0.99


EDM = {"_class_name": "EDMEulerScheduler", "sigma_max": 20.0}


class Wider(Mixture):
    """A guiding model that is worse: of Gaussians twice as wide."""

    def posterior_mean(self, x: Tensor, labels: Tensor) -> Tensor:
        alpha, sigma = self.level
        gain = alpha * 4 * SPREAD**2 / (alpha**2 * 4 * SPREAD**2 + sigma**2)
        return (MEANS[labels] + gain * (x.flatten(1) - alpha * MEANS[labels])).view_as(x)


@pytest.mark.parametrize("level", LEVELS[:2] + UNIT_ALPHA)
def test_autoguidance_has_its_closed_form(level: Level) -> None:
    """score + (w - 1)(score - weak score) of two Gaussians, which is linear in x."""
    mixture, wider, x, t = Mixture("sample"), Wider("sample"), points(5), torch.tensor(0)
    mixture.level = wider.level = level
    w, label = [0.0, 0.5, 1.0, 2.0, 3.5], 1
    guided = Guide(mixture, [label] * 5, [1.0] * 5, guiding=wider, w_guide=w)(x, t, level)
    slopes = [
        (level.alpha * MEANS[label] - x.flatten(1)) / (level.alpha**2 * spread**2 + level.sigma**2)
        for spread in (SPREAD, 2 * SPREAD)
    ]
    expected = slopes[1] + torch.tensor(w).double()[:, None] * (slopes[0] - slopes[1])
    found = to_score(guided, x, level, "sample").flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["edm", "euler", "dpm++"])
def test_both_modes_draw_the_same_samples_where_alpha_is_one(name: str) -> None:
    drawn = []
    for mode in ("cfg", "classifier"):
        mixture = Mixture("sample")
        guide = follow(make_guide(mixture, mode, [0, 1, 2, 0], [0.0, 1.0, 3.0, 1.5]), mixture)
        drawn.append(sample(guide, make_scheduler(EDM, name), [0, 1, 2, 3], SHAPE, steps=15))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_w0_and_w1_have_the_exact_moments_where_alpha_is_one(mode: str) -> None:
    count = 3000
    for w, share in ((0.0, PRIOR), (1.0, torch.tensor([0.0, 0.0, 1.0]).double())):
        mixture = Mixture("sample")
        guide = follow(make_guide(mixture, mode, [2] * count, [w] * count), mixture)
        drawn = sample(guide, make_scheduler(EDM, "edm"), list(range(count)), SHAPE, steps=40).flatten(1)
        mean = share @ MEANS
        centred = MEANS - mean
        covariance = SPREAD**2 * torch.eye(2) + centred.T @ (share[:, None] * centred)
        # as above: standard errors of 0.011, and 0.01 for the solver
        torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.055)
        torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0, atol=0.055)


def test_w1_is_the_exact_conditional_flow_where_alpha_is_one() -> None:
    label, count = 1, 64
    mixture = Mixture("sample")
    guide = follow(make_guide(mixture, "cfg", [label] * count, [1.0] * count), mixture)
    drawn = sample(guide, make_scheduler(EDM, "edm"), list(range(count)), SHAPE, steps=150).flatten(1)
    noise = torch.cat([torch.randn((1, 2), generator=torch.Generator().manual_seed(i)) for i in range(count)]).double()
    exact = MEANS[label] + SPREAD * (20.0 * noise - MEANS[label]) / math.sqrt(SPREAD**2 + 20.0**2)
    # of second order in 150 steps
    torch.testing.assert_close(drawn, exact, rtol=0, atol=2e-3)
