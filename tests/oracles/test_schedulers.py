"""Every scheduler class of the installed diffusers against Gaussian data, whose exact score is known.

p(x_0) = N(m, s^2), so x_t = alpha x_0 + sigma eps is N(alpha m, alpha^2 s^2 + sigma^2) and E[x_0 | x_t] is linear.
With s = 0 a solver has nothing to approximate: (x_t - alpha m) / sigma is the noise that the image started from at
every step if, and only if, alpha and sigma are those of the network's input.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.utils import is_scipy_available
from torch import Tensor

from guidegen.errors import CheckpointError, GuidegenError, UsageError
from guidegen.models.noise_schedule import Convention, convention_of, noise_schedule
from guidegen.sampling.loop import initial_noise, sample, try_out
from guidegen.sampling.schedulers import (
    SCHEDULERS,
    fitting,
    levels_after,
    make_scheduler,
    noise_levels,
    scheduler_class,
)
from guidegen.scores.interfaces import Weights
from guidegen.scores.methods import METHODS
from guidegen.scores.noise import Level, PredictionType, from_x0
from guidegen.scores.schedule import make_schedule

CLASSES = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
VP = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
SHAPE = (1, 64, 64)
SEEDS = [0, 1, 2, 3]
"""16,384 numbers: a standard error of 0.8 % for a mean and 0.6 % for a standard deviation."""


def convention(flow: bool) -> Convention:
    return "flow" if flow else "vp"


def classes_that_fit(flow: bool) -> list[str]:
    """Those of diffusers; the one that is guidegen's is held to the same in test_sigma_schedulers."""
    classes = [scheduler_class(name, convention(flow)) for name in fitting(convention(flow))]
    return [name for name in classes if hasattr(diffusers, name)]


class Exact:
    """The exact network of N(m, s^2), which keeps what noise it is shown, in units of what the level says."""

    def __init__(self, kind: PredictionType, mean: float, spread: float):
        self.kind, self.mean, self.spread = kind, mean, spread
        self.noise: list[Tensor] = []
        self.levels: list[Level] = []

    def __call__(self, x_t: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
        alpha, sigma = level
        x, variance = x_t.double(), alpha**2 * self.spread**2 + sigma**2
        if not self.spread:
            self.noise.append((x - alpha * self.mean) / variance**0.5)
            self.levels.append(level)
        x0 = self.mean + alpha * self.spread**2 / variance * (x - alpha * self.mean)
        return from_x0(x0, x, level, self.kind).float()


class Case(NamedTuple):
    """A scheduler of a class with some options on top of `VP` or `FLOW`."""

    cls: str
    flow: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}"[:40] for key, value in self.options)
        return f"{self.cls.removesuffix('Scheduler')}-{'flow' if self.flow else 'vp'}-{options or 'plain'}"

    @property
    def config(self) -> dict[str, Any]:
        return {**(FLOW if self.flow else VP), **dict(self.options)}

    @property
    def kind(self) -> PredictionType:
        return "flow" if self.flow else dict(self.options).get("prediction_type", "epsilon")

    def scheduler(self) -> Any:
        return make_scheduler(self.config, self.cls)

    def walk(self, mean: float, spread: float, steps: int) -> tuple[Exact, Tensor]:
        exact = Exact(self.kind, mean, spread)
        return exact, sample(exact, self.scheduler(), SEEDS, SHAPE, steps)


