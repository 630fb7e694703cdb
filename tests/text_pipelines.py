"""Small folders of text-to-image pipelines with random weights, saved by diffusers itself, text encoders and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pipelines import LETTERS, clip_text_config, clip_tokenizer, tiny_vae

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def lively(network: Any, *texts: str) -> Any:
    """What training starts from at zero is not left there, and what reads the text does so loudly."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if not weight.any():
                weight.normal_(std=0.3)
            if any(text in name for text in texts):
                weight *= 8
    return network.eval()


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    words = [*LETTERS, "Ġ", "Ċ", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], chat_template=CHAT)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=32)


def t5_encoder(width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, initializer_factor=5.0)
    return T5EncoderModel(config).eval()


def qwen3(cls: str, layers: int = 2) -> Any:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=1.0,
    )
    return getattr(transformers, cls)(config).eval()


def flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def shifted_vae() -> Any:
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.06)
    return vae


def sd3(folder: Path) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(1)
    transformer = lively(
        SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=24,
        )
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(shift=3.0),
        vae=shifted_vae(),
        text_encoder=CLIPTextModelWithProjection(clip_text_config()).eval(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config()).eval(),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2"),
        text_encoder_3=t5_encoder(32),
        tokenizer_3=t5_tokenizer(),
    )


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    ).eval()


def qwen_image(folder: Path) -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(2)
    transformer = lively(
        QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        "add_v_proj",
        "to_out",
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "initializer_range": 1.0}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "default"}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=sizes | heads, vision_config=vision)
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=qwen_tokenizer(),
    )


def z_image(folder: Path) -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(3)
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
            axes_lens=[512, 32, 32],
        )
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=flow(shift=3.0),
        vae=shifted_vae(),
        text_encoder=qwen3("Qwen3Model"),
        tokenizer=qwen_tokenizer(),
    )


FOLDERS = {"sd3": sd3, "qwen-image": qwen_image, "z-image": z_image}


def save(name: str, folder: Path) -> Path:
    """The folder of a family's pipeline."""
    FOLDERS[name](folder).save_pretrained(folder)
    return folder
