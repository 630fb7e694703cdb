"""Every guidance method against the guiders of diffusers, its schedulers, and loops written from the papers.

Tolerance: 1e-6 of the largest number of the expected tensor, in fp32. Near zero crossings of
u + 20 (c - u) an element is the difference of numbers of that size, so its own size says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, guiders
from test_gaussian_mixture import LEVELS, MEANS, SHAPE, Mixture, points
from torch import Tensor

from guidegen.sampling.loop import initial_noise, sample
from guidegen.sampling.schedulers import levels_after, noise_levels
from guidegen.scores import methods as formulas
from guidegen.scores.interfaces import NULL, Step, Weights
from guidegen.scores.methods import METHODS, find_method
from guidegen.scores.noise import PREDICTION_TYPES, Level, PredictionType, to_x0
from guidegen.scores.schedule import interval_factors, make_schedule

SHAPES = [(3, 3, 8, 8), (1, 4, 16, 32), (2, 1, 32, 32)]
WEIGHTS = [0.5, 1.5, 3.0, 7.5, 20.0]
COUNT = 10


def tensors(shape: tuple[int, ...], seed: int, apart: float = 0.3) -> tuple[Tensor, Tensor]:
    """An unconditional and a conditional prediction, alike as those of a network are."""
    generator = torch.Generator().manual_seed(seed)
    unconditional, difference = torch.randn((2, *shape), generator=generator)
    return unconditional, unconditional + apart * difference


def a_step(shape: tuple[int, ...], kind: PredictionType = "flow", index: int = 0, level: Level = LEVELS[1]) -> Step:
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    return Step(x_t, level, kind, index, COUNT)


def weights(w: float, batch: int) -> Tensor:
    return torch.full((batch, 1, 1, 1), w)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def guider(name: str, **settings: Any) -> Any:
    made = getattr(guiders, name)(**settings)
    made.set_state(0, COUNT, torch.tensor(0))
    return made


def prepared(made: Any, index: int) -> Any:
    """The guider at one step, as its pipelines bring it there: this is where momentum begins anew."""
    made.set_state(index, COUNT, torch.tensor(0))
    made.prepare_inputs({})
    return made


# ours, its options, theirs, and theirs for one w. Theirs run in the formulation that starts from c where
# ours does (`use_original_formulation`: c + scale (c - u), so that scale = w - 1).
PAIRS: dict[str, tuple[str, dict[str, Any], str, Callable[[float], dict[str, Any]]]] = {
    "cfg": ("cfg", {}, "ClassifierFreeGuidance", lambda w: {"guidance_scale": w}),
    "cfg from c": (
        "cfg",
        {},
        "ClassifierFreeGuidance",
        lambda w: {"guidance_scale": w - 1, "use_original_formulation": True},
    ),
    "rescale": ("rescale", {}, "ClassifierFreeGuidance", lambda w: {"guidance_scale": w, "guidance_rescale": 0.7}),
    "rescale fully": (
        "rescale",
        {"phi": 1.0},
        "ClassifierFreeGuidance",
        lambda w: {"guidance_scale": w, "guidance_rescale": 1.0},
    ),
    "apg": (
        "apg",
        {"space": "native", "norm_threshold": 5.0, "momentum": 0.0, "eta": 0.2},
        "AdaptiveProjectedGuidance",
        lambda w: {
            "guidance_scale": w - 1,
            "adaptive_projected_guidance_rescale": 5.0,
            "eta": 0.2,
            "use_original_formulation": True,
        },
    ),
    "apg unbounded": (
        "apg",
        {"space": "native", "momentum": 0.0},
        "AdaptiveProjectedGuidance",
        lambda w: {
            "guidance_scale": w - 1,
            "adaptive_projected_guidance_rescale": 0.0,
            "eta": 0.0,
            "use_original_formulation": True,
        },
    ),
    "cfg-zero": ("cfg-zero", {}, "ClassifierFreeZeroStarGuidance", lambda w: {"guidance_scale": w, "zero_init_steps": 1}),
    "magnitude": ("magnitude", {}, "MagnitudeAwareGuidance", lambda w: {"guidance_scale": w}),
    "magnitude, other alpha": (
        "magnitude",
        {"alpha": 2.0},
        "MagnitudeAwareGuidance",
        lambda w: {"guidance_scale": w, "alpha": 2.0},
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("w", WEIGHTS)
def test_same_tensors_as_diffusers(pair: str, shape: tuple[int, ...], w: float) -> None:
    name, options, theirs, settings = PAIRS[pair]
    made = guider(theirs, **({"stop": 1.0, "start": 0.0} | settings(w)))
    for index in range(3):
        unconditional, conditional = tensors(shape, index)
        # flat, as latents of transformers are: torch.norm of theirs refuses three dimensions at once
        flat = (conditional.flatten(2), unconditional.flatten(2)) if name == "magnitude" else (conditional, unconditional)
        expected = prepared(made, index).forward(*flat).pred.view(shape)
        ours = METHODS[name](unconditional, conditional, weights(w, shape[0]), a_step(shape, index=index), **options)
        close(ours, expected)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 32, 32)])
@pytest.mark.parametrize("w", WEIGHTS)
def test_tangential(shape: tuple[int, ...], w: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1e-6 of diffusers' guider with its SVD in fp64; in fp32, as it is, it is further from that than ours."""
    made = prepared(guider("TangentialClassifierFreeGuidance", guidance_scale=w), 0)
    unconditional, conditional = tensors(shape, 0)
    single = made.forward(conditional, unconditional).pred
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    expected = made.forward(conditional.double(), unconditional.double()).pred
    ours = METHODS["tangential"](unconditional, conditional, weights(w, shape[0]), a_step(shape))
    close(ours, expected.to(torch.float32))
    assert (ours - expected).abs().max() < (single - expected).abs().max()


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("momentum", [-0.5, 0.9])
def test_momentum_over_several_steps(w: float, momentum: float) -> None:
    shape, step = SHAPES[0], a_step(SHAPES[0])
    made = guider(
        "AdaptiveProjectedGuidance",
        guidance_scale=w - 1,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=5.0,
        eta=0.0,
        use_original_formulation=True,
    )
    for index in range(6):
        unconditional, conditional = tensors(shape, index)
        expected = prepared(made, index).forward(conditional, unconditional).pred
        now = replace(step, index=index)  # with the same memory
        ours = formulas.apg(
            unconditional, conditional, weights(w, 3), now, momentum=momentum, norm_threshold=5.0, space="native"
        )
        close(ours, expected)


