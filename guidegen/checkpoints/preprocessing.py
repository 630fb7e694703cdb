"""What a transformers image processor does to an image, in torch, so that gradients flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as `resample` has them


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalise, as `preprocessor_config.json` says.

    Attributes:
        height: to resize to; None keeps the size.
        width: to resize to; None with a height makes it the shorter edge.
        crop: (height, width) of the centre crop; None crops nothing.
        mode: bilinear, bicubic or nearest.
        mean: of each channel in [0, 1].
        std: of each channel in [0, 1].
    """

    height: int | None
    width: int | None
    crop: tuple[int, int] | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Reads `preprocessor_config.json`; `size` may be a number, edges, or height and width.

        Raises:
            ValueError: a size or a resampling filter of an unknown kind.
        """
        size, crop = config.get("size"), None
        height = width = None
        if config.get("do_resize", True) and size is not None:
            height, width = _edges(size)
        if config.get("do_center_crop"):
            high, wide = _edges(config.get("crop_size", size))
            crop = (high, wide or high)
        if width is None and height is not None and "crop_pct" in config:  # ConvNeXT: resize to more, crop the rest
            full, crop = height, (height, height)
            if full < 384:
                height = int(full / (config["crop_pct"] or 224 / 256))
            else:
                width = full
        mode = _MODES.get(config.get("resample", 2))
        if mode is None:
            raise ValueError(f"unknown resample {config.get('resample')!r}")
        normal = config.get("do_normalize", True)
        mean = tuple(config.get("image_mean") or (0.5,) * 3) if normal else (0.0,) * 3
        std = tuple(config.get("image_std") or (0.5,) * 3) if normal else (1.0,) * 3
        return cls(height, width, crop, mode, mean, std)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to what the network takes (B, 3, h, w)."""
        x = images / 2 + 0.5
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.height is not None:
            x = self._resize(x, self.height)
        if self.crop is not None:
            x = _centre_crop(x, *self.crop)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std

    def _resize(self, x: Tensor, height: int) -> Tensor:
        high, wide = x.shape[-2:]
        if self.width is not None:
            size = (height, self.width)
        elif high <= wide:
            size = (height, int(height * wide / high))
        else:
            size = (int(height * high / wide), height)
        smooth = self.mode != "nearest"
        return interpolate(x, size, mode=self.mode, antialias=smooth, **({"align_corners": False} if smooth else {}))


class ImageClassifier(nn.Module):
    """A transformers image classifier with its preprocessing: [-1, 1] images (B, C, H, W) -> logits (B, K)."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, images: Tensor) -> Tensor:
        """Un-normalised logits."""
        logits: Tensor = self.network(pixel_values=self.preprocessing(images)).logits
        return logits


class CleanClassifier(nn.Module):
    """A noise-aware classifier read at t = 0, where images are clean: (B, C, H, W) -> logits (B, K)."""

    def __init__(self, network: Callable[..., Tensor]):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Un-normalised logits."""
        return self.network(images, images.new_zeros(len(images)).long())


def _edges(size: Any) -> tuple[int, int | None]:
    """(height, width), or (shorter edge, None)."""
    if isinstance(size, int):
        return size, None
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), None
    if "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    raise ValueError(f"unknown size {size!r}")


def _centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The middle (height, width); what is too small is padded with black."""
    high, wide = x.shape[-2:]
    down, right = max(0, height - high), max(0, width - wide)
    if down or right:
        x = pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        high, wide = x.shape[-2:]
    top, left = (high - height) // 2, (wide - width) // 2
    return x[..., top : top + height, left : left + width]
