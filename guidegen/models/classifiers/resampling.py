"""Pillow's image resampling as matrices, so that gradients flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Floats = NDArray[np.float64]


def _bicubic(x: Floats) -> Floats:
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


def _hamming(x: Floats) -> Floats:
    return np.where(np.abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0.0)


def _lanczos(x: Floats) -> Floats:
    return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0.0)


_FILTERS: dict[str, tuple[float, Callable[[Floats], Floats]]] = {  # how far each reaches, and what it is
    "box": (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    "bilinear": (1.0, lambda x: np.maximum(1 - np.abs(x), 0.0)),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, _lanczos),
}
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of its filters."""


def resize(images: Tensor, height: int, width: int, filter: str) -> Tensor:
    """Grey levels (B, C, H, W) in [0, 255] to (B, C, height, width), as `PIL.Image.resize` does it.

    Pillow resizes rows and columns one after the other and keeps whole levels in [0, 255] after each. Nothing
    is rounded here, for the gradient's sake; what a filter overshoots is cut off half a level beyond
    (where Pillow would round it back) the range of the image, or [0, 255] where that is wider.

    Args:
        images: (B, C, H, W), fp32 or fp64.
        height: in pixels.
        width: in pixels.
        filter: one of `FILTERS`.
    """
    low = images.amin((1, 2, 3), keepdim=True).clamp(max=0) - 0.5  # of each image: its batch must not matter
    high = images.amax((1, 2, 3), keepdim=True).clamp(min=255) + 0.5
    overshoots = filter in ("bicubic", "lanczos")
    before, after = images.shape[-2:], (height, width)
    axes = (-2, -1) if overshoots and _height_first(*before, *after, filter) else (-1, -2)
    with torch.autocast(images.device.type, enabled=False):
        for axis in axes:
            if before[axis] == after[axis]:
                continue
            weights = _matrix(before[axis], after[axis], filter, images.device, images.dtype)
            images = images @ weights.T if axis == -1 else weights @ images
            images = images.clamp(low, high) if overshoots else images
    return images


@lru_cache(maxsize=64)
def _height_first(high: int, wide: int, height: int, width: int, filter: str) -> bool:
    """Whether Pillow resizes the height before the width, which its releases decide differently."""
    number = next(number for number, name in FILTERS.items() if name == filter)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, (high, wide, 3), np.uint8) * np.uint8(255))
    expected = image.resize((wide, height), number).resize((width, height), number)
    return image.resize((width, height), number).tobytes() == expected.tobytes()


@lru_cache(maxsize=64)
def _matrix(before: int, after: int, filter: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(after, before): the weight of each pixel before in each pixel after."""
    weights = _nearest(before, after) if filter == "nearest" else _weights(before, after, *_FILTERS[filter])
    with torch.inference_mode(False):  # kept for calls that take gradients
        return torch.from_numpy(weights).to(device, dtype)


def _weights(before: int, after: int, support: float, filter: Callable[[Floats], Floats]) -> Floats:
    """`precompute_coeffs` of Pillow's src/libImaging/Resample.c: the filter is widened to shrink an image."""
    scale = before / after
    wide = max(scale, 1.0)
    weights = np.zeros((after, before))
    for i in range(after):
        centre = (i + 0.5) * scale
        first = max(int(centre - support * wide + 0.5), 0)
        last = min(int(centre + support * wide + 0.5), before)
        weights[i, first:last] = filter((np.arange(first, last, dtype=np.float64) - centre + 0.5) / wide)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _nearest(before: int, after: int) -> Floats:
    """`ImagingScaleAffine` of Pillow's src/libImaging/Geometry.c, which adds up its steps in double precision."""
    step = before / after
    weights, position = np.zeros((after, before)), step * 0.5
    for i in range(after):
        weights[i, min(math.floor(position), before - 1)] = 1
        position += step
    return weights
