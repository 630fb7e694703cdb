"""The guider of guidegen in modular pipelines of diffusers, against their own guider and against `sample`.

Networks are small, with random weights. Latents are compared within 1e-6 of their largest number, images within 1/255.
"""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, guiders
from modular import FAMILIES, SEED, STEPS, WEIGHTS, Denoiser, Made, close, drawn
from test_guiders import PAIRS

from guidegen.diffusers import Guidance
from guidegen.sampling.loop import sample
from guidegen.sampling.schedulers import levels_after, noise_levels
from guidegen.scores.guided import Guide
from guidegen.scores.methods import METHODS
from guidegen.scores.schedule import make_schedule


def calls_of(made: Made, guider: Any, count: int = 1) -> list[int]:
    """How many samples each call of the network had."""
    calls: list[int] = []
    hook = made.network.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    drawn(made, guider, count)
    hook.remove()
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_guider_of_diffusers(families: Any, name: str) -> None:
    """At each weight, and decoded."""
    made = families(name)
    for w in WEIGHTS:
        ours, theirs = (
            drawn(made, guider, output=["latents", "images"], output_type="pt")
            for guider in (Guidance(w=w), ClassifierFreeGuidance(guidance_scale=w))
        )
        close(ours["latents"], theirs["latents"])
        assert (ours["images"] - theirs["images"]).abs().max() <= 1 / 255
        assert theirs["images"].std() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["cfg", "apg"])
def test_three_weights_in_one_batch_are_three_runs(families: Any, name: str, method: str) -> None:
    made = families(name)
    three = drawn(made, Guidance(w=WEIGHTS, method=method), 3)
    assert (three[0] - three[2]).abs().max() > 0.01
    for i, w in enumerate(WEIGHTS):
        close(three[i : i + 1], drawn(made, Guidance(w=w, method=method)))


_APG = {"eta": 0.2, "adaptive_projected_guidance_rescale": 5.0, "use_original_formulation": True}
_OURS_APG = {"eta": 0.2, "norm_threshold": 5.0, "space": "native"}
OTHER_PAIRS = {
    "apg with momentum": (
        "apg",
        _OURS_APG,
        "AdaptiveProjectedGuidance",
        lambda w: {**_APG, "guidance_scale": w - 1, "adaptive_projected_guidance_momentum": -0.5},
    ),
    "apg-mix": (
        "apg-mix",
        {**_OURS_APG, "start": 1},
        "AdaptiveProjectedMixGuidance",
        lambda w: {
            **_APG,
            "guidance_scale": 0.28 * (w - 1),
            "adaptive_projected_guidance_scale": w - 1,
            "adaptive_projected_guidance_start_step": 1,
        },
    ),
    "tangential": ("tangential", {}, "TangentialClassifierFreeGuidance", lambda w: {"guidance_scale": w}),
    "frequency": (
        "frequency",
        {"low": 0.4},
        "FrequencyDecoupledGuidance",
        lambda w: {"guidance_scales": [w, 0.4 * w + 0.6]},
    ),
}


