"""Equality with diffusers: its pipelines, its guiders, and the loop that its users write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZE, settings_of, tiny_classifier, tiny_unet
from setups import open_sampler
from torch import Tensor

from guidegen.models.checkpoint import open_checkpoint
from guidegen.models.denoisers import UNetDenoiser
from guidegen.sampling.loop import sample, to_uint8
from guidegen.sampling.sampler import Sampler
from guidegen.sampling.schedulers import SCHEDULERS, make_scheduler
from guidegen.scores.gradient import NoisyScore
from guidegen.scores.guidance import classifier_free
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import NULL
from guidegen.scores.noise import PREDICTION_TYPES
from guidegen.spec.cell import Cell

SHAPE = (3, SIZE, SIZE)
NULL_LABEL = 5
WEIGHTS = [0.0, 0.5, 1.0, 4.0]
SEEDS = [7, 8, 9, 10]
LABELS = [0, 1, 2, 3]
ONE_LEVEL = 2 / 255  # one grey level of images in [-1, 1]


def plain_loop(unet: Any, scheduler: Any, steps: int, extra: dict[str, Any], classifier: Any = None) -> Tensor:
    """Guidance as diffusers' users write it; one weight a sample so that all are seen."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn((1, *SHAPE), generator=g) for g in generators]) * scheduler.init_noise_sigma
    w, labels = torch.tensor(WEIGHTS)[:, None, None, None], torch.tensor(LABELS)
    if "generator" in extra:
        extra = extra | {"generator": generators}
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        null = torch.full((len(x),), NULL_LABEL)
        with torch.no_grad():
            free = unet(x_in, t, class_labels=null).sample
            prediction = free + w * (unet(x_in, t, class_labels=labels).sample - free)
        if classifier is not None:  # Dhariwal & Nichol 2021, algorithm 2, for epsilon on the DDIM schedule
            leaf = x_in.detach().requires_grad_()
            log_p = classifier(leaf, t.expand(len(x))).log_softmax(-1)[range(len(x)), labels].sum()
            gradient = torch.autograd.grad(log_p, leaf)[0]
            prediction = free - w * (1 - scheduler.alphas_cumprod[t]).sqrt() * gradient
        x = scheduler.step(prediction, t, x, **extra).prev_sample
    return x


def ours(unet: Any, scheduler: Any, steps: int, eta: float | None, kind: str = "epsilon") -> Tensor:
    denoiser = UNetDenoiser(unet, kind, NULL_LABEL)  # type: ignore[arg-type]
    return sample(Guide(denoiser, LABELS, WEIGHTS), scheduler, SEEDS, SHAPE, steps, eta)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_cfg_equals_the_plain_loop(name: str, kind: str) -> None:
    config = {"_class_name": "DDPMScheduler", "prediction_type": kind, "clip_sample": name in ("ddim", "ddpm")}
    unet = tiny_unet(num_class_embeds=6)
    mine, theirs = make_scheduler(config, name), make_scheduler(config, name)
    extra: dict[str, Any] = {"generator": None} if name in ("ddim", "ddpm") else {}
    eta = 0.7 if name == "ddim" else None
    expected = plain_loop(unet, theirs, 12, extra | ({"eta": eta} if eta else {}))
    # the same network in other batches: rounding only, but an untrained network's images are not
    # bounded, so the tolerance is relative to them
    torch.testing.assert_close(ours(unet, mine, 12, eta, kind), expected, rtol=1e-4, atol=1e-4)


