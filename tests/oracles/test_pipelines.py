"""Equality with DiTPipeline, StableDiffusionPipeline and StableDiffusionXLPipeline: same weights, seeds and steps.

The pipelines guide at w > 1 and draw plain conditional samples at w = 1; for other weights the
loop that their users would write stands in. Within one grey level of 255: the sums run in another order.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from conftest import settings_of
from setups import open_sampler
from torch import Tensor

from guidegen.models.checkpoint import open_checkpoint
from guidegen.sampling.loop import to_uint8
from guidegen.sampling.sampler import Sampler
from guidegen.sampling.schedulers import SCHEDULERS
from guidegen.sampling.setup import plan_scheduler
from guidegen.spec.cell import Cell

STEPS = 6
LABELS = [207, 0, 999, 207, 0]
PROMPTS = ["a red fox", "snow", "an old house", "a red fox", "b"]
NEGATIVE = "dull"
SCHEDULED = ("ddim", "ddpm", "dpm++")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("pipelines")
    return {
        "dit": pipelines.dit(home / "dit"),
        "sd": pipelines.stable_diffusion(home / "sd"),
        "sd-v": pipelines.stable_diffusion(home / "sd-v", "v_prediction"),
        "sdxl": pipelines.stable_diffusion_xl(home / "sdxl"),
    }


def their_pipeline(folder: Path, name: str) -> Any:
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    cls = getattr(diffusers, SCHEDULERS[name])
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    return pipeline


def sampler_of(folder: Path, name: str, **settings: Any) -> Sampler:
    checkpoint = open_checkpoint(folder)
    walker = plan_scheduler(checkpoint, name, STEPS, None)
    return open_sampler(checkpoint, None, walker, settings_of("cfg", STEPS, **settings), torch.device("cpu"))


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def seeded(scheduler: Any, draws: list[torch.Generator]) -> Any:
    """DiTPipeline gives its scheduler no generators: this one brings them, and spare ones for a doubled batch."""

    class Seeded(type(scheduler)):  # type: ignore[misc]
        def step(self, output: Tensor, t: Any, x: Tensor, **kwargs: Any) -> Any:
            spare = [torch.Generator() for _ in range(len(x) - len(draws))]
            return super().step(output, t, x, generator=draws + spare, **kwargs)

    return Seeded.from_config(scheduler.config)


def loop(pipeline: Any, text: bool, batch: int, w: float) -> Tensor:
    """Guidance as a user of the parts would write it, one sample after the other, (B, H, W, 3) in [0, 1]."""
    images = []
    for i, draw in enumerate(generators(batch)):
        pipeline.scheduler.set_timesteps(STEPS)
        shape = (1, 4, pipelines.LATENT, pipelines.LATENT)
        x = torch.randn(shape, generator=draw) * pipeline.scheduler.init_noise_sigma
        extra = {} if pipeline.scheduler.__class__.__name__ == "DDIMScheduler" else {"generator": draw}
        for t in pipeline.scheduler.timesteps:
            x_in = pipeline.scheduler.scale_model_input(x, t)
            with torch.no_grad():
                if text:
                    u, c = (predict_text(pipeline, x_in, t, PROMPTS[i], null) for null in (True, False))
                else:
                    u, c = (predict_class(pipeline, x_in, t, label) for label in (1000, LABELS[i]))
            x = pipeline.scheduler.step(u + w * (c - u), t, x, **extra).prev_sample
        with torch.no_grad():
            images.append(pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample)
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def predict_class(pipeline: Any, x: Tensor, t: Tensor, label: int) -> Tensor:
    return pipeline.transformer(x, timestep=t[None], class_labels=torch.tensor([label])).sample[:, :4]


def predict_text(pipeline: Any, x: Tensor, t: Tensor, prompt: str, null: bool) -> Tensor:
    found = pipeline.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=NEGATIVE
    )
    extra = {}
    if len(found) > 2:
        edge = float(pipelines.EDGE)
        ids = torch.tensor([[edge, edge, 0.0, 0.0, edge, edge]])  # original size, crop, target size
        extra["added_cond_kwargs"] = {"text_embeds": found[2 + null], "time_ids": ids}
    return pipeline.unet(x, t, encoder_hidden_states=found[null], **extra).sample


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", SCHEDULED)
def test_dit(folders: dict[str, Path], name: str, batch: int) -> None:
    sampler = sampler_of(folders["dit"], name)
    for w in (0.0, 0.5, 1.0, 4.0):
        pipeline = their_pipeline(folders["dit"], name)
        if w < 1:
            theirs = loop(pipeline, False, batch, w)
        else:
            draws = generators(batch)
            if name != "ddim":
                pipeline.scheduler = seeded(pipeline.scheduler, draws)
            made = pipeline(LABELS[:batch], w, draws, num_inference_steps=STEPS, output_type="np")
            theirs = torch.from_numpy(made.images)
        images, _ = sampler.draw([Cell(LABELS[i], i, w) for i in range(batch)])
        assert (to_uint8(images).float() / 255 - theirs).abs().max() <= 1 / 255, (name, w)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl"])
def test_text(folders: dict[str, Path], kind: str, name: str, batch: int) -> None:
    sampler = sampler_of(folders[kind], name, negative_prompt=NEGATIVE)
    pipeline = their_pipeline(folders[kind], name)
    for w in (0.0, 0.5, 1.0, 4.0):
        if w < 1:
            theirs = loop(pipeline, True, batch, w)
        else:
            asked = {"negative_prompt": [NEGATIVE] * batch, "generator": generators(batch), "output_type": "np"}
            made = pipeline(PROMPTS[:batch], num_inference_steps=STEPS, guidance_scale=w, **asked)
            theirs = torch.from_numpy(made.images)
        images, _ = sampler.draw([Cell(None, i, w, None, PROMPTS[i], i) for i in range(batch)])
        assert (to_uint8(images).float() / 255 - theirs).abs().max() <= 1 / 255, (kind, name, w)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("size", [None, (24, 16)])
def test_the_empty_negative_prompt_and_other_sizes(
    folders: dict[str, Path], kind: str, size: tuple[int, int] | None
) -> None:
    """SDXL's null condition is zeros where nothing is negated; its sizes follow the image's."""
    checkpoint = open_checkpoint(folders[kind], size=size)
    walker = plan_scheduler(checkpoint, None, STEPS, None)
    sampler = open_sampler(checkpoint, None, walker, settings_of("cfg", STEPS), torch.device("cpu"))
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[kind], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    height, width = checkpoint.size
    made = pipeline(
        PROMPTS[:2],
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=generators(2),
        output_type="np",
    )
    images, _ = sampler.draw([Cell(None, i, 5.0, None, PROMPTS[i], i) for i in range(2)])
    assert images.shape[2:] == (height, width)
    assert (to_uint8(images).float() / 255 - torch.from_numpy(made.images)).abs().max() <= 1 / 255


@pytest.mark.parametrize("kind", ["dit", "sd", "sdxl"])
def test_the_condition_matters(folders: dict[str, Path], kind: str) -> None:
    """What the equalities above compare is not the same picture each time."""
    sampler = sampler_of(folders[kind], "ddim", negative_prompt=NEGATIVE)
    cells = [Cell(LABELS[i] if kind == "dit" else None, 0, w, None, PROMPTS[i], i) for i in (0, 1) for w in (0.0, 1.0, 4.0)]
    images, _ = sampler.draw(cells)
    fox, other = images[:3], images[3:]
    assert (fox[0] - other[0]).abs().max() <= 1 / 255  # unconditional: the same
    for w in (1, 2):
        assert (fox[w] - other[w]).abs().max() > 20 / 255
    assert (fox[1] - fox[2]).abs().max() > 20 / 255


@pytest.mark.parametrize("w", [0.0, 1.0, 4.0])
def test_a_class_conditional_flow_model(tmp_path: Path, w: float) -> None:
    """A DiT trained by flow matching (as SiT, arXiv 2401.08740, is), against Euler's method on dx/dsigma = eps - x0."""
    import diffusers

    folder = pipelines.dit(tmp_path / "sit")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5).save_pretrained(folder / "scheduler")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.prediction_type, checkpoint.null_label) == ("flow", 1000)
    walker = plan_scheduler(checkpoint, None, STEPS, None)
    sampler = open_sampler(checkpoint, None, walker, settings_of("cfg", STEPS), torch.device("cpu"))
    images, _ = sampler.draw([Cell(207, 5, w)])

    parts = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    sigmas = walker.sigmas.tolist()
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1.0, 0.0, STEPS + 1)
    x = torch.randn((1, 4, pipelines.LATENT, pipelines.LATENT), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for sigma, after in pairwise(sigmas):
            u, c = (
                parts(x, timestep=torch.tensor([1000 * sigma]), class_labels=torch.tensor([label])).sample[:, :4]
                for label in (1000, 207)
            )
            x = x + (after - sigma) * (u + w * (c - u))
        theirs = vae.decode(x / vae.config.scaling_factor).sample
    assert (to_uint8(images).int() - to_uint8(theirs).int()).abs().max() <= 1