@pytest.mark.parametrize("w", [3.0, 10.0, 20.0])
def test_apg_mix_over_several_steps(w: float) -> None:
    shape, step = SHAPES[0], a_step(SHAPES[0])
    made = guider(
        "AdaptiveProjectedMixGuidance",
        guidance_scale=0.28 * (w - 1),
        adaptive_projected_guidance_scale=w - 1,
        adaptive_projected_guidance_start_step=2,
        adaptive_projected_guidance_rescale=10.0,
        use_original_formulation=True,
    )
    for index in range(6):
        unconditional, conditional = tensors(shape, index)
        expected = prepared(made, index).forward(conditional, unconditional).pred
        now = replace(step, index=index)
        ours = formulas.apg_mix(unconditional, conditional, weights(w, 3), now, start=2, norm_threshold=10.0)
        close(ours, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("w", [1.5, 7.5, 20.0])
@pytest.mark.parametrize("halvings", [1, 2])
def test_frequency_decoupled(shape: tuple[int, ...], w: float, halvings: int) -> None:
    pytest.importorskip("kornia")
    low = 0.4
    # theirs weighs every band of the pyramid; ours all bands above the cut alike
    made = guider("FrequencyDecoupledGuidance", guidance_scales=[w] * halvings + [1 + low * (w - 1)])
    unconditional, conditional = tensors(shape, 5)
    expected = prepared(made, 0).forward(conditional, unconditional).pred
    ours = formulas.frequency(unconditional, conditional, weights(w, shape[0]), a_step(shape), low=low, halvings=halvings)
    close(ours, expected)


def test_frequency_keeps_sizes_that_a_pyramid_pads() -> None:
    """diffusers' guider returns a tensor padded to powers of two here; ours one of the size it got."""
    for shape in ((1, 3, 24, 40), (1, 1, 7, 5), (2, 2, 1, 1)):
        unconditional, conditional = tensors(shape, 1)
        ours = formulas.frequency(unconditional, conditional, weights(4.0, shape[0]), a_step(shape), halvings=2)
        assert ours.shape == shape
        assert ours.isfinite().all()
        flat = formulas.frequency(
            unconditional, unconditional + 1, weights(4.0, shape[0]), a_step(shape), low=0.5, halvings=2
        )
        close(flat, unconditional + 1 + 3 * 0.5)  # a constant is all low frequency


@pytest.mark.parametrize("limits", [(0.0, 1.0), (0.2, 0.7), (0.5, 1.0), (0.0, 0.35)])
def test_off_where_diffusers_is_off(limits: tuple[float, float]) -> None:
    start, stop = limits
    made = guider("ClassifierFreeGuidance", guidance_scale=5.0, start=start, stop=stop)
    unconditional, conditional = tensors(SHAPES[0], 0)
    levels = [Level(math.cos(a), math.sin(a)) for a in torch.linspace(1.5, 0.1, COUNT).tolist()]
    schedule = make_schedule(levels, f"{100 * start:g}%:{100 * stop:g}%", None, METHODS["cfg"])
    for index in range(COUNT):
        expected = prepared(made, index).forward(conditional, unconditional).pred
        w = weights(schedule.weights(index, Weights(5.0, 0.0, 1.0))[0], 3)
        close(METHODS["cfg"](unconditional, conditional, w, a_step(SHAPES[0], index=index)), expected)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("maximum", [1.0, 1.5, 100.0])
def test_threshold_as_the_schedulers_do(scheduler: type, kind: PredictionType, maximum: float) -> None:
    unconditional, conditional = tensors(SHAPES[0], 2, apart=0.5)
    step, w = a_step(SHAPES[0], kind), weights(6.0, 3)
    theirs = scheduler(thresholding=True, sample_max_value=maximum, dynamic_thresholding_ratio=0.98)
    guided = formulas.classifier_free(unconditional, conditional, w)
    expected = theirs._threshold_sample(step.to_x0(guided))
    ours = formulas.threshold(unconditional, conditional, w, step, percentile=0.98, maximum=maximum)
    torch.testing.assert_close(step.to_x0(ours), expected, rtol=0, atol=3e-6)  # there and back again, of x0 up to 10
    if kind == "sample":
        close(ours, expected)


def test_renorm_as_the_z_image_pipeline_does() -> None:
    """Its loop, in a line each: per image, only shortened."""
    unconditional, conditional = tensors(SHAPES[0], 3)
    for limit in (0.5, 1.0, 2.0, 50.0):
        for w in WEIGHTS:
            ours = formulas.renorm(unconditional, conditional, weights(w, 3), a_step(SHAPES[0]), limit=limit)
            for u, c, each in zip(unconditional, conditional, ours, strict=True):
                guided = c + (w - 1) * (c - u)
                longest = limit * torch.linalg.vector_norm(c)
                length = torch.linalg.vector_norm(guided)
                close(each, guided * (longest / length) if length > longest else guided)


# --- properties of all of them


def methods_and_kinds() -> list[tuple[str, PredictionType]]:
    return [(name, kind) for name in METHODS for kind in PREDICTION_TYPES]


@pytest.mark.parametrize(("name", "kind"), methods_and_kinds())
def test_finite_for_finite_input(name: str, kind: PredictionType) -> None:
    """At w = 20, for sizes from 1e-30 to 1e9, zeros, equals and constants; at pure noise and next to none."""
    shape = (2, 3, 8, 8)
    u, c = tensors(shape, 0)
    zero, one = torch.zeros(shape), torch.ones(shape)
    cases = [(u, c), (u, u), (zero, zero), (zero, c), (u, zero), (one, one), (one, 2 * one), (u, -u)]
    cases += [(a * u, b * c) for a in (1e-30, 1e-9, 1e9) for b in (1e-30, 1.0, 1e9)]
    for level in (Level(0.0, 1.0), Level(1e-3, 1.0), LEVELS[0], Level(1.0, 1e-4)):
        for index in (0, 9):
            for unconditional, conditional in cases:
                step = a_step(shape, kind, index, level)
                guided = METHODS[name].combine(unconditional, conditional, weights(20.0, 2), step)
                assert guided.isfinite().all(), (name, kind, level, index)


@pytest.mark.parametrize("name", METHODS)
def test_each_sample_apart_from_the_others(name: str) -> None:
    """So that an image does not depend on which cells share its batch."""
    unconditional, conditional = tensors((4, 3, 8, 8), 1)
    w = torch.tensor([0.0, 1.0, 2.5, 9.0])[:, None, None, None]
    step = a_step((4, 3, 8, 8), "epsilon", index=7)
    together = METHODS[name](unconditional, conditional, w, step)
    for i in range(4):
        alone = Step(step.x_t[i : i + 1], step.level, step.kind, 7, COUNT)
        one = METHODS[name](unconditional[i : i + 1], conditional[i : i + 1], w[i : i + 1], alone)
        close(one[0], together[i])
    assert torch.equal(together[0], unconditional[0])
    assert torch.equal(together[1], conditional[1])


@pytest.mark.parametrize("name", METHODS)
def test_packed_tokens_and_video_are_as_images(name: str) -> None:
    """Formulas of lengths and means do not read the layout; one of frequencies refuses all but images."""
    images = (2, 4, 8, 8)
    unconditional, conditional = tensors(images, 1)
    step, w = a_step(images, index=7), weights(4.0, 2)
    expected = METHODS[name](unconditional, conditional, w, step)
    for shape in ((2, 16, 16), (2, 4, 1, 8, 8)):
        u, c, x_t = (each.reshape(shape) for each in (unconditional, conditional, step.x_t))
        w = torch.full((2, *[1] * (len(shape) - 1)), 4.0)
        if name == "frequency":
            with pytest.raises(ValueError, match="takes images"):
                METHODS[name](u, c, w, replace(step, x_t=x_t))
        else:
            close(METHODS[name](u, c, w, replace(step, x_t=x_t, memory={})).reshape(images), expected)


NEUTRAL: dict[str, dict[str, str]] = {
    "cfg++": {},
    "rescale": {"phi": "0"},
    "renorm": {"limit": "1e9"},
    "threshold": {"limit": "1e9"},
    "apg": {"eta": "1", "norm_threshold": "0", "momentum": "0"},
    "apg-mix": {"early": "1", "eta": "1", "norm_threshold": "0", "momentum": "0", "space": "x0"},
    "frequency": {"low": "1"},
    "magnitude": {"alpha": "0"},
    "power": {"exponent": "0"},
}


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_on_the_mixture(name: str, kind: PredictionType) -> None:
    """At its neutral setting each method is classifier-free guidance, at every level of the mixture."""
    method, options = find_method(name, NEUTRAL[name])
    mixture, x = Mixture(kind), points(6)
    w = torch.tensor([-1.0, 0.0, 1.0, 1.5, 4.0, 20.0]).double()[:, None, None, None]
    for index, level in enumerate(LEVELS):
        mixture.level = level
        null, label = (
            mixture(x, torch.tensor(0), torch.full((6,), NULL)),
            mixture(x, torch.tensor(0), torch.tensor([0, 1, 2] * 2)),
        )
        step = Step(x, level, kind, index, len(LEVELS))
        # fp64; x0 there and back again divides by sigma >= 0.04
        torch.testing.assert_close(
            method(null, label, w, step, **options), formulas.classifier_free(null, label, w), rtol=1e-9, atol=1e-9
        )


def test_methods_without_a_switch_are_neutral_where_the_predictions_agree() -> None:
    """CFG-Zero* fits u to c, the tangential one drops what of u is not along c: nothing to do where c = s u."""
    unconditional, _ = tensors(SHAPES[0], 4)
    step = a_step(SHAPES[0], "epsilon")
    for name in ("cfg-zero", "tangential"):
        close(METHODS[name](unconditional, unconditional, weights(7.0, 3), step), unconditional)
    along = 1.3 * unconditional
    close(
        formulas.tangential(unconditional, along, weights(7.0, 3), step),
        formulas.classifier_free(unconditional, along, weights(7.0, 3)),
    )
    close(formulas.cfg_zero(unconditional, along, weights(7.0, 3), step), along)


@pytest.mark.parametrize("name", ["apg", "power", "threshold"])
def test_the_same_in_every_prediction_type(name: str) -> None:
    """What works on denoised estimates gives the same one, whatever the network predicts."""
    method, results = METHODS[name], []
    x, level = points(6), LEVELS[1]
    for kind in PREDICTION_TYPES:
        mixture = Mixture(kind)
        mixture.level = level
        null, label = (
            mixture(x, torch.tensor(0), torch.full((6,), NULL)),
            mixture(x, torch.tensor(0), torch.tensor([0, 1, 2] * 2)),
        )
        step = Step(x, level, kind, 3, 10)
        guided = method(null, label, torch.full((6, 1, 1, 1), 9.0).double(), step)
        results.append(to_x0(guided, x, level, kind))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


# --- CFG++


class Walker:
    """A small guide: the mixture's two predictions, combined with the scheduled weight of each step."""

    def __init__(
        self, mixture: Mixture, scheduler: Any, steps: int, name: str, w: float, label: int, interval: str | None = None
    ):
        scheduler.set_timesteps(steps)
        self.mixture, self.method, self.w, self.label = mixture, METHODS[name], w, label
        self.schedule = make_schedule(noise_levels(scheduler), interval, None, self.method, levels_after(scheduler))
        self.index, self.memory = 0, {}

    def __call__(self, x: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
        self.mixture.level = level
        null = self.mixture(x, t, torch.full((len(x),), NULL))
        label = self.mixture(x, t, torch.full((len(x),), self.label))
        w = torch.full((len(x), 1, 1, 1), self.schedule.weights(index, Weights(self.w, 0.0, 1.0))[0]).double()
        step = Step(x, level, self.mixture.prediction_type, index, len(self.schedule.gains), self.memory)
        return self.method(null, label, w, step)


def renoised(mixture: Mixture, levels: list[Level], seeds: list[int], scale: float, weight: float, label: int) -> Tensor:
    """Algorithm 2 of CFG++: x0 from the guided noise, then the unconditional noise back."""
    x = initial_noise(seeds, SHAPE)[0].double() * scale
    for level, following in zip(levels, [*levels[1:], Level(1.0, 0.0)], strict=True):
        mixture.level = level
        null, labels = torch.full((len(x),), NULL), torch.full((len(x),), label)
        eps = (x - level.alpha * mixture.posterior_mean(x, null)) / level.sigma
        eps_label = (x - level.alpha * mixture.posterior_mean(x, labels)) / level.sigma
        x0 = (x - level.sigma * (eps + weight * (eps_label - eps))) / level.alpha
        x = following.alpha * x0 + following.sigma * eps
    return x


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.6, 1.0])
def test_cfg_plus_plus_is_its_own_loop(kind: PredictionType, weight: float) -> None:
    """The paper's DDIM loop against guidegen's sampler with diffusers' DDIM, w alone being scheduled."""
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    mixture, seeds = Mixture(kind), list(range(8))
    drawn = sample(Walker(mixture, scheduler, 20, "cfg++", weight, 1), scheduler, seeds, SHAPE, 20)
    expected = renoised(mixture, noise_levels(scheduler), seeds, 1.0, weight, 1)
    # fp64 but for the scheduler's own alphas, which are fp32: 20 steps of 1e-7
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-5)


