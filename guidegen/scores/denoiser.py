"""Networks behind the `Denoiser` interface of `guidegen.scores.guidance`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from guidegen.scores.diffusion import PredictionType
from guidegen.scores.guidance import NULL


def autocast(x: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on the device of `x`; None computes in fp32."""
    return torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class UNetDenoiser:
    """A diffusers `UNet2DModel`, with or without classes.

    Knows the null label, the split of a learned variance (twice the channels: only the mean is
    guided, Nichol & Dhariwal 2021, arXiv 2102.09672) and autocast.

    Args:
        unet: the network, fp32 weights, in eval mode.
        prediction_type: what it predicts.
        null_label: the class id that means "no label"; None where there is none.
        autocast: fp16 or bf16; None computes in fp32.
    """

    def __init__(
        self,
        unet: nn.Module,
        prediction_type: PredictionType,
        null_label: int | None = None,
        autocast: torch.dtype | None = None,
    ):
        config: Any = unet.config
        self.unet, self.prediction_type, self.null_label = unet, prediction_type, null_label
        self.autocast = autocast
        self.class_conditional = config.num_class_embeds is not None or config.class_embed_type is not None
        self.learned_variance = config.out_channels == 2 * config.in_channels

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from x_t (B, C, H, W), timestep t () and labels (B,) or `NULL`."""
        with autocast(x_t, self.autocast):
            output: Tensor = self.unet(x_t, t, class_labels=self._class_labels(labels), return_dict=False)[0]
        if self.learned_variance:
            output = output.chunk(2, dim=1)[0]
        return output.float()

    def _class_labels(self, labels: Tensor) -> Tensor | None:
        if not self.class_conditional:
            return None
        if self.null_label is None:
            return labels
        return torch.where(labels == NULL, self.null_label, labels)