def options_of(cls: str, flow: bool) -> Iterator[dict[str, Any]]:
    """What a config may ask of a class, one thing at a time."""
    taken = inspect.signature(getattr(diffusers, cls).__init__).parameters
    yield {}
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "skip_prk_steps"):
        if key in taken and (key != "use_beta_sigmas" or is_scipy_available()):
            yield {key: True}
    if flow:
        yield {"shift": 3.0}
        return
    for spacing in ("leading", "trailing", "linspace") if "timestep_spacing" in taken else ():
        yield {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    if "rescale_betas_zero_snr" in taken:
        yield {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    if "algorithm_type" in taken and "DPMSolver" in cls:
        yield {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
        yield {"algorithm_type": "sde-dpmsolver++"}
    yield from ({"solver_order": order} for order in (1, 3) if "solver_order" in taken)
    yield from ({"set_alpha_to_one": each} for each in (False, True) if "set_alpha_to_one" in taken)
    yield from ({"final_sigmas_type": "sigma_min"} for _ in "x" if "final_sigmas_type" in taken)
    yield from ({"prediction_type": kind} for kind in ("sample", "v_prediction"))
    yield {"beta_schedule": "squaredcos_cap_v2"}
    if cls in SCHEDULERS.values():
        yield {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        yield {"trained_betas": torch.linspace(0.0002, 0.015, 1000).tolist()}


def cases() -> Iterator[Case]:
    for flow in (False, True):
        for cls in classes_that_fit(flow):
            if cls == "LMSDiscreteScheduler" and not is_scipy_available():
                continue
            yield from (Case(cls, flow, tuple(options.items())) for options in options_of(cls, flow))


def served(case: Case) -> bool:
    """Whether guidegen draws this; where it does not, the error says so before weights are read."""
    try:
        try_out(case.scheduler(), 20)
    except UsageError:
        return False
    return True


REFUSED = {
    ("EulerAncestralDiscrete", "prediction_type=sample"),
    ("KDPM2Discrete", "prediction_type=sample"),
    ("KDPM2AncestralDiscrete", "prediction_type=sample"),
    ("PNDM", "prediction_type=sample"),
    # it averages the v of several steps, and reads the mean at the last of them
    ("PNDM", "prediction_type=v_prediction"),
    # 8 % off at 500 steps: its integrals cancel in fp32
    ("DEISMultistep", "solver_order=3"),
    # of a flow: diffusers computes their sigmas as of a variance preserving schedule
    ("DPMSolverMultistep", "use_karras_sigmas=True"),
    ("DPMSolverMultistep", "use_exponential_sigmas=True"),
    ("DPMSolverMultistep", "use_lu_lambdas=True"),
    ("DPMSolverSinglestep", "use_karras_sigmas=True"),
    ("DPMSolverSinglestep", "use_exponential_sigmas=True"),
    ("UniPCMultistep", "use_exponential_sigmas=True"),
    ("DPMSolverMultistep", "use_beta_sigmas=True"),
    ("DPMSolverSinglestep", "use_beta_sigmas=True"),
    ("UniPCMultistep", "use_beta_sigmas=True"),
}
"""What of a class that fits does not, and why; all of it with exit code 2."""


def level_fault(case: Case) -> str | None:
    """How the input's noise differs from what its level says; None where it does not."""
    exact, drawn = case.walk(mean=5.0, spread=0.0, steps=20)
    first, start = exact.levels[0], exact.noise[0]
    ratios = [level.sigma / level.alpha if level.alpha else 1e4 for level in exact.levels]
    # fp32 rounding of an x that was as large as the first sigma / alpha
    kept = all((z - start).abs().max() <= 2e-3 + 1e-6 * ratios[0] / r for z, r in zip(exact.noise, ratios, strict=True))
    # what the start lacks of the image's mean, which every sampler has; and 5 standard errors
    lacks = first.alpha * 5.0 / first.sigma + 0.04
    fresh = all(abs(z.mean()) <= lacks and abs(z.std() - 1) <= 0.03 for z in exact.noise)
    if not (kept or fresh):
        worst = max(
            range(len(ratios)), key=lambda i: abs(math.log(exact.noise[i].std() + 1e-9)) + abs(exact.noise[i].mean())
        )
        z = exact.noise[worst]
        return f"step {worst}: noise of mean {z.mean():.3g} and standard deviation {z.std():.3g}"
    kept_least = getattr(case.scheduler(), "alphas_cumprod", None)
    least = 1e-3 if case.flow or kept_least is None else math.sqrt(1 / float(kept_least[0]) - 1)
    left = float((drawn - 5.0).square().mean().sqrt())
    return None if left <= 1.5 * least else f"ends with noise of {left:.3g}, and the schedule's least is {least:.3g}"


def convergence_fault(case: Case) -> str | None:
    """How far mean and standard deviation of the images are from those of the data, if that does not shrink."""
    errors = []
    many = 500 if "use_beta_sigmas" in dict(case.options) else 200  # most of its steps are at either end
    for steps in (20, many):
        drawn = case.walk(mean=0.5, spread=0.4, steps=steps)[1].double()
        errors.append((abs(float(drawn.mean()) - 0.5), abs(float(drawn.std()) / 0.4 - 1)))
    (_, before), (mean, spread) = errors
    # 3 standard errors of both; first-order solvers go with 1 / steps, and ten times the steps should help threefold
    good = mean <= 0.015 and spread <= max(0.025, min(before / 3, 0.12))
    return (
        None
        if good
        else f"mean off by {mean:.3g}, standard deviation by {spread:.1%} (at a tenth of the steps {before:.1%})"
    )


def strides_apart(case: Case) -> bool:
    """Where DDIM's and PNDM's fixed stride does not meet the next timestep, in diffusers too."""
    return case.cls in ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler") and (
        dict(case.options).get("timestep_spacing") == "linspace"
    )


@pytest.mark.parametrize("case", cases(), ids=str)
def test_levels_are_those_of_the_input_and_samples_converge(case: Case) -> None:
    if not served(case):
        short = case.cls.removesuffix("Scheduler")
        known = any((short, f"{key}={value}") in REFUSED for key, value in case.options)
        assert known, "refused, and not known to be"
        assert case.flow or "sigmas" not in str(case), "refused as if it were a flow"
        return
    if not strides_apart(case):
        assert level_fault(case) is None
    assert convergence_fault(case) is None


@pytest.mark.parametrize("flow", [False, True], ids=["vp", "flow"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_other_class_is_refused_and_would_fail(name: str, flow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed classes are above. The rest say no before anything is read, and do not fit by any reading of their levels."""
    from guidegen.sampling import schedulers

    if name in classes_that_fit(flow):
        return
    with pytest.raises(UsageError, match=r"Use ddim|Use dpm") as refusal:
        make_scheduler(FLOW if flow else VP, name)
    assert all(word in str(refusal.value) for word in fitting(convention(flow)))
    assert refusal.value.code == 2
    for levels in (schedulers._by_timestep, schedulers._sigmas):
        monkeypatch.setitem(schedulers._WALKS, name, schedulers._Walk(levels, conventions=("vp", "flow")))
        case = Case(name, flow)
        try:
            fault = level_fault(case) or convergence_fault(case)
        except Exception as error:
            fault = repr(error)
        assert fault is not None, "it fits, and is not listed"


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_of_a_class_that_does_not_fit_is_refused(name: str) -> None:
    flow = name.startswith("FlowMatch")
    if name in classes_that_fit(flow) or convention_of({"_class_name": name}) in ("sigma", "consistency"):
        return
    with pytest.raises(UsageError, match="does not fit"):
        make_scheduler({"_class_name": name})


def test_classes_of_no_diffusers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no such scheduler\. Use ddim, ddpm"):
        make_scheduler(VP, "TomorrowScheduler")
    for name in (None, "ddim"):
        with pytest.raises(CheckpointError, match="TomorrowScheduler"):
            make_scheduler({"_class_name": "TomorrowScheduler"}, name)
    for bad in (["DDIMScheduler"], 3, "UNet2DModel"):
        with pytest.raises(CheckpointError, match="not one of diffusers"):
            make_scheduler({"_class_name": bad})


# --- the checkpoint's own noise schedule

OTHERS = ("LCMScheduler", "TCDScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")


@pytest.mark.parametrize("own", [*classes_that_fit(flow=False), *OTHERS])
def test_what_a_config_does_not_say_is_as_its_own_class_has_it(own: str) -> None:
    if own == "LMSDiscreteScheduler" and not is_scipy_available():
        pytest.skip("needs scipy")
    theirs = getattr(diffusers, own)()
    assert theirs.config.prediction_type == "epsilon"  # what Checkpoint.prediction_type takes where nothing is said
    for name in SCHEDULERS:
        for config in ({"_class_name": own}, {"_class_name": own, **theirs.config}):
            scheduler = make_scheduler(config, name)
            assert torch.equal(scheduler.alphas_cumprod, theirs.alphas_cumprod)
            for key in ("clip_sample", "thresholding", "prediction_type"):
                if key in scheduler.config and key in theirs.config:
                    assert scheduler.config[key] == theirs.config[key], (name, key)


def test_a_config_without_a_class_is_of_ddpm() -> None:
    theirs = diffusers.DDPMScheduler()
    for name in (None, *SCHEDULERS):
        assert torch.equal(make_scheduler({}, name).alphas_cumprod, theirs.alphas_cumprod)
    assert isinstance(make_scheduler({}), diffusers.DDPMScheduler)


def test_noise_schedules_are_compared_as_their_classes_complete_them() -> None:
    """DDPM's betas and Heun's are not the same where neither config says any."""
    ddpm, heun = (noise_schedule({"_class_name": name}) for name in ("DDPMScheduler", "HeunDiscreteScheduler"))
    assert (ddpm["beta_start"], heun["beta_start"]) == (0.0001, 0.00085)
    assert noise_schedule({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": False}) == ddpm == noise_schedule({})
    solver = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    assert noise_schedule(solver) == noise_schedule(FLOW)


def complete(cls: Any) -> dict[str, Any]:
    """A config of a class in which everything is said."""
    defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    said = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    said |= {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}
    given = defaults | {key: value for key, value in said.items() if key in defaults}
    return {"_class_name": cls.__name__, **cls(**given).config}


@pytest.mark.parametrize("own", SCHEDULERS.values())
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_complete_config_is_taken_over_as_diffusers_does(own: str, name: str) -> None:
    config = complete(getattr(diffusers, own))
    theirs = getattr(diffusers, SCHEDULERS[name]).from_config(config)
    mine = make_scheduler(config, name)
    assert {k: v for k, v in mine.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_" and k in inspect.signature(type(theirs).__init__).parameters
    }


@pytest.mark.parametrize("own", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_shifts_go_with_the_checkpoint(own: str) -> None:
    """Both ways: FlowMatch classes say shift, the solvers flow_shift."""
    solver = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    euler = make_scheduler({**solver, "flow_shift": 3.0}, "euler")
    assert (type(euler).__name__, euler.config.shift) == ("FlowMatchEulerDiscreteScheduler", 3.0)
    for name in ("dpm++", "unipc"):
        scheduler = make_scheduler({"_class_name": own, "shift": 3.0}, name)
        assert (scheduler.config.flow_shift, scheduler.config.use_flow_sigmas) == (3.0, True)
        assert make_scheduler({"_class_name": own}, name).config.flow_shift == getattr(diffusers, own)().config.shift


@pytest.mark.parametrize(
    ("config", "name", "word"),
    [
        ({**VP, "prediction_type": "noise"}, None, "prediction_type 'noise'"),
        ({**VP, "prediction_type": None}, None, "prediction_type None"),
        ({**VP, "prediction_type": "sample"}, "PNDMScheduler", "it reads epsilon here"),
        ({**VP, "rescale_betas_zero_snr": True}, "heun", "rescale_betas_zero_snr True"),
        ({**VP, "_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "ddim", "sigmoid"),
        ({**VP, "timestep_type": "continuous", "_class_name": "EulerDiscreteScheduler"}, None, "timestep_type"),
        ({**VP, "interpolation_type": "log_linear"}, "euler", "interpolation_type"),
        ({**VP, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, "dpm++", "algorithm_type"),
        ({**VP, "algorithm_type": "dpmsolver"}, "dpm++", "final_sigmas_type"),
        ({**FLOW, "stochastic_sampling": True}, None, "stochastic_sampling"),
        ({**FLOW, "invert_sigmas": True}, "heun", "invert_sigmas"),
        ({**FLOW, "use_dynamic_shifting": True}, None, "use_dynamic_shifting"),
        ({**FLOW, "use_dynamic_shifting": True}, "heun", "use_dynamic_shifting"),
        ({**FLOW, "shift_terminal": 0.1}, None, "shift_terminal"),
        (FLOW, "ddim", "cannot walk a flow-matching model"),
        (FLOW, "DEISMultistepScheduler", "cannot walk a flow-matching model"),
        (VP, "FlowMatchEulerDiscreteScheduler", "is for flow-matching models"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, None, "prediction_type 'epsilon'"),
    ],
)
def test_options_that_do_not_fit_are_refused(config: dict[str, Any], name: str | None, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        make_scheduler(config, name)


@pytest.mark.parametrize(
    ("config", "name", "steps", "word"),
    [
        ({**VP, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "ddim", 20, "starts from pure noise"),
        ({**VP, "sigma_max": 800.0, "use_karras_sigmas": True}, "euler", 20, "which is not that of its training"),
        ({**FLOW, "use_karras_sigmas": True}, "dpm++", 20, "which is not that of its training"),
        ({**VP, "timestep_spacing": "leading", "steps_offset": 1}, "ddim", 1000, "refuses"),
        (VP, "ddpm", 1001, "more than the 1000 timesteps"),
        (VP, "dpm++", 1001, "more than the 1000 timesteps"),
    ],
)
def test_steps_that_do_not_fit_are_refused(config: dict[str, Any], name: str, steps: int, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        try_out(make_scheduler(config, name), steps)


@pytest.mark.parametrize(
    "config",
    [
        {**VP, "beta_start": "small"},
        {**VP, "beta_schedule": "unheard of"},
        {**VP, "beta_start": -0.1, "beta_end": -0.2},
        {**VP, "trained_betas": [0.1, math.nan, 0.2], "num_train_timesteps": 3},
        {**VP, "num_train_timesteps": 0},
        {**VP, "trained_betas": [0.1, 0.2]},
        {**VP, "trained_betas": 0.5},
    ],
)
def test_configs_that_make_no_schedule_are_the_checkpoints_fault(config: dict[str, Any]) -> None:
    for name in (None, "euler"):
        with pytest.raises(CheckpointError, match="scheduler config"):
            make_scheduler(config, name)


# --- an image depends on its seed alone

NOISY = {
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "sde-dpmsolver++"},
}


@pytest.mark.parametrize("flow", [False, True], ids=["vp", "flow"])
@pytest.mark.parametrize("name", sorted({*classes_that_fit(flow=False), *classes_that_fit(flow=True)}))
@pytest.mark.parametrize("steps", [1, 2, 3, 11])
def test_a_seed_draws_the_same_alone_and_beside_others(name: str, flow: bool, steps: int) -> None:
    """In a batch, in another place, and after the scheduler has drawn something else."""
    if name not in classes_that_fit(flow):
        return
    if name == "LMSDiscreteScheduler" and not is_scipy_available():
        pytest.skip("needs scipy")
    eta = 1.0 if name.startswith("DDIM") else None
    for options in ({}, NOISY.get(name, {})):
        scheduler = make_scheduler({**(FLOW if flow else VP), **options}, name)
        try:
            try_out(scheduler, steps, eta)
        except UsageError:
            assert steps < 4
            assert name in ("PNDMScheduler", "KDPM2AncestralDiscreteScheduler")
            return

        def draw(*seeds: int, scheduler: Any = scheduler) -> Tensor:
            network = Exact("flow" if flow else "epsilon", 0.5, 0.4)
            return sample(network, scheduler, seeds, (2, 4, 4), steps, eta)

        alone, among, again = draw(7), draw(3, 7, 11), draw(7)
        # elementwise fp32, in vectors of other lengths
        torch.testing.assert_close(alone[0], among[1], rtol=0, atol=1e-6)
        assert torch.equal(alone, again)
        assert steps < 11 or not torch.allclose(among[0], among[1], atol=1e-2)


# --- cfg++


class Pair:
    """Exact predictions without a label, N(0, 0.5^2), and with one, N(0.7, 0.2^2)."""

    def __init__(self, kind: PredictionType):
        self.null, self.label = Exact(kind, 0.0, 0.5), Exact(kind, 0.7, 0.2)

    def __call__(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return self.null(x, torch.tensor(0), level, 0).double(), self.label(x, torch.tensor(0), level, 0).double()


def guided(scheduler: Any, pair: Pair, weight: float) -> Callable[..., Tensor]:
    schedule = make_schedule(noise_levels(scheduler), None, None, METHODS["cfg++"], levels_after(scheduler))

    def guide(x: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
        u, c = pair(x, level)
        return u + schedule.weights(index, Weights(weight)).w * (c - u)

    return guide


def algorithm_2(pair: Pair, levels: list[tuple[Level, Level]], weight: float) -> Tensor:
    """CFG++ (arXiv 2406.08070, algorithm 2): x0 from the guided noise, then the unguided noise back."""
    x = initial_noise(SEEDS, (1, 8, 8))[0].double()
    for now, then in levels:
        u, c = (now_to_noise(prediction, x, now) for prediction in pair(x, now))
        x0 = (x - now.sigma * (u + weight * (c - u))) / now.alpha
        x = then.alpha * x0 + then.sigma * u
    return x


def now_to_noise(prediction: Tensor, x: Tensor, level: Level) -> Tensor:
    return level.alpha * prediction + level.sigma * x  # of v = alpha eps - sigma x0


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 30])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_cfg_plus_plus_on_the_alphas_of_stable_diffusion(spacing: str, to_one: bool, steps: int, weight: float) -> None:
    """Its own DDIM config; the loop takes its alphas from the betas, and its stride from the DDIM paper's code."""
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": to_one,
        "steps_offset": 1,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "timestep_spacing": spacing,
    }
    scheduler = make_scheduler(config, "ddim")
    scheduler.set_timesteps(steps)
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).tolist()

    def level(t: int) -> Level:
        alpha_bar = kept[t] if t >= 0 else 1.0 if to_one else kept[0]
        return Level(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    levels = [(level(t), level(t - 1000 // steps)) for t in scheduler.timesteps.tolist()]
    pair = Pair("v_prediction")
    if levels[-1][0] == levels[-1][1]:  # linspace ends at t = 0, where this config goes nowhere
        with pytest.raises(UsageError, match="takes no noise away"):
            guided(scheduler, pair, weight)
        return
    drawn = sample(guided(scheduler, pair, weight), scheduler, SEEDS, (1, 8, 8), steps)
    # diffusers' alphas are fp32 sums of logs over 1000 steps: 1e-5 of them, times gains of up to 30 at the small steps
    torch.testing.assert_close(drawn.double(), algorithm_2(pair, levels, weight), rtol=0, atol=5e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("last", ["zero", "sigma_min"])
def test_cfg_plus_plus_with_euler(spacing: str, last: str) -> None:
    config = {**VP, "prediction_type": "v_prediction", "timestep_spacing": spacing, "final_sigmas_type": last}
    scheduler = make_scheduler({**config, "steps_offset": 1}, "euler")
    scheduler.set_timesteps(20)
    pair = Pair("v_prediction")
    ratios = scheduler.sigmas.double().tolist()
    if ratios[-1] == ratios[-2]:
        with pytest.raises(UsageError, match="takes no noise away"):
            guided(scheduler, pair, 0.4)
        return
    drawn = sample(guided(scheduler, pair, 0.4), scheduler, SEEDS, (1, 8, 8), 20).double()
    x = initial_noise(SEEDS, (1, 8, 8))[0].double() * float(scheduler.init_noise_sigma)  # x_t / alpha, as Euler has it
    for now, then in pairwise(ratios):
        level = Level((1 + now * now) ** -0.5, now * (1 + now * now) ** -0.5)
        u, c = (now_to_noise(prediction, level.alpha * x, level) for prediction in pair(level.alpha * x, level))
        x = x - now * (u + 0.4 * (c - u)) + then * u
    torch.testing.assert_close(drawn, x, rtol=0, atol=2e-4)  # fp32 of an x of up to 160


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_leads_where_levels_after_says(spacing: str, to_one: bool) -> None:
    """On one point of data the next input is at that level to fp32's rounding, whatever the spacing."""
    scheduler = make_scheduler({**VP, "timestep_spacing": spacing, "set_alpha_to_one": to_one}, "ddim")
    inputs: list[Tensor] = []

    def exact(x: Tensor, t: Tensor, level: Level, index: int) -> Tensor:
        inputs.append(x.double())
        return ((x.double() - level.alpha * 2.0) / level.sigma).float()

    drawn = sample(exact, scheduler, [0], (1, 8, 8), 30)
    levels, after = noise_levels(scheduler), levels_after(scheduler)
    assert after is not None
    for x, now, then, following in zip(inputs, levels, after, [*inputs[1:], drawn.double()], strict=True):
        noise = (x - now.alpha * 2.0) / now.sigma
        torch.testing.assert_close(following, then.alpha * 2.0 + then.sigma * noise, rtol=0, atol=1e-4)


# --- the command line


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "real"])
@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--scheduler", "CogVideoXDPMScheduler"], "does not fit"),
        (["--scheduler", "LCMScheduler"], "does not fit"),
        (["--scheduler", "DDIMInverseScheduler"], "does not fit"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "is for flow-matching models"),
        (["--scheduler", "heun", "--guidance", "cfg++"], "this is HeunDiscreteScheduler"),
        (["--scheduler", "dpm++", "--guidance", "cfg++"], "this is DPMSolverMultistepScheduler"),
        (["--scheduler", "EulerAncestralDiscreteScheduler", "--guidance", "cfg++"], "exact only for"),
        (["--scheduler", "ddim", "--eta", "0.5", "--guidance", "cfg++"], "this is --eta 0.5"),
    ],
)
def test_the_command_refuses_before_it_reads_weights(
    with_null: Any, tmp_path: Any, flags: list[str], word: str, dry: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from guidegen.models import loading

    monkeypatch.setattr(loading, "load_network", lambda *_, **__: pytest.fail("weights were read"))
    message = refused(["sample", "-m", with_null, "--label", "1", "-o", tmp_path / "x", *flags, *dry])
    assert word in message
    assert not (tmp_path / "x").exists()


def test_a_sweep_over_schedulers_refuses_cfg_plus_plus_where_it_is_not_exact(with_null: Any, tmp_path: Any) -> None:
    by = ["--by", "guidance=cfg@3,cfg++@0.6", "--by", "scheduler=ddim,heun"]
    message = refused(["sweep", "-m", with_null, "--label", "1", "-o", tmp_path / "x", *by, "--dry-run"])
    assert "this is HeunDiscreteScheduler" in message


def refused(args: list[Any]) -> str:
    from conftest import call

    return str(call(*args, code=2).exception)


def test_errors_are_for_people() -> None:
    for config, name in ((VP, "LCMScheduler"), (FLOW, "ddim"), ({"_class_name": "UnCLIPScheduler"}, None)):
        with pytest.raises(GuidegenError) as refusal:
            make_scheduler(config, name)
        assert "\n" not in str(refusal.value)
