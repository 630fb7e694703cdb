"""Small transformers of text-to-image pipelines, with random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipelines import tiny_vae


def lively(network: Any, *texts: str) -> Any:
    """What training starts from at zero is not left there, and what reads the text, by parts of names, does so loudly."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if not weight.any():
                weight.normal_(std=0.3)
            if any(text in name for text in texts):
                weight *= 8
    return network.eval()


def shifted_vae() -> Any:
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.06)
    return vae


_CONFIGS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [64, 32, 32],
    },
    "Flux2Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    },
    "Krea2Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 16,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (8, 4, 4),
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": 16,
        "rope_axes_dim": (8, 4, 4),
    },
}


def transformer(name: str, seed: int, *texts: str, **sizes: Any) -> Any:
    """A network of a class with weights of a seed.

    Args:
        name: of the class in diffusers.
        seed: of torch's generator, which it leaves after its weights.
        texts: as in `lively`.
        sizes: other entries of its config.
    """
    torch.manual_seed(seed)
    return lively(getattr(diffusers, name)(**(_CONFIGS[name] | sizes)), *texts)
