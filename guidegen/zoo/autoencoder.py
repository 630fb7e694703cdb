"""The autoencoder of a latent checkpoint: photographs of 64x64 pixels to latents of 4x16x16, and back.

An `AutoencoderKL` (Rombach et al. 2022, arXiv 2112.10752) without attention and without a critic. Absolute errors alone
blur edges, so those of a Laplacian pyramid are added, which weighs fine detail as much as coarse. The divergence from a
normal distribution keeps latents small and near to unit deviation, and its noise makes the decoder forgive errors
of the network that draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guidegen.zoo.batches import Batches, drawn_by, scaled
from guidegen.zoo.loop import train

AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
}
PART = "vqvae"  # what LDMPipeline calls it, whatever its class
PYRAMID = 3
DIVERGENCE = 1e-6  # weight of the divergence of an image, in nats, beside the mean error of its pixels


class Reconstruction(nn.Module):
    """An `AutoencoderKL` as one module to train: its own methods are wrapped in hooks, which do not compile."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] and noise (B, C, h, w) to reconstructions, means and log-variances."""
        network = self.network
        mean, log_variance = network.quant_conv(network.encoder(images)).float().chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean + (0.5 * log_variance).exp() * noise
        return network.decoder(network.post_quant_conv(latents)), mean, log_variance


def pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """The Laplacian pyramid (Burt & Adelson 1983) of images (B, C, H, W), with means of 2x2 pixels."""
    bands = []
    for _ in range(levels):
        coarse = nn.functional.avg_pool2d(images, 2)
        bands.append(images - coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))
        images = coarse
    return [*bands, images]


def autoencoder_loss(batches: Batches, shape: tuple[int, int, int]) -> Callable[[nn.Module, int], Tensor]:
    """Mean absolute error of pixels and of each band of their pyramid, and the divergence of latents of that shape."""

    def loss(model: nn.Module, step: int) -> Tensor:
        x0, *_, generator = batches.drawn(step)
        noise = torch.randn((len(x0), *shape), **drawn_by(generator))
        made, mean, log_variance = model(x0.contiguous(memory_format=torch.channels_last), noise)
        error = made.float() - x0
        bands = sum(band.abs().mean() for band in pyramid(error, PYRAMID)) / (PYRAMID + 1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        return error.abs().mean() + bands + DIVERGENCE * divergence

    return loss


def latent_shape(network: Any) -> tuple[int, int, int]:
    """(C, h, w) of the latents of an autoencoder."""
    config = network.config
    size = config.sample_size >> (len(config.block_out_channels) - 1)
    return config.latent_channels, size, size


@torch.no_grad()
def encode(network: Any, photographs: Tensor, part: int = 500) -> Tensor:
    """Scaled latents, fp16 (N, 2, C, h, w), of photographs, uint8 (N, 3, H, W), and of their mirror images.

    Means of the posterior, in bf16 on a GPU.
    """
    device = network.device.type
    encoded = []
    for images in photographs.split(part):
        both = torch.stack([images, images.flip(3)], 1).flatten(0, 1)
        x = scaled(both).to(network.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            mean = network.quant_conv(network.encoder(x)).chunk(2, 1)[0]
        latents = mean.float().contiguous() * network.config.scaling_factor
        encoded.append(latents.half().unflatten(0, (-1, 2)))
    return torch.cat(encoded)


def fit_scale(network: Any, photographs: Tensor, most: int = 10_000) -> None:
    """Sets the scaling factor by which latents of the first photographs have unit standard deviation."""
    network.register_to_config(scaling_factor=1.0)
    network.register_to_config(scaling_factor=1 / encode(network, photographs[:most]).float().std().item())


@torch.no_grad()
def signal_to_noise(network: Any, photographs: Tensor, part: int = 500) -> float:
    """Mean peak signal-to-noise ratio, in dB, of photographs, uint8 (N, 3, H, W), decoded from their latents."""
    ratios = []
    for images in photographs.split(part):
        latents = encode(network, images, part)[:, 0].float() / network.config.scaling_factor
        made = network.decoder(network.post_quant_conv(latents))
        error = (made.clamp(-1, 1) - scaled(images).to(made.device)).square().mean((1, 2, 3)) / 4
        ratios.append(-10 * error.log10())
    return torch.cat(ratios).mean().item()


def make_autoencoder(size: int) -> Any:
    """An untrained autoencoder of images of that height and width."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(sample_size=size, **AUTOENCODER)


def open_autoencoder(out: Path, device: str) -> Any:
    """The autoencoder that was written to a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    from diffusers import AutoencoderKL

    if not (out / PART / "config.json").is_file():
        raise FileNotFoundError(f"{out / PART}: train the autoencoder first")
    return AutoencoderKL.from_pretrained(out / PART).to(device).float().eval()


def train_autoencoder(
    photographs: Tensor, labels: Tensor, out: Path, images: int, batch: int, seed: int, compile_model: bool
) -> Any:
    """The autoencoder of some photographs, uint8 (N, 3, H, H), after so many `images`."""
    torch.manual_seed(seed)
    network = make_autoencoder(photographs.shape[-1]).to(photographs.device)
    loss = autoencoder_loss(Batches(photographs, labels, batch, seed, network.device.type), latent_shape(network))
    train(Reconstruction(network), loss, out / "autoencoder.state", images // batch, batch, 1e-3, 0.0, compile_model)
    fit_scale(network, photographs)
    return network