def test_cfg_plus_plus_with_euler() -> None:
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    mixture, seeds = Mixture("epsilon"), list(range(8))
    drawn = sample(Walker(mixture, scheduler, 20, "cfg++", 0.6, 2), scheduler, seeds, SHAPE, 20)
    levels = noise_levels(scheduler)
    scale = float(scheduler.init_noise_sigma) * levels[0].alpha  # Euler's x is ours over alpha
    expected = renoised(mixture, levels, seeds, scale, 0.6, 2)
    torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=2e-5)


def test_cfg_plus_plus_on_a_flow_from_pure_noise() -> None:
    """alpha = 0 at the first step: the gain there is 1 and nothing is divided by zero."""
    scheduler, mixture, seeds = FlowMatchEulerDiscreteScheduler(), Mixture("flow"), list(range(8))
    drawn = sample(Walker(mixture, scheduler, 20, "cfg++", 0.7, 0), scheduler, seeds, SHAPE, 20)
    levels = noise_levels(scheduler)
    assert levels[0] == Level(0.0, 1.0)
    x = initial_noise(seeds, SHAPE)[0].double()
    for level, following in zip(levels, [*levels[1:], Level(1.0, 0.0)], strict=True):
        mixture.level = level
        x0 = mixture.posterior_mean(x, torch.full((8,), NULL))
        eps = (x - level.alpha * x0) / level.sigma
        guided = x0 + 0.7 * (mixture.posterior_mean(x, torch.zeros(8, dtype=torch.long)) - x0)
        x = following.alpha * guided + following.sigma * eps
    torch.testing.assert_close(drawn, x, rtol=0, atol=2e-5)


