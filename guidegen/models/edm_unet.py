"""The UNets of EDM: DDPM++, NCSN++ (Song et al. 2021, arXiv 2011.13456) and ADM (Dhariwal & Nichol 2021, 2105.05233).

As Karras et al. 2022 (2206.00364, appendix F.1, tables 6 and 7) describe them. Tensors have the names that NVlabs' files
give them, so that converting a file is copying it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from guidegen.models.edm_preconditioning import Preconditioned, check_labels


def resample(x: Tensor, how: str, weights: Sequence[float], padding: int | None = None) -> Tensor:
    """Images (B, C, H, W) at half ("down") or twice ("up") the size through a separable filter; "keep" leaves them."""
    if how == "keep":
        return x
    row = torch.tensor(weights, dtype=x.dtype, device=x.device)
    row = row / row.sum() * (2 if how == "up" else 1)
    kernel = row.outer(row).expand(x.shape[1], 1, -1, -1)
    padding = (len(weights) - 1) // 2 if padding is None else padding
    convolve = F.conv_transpose2d if how == "up" else F.conv2d
    return convolve(x, kernel, stride=2, padding=padding, groups=x.shape[1])


class _Resample(nn.Module):
    def __init__(self, how: str, weights: Sequence[float]):
        super().__init__()
        self.how, self.weights = how, weights

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.how, self.weights)


class _Convolution(nn.Conv2d):
    """A convolution of 3x3 or 1x1 after resampling."""

    def __init__(self, inputs: int, outputs: int, size: int, how: str = "keep", weights: Sequence[float] = (1, 1)):
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.how, self.weights = how, weights

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(resample(x, self.how, self.weights))


class _Down(nn.Conv2d):
    """A convolution of 3x3 before downsampling, which sees as far past the edges as both together."""

    def __init__(self, inputs: int, outputs: int, weights: Sequence[float]):
        super().__init__(inputs, outputs, 3, padding=1 + (len(weights) - 1) // 2)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return resample(super().forward(x), "down", self.weights, padding=0)


class _Norm(nn.GroupNorm):
    def __init__(self, channels: int, eps: float):
        super().__init__(max(1, min(32, channels // 4)), channels, eps)


class _Block(nn.Module):
    """A residual block with self-attention or without.

    Args:
        inputs: channels.
        outputs: channels.
        embedded: channels of the embedding of noise level and label.
        how: keep, up or down.
        heads: of attention; 0 for none.
        song: DDPM++ and NCSN++: the embedding is added, where ADM scales and shifts by it; sums are divided by
            sqrt(2); the skip connection always has a convolution where it is resampled.
        weights: of the resampling filter.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedded: int,
        how: str = "keep",
        heads: int = 0,
        song: bool = False,
        weights: Sequence[float] = (1, 1),
    ):
        super().__init__()
        self.heads, self.song = heads, song
        self.scale = math.sqrt(0.5) if song else 1.0
        eps = 1e-6 if song else 1e-5
        self.norm0 = _Norm(inputs, eps)
        self.conv0 = _Convolution(inputs, outputs, 3, how, weights)
        self.affine = nn.Linear(embedded, outputs if song else 2 * outputs)
        self.norm1 = _Norm(outputs, eps)
        self.conv1 = _Convolution(outputs, outputs, 3)
        self.skip: nn.Module | None = None
        if inputs != outputs or (song and how != "keep"):
            self.skip = _Convolution(inputs, outputs, 1, how, weights)
        elif how != "keep":
            self.skip = _Resample(how, weights)
        if heads:
            self.norm2 = _Norm(outputs, eps)
            self.qkv = _Convolution(outputs, 3 * outputs, 1)
            self.proj = _Convolution(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))
        affine = self.affine(embedding)[:, :, None, None]
        if self.song:
            y = self.norm1(y + affine)
        else:
            scale, shift = affine.chunk(2, dim=1)
            y = torch.addcmul(shift, self.norm1(y), scale + 1)
        y = self.conv1(F.silu(y))
        x = (y + (x if self.skip is None else self.skip(x))) * self.scale
        if self.heads:
            x = (self.proj(attention(self.qkv(self.norm2(x)), self.heads)) + x) * self.scale
        return x


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention (B, C, H, W) from queries, keys and values (B, 3C, H, W), which alternate in the channels of a head."""
    batch, channels, height, width = qkv.shape
    q, k, v = qkv.reshape(batch, heads, -1, 3, height * width).permute(3, 0, 1, 4, 2).unbind(0)
    found = F.scaled_dot_product_attention(q, k, v)
    return found.transpose(2, 3).reshape(batch, channels // 3, height, width)


class BlockSpec(NamedTuple):
    """One block of a UNet: its name, channels, resampling, and whether it attends."""

    name: str
    inputs: int
    outputs: int
    how: str = "keep"
    attends: bool = False


def unet_blocks(
    size: int, first: int, channels: Sequence[int], layers: int, attention: Sequence[int], last_alone: bool = False
) -> tuple[list[BlockSpec], list[BlockSpec]]:
    """The blocks of the encoder, its first convolution aside, and of the decoder, both in the order of their calls.

    Those of the decoder that are called `block` take a skip connection beside what comes before them.

    Args:
        size: height and width in pixels.
        first: channels of the first convolution.
        channels: of each level, the finest first.
        layers: blocks of each level.
        attention: edges in pixels of the levels that attend.
        last_alone: whether of such a level of the decoder the last block attends alone.
    """
    encoder: list[BlockSpec] = []
    decoder: list[BlockSpec] = []
    now, skips = first, [first]
    for level, width in enumerate(channels):
        edge = size >> level
        if level:
            encoder.append(BlockSpec(f"{edge}x{edge}_down", now, now, "down"))
            skips.append(now)
        for i in range(layers):
            encoder.append(BlockSpec(f"{edge}x{edge}_block{i}", now, width, attends=edge in attention))
            skips.append(now := width)
    for level, width in reversed([*enumerate(channels)]):
        edge = size >> level
        if level == len(channels) - 1:
            decoder += [
                BlockSpec(f"{edge}x{edge}_in0", now, now, attends=True),
                BlockSpec(f"{edge}x{edge}_in1", now, now),
            ]
        else:
            decoder.append(BlockSpec(f"{edge}x{edge}_up", now, now, "up"))
        for i in range(layers + 1):
            attends = edge in attention and (i == layers or not last_alone)
            decoder.append(BlockSpec(f"{edge}x{edge}_block{i}", now + skips.pop(), width, attends=attends))
            now = width
    return encoder, decoder


class SongUNet(Preconditioned):
    """DDPM++ and NCSN++.

    Args:
        sample_size: height and width of the images.
        in_channels: channels of the images.
        out_channels: the same.
        num_class_embeds: labels, with the null one; None for an unconditional network.
        null_label: the last of them, if it means none.
        model_channels: of the first layer.
        block_out_channels: of each level.
        emb_channels: of the embedding of noise level and label.
        noise_channels: of the sinusoids or Fourier features of the noise level.
        layers_per_block: residual blocks of each level.
        attn_resolutions: edges in pixels of the levels with self-attention.
        embedding: positional (DDPM++) or fourier (NCSN++).
        encoder: standard (DDPM++) or residual (NCSN++).
        resample_filter: 1, 1 (DDPM++) or 1, 3, 3, 1 (NCSN++).
        precondition: as in `guidegen.models.edm_preconditioning`, and so are the rest.
        sigma_data: standard deviation of the images.
        beta_d: of the variance preserving SDE.
        beta_min: of the variance preserving SDE.
        train_steps: timesteps.
        c_1: of iDDPM.
        c_2: of iDDPM.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        null_label: int | None = None,
        model_channels: int = 128,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        emb_channels: int = 512,
        noise_channels: int = 128,
        layers_per_block: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        embedding: str = "positional",
        encoder: str = "standard",
        resample_filter: tuple[int, ...] = (1, 1),
        precondition: str = "edm",
        sigma_data: float = 0.5,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        train_steps: int = 1000,
        c_1: float = 0.001,
        c_2: float = 0.008,
    ):
        super().__init__()
        if embedding not in ("positional", "fourier") or encoder not in ("standard", "residual"):
            raise ValueError(f"SongUNet has no {embedding} embedding with a {encoder} encoder")
        labels = check_labels(num_class_embeds, null_label, precondition)
        self.map_noise = _Positional(noise_channels) if embedding == "positional" else _Fourier(noise_channels)
        self.map_label = nn.Linear(labels, noise_channels) if labels else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        def block(spec: BlockSpec) -> _Block:
            return _Block(spec.inputs, spec.outputs, emb_channels, spec.how, int(spec.attends), True, resample_filter)

        encoder_blocks, decoder_blocks = unet_blocks(
            sample_size, model_channels, block_out_channels, layers_per_block, attn_resolutions, last_alone=True
        )
        edge = f"{sample_size}x{sample_size}"
        self.enc = nn.ModuleDict({f"{edge}_conv": _Convolution(in_channels, model_channels, 3)})
        aux = in_channels
        for spec in encoder_blocks:
            self.enc[spec.name] = block(spec)
            if encoder == "residual" and spec.how == "down":
                self.enc[spec.name.replace("down", "aux_residual")] = _Down(aux, spec.outputs, resample_filter)
                aux = spec.outputs
        self.dec = nn.ModuleDict({spec.name: block(spec) for spec in decoder_blocks})
        last = decoder_blocks[-1].outputs
        self.dec[f"{edge}_aux_norm"] = _Norm(last, 1e-6)
        self.dec[f"{edge}_aux_conv"] = _Convolution(last, out_channels, 3)

    def predict(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        embedding = self.map_noise(noise)
        if self.map_label is not None and labels is not None:
            embedding = embedding + self.map_label(labels * math.sqrt(labels.shape[1]))
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        aux, skips = x, list[Tensor]()
        for name, block in self.enc.items():
            if "aux" in name:
                x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
            else:
                x = block(x) if "conv" in name else block(x, embedding)
                skips.append(x)
        for name, block in self.dec.items():
            if "aux" in name:
                x = block(F.silu(x) if "conv" in name else x)
            else:
                x = block(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, embedding)
        return x


class DhariwalUNet(Preconditioned):
    """ADM; its arguments are those of `SongUNet`.

    Args:
        sample_size: height and width of the images.
        in_channels: channels of the images.
        out_channels: the same.
        num_class_embeds: labels, with the null one; None for an unconditional network.
        null_label: the last of them, if it means none.
        model_channels: sinusoids of the noise level.
        block_out_channels: of each level.
        emb_channels: of the embedding of noise level and label.
        layers_per_block: residual blocks of each level.
        attn_resolutions: edges in pixels of the levels with self-attention.
        learned_variance: whether the last layer has a variance beside the mean, which nobody reads (iDDPM).
        precondition: as in `SongUNet`, and so are the rest.
        sigma_data: as in `SongUNet`.
        beta_d: as in `SongUNet`.
        beta_min: as in `SongUNet`.
        train_steps: as in `SongUNet`.
        c_1: as in `SongUNet`.
        c_2: as in `SongUNet`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        null_label: int | None = None,
        model_channels: int = 192,
        block_out_channels: tuple[int, ...] = (192, 384, 576, 768),
        emb_channels: int = 768,
        layers_per_block: int = 3,
        attn_resolutions: tuple[int, ...] = (32, 16, 8),
        learned_variance: bool = False,
        precondition: str = "edm",
        sigma_data: float = 0.5,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        train_steps: int = 1000,
        c_1: float = 0.001,
        c_2: float = 0.008,
    ):
        super().__init__()
        labels = check_labels(num_class_embeds, null_label, precondition)
        self.map_noise = _Positional(model_channels, endpoint=False)
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(labels, emb_channels, bias=False) if labels else None

        def block(spec: BlockSpec) -> _Block:
            heads = spec.outputs // 64 if spec.attends else 0
            return _Block(spec.inputs, spec.outputs, emb_channels, spec.how, heads)

        first = block_out_channels[0]
        encoder, decoder = unet_blocks(sample_size, first, block_out_channels, layers_per_block, attn_resolutions)
        self.enc = nn.ModuleDict({f"{sample_size}x{sample_size}_conv": _Convolution(in_channels, first, 3)})
        self.enc.update({spec.name: block(spec) for spec in encoder})
        self.dec = nn.ModuleDict({spec.name: block(spec) for spec in decoder})
        self.out_norm = _Norm(first, 1e-5)
        self.out_conv = _Convolution(first, out_channels * (2 if learned_variance else 1), 3)

    def predict(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        embedding = self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise))))
        if self.map_label is not None and labels is not None:
            embedding = embedding + self.map_label(labels)
        embedding = F.silu(embedding)
        skips = []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, embedding)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, embedding)
        predicted: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return predicted


class _Positional(nn.Module):
    """Sinusoids (B, channels) of noise levels (B,): sines before cosines in DDPM++, whose last frequency is 1/10000."""

    def __init__(self, channels: int, endpoint: bool = True):
        super().__init__()
        self.count, self.endpoint = channels // 2, endpoint

    def forward(self, noise: Tensor) -> Tensor:
        index = torch.arange(self.count, dtype=torch.float32, device=noise.device)
        angles = noise.outer((1 / 10000) ** (index / (self.count - int(self.endpoint))))
        parts = (angles.sin(), angles.cos()) if self.endpoint else (angles.cos(), angles.sin())
        return torch.cat(parts, dim=1)


class _Fourier(nn.Module):
    """Random Fourier features (B, channels) of noise levels (B,)."""

    freqs: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2))

    def forward(self, noise: Tensor) -> Tensor:
        angles = noise.outer(2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)