@pytest.mark.parametrize("pair", {**PAIRS, **OTHER_PAIRS})
def test_the_guiders_of_diffusers_in_the_same_pipeline(families: Any, pair: str) -> None:
    """Those that have a method here; the others change the network (layers, attention) or are of one model (LTX-2)."""
    method, options, theirs, settings = {**PAIRS, **OTHER_PAIRS}[pair]
    if method == "frequency":
        pytest.importorskip("kornia")
    made = families("FLUX.2-klein" if method == "magnitude" else "SD3")  # theirs refuses (B, C, H, W)
    expected = drawn(made, getattr(guiders, theirs)(**({"start": 0.0, "stop": 1.0} | settings(4.0))))
    close(drawn(made, Guidance(w=4.0, method=method, options=options)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_those_of_sample(families: Any, method: str) -> None:
    """With an interval and a schedule, on the same network and scheduler; on SDXL in `test_modular_networks`."""
    made, weights = families("SD3"), [0.4, 3.0]
    settings = {"interval": "0.2:inf", "w_schedule": "linear"}
    guider = drawn(made, Guidance(w=weights, method=method, **settings), 2)
    scheduler = made.pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    after = levels_after(scheduler) if METHODS[method].gain else None
    schedule = make_schedule(noise_levels(scheduler), *settings.values(), METHODS[method], after)
    guide = Guide(Denoiser(made), [0, 0], weights, method=METHODS[method], schedule=schedule.weights, steps=STEPS)
    close(guider, sample(guide, scheduler, [SEED, SEED], guider.shape[1:], STEPS))


@pytest.mark.parametrize(
    ("name", "w", "each"),
    [
        ("SDXL", [0.0, 0.0], 1),
        ("SDXL", [1.0, 1.0], 1),
        ("SDXL", [0.0, 1.0], 2),
        ("SD3", 0.0, 1),
        ("Qwen-Image", 1.0, 1),
        ("Qwen-Image", 0.0, 2),  # its pipeline renormalises to the conditional prediction
    ],
)
def test_calls_of_zero_weight_are_skipped(families: Any, name: str, w: Any, each: int) -> None:
    assert calls_of(families(name), Guidance(w=w), 2) == [2] * (each * STEPS)


def test_an_interval_saves_calls(families: Any) -> None:
    assert len(calls_of(families("SD3"), Guidance(w=4.0, interval="0%:50%"))) == STEPS + STEPS // 2


def test_every_evaluation_of_a_second_order_scheduler_is_guided(families: Any) -> None:
    """diffusers' own guider counts evaluations, is told the number of steps, and goes off after that many."""
    made = families("SDXL")
    scheduler = made.pipeline.scheduler
    made.pipeline.update_components(scheduler=HeunDiscreteScheduler.from_config(scheduler.config))
    assert len(calls_of(made, Guidance(w=4.0))) == 2 * (2 * STEPS - 1)
    assert len(calls_of(made, ClassifierFreeGuidance(guidance_scale=4.0))) == 2 * STEPS + STEPS - 1
    theirs = ClassifierFreeGuidance(guidance_scale=4.0)  # its second run would fail, off by the state of the first
    close(drawn(made, Guidance(w=4.0, interval=f"0%:{100 * STEPS / (2 * STEPS - 1) + 1:g}%")), drawn(made, theirs))
    made.pipeline.update_components(scheduler=scheduler)


def test_a_disabled_guider_is_the_conditional_model(families: Any) -> None:
    made, guider = families("SD3"), Guidance(w=3.0)
    guider.disable()
    assert torch.equal(drawn(made, guider), drawn(made, Guidance(w=1.0)))


def test_embedded_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="guidance distilled"):
        _ = Guidance(w=3.0).guidance_scale


def test_each_run_begins_anew(families: Any) -> None:
    made, guider = families("SD3"), Guidance(w=4.0, method="apg")
    assert torch.equal(drawn(made, guider), drawn(made, guider))
    assert not made.network._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "settings", "others", "message"),
    [
        ("SDXL", {"w": [1, 2]}, {}, "w has 2 weights and the batch 1 samples"),
        ("SD3", {"w": 2}, {"negative_prompt_embeds": None}, "negative_prompt"),
        ("Qwen-Image", {"w": 2, "method": "cfg-zero"}, {}, "zero_init"),
        ("SD3", {"w": 2, "interval": "7:9"}, {}, "holds none of the 4 steps"),
    ],
)
def test_refused(families: Any, name: str, settings: Any, others: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(families(name), Guidance(**settings), **others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w": "3"}, "w takes numbers"),
        ({"w": []}, "w is empty"),
        ({"w": math.nan}, "w takes finite numbers"),
        ({"w": 3, "method": "ap"}, "method ap: no such method. Did you mean apg"),
        ({"w": 3, "method": "some.py:f"}, "a file would be run"),
        ({"w": 3, "method": "apg", "options": {"a": 1}}, "options a=1: apg has no such option"),
        ({"w": 3, "interval": "3"}, "^interval 3: give"),
        ({"w": 3, "w_schedule": "up"}, "^w_schedule up: no such"),
    ],
)
def test_arguments_are_refused_at_once(settings: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Guidance(**settings)


def test_saved_and_loaded(families: Any, tmp_path: Path) -> None:
    made = families("SD3")
    guider = Guidance(w=torch.tensor([1.0, 3.0]), method="apg", options={"eta": 0.5}, interval="0%:75%")
    guider.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["w"] == [1, 3]
    expected = drawn(made, guider, 2)
    assert torch.equal(drawn(made, Guidance.from_pretrained(tmp_path), 2), expected)
    assert torch.equal(drawn(made, guider.new(), 2), expected)
    assert guider.new(w=2.0).config.w == 2
    assert pickle.loads(pickle.dumps(Guidance(w=2.0))).config.w == 2


def test_without_a_pipeline_methods_that_read_the_noise_level_are_refused() -> None:
    """As in custom blocks; the plain method goes on, and a scheduler can be set."""
    u, c, scheduler = torch.zeros(1, 4, 4), torch.ones(1, 4, 4), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    for method, known in (("cfg", False), ("apg", False), ("cfg++", False), ("cfg++", True)):
        guider = Guidance(w=2.0, method=method)
        guider.scheduler = scheduler if known else None
        if method == "cfg" or known:
            guider.set_state(0, STEPS, scheduler.timesteps[0])
            assert guider.forward(c, u).pred.mean() == 2  # also of cfg++, from pure noise
        else:
            with pytest.raises(ValueError, match="set the guider's scheduler"):  # noqa: PT012
                guider.set_state(0, STEPS, scheduler.timesteps[0])
                guider.forward(c, u)


def test_formulas_are_in_fp32_and_rounded_once() -> None:
    u, c = (torch.randn((2, 4, 8), generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    pred = Guidance(w=[3.0, 7.0]).forward(c, u).pred
    w = torch.tensor([3.0, 7.0]).view(2, 1, 1)
    assert torch.equal(pred, (u.float() + w * (c.float() - u.float())).bfloat16())


def test_a_network_that_fails_keeps_no_hook(families: Any) -> None:
    made = families("SD3")
    with pytest.raises(Exception):  # noqa: B017, PT011
        drawn(made, Guidance(w=4.0, method="apg"), negative_prompt_embeds=torch.zeros(1, 5, 3))
    assert not made.network._forward_pre_hooks


def test_levels_of_a_run_that_begins_later() -> None:
    """As image-to-image does: the timesteps are the last of the scheduler's."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    guider = Guidance(w=2.0, interval="0.2:inf")
    guider.scheduler = scheduler
    guider.set_state(0, 2, scheduler.timesteps[2])
    assert [level.sigma for level in guider._noise.levels] == scheduler.sigmas[2:STEPS].double().tolist()
