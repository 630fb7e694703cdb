"""Small pipeline folders of the kinds that are published, saved by diffusers and transformers themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LATENT = 8  # edge of the latents
EDGE = 16  # edge of the images


def tiny_vae(seed: int = 0) -> Any:
    """An AutoencoderKL that doubles the edges, with a scaling factor that is not one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=EDGE,
        scaling_factor=0.18215,
    ).eval()


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters, 16 tokens long."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def clip_text_config(**others: Any) -> Any:
    from transformers import CLIPTextConfig

    given = {
        "vocab_size": 54,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
        "projection_dim": 12,
        "initializer_range": 1.0,
    }
    return CLIPTextConfig(**(given | others))


def tiny_text_unet(seed: int = 0, **others: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    given = {
        "sample_size": LATENT,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(**(given | others)).eval()
    with torch.no_grad():  # a prompt should show in the picture
        for name, weight in unet.named_parameters():
            if "attn2.to_out" in name or "attn2.to_v" in name:
                weight *= 6
    return unet


def tiny_transformer(**others: Any) -> Any:
    """A DiTTransformer2DModel of two blocks."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    given = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": LATENT,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    return DiTTransformer2DModel(**(given | others)).eval()


def dit(folder: Path, **scheduler: Any) -> Path:
    """A DiTPipeline folder with learned variance; its output layer is not left at zero."""
    from diffusers import DDIMScheduler, DiTPipeline

    transformer = tiny_transformer()
    names = {0: "tench, Tinca tinca", 207: "golden retriever", 999: "toilet tissue"}
    walker = DDIMScheduler(clip_sample=False, **scheduler)
    pipeline = DiTPipeline(transformer, tiny_vae(), walker, id2label=names)
    pipeline.register_to_config(id2label=names)
    pipeline.save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A StableDiffusionPipeline folder with the scheduler config that SD 1.5 has."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(clip_text_config()).eval(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        unet=tiny_text_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_sample": False}))  # as the published one has
    return folder


def stable_diffusion_xl(folder: Path) -> Path:
    """A StableDiffusionXLPipeline folder with both text encoders and the sizes as condition."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    first = CLIPTextModel(clip_text_config()).eval()
    second = CLIPTextModelWithProjection(clip_text_config(hidden_size=8, num_hidden_layers=3)).eval()
    unet = tiny_text_unet(
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )
    StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
        ),
    ).save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    """A CLIPModel folder: tokenizer, image processor, weights; images of 16 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = CLIPConfig(text_config=clip_text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer(folder).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def siglip(folder: Path) -> Path:
    """A SiglipModel folder, whose texts are padded to their full length."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(4)
    letters = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1} | {c: i + 2 for i, c in enumerate(LETTERS)}, "<unk>"))
    letters.pre_tokenizer = Split("", "isolated")
    text = {"vocab_size": 28, "max_position_embeddings": 12, "projection_size": 16}
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"image_size": 16, "patch_size": 4}
    SiglipModel(SiglipConfig(text_config=text | shared, vision_config=vision | shared)).save_pretrained(folder)
    reads = {"model_input_names": ["input_ids"]}  # as SigLIP's own
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", unk_token="<unk>", **reads).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
