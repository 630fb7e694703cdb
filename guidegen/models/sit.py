"""The transformer of SiT (Ma et al. 2024, arXiv 2401.08740), which is that of DiT with time from 0 to 1 and a velocity.

Tensors have the names that SiT's files give them.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F


class _Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class _Times(nn.Module):
    """Embeddings (B, D) of times (B,) by 256 sinusoids."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t.float().outer(frequencies)
        embedded: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        return embedded


class _Labels(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(labels)
        return embedded


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        projected: Tensor = self.proj(found.transpose(1, 2).reshape(batch, length, width))
        return projected


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return found


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class _Block(nn.Module):
    """A block whose normalisations are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool):
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = _Attention(width, heads, qk_norm)
        self.mlp = _Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(_modulated(self.norm1(x), shift_a, scale_a))
        mixed: Tensor = x + gate_m[:, None] * self.mlp(_modulated(self.norm2(x), shift_m, scale_m))
        return mixed


class _Last(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final = _norm(width)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        found: Tensor = self.linear(_modulated(self.norm_final(x), shift, scale))
        return found


class SiTTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """SiT and REPA, as flow-matching networks of diffusers: they take timesteps up to 1000 and give eps - x_0.

    Args:
        sample_size: height and width of the latents.
        in_channels: channels of the latents.
        out_channels: the same.
        patch_size: latents along an edge of one token.
        num_layers: blocks.
        num_attention_heads: of each block.
        attention_head_dim: channels of each head.
        mlp_channels: between the two layers of an MLP.
        num_embeds_ada_norm: labels; one row more means none.
        qk_norm: whether queries and keys are normalised.
        data_time: the network's own time of an image without noise: 1 in SiT, whose velocity is x_0 - eps; 0 in
            REPA, whose velocity is eps - x_0 (Yu et al. 2024, arXiv 2410.06940).
        train_steps: timesteps of the scheduler.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_channels: int = 4608,
        num_embeds_ada_norm: int = 1000,
        qk_norm: bool = False,
        data_time: int = 1,
        train_steps: int = 1000,
    ):
        super().__init__()
        if data_time not in (0, 1):
            raise ValueError(f"data_time should be 0 or 1, found {data_time}")
        width, tokens = num_attention_heads * attention_head_dim, (sample_size // patch_size) ** 2
        self.x_embedder = _Patches(in_channels, width, patch_size)
        self.t_embedder = _Times(width)
        self.y_embedder = _Labels(num_embeds_ada_norm + 1, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        self.blocks = nn.ModuleList([_Block(width, num_attention_heads, mlp_channels, qk_norm) for _ in range(num_layers)])
        self.final_layer = _Last(width, patch_size**2 * out_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """The prediction eps - x_0 (B, C, H, W), as the only one of a tuple.

        Args:
            hidden_states: x_t = (1 - s) x_0 + s eps (B, C, H, W).
            timestep: s times `train_steps` (B,).
            class_labels: ids (B,).
            return_dict: for diffusers' sake.
        """
        config = self.config
        noise = timestep / config.train_steps
        condition = self.t_embedder(1 - noise if config.data_time else noise) + self.y_embedder(class_labels)
        x = self.x_embedder(hidden_states) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        x = self.final_layer(x, condition)
        batch, edge, patch = len(x), config.sample_size // config.patch_size, config.patch_size
        x = x.reshape(batch, edge, edge, patch, patch, config.out_channels).permute(0, 5, 1, 3, 2, 4)
        velocity = x.reshape(batch, config.out_channels, edge * patch, edge * patch)
        return (-velocity if config.data_time else velocity,)
