"""The two things of Dhariwal & Nichol's UNets that diffusers' `UNet2DModel` cannot say."""

from __future__ import annotations

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn


class AdmUNet2DModel(UNet2DModel):
    """A `UNet2DModel` with a fixed number of attention heads, or its own width of the timestep sinusoids.

    Of the networks published with Dhariwal & Nichol 2021 (arXiv 2105.05233), the one of 128x128 has 4
    heads at every width, where `UNet2DModel` has heads of one width; and the one of 512x512 has 256
    sinusoids over a first level of 128 channels, where `UNet2DModel` has as many as channels. All else
    is a `UNet2DModel`, and a folder that needs neither is saved as one.

    Args:
        sample_size: height and width of the images.
        in_channels: channels of the images.
        out_channels: as many, or twice as many with a learned variance.
        block_out_channels: channels of each resolution.
        down_block_types: diffusers block names, one for each resolution.
        up_block_types: the same, from the smallest resolution up.
        layers_per_block: ResNet blocks at each resolution on the way down.
        downsample_type: "conv" or "resnet".
        upsample_type: "conv" or "resnet".
        resnet_time_scale_shift: "default" or "scale_shift".
        attention_head_dim: channels of one attention head; None with `num_attention_heads`.
        num_attention_heads: heads of every attention layer.
        time_channels: sinusoids of the timestep; None for `block_out_channels[0]`.
        num_class_embeds: classes; None for an unconditional network.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (32, 64),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block: int = 2,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        resnet_time_scale_shift: str = "default",
        attention_head_dim: int | None = None,
        num_attention_heads: int | None = None,
        time_channels: int | None = None,
        num_class_embeds: int | None = None,
    ):
        if (attention_head_dim is None) == (num_attention_heads is None):
            raise ValueError("AdmUNet2DModel needs one of attention_head_dim and num_attention_heads")
        time_channels = time_channels or block_out_channels[0]
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            attention_head_dim=attention_head_dim,
            attn_norm_num_groups=32,
            num_class_embeds=num_class_embeds,
            time_embedding_dim=4 * time_channels,
        )
        self.time_proj = Timesteps(time_channels, True, 0)
        self.time_embedding = TimestepEmbedding(time_channels, 4 * time_channels)
        if num_attention_heads:
            set_heads(self, num_attention_heads)


def set_heads(network: nn.Module, heads: int) -> None:
    """Gives every attention layer of diffusers in `network` so many heads.

    Raises:
        ValueError: they do not divide the channels of one.
    """
    for layer in network.modules():
        if isinstance(layer, Attention):
            channels = layer.to_q.out_features
            if channels % heads:
                raise ValueError(f"{heads} heads do not divide {channels} channels")
            layer.heads, layer.scale = heads, (channels // heads) ** -0.5