def test_classifier_guidance_equals_the_published_loop() -> None:
    unet, classifier = tiny_unet(num_class_embeds=6), tiny_classifier()
    scheduler = make_scheduler({"clip_sample": False}, "ddim")
    expected = plain_loop(unet, scheduler, 12, {}, classifier)
    guide = Guide(
        UNetDenoiser(unet, "epsilon", NULL_LABEL),
        LABELS,
        [0.0] * 4,
        WEIGHTS,
        NoisyScore(classifier, {i: i for i in range(5)}),
    )
    drawn = sample(guide, scheduler, SEEDS, SHAPE, 12)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_unconditional_equals_ddim_pipeline(unconditional: Path, eta: float) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = DDIMPipeline(UNet2DModel.from_pretrained(unconditional / "unet"), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(4, generators, eta=eta, num_inference_steps=10, output_type="np").images
    sampler = sampler_of(unconditional, "ddim", 10, eta, mode="none")
    images, _ = sampler.draw([Cell(None, seed, 0.0) for seed in SEEDS])
    mine = to_uint8(images).float() / 255
    assert (mine - torch.from_numpy(theirs)).abs().max() <= 1 / 255


def test_unconditional_equals_ddpm_pipeline(unconditional: Path) -> None:
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(unconditional)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(1, torch.Generator().manual_seed(3), num_inference_steps=15, output_type="np").images
    images, _ = sampler_of(unconditional, None, 15, None, mode="none").draw([Cell(None, 3, 0.0)])
    assert (to_uint8(images).float() / 255 - torch.from_numpy(theirs)).abs().max() <= 1 / 255


def sampler_of(folder: Path, scheduler: str | None, steps: int, eta: float | None, mode: str = "cfg") -> Sampler:
    checkpoint = open_checkpoint(str(folder))
    walker = make_scheduler(checkpoint.scheduler_config, scheduler)
    return open_sampler(checkpoint, None, walker, settings_of(mode, steps, eta=eta), torch.device("cpu"))


def test_classifier_free_equals_diffusers_guider() -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    draw = torch.Generator().manual_seed(0)
    conditional, unconditional = (torch.randn((2, *SHAPE), generator=draw) for _ in range(2))
    for w in (1.5, 3.0, 7.5):
        guider = ClassifierFreeGuidance(guidance_scale=w)
        guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(500))
        found = guider.forward(conditional, unconditional)
        theirs = getattr(found, "pred", found[0])  # a pair before diffusers 0.36
        mine = classifier_free(unconditional, conditional, torch.full((2, 1, 1, 1), w))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [None, "ddpm", "dpm++"])
@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_a_cell_does_not_depend_on_its_batch(with_null: Path, name: str | None, mode: str) -> None:
    from guidegen.models.checkpoint import open_classifier
    from guidegen.sampling.setup import plan_scheduler

    checkpoint = open_checkpoint(str(with_null))
    classifier = open_classifier(str(with_null / "classifier"))
    walker = plan_scheduler(checkpoint, name, 10, None)
    sampler = open_sampler(checkpoint, classifier, walker, settings_of(mode), torch.device("cpu"))
    cells = [Cell(i % 5, i, w) for i, w in enumerate([0.0, 1.0, 0.5, 4.0] * 4)]
    together, calls = sampler.draw(cells)
    backwards, _ = sampler.draw(cells[::-1])
    for i in (0, 1, 2, 3, 15):
        alone, own_calls = sampler.draw([cells[i]])
        assert (alone[0] - together[i]).abs().max() <= ONE_LEVEL
        assert (backwards[15 - i] - together[i]).abs().max() <= ONE_LEVEL
        assert own_calls == [calls[i]]


def test_learned_variance_is_left_out() -> None:
    unet = tiny_unet(out_channels=6)
    x, t = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0)), torch.tensor(10)
    prediction = UNetDenoiser(unet, "epsilon")(x, t, torch.tensor([NULL, NULL]))
    with torch.no_grad():
        torch.testing.assert_close(prediction, unet(x, t).sample[:, :3])


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_flow_and_other_kinds_sample_to_finite_images(kind: str) -> None:
    config: dict[str, Any] = {"_class_name": "DDPMScheduler", "prediction_type": kind}
    names = list(SCHEDULERS)
    if kind == "flow":
        config, names = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}, ["euler", "heun", "dpm++", "unipc"]
    classifier = NoisyScore(tiny_classifier(), {i: i for i in range(5)})
    denoiser = UNetDenoiser(tiny_unet(num_class_embeds=6), kind, NULL_LABEL)  # type: ignore[arg-type]
    for name in names:
        guide = Guide(denoiser, LABELS, [2.0] * 4, [0.5] * 4, classifier)
        assert sample(guide, make_scheduler(config, name), SEEDS, SHAPE, 6).isfinite().all(), name
