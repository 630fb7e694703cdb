"""A noise-aware image classifier: the network that classifier guidance was published with.

Format on disk is the one of every diffusers model: a folder with `config.json` (whose
`_class_name` is `NoisyClassifier`) and `diffusion_pytorch_model.safetensors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from guidegen.models.adm_unet import set_heads


class NoisyClassifier(ModelMixin, ConfigMixin):
    """p(label | x_t, t): the encoder half of a `UNet2DModel`, pooled into logits.

    The layout follows the noise-aware classifier of Dhariwal & Nichol 2021 (arXiv 2105.05233,
    section 4.1), built from the blocks of diffusers' `UNet2DModel`. It has all of
    their options but spatial pooling, so that `guidegen convert` converts their classifiers exactly.

    For a custom classifier, save a folder of this class, or wrap any module with
    `forward(sample, timestep) -> logits` in `guidegen.NoisyScore`. It must
    have been trained on images noised by the *same* schedule as the UNet it guides
    (x_t = alpha_t x_0 + sigma_t eps, x_0 in [-1, 1], integer timesteps; sigma itself where alpha is 1), and must give
    un-normalised logits, one column for each entry of `id2label`, in ascending order of the ids.

    Args:
        sample_size: height and width of the images.
        in_channels: channels of the images.
        block_out_channels: channels of each resolution.
        down_block_types: diffusers block names, one for each resolution.
        layers_per_block: ResNet blocks at each resolution.
        attention_head_dim: channels of one attention head.
        num_attention_heads: heads of every attention layer but the pool, instead of `attention_head_dim`.
        norm_num_groups: groups of every GroupNorm.
        attn_norm_num_groups: groups of the GroupNorm before the attention of the middle; None for
            `norm_num_groups`, and for no norm there with "scale_shift", as in `UNet2DModel`.
        resnet_time_scale_shift: "default" or "scale_shift", as in `UNet2DModel`.
        downsample_type: "conv", or "resnet" for a ResNet block that halves the resolution.
        time_channels: sinusoids of the timestep; None for `block_out_channels[0]`.
        pooling: "mean" over the positions, or "attention" (`AttentionPool`), which fixes the size of the images.
        dropout: dropout inside the ResNet blocks and before the head.
        logit_scales: what the logits are multiplied by, at timesteps evenly spaced from the first to the
            last of 1000 and linear between them: one over the temperature of Guo et al. 2017
            (arXiv 1706.04599), one for each noise level. None for ones.
        negative_class: whether a last logit, after those of the labels, is of images that the guided model drew. The
            softmax over all then holds log p(x_t | label) against what the model itself draws, which is what
            corrects it: the discriminator of Kim et al. 2022 (arXiv 2211.17091) and the labels in one network, as the
            K + 1 classes of Salimans et al. 2016 (1606.03498, section 5).
        id2label: label id (as text, JSON has no integer keys) -> name. Columns are in ascending order of the ids:
            JSON files sort them as texts, "10" before "2".
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        layers_per_block: int = 1,
        attention_head_dim: int | None = 32,
        norm_num_groups: int = 16,
        resnet_time_scale_shift: str = "default",
        dropout: float = 0.0,
        logit_scales: list[float] | None = None,
        id2label: dict[str, str] | None = None,
        num_attention_heads: int | None = None,
        attn_norm_num_groups: int | None = None,
        downsample_type: str = "conv",
        time_channels: int | None = None,
        pooling: str = "mean",
        negative_class: bool = False,
    ):
        super().__init__()
        if not id2label:
            raise ValueError("NoisyClassifier needs id2label: one entry for each logit")
        if pooling not in ("mean", "attention"):
            raise ValueError(f"NoisyClassifier pools by mean or attention, not {pooling!r}")
        head_dim = None if num_attention_heads else attention_head_dim
        time_channels = time_channels or block_out_channels[0]
        temb = time_channels * 4
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.time_proj = Timesteps(time_channels, True, 0)
        self.time_embedding = TimestepEmbedding(time_channels, temb)
        self.down_blocks = nn.ModuleList()
        channels = block_out_channels[0]
        for i, kind in enumerate(down_block_types):
            self.down_blocks.append(
                get_down_block(
                    kind,
                    num_layers=layers_per_block,
                    in_channels=channels,
                    out_channels=block_out_channels[i],
                    temb_channels=temb,
                    add_downsample=i < len(down_block_types) - 1,
                    resnet_eps=1e-5,
                    resnet_act_fn="silu",
                    resnet_groups=norm_num_groups,
                    attention_head_dim=head_dim or block_out_channels[i],
                    downsample_padding=1,
                    downsample_type=downsample_type,
                    resnet_time_scale_shift=resnet_time_scale_shift,
                    dropout=dropout,
                )
            )
            channels = block_out_channels[i]
        self.mid_block = UNetMidBlock2D(
            in_channels=channels,
            temb_channels=temb,
            dropout=dropout,
            resnet_eps=1e-5,
            resnet_act_fn="silu",
            resnet_time_scale_shift=resnet_time_scale_shift,
            attention_head_dim=head_dim or channels,
            resnet_groups=norm_num_groups,
            attn_groups=attn_norm_num_groups,
        )
        if num_attention_heads:
            set_heads(self, num_attention_heads)
        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.head_dropout = nn.Dropout(dropout)
        logits = len(id2label) + negative_class
        if pooling == "attention":
            if attention_head_dim is None:
                raise ValueError("NoisyClassifier needs attention_head_dim to pool by attention")
            positions = (sample_size >> (len(down_block_types) - 1)) ** 2
            self.head: nn.Module = AttentionPool(channels, attention_head_dim, positions, logits)
        else:
            self.head = nn.Linear(channels, logits)
        self.calibrate(logit_scales or [1.0, 1.0])

    def calibrate(self, scales: list[float]) -> None:
        """Sets the scales of the logits, here and in the config.

        Raises:
            ValueError: fewer than two, or one that is no number from 0.
        """
        if len(scales) < 2 or not all(isinstance(scale, int | float) and 0 <= scale < math.inf for scale in scales):
            raise ValueError("NoisyClassifier: logit_scales should be two numbers or more, none below 0")
        self.register_to_config(logit_scales=list(scales))
        device = self.scales.device if hasattr(self, "scales") else None
        self.register_buffer("scales", torch.tensor(scales, device=device), persistent=False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of noisy images (B, C, H, W) at integer timesteps (B,), any negative class last."""
        temb = self.time_proj(timestep.expand(sample.shape[0])).to(self.dtype)
        temb = self.time_embedding(temb)
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden, _ = block(hidden, temb)
        hidden = self.mid_block(hidden, temb)
        hidden = nn.functional.silu(self.norm_out(hidden))
        if self.config.pooling == "mean":
            hidden = hidden.mean(dim=(2, 3))
        return self.head(self.head_dropout(hidden)) * self._scale(timestep, sample.shape[0])[:, None]

    def _scale(self, timestep: torch.Tensor, batch: int) -> torch.Tensor:
        position = timestep.float().clamp(0, 999).expand(batch) / 999 * (len(self.scales) - 1)
        below = position.floor().long().clamp(max=len(self.scales) - 2)
        return torch.lerp(self.scales[below].float(), self.scales[below + 1].float(), position - below)


class CleanClassifier(nn.Module):
    """A noise-aware classifier read at t = 0, where images are clean: (B, C, H, W) -> logits (B, K) of its K labels."""

    def __init__(self, network: Callable[..., torch.Tensor], labels: int | None = None):
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Un-normalised logits."""
        return self.network(images, images.new_zeros(len(images)).long())[:, : self.labels]


class AttentionPool(nn.Module):
    """The attention pooling of CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.4).

    The query is the mean over the positions; keys are the positions and the mean, each with a learned positional embedding.

    Args:
        channels: C, of the features.
        head_dim: channels of one attention head.
        positions: height times width of the features.
        out_channels: K, of the result.
    """

    def __init__(self, channels: int, head_dim: int, positions: int, out_channels: int):
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"heads of {head_dim} channels do not divide {channels}")
        self.head_dim = head_dim
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, channels) / channels**0.5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Linear(channels, out_channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) to (B, K)."""
        tokens = features.flatten(2).transpose(1, 2)  # (B, HW, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding
        query, key, value = (
            part.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, tokens, head_dim)
            for part in (self.to_q(tokens[:, :1]), self.to_k(tokens), self.to_v(tokens))
        )
        pooled = scaled_dot_product_attention(query, key, value)
        return self.to_out(pooled.transpose(1, 2).flatten(1))
