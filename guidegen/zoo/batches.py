"""Photographs or their latents, noised at the levels of a bundled checkpoint's training."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
NULL_LABEL = 1000
LOG_SIGMA = (-0.6, 1.3)  # P_mean and P_std of log(sigma/alpha), for images of std 1/2
LATENT_LOG_SIGMA = (LOG_SIGMA[0] + math.log(2), LOG_SIGMA[1])  # the same share of noise in latents of std 1


def decode_file(path: Path, classes: Sequence[int], size: int, first: int = 0, count: int | None = None) -> tuple[Any, Any]:
    """Images of `classes` in one file as uint8 arrays (N, size, size, 3), and their labels (N,).

    Of the `count` rows from `first` on: several processes can share a file.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from PIL import Image

    def decoded(raw: bytes) -> Any:
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BOX))

    table = pq.read_table(path, columns=["image", "label"]).slice(first, count)
    table = table.filter(pc.is_in(table["label"], value_set=pa.array(classes, pa.int32())))
    images = [decoded(raw) for raw in table["image"].to_pylist()]
    return np.stack(images) if images else np.empty((0, size, size, 3), np.uint8), table["label"].to_numpy()


def as_tensors(parts: Sequence[tuple[Any, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `decode_file` gave of each file as uint8 (N, 3, H, W) and labels (N,)."""
    import numpy as np

    images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def load_images(data: Path, split: str, classes: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of `classes` as uint8 (N, 3, size, size) and their labels (N,), decoded once."""
    parts = [decode_file(path, classes, size) for path in sorted(data.glob(f"{split}*.parquet"))]
    if not sum(len(labels) for _, labels in parts):
        raise FileNotFoundError(f"no {split}*.parquet with labels {classes} in {data}")
    return as_tensors(parts)


def alphas_sigmas() -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t (T,) of the training schedule."""
    from diffusers import DDPMScheduler

    cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod
    return cumprod.sqrt(), (1 - cumprod).sqrt()


def drawn_by(generator: torch.Generator) -> dict[str, Any]:
    """The arguments by which torch draws with a generator, on its device."""
    return {"generator": generator, "device": generator.device}


def scaled(photographs: torch.Tensor) -> torch.Tensor:
    """uint8 to fp32 in [-1, 1]."""
    return photographs.float() / 127.5 - 1


def draw_timesteps(
    batch: int, log_sigma: torch.Tensor, generator: torch.Generator, normal: tuple[float, float] = LOG_SIGMA
) -> torch.Tensor:
    """Timesteps (B,): log-normal noise levels of that mean and deviation, one in ten uniform."""
    mean, std = normal
    levels = torch.randn(batch, **drawn_by(generator)) * std + mean
    steps = torch.searchsorted(log_sigma, levels).clamp(0, len(log_sigma) - 1)
    uniform = torch.randint(0, len(log_sigma), (batch,), **drawn_by(generator))
    return torch.where(torch.rand(batch, **drawn_by(generator)) < 0.1, uniform, steps)


def shifted(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Images (B, C, S, S) moved by whole pixels, `down` and `right` (B, 1); what comes in is their reflection."""
    size = images.shape[-1]
    rows, columns = ((torch.arange(size, device=images.device) - move).abs() for move in (down, right))
    rows, columns = (size - 1 - (size - 1 - index).abs() for index in (rows, columns))
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (B, C, H, W), each mirrored or not."""
    flip = (torch.rand(len(images), **drawn_by(generator)) < 0.5).to(images.device)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def random_shift(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Images (B, C, S, S), each `shifted` by up to `most` pixels down or up and to either side."""
    offsets = torch.randint(-most, most + 1, (2, len(images), 1), **drawn_by(generator))
    return shifted(images, *offsets.to(images.device))


class Batches:
    """Endless shuffled batches, a pure function of (seed, step, kind of device): a resumed run draws the same ones.

    `images` are photographs, uint8 (N, 3, H, W), or latents of unit deviation, fp16 (N, 2, C, h, w), of each photograph
    and of its mirror image. `shift` is the most pixels of a `random_shift`; 0 for none.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch: int, seed: int, device: str, shift: int = 0):
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch, self.seed, self.device, self.shift = batch, seed, device, shift
        self.latent = images.dtype != torch.uint8
        self.alpha, self.sigma = (part.to(device) for part in alphas_sigmas())
        self.log_sigma = (self.sigma / self.alpha).log()

    def mirrored(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """x_0 (B, C, H, W), each mirrored or not."""
        if not self.latent:
            return random_flip(scaled(self.images[index]), generator)
        side = torch.randint(0, 2, index.shape, **drawn_by(generator))
        return self.images[index, side].float()

    def plain(self, first: int, last: int) -> torch.Tensor:
        """x_0 (B, C, H, W) of the images from first to before last, none mirrored."""
        images = self.images[first:last]
        return images[:, 0].float() if self.latent else scaled(images)

    def drawn(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator]:
        """x_0, t, eps, indices of one step, and the generator that drew them."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        index = torch.randint(0, len(self.labels), (self.batch,), **drawn_by(generator))
        x0 = self.mirrored(index, generator)
        t = draw_timesteps(self.batch, self.log_sigma, generator, LATENT_LOG_SIGMA if self.latent else LOG_SIGMA)
        eps = torch.randn(x0.shape, **drawn_by(generator))
        if self.shift:
            x0 = random_shift(x0, self.shift, generator)
        return x0, t, eps, index, generator

    def noised(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = (s[t][:, None, None, None] for s in (self.alpha, self.sigma))
        return (alpha * x0 + sigma * eps).contiguous(memory_format=torch.channels_last)

    def __call__(self, step: int) -> tuple[torch.Tensor, ...]:
        """x_t, t, x_0, eps, labels of one step."""
        x0, t, eps, index, _ = self.drawn(step)
        return self.noised(x0, t, eps), t, x0, eps, self.labels[index]
