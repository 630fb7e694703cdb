"""The guider of guidegen in modular pipelines of diffusers, against their own guider and against `sample`.

Networks are small, with random weights. Latents are compared within 1e-6 of their largest number, images within 1/255.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, guiders
from pipelines import stable_diffusion_xl, tiny_vae
from test_guiders import PAIRS
from torch import Tensor

from guidegen.diffusers import Guidance
from guidegen.sampling.loop import sample
from guidegen.sampling.schedulers import levels_after, noise_levels
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import NULL
from guidegen.scores.methods import METHODS
from guidegen.scores.schedule import make_schedule

STEPS, SEED = 4, 7
WEIGHTS = [0.0, 1.0, 4.0]


class Made(NamedTuple):
    """A modular pipeline, what it is called with, its denoiser, and what its text encoders give, where it has them."""

    pipeline: Any
    given: dict[str, Any]
    network: Any
    texts: dict[str, Any] | None = None


def embeddings(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


class Denoiser:
    """The network of a pipeline as `sample` calls it: label 0 is the prompt."""

    def __init__(self, made: Made, scheduler: Any):
        self.network, self.prediction_type = made.network, "flow" if made.texts is None else "epsilon"
        self.texts = made.texts or made.given

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        def read(name: str) -> Tensor:
            return torch.cat([self.texts[f"negative_{name}" if label == NULL else name] for label in labels.tolist()])

        texts, pooled = read("prompt_embeds"), read("pooled_prompt_embeds")
        if self.prediction_type == "flow":
            return self.network(x_t, texts, pooled, t.expand(len(x_t)), return_dict=False)[0]
        added = {"text_embeds": pooled, "time_ids": read("add_time_ids")}
        return self.network(x_t, t, texts, added_cond_kwargs=added, return_dict=False)[0]


def lively(network: Any) -> Any:
    """What training starts from at zero is not left there."""
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                weight.normal_(std=0.3)
    return network.eval()


def without_encoders(blocks: Any, *kept: str) -> Any:
    """A modular pipeline of the blocks of those names alone."""
    for name in set(blocks.sub_blocks) - set(kept):
        blocks.sub_blocks.pop(name)
    return blocks.init_pipeline()


def sd3(folder: Path) -> Made:
    from diffusers import SD3Transformer2DModel
    from diffusers.modular_pipelines import StableDiffusion3AutoBlocks

    torch.manual_seed(0)
    transformer = lively(
        SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=16,
            pooled_projection_dim=8,
        )
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.06)
    pipeline = without_encoders(StableDiffusion3AutoBlocks(), "denoise", "decode")
    pipeline.update_components(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    texts = {
        "prompt_embeds": embeddings(5, 16, seed=1),
        "negative_prompt_embeds": embeddings(5, 16, seed=2),
        "pooled_prompt_embeds": embeddings(8, seed=3),
        "negative_pooled_prompt_embeds": embeddings(8, seed=4),
    }
    return Made(pipeline, {**texts, "height": 16, "width": 16}, transformer)


def sdxl(folder: Path) -> Made:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    parts = StableDiffusionXLPipeline.from_pretrained(stable_diffusion_xl(folder)).components
    pipeline = StableDiffusionXLAutoBlocks().init_pipeline()
    pipeline.update_components(**{name: part for name, part in parts.items() if part is not None})
    given = {"prompt": "a fox", "negative_prompt": "blue", "height": 16, "width": 16}
    return Made(pipeline, given, parts["unet"], pipeline(**given, num_inference_steps=1, output_type="latent").values)


def qwen_image(folder: Path) -> Made:
    from diffusers import QwenImageTransformer2DModel
    from diffusers.modular_pipelines import QwenImageAutoBlocks

    torch.manual_seed(0)
    transformer = lively(
        QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        )
    )
    pipeline = without_encoders(QwenImageAutoBlocks(), "denoise")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline.update_components(transformer=transformer, scheduler=scheduler)
    ones = torch.ones((1, 5), dtype=torch.long)
    texts = {
        "prompt_embeds": embeddings(5, 16, seed=1),
        "prompt_embeds_mask": ones,
        "negative_prompt_embeds": embeddings(5, 16, seed=2),
        "negative_prompt_embeds_mask": ones,
    }
    return Made(pipeline, {**texts, "height": 64, "width": 64}, transformer)


def z_image(folder: Path) -> Made:
    from diffusers import ZImageTransformer2DModel
    from diffusers.modular_pipelines import ZImageAutoBlocks

    torch.manual_seed(0)
    transformer = lively(
        ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[64, 32, 32],
        )
    )
    pipeline = without_encoders(ZImageAutoBlocks(), "denoise")
    pipeline.update_components(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    texts = {
        name: [embeddings(5, 16, seed=seed)[0]] for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }
    return Made(pipeline, {**texts, "height": 64, "width": 64}, transformer)


def flux2_klein(folder: Path) -> Made:
    from diffusers import Flux2Transformer2DModel
    from diffusers.modular_pipelines import Flux2KleinBaseAutoBlocks

    torch.manual_seed(0)
    transformer = lively(
        Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
    )
    pipeline = without_encoders(Flux2KleinBaseAutoBlocks(), "denoise")
    pipeline.update_components(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    texts = {name: embeddings(5, 16, seed=seed) for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))}
    return Made(pipeline, {**texts, "height": 64, "width": 64}, transformer)


def krea2(folder: Path) -> Made:
    from diffusers import Krea2Transformer2DModel
    from diffusers.modular_pipelines import Krea2AutoBlocks

    torch.manual_seed(0)
    transformer = lively(
        Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(8, 4, 4),
        )
    )
    pipeline = without_encoders(Krea2AutoBlocks(), "denoise")
    pipeline.update_components(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    mask = torch.ones((1, 5), dtype=torch.bool)
    texts = {
        "prompt_embeds": embeddings(5, 2, 16, seed=1),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": embeddings(5, 2, 16, seed=2),
        "negative_prompt_embeds_mask": mask,
    }
    return Made(pipeline, {**texts, "height": 64, "width": 64}, transformer)


def ernie_image(folder: Path) -> Made:
    from diffusers import ErnieImageTransformer2DModel
    from diffusers.modular_pipelines import ErnieImageAutoBlocks

    torch.manual_seed(0)
    transformer = lively(
        ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=4,
            out_channels=4,
            text_in_dim=16,
            rope_axes_dim=(8, 4, 4),
        )
    )
    pipeline = without_encoders(ErnieImageAutoBlocks(), "denoise")
    pipeline.update_components(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    texts = {
        name: [embeddings(5, 16, seed=seed)[0]] for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }
    return Made(pipeline, {**texts, "height": 64, "width": 64}, transformer)


FAMILIES = {
    "SDXL": sdxl,
    "SD3": sd3,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
    "FLUX.2-klein": flux2_klein,
    "Krea 2": krea2,
    "ERNIE-Image": ernie_image,
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return cache(lambda name: FAMILIES[name](tmp_path_factory.mktemp("pipeline")))


def drawn(made: Made, guider: Any, count: int = 1, **others: Any) -> Tensor:
    """The latents of one seed, `count` times, or what `others` names as the output."""
    made.pipeline.update_components(guider=guider)
    made.pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(SEED) for _ in range(count)]
    settings = {"num_images_per_prompt": count, "generator": generators, "num_inference_steps": STEPS, "output": "latents"}
    drawn: Tensor = made.pipeline(**(made.given | settings | others))
    return drawn


def calls_of(made: Made, guider: Any, count: int = 1) -> list[int]:
    """How many samples each call of the network had."""
    calls: list[int] = []
    hook = made.network.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    drawn(made, guider, count)
    hook.remove()
    return calls


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_guider_of_diffusers(families: Any, name: str) -> None:
    made = families(name)
    for w in WEIGHTS:
        close(drawn(made, Guidance(w=w)), drawn(made, ClassifierFreeGuidance(guidance_scale=w)))
    images = [
        drawn(made, guider, output="images", output_type="pt")
        for guider in (Guidance(w=4.0), ClassifierFreeGuidance(guidance_scale=4.0))
        if "vae" in made.pipeline.component_names
    ]
    assert not images or (images[0] - images[1]).abs().max() <= 1 / 255


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


@pytest.mark.parametrize("name", ["SDXL", "SD3"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_those_of_sample(families: Any, name: str, method: str) -> None:
    """With an interval and a schedule, on the same network and scheduler."""
    made, weights = families(name), [0.4, 3.0]
    settings = {"interval": "0.2:inf", "w_schedule": "linear"}
    guider = drawn(made, Guidance(w=weights, method=method, **settings), 2)
    scheduler = made.pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    after = levels_after(scheduler) if METHODS[method].gain else None
    schedule = make_schedule(noise_levels(scheduler), *settings.values(), METHODS[method], after)
    guide = Guide(Denoiser(made, scheduler), [0, 0], weights, method=METHODS[method], schedule=schedule.weights, steps=STEPS)
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
        ("Qwen-Image", {"w": 2, "method": "frequency"}, {}, "images .B, C, H, W., found .1, 16, 16."),
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
