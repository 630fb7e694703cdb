"""Small folders of text-to-image pipelines with random weights, saved by diffusers itself, text encoders and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pipelines import LETTERS, clip_text_config, clip_tokenizer, tiny_vae
from transformers_at_random import lively, shifted_vae, transformer

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


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


def vae_of_eight() -> Any:
    """For pipelines that take the factor of their VAE for granted."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32}
    return AutoencoderKL(**blocks, **sizes, shift_factor=0.06).eval()


def sd3(folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    network = transformer("SD3Transformer2DModel", 1, joint_attention_dim=32, pooled_projection_dim=24)
    return StableDiffusion3Pipeline(
        transformer=network,
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
    from diffusers import QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    network = transformer("QwenImageTransformer2DModel", 2, "add_v_proj", "to_out")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "initializer_range": 1.0}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "default"}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=sizes | heads, vision_config=vision)
    return QwenImagePipeline(
        transformer=network,
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=qwen_tokenizer(),
    )


def z_image(folder: Path) -> Any:
    from diffusers import ZImagePipeline

    network = transformer("ZImageTransformer2DModel", 3, axes_lens=[512, 32, 32])
    return ZImagePipeline(
        transformer=network,
        scheduler=flow(shift=3.0),
        vae=shifted_vae(),
        text_encoder=qwen3("Qwen3Model"),
        tokenizer=qwen_tokenizer(),
    )


def flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32
    ).eval()


def flux2_klein(folder: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    network = transformer("Flux2Transformer2DModel", 4, "add_v_proj", "to_out", joint_attention_dim=48)
    return Flux2KleinPipeline(
        transformer=network,
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3("Qwen3ForCausalLM", 28),
        tokenizer=qwen_tokenizer(),
        is_distilled=False,
    )


def krea2(folder: Path) -> Any:
    from diffusers import Krea2Pipeline
    from transformers import Qwen3VLConfig, Qwen3VLModel

    network = transformer("Krea2Transformer2DModel", 5, "txt_in.linear", "to_v", num_text_layers=12)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "initializer_range": 1.0, "head_dim": 8}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    heads = {"num_hidden_layers": 36, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen3VLConfig(text_config=sizes | heads, vision_config=vision | {"deepstack_visual_indexes": [0]})
    return Krea2Pipeline(
        transformer=network,
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(config).eval(),
        tokenizer=qwen_tokenizer(),
    )


def ernie_image(folder: Path) -> Any:
    from diffusers import ErnieImagePipeline
    from transformers import Mistral3Config, Mistral3Model

    network = transformer("ErnieImageTransformer2DModel", 6)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "num_hidden_layers": 2, "initializer_range": 1.0}
    heads = {"model_type": "mistral", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Mistral3Config(text_config=sizes | heads, vision_config=vision | {"num_attention_heads": 2, "image_size": 16})
    return ErnieImagePipeline(
        transformer=network,
        scheduler=flow(shift=3.0),
        vae=flux2_vae(),
        text_encoder=Mistral3Model(config).eval(),
        tokenizer=qwen_tokenizer(),
    )


def pixart(folder: Path, cls: str = "PixArtSigmaPipeline") -> Any:
    import diffusers

    torch.manual_seed(7)
    transformer = lively(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=16,
            patch_size=2,
            caption_channels=16,
            use_additional_conditions=False,
        ),
        "caption_projection",
    )
    return getattr(diffusers, cls)(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=tiny_vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


def pixart_alpha(folder: Path) -> Any:
    return pixart(folder, "PixArtAlphaPipeline")


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "num_hidden_layers": 2, "initializer_range": 1.0}
    return Gemma2Model(Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8)).eval()


def sana(folder: Path) -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(8)
    transformer = lively(
        SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=16,
            patch_size=1,
        ),
        "caption_projection",
    )
    blocks = dict.fromkeys(("encoder_block_types", "decoder_block_types"), ("ResBlock", "ResBlock"))
    widths = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    layers = {f"{side}_layers_per_block": (1, 1) for side in ("encoder", "decoder")}
    scales = {f"{side}_qkv_multiscales": ((), ()) for side in ("encoder", "decoder")}
    return SanaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        vae=AutoencoderDC(latent_channels=4, **blocks, **widths, **layers, **scales).eval(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def aura_flow(folder: Path) -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(9)
    transformer = lively(
        AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=256,
        ),
        *("norm1", "add_v_proj", "to_v", "proj_out"),
    )
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return AuraFlowPipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=tiny_vae(),
        text_encoder=UMT5EncoderModel(UMT5Config(**sizes, initializer_factor=5.0)).eval(),
        tokenizer=t5_tokenizer(),
    )


def hunyuan_dit(folder: Path) -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(10)
    transformer = lively(
        HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=4,
            hidden_size=16,
            num_layers=2,
            mlp_ratio=2.0,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=77,
            text_len_t5=256,
            learn_sigma=True,
            activation_fn="gelu-approximate",
        )
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return HunyuanDiTPipeline(
        transformer=transformer,
        scheduler=DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        vae=vae_of_eight(),
        text_encoder=BertModel(BertConfig(vocab_size=60, **sizes, initializer_range=1.0)).eval(),
        tokenizer=BertTokenizer(vocab={word: i for i, word in enumerate(words)}),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def cogview4(folder: Path) -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    torch.manual_seed(11)
    transformer = lively(
        CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=16,
        )
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 1.0}
    return CogView4Pipeline(
        transformer=transformer,
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
        vae=tiny_vae(),
        text_encoder=GlmModel(GlmConfig(**sizes, **heads)).eval(),
        tokenizer=qwen_tokenizer(),
    )


_FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


def chroma(folder: Path) -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(12)
    sizes = {"approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16}
    return ChromaPipeline(
        transformer=lively(ChromaTransformer2DModel(**_FLUX, **sizes), "context_embedder"),
        scheduler=flow(),
        vae=shifted_vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


def flux(folder: Path) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(13)
    transformer = FluxTransformer2DModel(**_FLUX, pooled_projection_dim=16, guidance_embeds=True)
    return FluxPipeline(
        transformer=lively(transformer, "context_embedder"),
        scheduler=flow(use_dynamic_shifting=True),
        vae=shifted_vae(),
        text_encoder=CLIPTextModel(clip_text_config()).eval(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def lumina2(folder: Path) -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(14)
    transformer = lively(
        Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        )
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=flow(shift=6.0),
        vae=vae_of_eight(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


FOLDERS = {
    "sd3": sd3,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "flux2-klein": flux2_klein,
    "krea2": krea2,
    "ernie-image": ernie_image,
    "pixart-sigma": pixart,
    "pixart-alpha": pixart_alpha,
    "sana": sana,
    "aura-flow": aura_flow,
    "hunyuan-dit": hunyuan_dit,
    "cogview4": cogview4,
    "chroma": chroma,
    "flux": flux,
    "lumina2": lumina2,
}


def save(name: str, folder: Path) -> Path:
    """The folder of a family's pipeline."""
    FOLDERS[name](folder).save_pretrained(folder)
    return folder
