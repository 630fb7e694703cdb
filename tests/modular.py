"""Small modular pipelines of diffusers, with random weights, and what compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import stable_diffusion_xl
from torch import Tensor
from transformers_at_random import shifted_vae, transformer

from guidegen.scores.interfaces import NULL

STEPS, SEED = 4, 7
WEIGHTS = [0.0, 1.0, 4.0]


class Made(NamedTuple):
    """A modular pipeline, what it is called with, its denoiser, and, with text encoders, what they give and its folder."""

    pipeline: Any
    given: dict[str, Any]
    network: Any
    texts: dict[str, Any] | None = None
    folder: Path | None = None


def embeddings(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


class Denoiser:
    """The network of a pipeline as `sample` calls it: label 0 is the prompt."""

    def __init__(self, made: Made, network: Any = None):
        self.network, self.prediction_type = network or made.network, "flow" if made.texts is None else "epsilon"
        self.texts = made.texts or made.given

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        def read(name: str) -> Tensor:
            return torch.cat([self.texts[f"negative_{name}" if label == NULL else name] for label in labels.tolist()])

        texts, pooled = read("prompt_embeds"), read("pooled_prompt_embeds")
        if self.prediction_type == "flow":
            return self.network(x_t, texts, pooled, t.expand(len(x_t)), return_dict=False)[0]
        added = {"text_embeds": pooled, "time_ids": read("add_time_ids")}
        return self.network(x_t, t, texts, added_cond_kwargs=added, return_dict=False)[0]


def without_encoders(blocks: Any, *kept: str) -> Any:
    """A modular pipeline of the blocks of those names alone."""
    for name in set(blocks.sub_blocks) - set(kept):
        blocks.sub_blocks.pop(name)
    return blocks.init_pipeline()


def qwen_vae() -> Any:
    """Of Qwen-Image and Krea 2: latents (B, 4, 1, H, W) with a mean and a deviation for each channel."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    spread = {"latents_mean": [-0.7, 0.4, 0.1, 0.9], "latents_std": [2.8, 1.4, 2.3, 0.7]}
    return AutoencoderKLQwenImage(**sizes, **spread).eval()


def flux2_vae() -> Any:
    """Of FLUX.2 and ERNIE-Image: the mean and deviation of patches of latents are those of a batch norm."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKLFlux2(**blocks, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4).eval()
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def sd3_transformer(seed: int = 0) -> Any:
    return transformer("SD3Transformer2DModel", seed)


def sd3(folder: Path) -> Made:
    from diffusers.modular_pipelines import StableDiffusion3AutoBlocks

    network = sd3_transformer()
    pipeline = without_encoders(StableDiffusion3AutoBlocks(), "denoise", "decode")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.update_components(transformer=network, vae=shifted_vae(), scheduler=scheduler)
    texts = {
        "prompt_embeds": embeddings(5, 16, seed=1),
        "negative_prompt_embeds": embeddings(5, 16, seed=2),
        "pooled_prompt_embeds": embeddings(8, seed=3),
        "negative_pooled_prompt_embeds": embeddings(8, seed=4),
    }
    return Made(pipeline, {**texts, "height": 16, "width": 16}, network)


def sdxl(folder: Path) -> Made:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    parts = StableDiffusionXLPipeline.from_pretrained(stable_diffusion_xl(folder)).components
    pipeline = StableDiffusionXLAutoBlocks().init_pipeline()
    pipeline.update_components(**{name: part for name, part in parts.items() if part is not None})
    given = {"prompt": "a fox", "negative_prompt": "blue", "height": 16, "width": 16}
    texts = pipeline(**given, num_inference_steps=1, output_type="latent").values
    return Made(pipeline, given, parts["unet"], texts, folder)


def qwen_image(folder: Path) -> Made:
    from diffusers.modular_pipelines import QwenImageAutoBlocks

    network = transformer("QwenImageTransformer2DModel", 0)
    pipeline = without_encoders(QwenImageAutoBlocks(), "denoise", "decode")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline.update_components(transformer=network, vae=qwen_vae(), scheduler=scheduler)
    ones = torch.ones((1, 5), dtype=torch.long)
    texts = {
        "prompt_embeds": embeddings(5, 16, seed=1),
        "prompt_embeds_mask": ones,
        "negative_prompt_embeds": embeddings(5, 16, seed=2),
        "negative_prompt_embeds_mask": ones,
    }
    return Made(pipeline, {**texts, "height": 16, "width": 16}, network)


def z_image(folder: Path) -> Made:
    from diffusers.modular_pipelines import ZImageAutoBlocks

    network = transformer("ZImageTransformer2DModel", 0)
    pipeline = without_encoders(ZImageAutoBlocks(), "denoise", "decode")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.update_components(transformer=network, vae=shifted_vae(), scheduler=scheduler)
    texts = {
        name: [embeddings(5, 16, seed=seed)[0]] for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }
    return Made(pipeline, {**texts, "height": 16, "width": 16}, network)


def flux2_klein(folder: Path) -> Made:
    from diffusers.modular_pipelines import Flux2KleinBaseAutoBlocks

    network = transformer("Flux2Transformer2DModel", 0)
    pipeline = without_encoders(Flux2KleinBaseAutoBlocks(), "denoise", "decode")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline.update_components(transformer=network, vae=flux2_vae(), scheduler=scheduler)
    texts = {name: embeddings(5, 16, seed=seed) for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))}
    return Made(pipeline, {**texts, "height": 16, "width": 16}, network)


def krea2(folder: Path) -> Made:
    from diffusers.modular_pipelines import Krea2AutoBlocks

    network = transformer("Krea2Transformer2DModel", 0)
    pipeline = without_encoders(Krea2AutoBlocks(), "denoise", "decode")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline.update_components(transformer=network, vae=qwen_vae(), scheduler=scheduler)
    mask = torch.ones((1, 5), dtype=torch.bool)
    texts = {
        "prompt_embeds": embeddings(5, 2, 16, seed=1),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": embeddings(5, 2, 16, seed=2),
        "negative_prompt_embeds_mask": mask,
    }
    return Made(pipeline, {**texts, "height": 16, "width": 16}, network)


def ernie_image(folder: Path) -> Made:
    from diffusers.modular_pipelines import ErnieImageAutoBlocks

    network = transformer("ErnieImageTransformer2DModel", 0)
    pipeline = without_encoders(ErnieImageAutoBlocks(), "denoise", "decode")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.update_components(transformer=network, vae=flux2_vae(), scheduler=scheduler)
    texts = {
        name: [embeddings(5, 16, seed=seed)[0]] for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }
    return Made(pipeline, {**texts, "height": 16, "width": 16}, network)


FAMILIES = {
    "SDXL": sdxl,
    "SD3": sd3,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
    "FLUX.2-klein": flux2_klein,
    "Krea 2": krea2,
    "ERNIE-Image": ernie_image,
}


def drawn(made: Made, guider: Any, count: int = 1, **others: Any) -> Tensor:
    """The latents of one seed, `count` times, or what `others` names as the output."""
    made.pipeline.update_components(guider=guider)
    made.pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(SEED) for _ in range(count)]
    settings = {"num_images_per_prompt": count, "generator": generators, "num_inference_steps": STEPS, "output": "latents"}
    drawn: Tensor = made.pipeline(**(made.given | settings | others))
    return drawn


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
