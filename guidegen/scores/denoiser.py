"""Networks behind the `Denoiser` interface of `guidegen.scores.guidance`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guidegen.scores.diffusion import PredictionType
from guidegen.scores.guidance import NULL


def autocast(x: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on the device of `x`; None computes in fp32."""
    return torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class _Network:
    """What all diffusers networks share: autocast, and the split of a learned variance.

    A learned variance is twice the channels, of which guidance sees the mean only (Nichol &
    Dhariwal 2021, arXiv 2102.09672).
    """

    def __init__(self, network: nn.Module, prediction_type: PredictionType, autocast: torch.dtype | None):
        config: Any = network.config
        self.network, self.prediction_type, self.autocast = network, prediction_type, autocast
        self.learned_variance = config.out_channels == 2 * config.in_channels

    def _call(self, x_t: Tensor, t: Tensor, **condition: Any) -> Tensor:
        with autocast(x_t, self.autocast):
            output: Tensor = self.network(x_t, t, return_dict=False, **condition)[0]
        if self.learned_variance:
            output = output.chunk(2, dim=1)[0]
        return output.float()


class UNetDenoiser(_Network):
    """A diffusers `UNet2DModel`, with or without classes.

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
        super().__init__(unet, prediction_type, autocast)
        config: Any = unet.config
        self.null_label = null_label
        self.class_conditional = config.num_class_embeds is not None or config.class_embed_type is not None

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from x_t (B, C, H, W), timestep t () and labels (B,) or `NULL`."""
        return self._call(x_t, t, class_labels=_with_null(labels, self.null_label) if self.class_conditional else None)


class DiTDenoiser(_Network):
    """A diffusers `DiTTransformer2DModel` (Peebles & Xie 2022, arXiv 2212.09748).

    Args:
        transformer: the network, fp32 weights, in eval mode.
        prediction_type: what it predicts.
        null_label: the class id that means "no label".
        autocast: fp16 or bf16; None computes in fp32.
    """

    def __init__(
        self,
        transformer: nn.Module,
        prediction_type: PredictionType,
        null_label: int | None,
        autocast: torch.dtype | None = None,
    ):
        super().__init__(transformer, prediction_type, autocast)
        self.null_label = null_label

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from latents x_t (B, C, H, W), timestep t () and labels (B,) or `NULL`."""
        return self._call(x_t, t.expand(len(x_t)), class_labels=_with_null(labels, self.null_label))


@dataclass(frozen=True)
class Texts:
    """P prompts as a text-conditional UNet reads them; row 0 is the null condition.

    Attributes:
        states: hidden states of the text encoders (1 + P, L, D).
        pooled: pooled states (1 + P, E) of SDXL; None elsewhere.
        time_ids: SDXL's sizes and crop (6,); None elsewhere.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None


class TextDenoiser(_Network):
    """A diffusers `UNet2DConditionModel`, of Stable Diffusion or SDXL; its labels count prompts.

    Args:
        unet: the network, fp32 weights, in eval mode.
        prediction_type: what it predicts.
        texts: the null condition and the prompts: label i is its row i + 1, `NULL` its row 0.
        autocast: fp16 or bf16; None computes in fp32.
    """

    def __init__(self, unet: nn.Module, prediction_type: PredictionType, texts: Texts, autocast: torch.dtype | None = None):
        super().__init__(unet, prediction_type, autocast)
        self.texts = texts

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from latents x_t (B, C, H, W), timestep t () and labels (B,) or `NULL`."""
        rows = labels - NULL
        condition: dict[str, Any] = {"encoder_hidden_states": self.texts.states.index_select(0, rows)}
        if self.texts.pooled is not None and self.texts.time_ids is not None:
            condition["added_cond_kwargs"] = {
                "text_embeds": self.texts.pooled.index_select(0, rows),
                "time_ids": self.texts.time_ids.expand(len(rows), -1),
            }
        return self._call(x_t, t, **condition)


def latent_decoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """From latents (B, C, h, w) to images (B, 3, H, W) in about [-1, 1], fp32, as diffusers' pipelines do it.

    One image at a time: a decoder's activations outgrow a device long before its latents do.

    Args:
        vae: an `AutoencoderKL`.
    """
    config = vae.config
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))

    def decode(latents: Tensor) -> Tensor:
        z = latents.float() / config.scaling_factor
        if mean is not None and std is not None:  # SDXL's successors
            z = z * z.new_tensor(std)[:, None, None] + z.new_tensor(mean)[:, None, None]
        with autocast(z, None):  # SDXL's decoder overflows in half precision
            return torch.cat([vae.decode(one, return_dict=False)[0] for one in z.split(1)])

    return decode


def _with_null(labels: Tensor, null_label: int | None) -> Tensor:
    return labels if null_label is None else torch.where(labels == NULL, null_label, labels)
