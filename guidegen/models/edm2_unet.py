"""The magnitude-preserving network of EDM2 (Karras et al. 2024, arXiv 2312.02696, config G, figure 21).

Weights are those after their normalisation (equations 47 and 66), scaled by 1/sqrt(fan-in) and by their gains, which does
not change between calls: `guidegen.models.convert.nvlabs` does it once, and layers here are plain ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from guidegen.models.edm_preconditioning import Preconditioned, check_labels
from guidegen.models.edm_unet import BlockSpec, resample, unet_blocks


def normalize(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x with a root mean square of 1 over some dimensions (equation 30)."""
    length = torch.linalg.vector_norm(x, dim=list(dims), keepdim=True, dtype=torch.float32)
    normal: Tensor = x / (1e-4 + length * math.sqrt(length.numel() / x.numel())).to(x.dtype)
    return normal


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of a unit Gaussian (equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The sum (1 - t) a + t b of uncorrelated tensors, of their magnitude (equation 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a and b, whose shares of the squared magnitude do not depend on their numbers (equation 103)."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(na)), b * (scale * t / math.sqrt(nb))], dim=1)


def _convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)


class _Fourier(nn.Module):
    """Random Fourier features (B, channels) of noise levels (B,), of magnitude 1 (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, noise: Tensor) -> Tensor:
        return (noise.outer(self.freqs) + self.phases).cos() * math.sqrt(2)


class _Block(nn.Module):
    """A block of the encoder, which normalises its input, or of the decoder.

    Args:
        inputs: channels.
        outputs: channels.
        embedded: channels of the embedding of noise level and label.
        encodes: whether it is of the encoder.
        how: keep, up or down.
        heads: of self-attention; 0 for none.
        balances: shares of the residual branch and of attention in their sums.
        clip: the largest activation that leaves it; None for any.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedded: int,
        encodes: bool,
        how: str,
        heads: int,
        balances: tuple[float, float],
        clip: float | None,
    ):
        super().__init__()
        self.encodes, self.how, self.heads, self.clip = encodes, how, heads, clip
        self.res_balance, self.attn_balance = balances
        self.conv_res0 = _convolution(outputs if encodes else inputs, outputs, 3)
        self.emb_linear = nn.Linear(embedded, outputs, bias=False)
        self.conv_res1 = _convolution(outputs, outputs, 3)
        self.conv_skip = _convolution(inputs, outputs, 1) if inputs != outputs else None
        self.attn_qkv = _convolution(outputs, 3 * outputs, 1) if heads else None
        self.attn_proj = _convolution(outputs, outputs, 1) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = resample(x, self.how, (1, 1))
        if self.encodes:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalize(x, [1])
        y = self.conv_res0(mp_silu(x))
        y = mp_silu(y * (self.emb_linear(embedding) + 1)[:, :, None, None].to(y.dtype))
        y = self.conv_res1(y)
        if not self.encodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y.to(x.dtype), self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attention(self.attn_qkv(x))).to(x.dtype), self.attn_balance)
        return x if self.clip is None else x.clip(-self.clip, self.clip)

    def _attention(self, qkv: Tensor) -> Tensor:
        """Cosine attention (B, C, H, W) of queries, keys and values (B, 3C, H, W), which alternate in the channels."""
        batch, channels, height, width = qkv.shape
        parts = normalize(qkv.reshape(batch, self.heads, -1, 3, height * width), [2])
        q, k, v = parts.permute(3, 0, 1, 4, 2).unbind(0)
        found = F.scaled_dot_product_attention(q, k, v)
        return found.transpose(2, 3).reshape(batch, channels // 3, height, width)


class Edm2UNet(Preconditioned):
    """EDM2's network with its preconditioning.

    Args:
        sample_size: height and width of the images or latents.
        in_channels: channels of the images or latents.
        out_channels: the same.
        num_class_embeds: labels, with the null one; None for an unconditional network.
        null_label: the last of them, if it means none.
        block_out_channels: of each level.
        noise_channels: Fourier features of the noise level.
        emb_channels: of the embedding of noise level and label.
        layers_per_block: blocks of each level.
        attn_resolutions: edges in pixels of the levels with self-attention.
        attention_head_dim: channels of one attention head.
        label_balance: share of the label in the embedding.
        concat_balance: share of the skip connections.
        res_balance: share of the residual branch.
        attn_balance: share of attention.
        clip_act: the largest activation.
        sigma_data: standard deviation of the data.
        precondition: edm.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        num_class_embeds: int | None = None,
        null_label: int | None = None,
        block_out_channels: tuple[int, ...] = (192, 384, 576, 768),
        noise_channels: int = 192,
        emb_channels: int = 768,
        layers_per_block: int = 3,
        attn_resolutions: tuple[int, ...] = (16, 8),
        attention_head_dim: int = 64,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
        sigma_data: float = 0.5,
        precondition: str = "edm",
    ):
        super().__init__()
        labels = check_labels(num_class_embeds, null_label, precondition)
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.emb_fourier = _Fourier(noise_channels)
        self.emb_noise = nn.Linear(noise_channels, emb_channels, bias=False)
        self.emb_label = nn.Linear(labels, emb_channels, bias=False) if labels else None

        def block(spec: BlockSpec, encodes: bool) -> _Block:
            heads = spec.outputs // attention_head_dim if spec.attends else 0
            balances = (res_balance, attn_balance)
            return _Block(spec.inputs, spec.outputs, emb_channels, encodes, spec.how, heads, balances, clip_act)

        first = block_out_channels[0]
        encoder, decoder = unet_blocks(sample_size, first, block_out_channels, layers_per_block, attn_resolutions)
        # a channel of ones stands for the bias
        self.enc = nn.ModuleDict({f"{sample_size}x{sample_size}_conv": _convolution(in_channels + 1, first, 3)})
        self.enc.update({spec.name: block(spec, True) for spec in encoder})
        self.dec = nn.ModuleDict({spec.name: block(spec, False) for spec in decoder})
        self.out_conv = _convolution(first, out_channels, 3)

    def predict(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        embedding = self.emb_noise(self.emb_fourier(noise))
        if self.emb_label is not None and labels is not None:
            label = self.emb_label(labels * math.sqrt(labels.shape[1]))
            embedding = mp_sum(embedding, label, self.label_balance)
        embedding = mp_silu(embedding)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, embedding)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(mp_cat(x, skips.pop(), self.concat_balance) if "block" in name else x, embedding)
        predicted: Tensor = self.out_conv(x)
        return predicted
