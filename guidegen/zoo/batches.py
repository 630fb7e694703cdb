"""Photographs, noised at the levels of the bundled checkpoint's training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
LOG_SIGMA = (-0.6, 1.3)  # P_mean and P_std of log(sigma/alpha), for images of std 1/2


def load_images(data: Path, split: str, classes: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of `classes` as uint8 (N, 3, size, size) and their labels (N,), decoded once."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from PIL import Image

    images, labels = [], []
    for path in sorted(data.glob(f"{split}*.parquet")):
        table = pq.read_table(path)
        table = table.filter(pc.is_in(table["label"], value_set=pa.array(classes, pa.int32())))
        for raw, label in zip(table["image"], table["label"], strict=True):
            image = Image.open(io.BytesIO(raw.as_py())).convert("RGB").resize((size, size), Image.Resampling.BOX)
            images.append(np.asarray(image))
            labels.append(label.as_py())
    if not images:
        raise FileNotFoundError(f"no {split}*.parquet with labels {classes} in {data}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def alphas_sigmas() -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t (T,) of the training schedule."""
    from diffusers import DDPMScheduler

    cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod
    return cumprod.sqrt(), (1 - cumprod).sqrt()


def drawn_by(generator: torch.Generator) -> dict[str, Any]:
    """The arguments by which torch draws with a generator, on its device."""
    return {"generator": generator, "device": generator.device}


def draw_timesteps(batch: int, log_sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (B,): log-normal noise levels, one in ten uniform."""
    mean, std = LOG_SIGMA
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

    `shift` is the most pixels of a `random_shift`; 0 for none.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch: int, seed: int, device: str, shift: int = 0):
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch, self.seed, self.device, self.shift = batch, seed, device, shift
        self.alpha, self.sigma = (part.to(device) for part in alphas_sigmas())
        self.log_sigma = (self.sigma / self.alpha).log()

    def drawn(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator]:
        """x_0, t, eps, indices of one step, and the generator that drew them."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        index = torch.randint(0, len(self.labels), (self.batch,), **drawn_by(generator))
        x0 = random_flip(self.images[index].float() / 127.5 - 1, generator)
        t = draw_timesteps(self.batch, self.log_sigma, generator)
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
