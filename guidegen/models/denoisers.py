"""Networks behind the `Denoiser` interface of `guidegen.scores.guided`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guidegen.arguments import one_of, whole
from guidegen.scores.interfaces import NULL, autocast
from guidegen.scores.noise import PREDICTION_TYPES, PredictionType


class _Network:
    """What all diffusers networks share: autocast, and the split of a learned variance.

    A learned variance is twice the channels, of which guidance sees the mean only (Nichol &
    Dhariwal 2021, arXiv 2102.09672).
    """

    null_label: int | None = None
    rows: int | None = None
    """How many labels the network distinguishes, the null one included; None where it takes any."""

    def __init__(self, network: nn.Module, prediction_type: PredictionType, autocast: torch.dtype | None):
        config: Any = getattr(network, "config", None)
        if not hasattr(config, "in_channels"):
            raise TypeError(f"{type(self).__name__} takes a network of diffusers, found {type(network).__name__}.")
        one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        one_of("autocast", autocast, (None, torch.float16, torch.bfloat16))
        self.in_channels = config.in_channels
        self.network, self.prediction_type, self.autocast = network, prediction_type, autocast
        self.learned_variance = config.out_channels == 2 * config.in_channels

    def check_labels(self, labels: Iterable[int]) -> None:
        """Raises ValueError where the network has no such label, `NULL` without a null label included."""
        for label in labels if self.rows is not None else ():
            if label == NULL and self.null_label is None:
                raise ValueError("labels: the null condition is asked for, and the network has no null_label.")
            if label != NULL and not 0 <= label < (self.rows or 0):
                raise ValueError(f"labels: {label} is not one of the network's, which has {self.rows}, counted from 0.")

    def _check(self, x_t: Tensor, labels: Tensor) -> None:
        """Refuses shapes and labels that torch would refuse in words of its own; labels where reading them costs nothing."""
        if x_t.ndim != 4 or x_t.shape[1] != self.in_channels:
            raise ValueError(f"x_t is (B, {self.in_channels}, H, W), found {tuple(x_t.shape)}.")
        if labels.shape != (len(x_t),) or labels.is_floating_point():
            found = f"{tuple(labels.shape)} {labels.dtype}"
            raise ValueError(f"labels are {len(x_t)} whole numbers, one a row of x_t; found {found}.")
        if labels.device.type == "cpu":
            self.check_labels(labels.tolist())

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
        projected = getattr(config, "class_embed_type", None) is not None  # of UNet2DModel alone
        self.class_conditional = config.num_class_embeds is not None or projected
        self.rows = None if projected else config.num_class_embeds
        _check_null(null_label, self.rows)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from x_t (B, C, H, W), timestep t () and labels (B,) or `NULL`."""
        self._check(x_t, labels)
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
        config: Any = transformer.config
        self.null_label, self.rows = null_label, config.num_embeds_ada_norm + 1
        _check_null(null_label, self.rows)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from latents x_t (B, C, H, W), timestep t () and labels (B,) or `NULL`."""
        self._check(x_t, labels)
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
        self.texts, self.null_label, self.rows = texts, NULL, len(texts.states) - 1

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from latents x_t (B, C, H, W), timestep t () and labels (B,) or `NULL`."""
        self._check(x_t, labels)
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
        return _decoded(vae, z)

    return decode


def standardized_decoder(
    vae: Any, mean: Sequence[float], std: Sequence[float], image_range: tuple[float, float]
) -> Callable[[Tensor], Tensor]:
    """`latent_decoder` of standardised latents: from (B, C, h, w) to images in about [-1, 1], fp32.

    Args:
        vae: an `AutoencoderKL`.
        mean: of each channel of what it decodes.
        std: of each channel, that is, of one unit of the latents.
        image_range: of what it gives.
    """
    low, high = image_range

    def decode(latents: Tensor) -> Tensor:
        z = latents.float() * latents.new_tensor(std)[:, None, None] + latents.new_tensor(mean)[:, None, None]
        return (_decoded(vae, z) - low) * (2 / (high - low)) - 1

    return decode


def _decoded(vae: Any, z: Tensor) -> Tensor:
    with autocast(z, None):  # SDXL's decoder overflows in half precision
        return torch.cat([vae.decode(one, return_dict=False)[0] for one in torch.split(z, 1)])


def _check_null(null_label: int | None, rows: int | None) -> None:
    if null_label is not None and rows is not None:
        whole("null_label", null_label, 0, rows - 1)


def _with_null(labels: Tensor, null_label: int | None) -> Tensor:
    return labels if null_label is None else torch.where(labels == NULL, null_label, labels)
