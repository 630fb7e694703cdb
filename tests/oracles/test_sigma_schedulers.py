"""Samplers of x_t = x_0 + sigma eps against Gaussian data, diffusers' own classes, and the published algorithm.

p(x_0) = N(m, s^2), so E[x_0 | x] = m + s^2 / (s^2 + sigma^2) (x - m), and the flow of the
probabilities ends at m + s (x - m) / (s^2 + sigma^2)^0.5.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.noise_schedule import convention_of, noise_schedule, sigma_range
from guidegen.sampling.loop import initial_noise, sample, try_out
from guidegen.sampling.schedulers import SIGMA_SCHEDULERS, fitting, levels_after, make_scheduler, noise_levels
from guidegen.scores.interfaces import Weights
from guidegen.scores.methods import METHODS
from guidegen.scores.noise import Level
from guidegen.scores.schedule import make_schedule

MEAN, SPREAD = 0.5, 0.4
SHAPE, SEEDS = (1, 64, 64), [0, 1, 2, 3]
"""16,384 numbers: a standard error of 0.8 % for a mean and 0.6 % for a standard deviation."""
EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0}
VE = {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 50.0}
CM = {"_class_name": "CMStochasticIterativeScheduler", "clip_denoised": False}


class Gaussian:
    """The posterior mean of N(m, s^2), or the end of its flow, which keeps the noise that it is shown."""

    def __init__(self, spread: float = SPREAD, consistent: bool = False):
        self.spread, self.consistent = spread, consistent
        self.noise: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
        assert level.alpha == 1
        assert float(t) == pytest.approx(level.sigma)
        variance = self.spread**2 + level.sigma**2
        self.noise.append((x.double() - MEAN) / variance**0.5)
        gain = self.spread / variance**0.5 if self.consistent else self.spread**2 / variance
        return (MEAN + gain * (x.double() - MEAN)).float()


def spread_of(config: dict[str, Any], name: str | None, steps: int, **options: Any) -> tuple[float, float]:
    """Mean, and standard deviation over that of the data, of what is drawn."""
    exact = Gaussian(consistent=convention_of(config) == "consistency")
    drawn = sample(exact, make_scheduler(config, name, options), SEEDS, SHAPE, steps).double()
    return float(drawn.mean()), float(drawn.std()) / SPREAD


@pytest.mark.parametrize(
    ("config", "name", "steps", "options", "off"),
    [
        (EDM, "edm", 60, {}, 0.01),
        (EDM, "edm", 120, {"S_churn": 40.0, "S_tmin": 0.05, "S_tmax": 50.0}, 0.02),
        (EDM, "edm", 60, {"S_churn": 10.0, "rho": 5.0}, 0.02),
        (EDM, None, 150, {}, 0.03),
        (EDM, None, 300, {"sigma_schedule": "exponential"}, 0.03),
        (EDM, "dpm++", 40, {}, 0.02),
        (EDM, "dpm++", 40, {"solver_order": 3}, 0.02),
        (EDM, "dpm++", 200, {"algorithm_type": "sde-dpmsolver++"}, 0.03),
        (EDM, "dpm++", 40, {"solver_type": "heun"}, 0.02),
        (VE, None, 400, {}, 0.04),
        (VE, None, 600, {"correct_steps": 0}, 0.03),
        (VE, "edm", 60, {}, 0.01),
        (EDM, "ScoreSdeVeScheduler", 400, {}, 0.04),
        ({"_class_name": "KarrasVeScheduler"}, None, 100, {}, 0.03),  # s_noise is 1.007
        ({"_class_name": "KarrasVeScheduler"}, "edm", 60, {}, 0.01),
        (CM, None, 1, {}, 0.02),
        (CM, None, 2, {}, 0.02),
        (CM, None, 8, {}, 0.02),
    ],
    ids=str,
)
def test_samples_are_those_of_the_data(
    config: dict[str, Any], name: str | None, steps: int, options: dict[str, Any], off: float
) -> None:
    mean, spread = spread_of(config, name, steps, **options)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert spread == pytest.approx(1, abs=off)


@pytest.mark.parametrize("name", ["edm", "euler", "dpm++"])
def test_a_point_shows_the_same_noise_at_every_step(name: str) -> None:
    """With s = 0 nothing is approximated: the noise in units of sigma stays, and the image is the point."""
    exact = Gaussian(spread=0.0)
    drawn = sample(exact, make_scheduler(EDM, name), SEEDS, SHAPE, 15)
    for noise in exact.noise:
        torch.testing.assert_close(noise, exact.noise[0], rtol=0, atol=5e-3)  # x of 80 in fp32, over sigma of 0.002
    torch.testing.assert_close(drawn, torch.full_like(drawn, MEAN), rtol=0, atol=1e-4)


def heun_of_the_paper(denoise: Any, x: Tensor, steps: int, churn: float, generator: torch.Generator) -> Tensor:
    """Algorithm 2, spelt out in fp64."""
    sigmas = [(80.0 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7 for i in range(steps)] + [0.0]
    for now, then in pairwise(sigmas):
        gamma = min(churn / steps, 2**0.5 - 1) if 0.05 <= now <= 50 else 0
        raised = now * (1 + gamma)
        noise = torch.randn(x.shape, generator=generator)
        x = x + (raised**2 - now**2) ** 0.5 * 1.003 * noise
        slope = (x - denoise(x, raised)) / raised
        following = x + (then - raised) * slope
        if then:
            following = x + (then - raised) * (slope + (following - denoise(following, then)) / then) / 2
        x = following
    return x


@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_edm_is_the_algorithm_of_the_paper(churn: float) -> None:
    def denoise(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(x / (1 + sigma))

    options = {"S_churn": churn, "S_tmin": 0.05, "S_tmax": 50.0, "S_noise": 1.003}
    scheduler = make_scheduler(EDM, "edm", options)
    drawn = sample(lambda x, t, level, index: denoise(x, level.sigma), scheduler, [3], SHAPE, 18)
    assert len(scheduler.timesteps) == 2 * 18 - 1
    generator = torch.Generator().manual_seed(3)
    start = torch.randn((1, *SHAPE), generator=generator).double() * 80
    torch.testing.assert_close(drawn.double(), heun_of_the_paper(denoise, start, 18, churn, generator), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (EDM, {"S_churn": 40.0}),
        (EDM | {"_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, {}),
        (VE, {}),
        ({"_class_name": "KarrasVeScheduler"}, {}),
        (CM, {}),
    ],
    ids=str,
)
def test_samples_do_not_depend_on_the_batch(config: dict[str, Any], options: dict[str, Any]) -> None:
    name = "edm" if options else None
    together, alone = (
        sample(Gaussian(), make_scheduler(config, name, options), seeds, SHAPE, 20) for seeds in ([5, 6], [6])
    )
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"])
def test_classes_of_diffusers_walk_as_they_do_there(name: str) -> None:
    """A network F behind their preconditioning, against the denoiser that it makes."""
    theirs = getattr(diffusers, name)()
    theirs.set_timesteps(12)
    noise, generators = initial_noise([0], SHAPE)
    x, sigmas = noise * theirs.init_noise_sigma, theirs.sigmas.tolist()
    for t in theirs.timesteps:
        x = theirs.step(torch.sin(theirs.scale_model_input(x, t)), t, x, generator=generators, return_dict=False)[0]

    def denoise(x: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
        sigma, data = level.sigma, 0.5
        output = torch.sin(x / (sigma**2 + data**2) ** 0.5)
        least = 0.002 if name.startswith("CM") else 0.0
        skip = data**2 / ((sigma - least) ** 2 + data**2)
        return skip * x + (sigma - least) * data / (sigma**2 + data**2) ** 0.5 * output

    ours = make_scheduler({"_class_name": name})
    drawn = sample(denoise, ours, [0], SHAPE, 12)
    assert [level.sigma for level in noise_levels(ours)] == pytest.approx(sigmas[:12])
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-4)


def test_cfg_plus_plus_and_intervals_read_sigma() -> None:
    scheduler = make_scheduler(EDM, "euler")
    scheduler.set_timesteps(10)
    levels, after = noise_levels(scheduler), levels_after(scheduler)
    schedule = make_schedule(levels, "0.3:5", None, METHODS["cfg++"], after)
    on = [factor == 1 for factor in schedule.factors]
    assert on == [0.3 < level.sigma <= 5 for level in levels]
    assert after is not None
    first = on.index(True)
    gain = levels[first].sigma / (levels[first].sigma - after[first].sigma)
    assert schedule.weights(first, Weights(2.0)).w == pytest.approx(2 * gain)
    assert levels_after(make_scheduler(EDM, "edm")) is None


@pytest.mark.parametrize(
    ("config", "name", "options", "words"),
    [
        (EDM, "ddim", {}, "is for variance preserving models; this checkpoint is not one. Use edm"),
        (EDM, "DDIMScheduler", {}, "is for variance preserving"),
        (EDM, "CMStochasticIterativeScheduler", {}, "is for consistency models"),
        (CM, "edm", {}, "this checkpoint is not one. Use CMStochasticIterativeScheduler"),
        (CM, "EDMHeunScheduler", {}, "is for models of x_0"),
        ({"_class_name": "DDPMScheduler"}, "EDMEulerScheduler", {}, "is for models of x_0"),
        ({"_class_name": "DDPMScheduler"}, "edm", {}, "is for models of x_0"),
        (EDM, "edm", {"sigma_max": 100.0}, "trained from 0.002 to 80"),
        (EDM, "edm", {"sigma_min": 0.001}, "trained from 0.002"),
        (EDM, "edm", {"S_churn": -1.0}, "0 <= S_churn"),
        (EDM, "edm", {"rho": 0.0}, "0 < rho"),
        (EDM | {"prediction_type": "sample"}, None, {}, "prediction_type 'sample'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(config: dict[str, Any], name: str | None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        make_scheduler(config, name, options)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["sigma_min", "sigma_max", "sigma_data", "rho"])
@pytest.mark.parametrize("value", [0, -1.0, "80", None, float("inf"), float("nan"), True, [1], 1e200, 10**400])
def test_sigmas_that_are_none_are_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        make_scheduler(EDM | {key: value}, "edm")


def test_karras_ve_without_churn_is_refused() -> None:
    """Its images would keep a hundredth of the spread of the data."""
    with pytest.raises(UsageError, match="take more s_churn, or edm"):
        try_out(make_scheduler({"_class_name": "KarrasVeScheduler", "s_churn": 0.0}), 50)
    with pytest.raises(UsageError, match="two steps"):
        try_out(make_scheduler(VE), 1)


def test_names_and_ranges() -> None:
    assert fitting("sigma")[:4] == list(SIGMA_SCHEDULERS)
    assert sigma_range(EDM) == (0.002, 80.0)
    assert sigma_range({"_class_name": "DDPMScheduler"}) is None
    assert noise_schedule(EDM) == noise_schedule(VE) != noise_schedule(CM)
    for name in ("edm", "dpm++", "ScoreSdeVeScheduler"):  # a config that says nothing is as its own class has it
        scheduler = make_scheduler({"_class_name": "KarrasVeScheduler"}, name)
        assert (scheduler.config.sigma_min, scheduler.config.sigma_max) == (0.02, 100.0)
        try_out(scheduler, 30)


VP = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}


def test_the_variance_preserving_sde() -> None:
    """It walks networks with linear betas that predict noise; each input has the noise of its timestep's level."""

    def exact(x: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
        variance = level.alpha**2 * SPREAD**2 + level.sigma**2
        assert float((x.double() - level.alpha * MEAN).std()) == pytest.approx(variance**0.5, rel=0.03)
        x0 = MEAN + level.alpha * SPREAD**2 / variance * (x.double() - level.alpha * MEAN)
        return ((x - level.alpha * x0) / level.sigma).float()

    scheduler = make_scheduler(VP, "ScoreSdeVpScheduler")
    try_out(scheduler, 200)
    drawn = sample(exact, scheduler, SEEDS, SHAPE, 200).double()
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(drawn.std()) / SPREAD == pytest.approx(1, abs=0.02)


def test_the_variance_preserving_sde_steps_as_the_deprecated_class_of_diffusers() -> None:
    from diffusers.schedulers.deprecated import ScoreSdeVpScheduler

    theirs, ours = ScoreSdeVpScheduler(), make_scheduler(VP, "ScoreSdeVpScheduler")
    theirs.set_timesteps(10)
    x, generators = initial_noise([0], SHAPE)
    for t in theirs.timesteps:
        x, mean = theirs.step_pred(torch.sin(x), x, t, generator=generators)
    drawn = sample(lambda x, t, level, index: torch.sin(x), ours, [0], SHAPE, 10)
    torch.testing.assert_close(drawn, mean, rtol=0, atol=1e-3)  # numbers of 10 in ten steps of fp32


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prediction_type": "v_prediction"}, "it reads epsilon here"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "it walks linear betas"),
        ({"trained_betas": torch.linspace(0.0002, 0.015, 1000).tolist()}, "does not take over"),
        ({"rescale_betas_zero_snr": True}, "does not take over"),
        (EDM, "is for variance preserving models"),
    ],
)
def test_networks_that_the_variance_preserving_sde_does_not_walk(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_scheduler(VP | config, "ScoreSdeVpScheduler")
    with pytest.raises(CheckpointError, match="not one of diffusers"):
        make_scheduler({"_class_name": "ScoreSdeVpScheduler"})