def test_gain_at_both_ends() -> None:
    assert formulas.renoising_gain(Level(0.0, 1.0), Level(0.1, 0.9)) == 1
    assert formulas.renoising_gain(Level(0.9, 0.4), Level(1.0, 0.0)) == 1
    now, after = Level(0.6, 0.8), Level(0.8, 0.6)
    rho, later = 0.8 / 0.6, 0.6 / 0.8
    assert formulas.renoising_gain(now, after) == pytest.approx(rho / (rho - later), rel=1e-12)


# --- when


def test_interval_without_ends_equals_none() -> None:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    drawn = [
        sample(Walker(Mixture("epsilon"), scheduler, 12, "cfg", 4.0, 1, interval), scheduler, [0, 1, 2], SHAPE, 12)
        for interval in (None, "0:inf", "0%:100%")
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    narrow = sample(Walker(Mixture("epsilon"), scheduler, 12, "cfg", 4.0, 1, "0.3:2"), scheduler, [0, 1, 2], SHAPE, 12)
    assert not torch.allclose(drawn[0], narrow, atol=1e-3)
    assert sum(interval_factors(noise_levels(scheduler), "0.3:2")) < 12


def test_larger_w_still_draws_the_label() -> None:
    """No method turns guidance round: at w = 3 the label is at least as likely as in the model itself."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    nearest = {}
    for name in METHODS:
        walker = Walker(Mixture("epsilon"), scheduler, 20, name, 0.8 if name == "cfg++" else 3.0, 1)
        drawn = sample(walker, scheduler, list(range(48)), SHAPE, 20).flatten(1)
        nearest[name] = ((drawn[:, None] - MEANS) ** 2).sum(-1).argmin(1).eq(1).float().mean().item()
    assert all(share > 0.9 for share in nearest.values()), nearest
