"""Networks of Karras et al. as denoisers: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

Source: Karras et al. 2022 (arXiv 2206.00364), equation 7 and table 1, for networks of Song et al. 2021 (2011.13456, VP and
VE), of Nichol & Dhariwal 2021 (2102.09672, iDDPM) and of EDM and EDM2 themselves.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from guidegen.models.preconditioning import Scales, edm

PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm")


class Preconditioned(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A network F with its preconditioning; subclasses are F.

    Their configs have `in_channels`, `num_class_embeds` (labels, with the null one last; None without), `null_label`,
    `precondition` (one of `PRECONDITIONINGS`) and the numbers that `coefficients` reads.
    """

    def predict(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """F of x (B, C, H, W), c_noise (B,) and one-hot labels (B, K), zeros for the null label."""
        raise NotImplementedError

    def forward(
        self, sample: Tensor, sigma: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        """The denoised estimate (B, C, H, W) fp32, as the only one of a tuple.

        Args:
            sample: x = x_0 + sigma eps (B, C, H, W).
            sigma: () or (B,).
            class_labels: ids (B,); None for an unconditional network.
            return_dict: for diffusers' sake.

        Raises:
            ValueError: a conditional network without labels.
        """
        config: Any = self.config
        one_hot = None
        if config.num_class_embeds is not None:
            if class_labels is None:
                raise ValueError("class_labels should be given to a class-conditional network")
            columns = config.num_class_embeds - (config.null_label is not None)
            one_hot = (class_labels[:, None] == torch.arange(columns, device=class_labels.device)).float()
        sigma = sigma.float().expand(len(sample))
        c = coefficients(sigma.reshape(-1, 1, 1, 1), config)
        predicted = self.predict(c.scale * sample, c.noise.flatten(), one_hot)[:, : config.in_channels]
        return (c.skip * sample + c.out * predicted.float(),)


def check_labels(num_class_embeds: int | None, null_label: int | None, precondition: str = "edm") -> int:
    """The columns of one-hot labels of a `Preconditioned` network, 0 without labels.

    Raises:
        ValueError: a null label that is not the last, or an unknown preconditioning.
    """
    if precondition not in PRECONDITIONINGS:
        raise ValueError(f"precondition should be one of {', '.join(PRECONDITIONINGS)}, found {precondition!r}")
    if null_label is None:
        return num_class_embeds or 0
    if num_class_embeds is None or null_label != num_class_embeds - 1:
        raise ValueError(f"null_label should be the last of {num_class_embeds} classes, found {null_label}")
    return null_label


def coefficients(sigma: Tensor, config: Any) -> Scales:
    """The coefficients at sigma of the preconditioning in a config."""
    kind = config.precondition
    if kind == "edm":
        return edm(sigma, config.sigma_data)
    if kind == "ve":
        return Scales(1, sigma, 1, (sigma / 2).log())
    scaled = 1 / (sigma**2 + 1).sqrt()
    if kind == "vp":
        time = vp_time(sigma, config.beta_d, config.beta_min)
        return Scales(1, -sigma, scaled, (config.train_steps - 1) * time)
    levels = torch.tensor(iddpm_sigmas(config.train_steps, config.c_1, config.c_2), device=sigma.device)
    index = (sigma.flatten()[:, None] - levels).abs().argmin(1)
    return Scales(1, -sigma, scaled, (config.train_steps - 1 - index).float())


def vp_time(sigma: Tensor, beta_d: float, beta_min: float) -> Tensor:
    """t in [0, 1] of a sigma of the variance preserving SDE."""
    return ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d


def vp_sigma(time: float, beta_d: float, beta_min: float) -> float:
    """The inverse of `vp_time`."""
    return math.sqrt(math.expm1(beta_d * time**2 / 2 + beta_min * time))


@cache
def iddpm_sigmas(steps: int, c_1: float, c_2: float) -> tuple[float, ...]:
    """The sigmas that an iDDPM knows, the largest first, and 0 (2206.00364, table 1)."""

    def kept(j: int) -> float:
        return math.sin(math.pi * j / steps / (c_2 + 1) / 2) ** 2

    sigmas = [0.0]
    for j in range(steps, 0, -1):
        sigmas.append(math.sqrt((sigmas[-1] ** 2 + 1) / max(kept(j - 1) / kept(j), c_1) - 1))
    return tuple(reversed(sigmas))
