"""A noise-aware image classifier: the network that classifier guidance was published with.

Format on disk is the one of every diffusers model: a folder with `config.json` (whose
`_class_name` is `NoisyClassifier`) and `diffusion_pytorch_model.safetensors`.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import nn


class NoisyClassifier(ModelMixin, ConfigMixin):
    """p(label | x_t, t): the encoder half of a `UNet2DModel`, pooled into logits.

    The layout follows the noise-aware classifier of Dhariwal & Nichol 2021 (arXiv 2105.05233,
    section 4.1), built from the blocks of diffusers' `UNet2DModel`.

    To bring your own, save a folder of this class, or wrap any module with
    `forward(sample, timestep) -> logits` in `guidegen.NoisyScore`. It must
    have been trained on images noised by the *same* schedule as the UNet it guides
    (x_t = alpha_t x_0 + sigma_t eps, x_0 in [-1, 1], integer timesteps), and must give
    un-normalised logits, one column for each entry of `id2label`, in that order.

    Args:
        sample_size: height and width of the images.
        in_channels: channels of the images.
        block_out_channels: channels of each resolution.
        down_block_types: diffusers block names, one for each resolution.
        layers_per_block: ResNet blocks at each resolution.
        attention_head_dim: channels of one attention head.
        norm_num_groups: groups of every GroupNorm.
        resnet_time_scale_shift: "default" or "scale_shift", as in `UNet2DModel`.
        dropout: dropout inside the ResNet blocks and before the head.
        logit_scales: what the logits are multiplied by, at timesteps evenly spaced from the first to the
            last of 1000 and linear between them: one over the temperature of Guo et al. 2017
            (arXiv 1706.04599), one for each noise level. None for ones.
        id2label: label id (as text, JSON has no integer keys) -> name; the order of the columns.
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
        attention_head_dim: int = 32,
        norm_num_groups: int = 16,
        resnet_time_scale_shift: str = "default",
        dropout: float = 0.0,
        logit_scales: list[float] | None = None,
        id2label: dict[str, str] | None = None,
    ):
        super().__init__()
        if not id2label:
            raise ValueError("NoisyClassifier needs id2label: one entry for each logit")
        temb = block_out_channels[0] * 4
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.time_proj = Timesteps(block_out_channels[0], True, 0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], temb)
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
                    attention_head_dim=attention_head_dim,
                    downsample_padding=1,
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
            attention_head_dim=attention_head_dim,
            resnet_groups=norm_num_groups,
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.head_dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, len(id2label))
        self.calibrate(logit_scales or [1.0, 1.0])

    def calibrate(self, scales: list[float]) -> None:
        """Sets the scales of the logits, here and in the config; at least two."""
        self.register_to_config(logit_scales=list(scales))
        self.register_buffer("scales", torch.tensor(scales), persistent=False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Logits (B, len(id2label)) of noisy images (B, C, H, W) at integer timesteps (B,)."""
        temb = self.time_proj(timestep.expand(sample.shape[0])).to(self.dtype)
        temb = self.time_embedding(temb)
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden, _ = block(hidden, temb)
        hidden = self.mid_block(hidden, temb)
        hidden = nn.functional.silu(self.norm_out(hidden)).mean(dim=(2, 3))
        return self.head(self.head_dropout(hidden)) * self._scale(timestep, sample.shape[0])[:, None]

    def _scale(self, timestep: torch.Tensor, batch: int) -> torch.Tensor:
        place = timestep.float().clamp(0, 999).expand(batch) / 999 * (len(self.scales) - 1)
        below = place.floor().long().clamp(max=len(self.scales) - 2)
        return torch.lerp(self.scales[below].float(), self.scales[below + 1].float(), place - below)
