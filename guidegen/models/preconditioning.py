"""Networks of x = x_0 + sigma eps behind their preconditioning: denoisers D(x; sigma) that predict x_0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guidegen.models.noise_schedule import EDM_CLASSES, in_sigma, own_scheduler
from guidegen.scores.interfaces import Denoiser
from guidegen.scores.noise import PredictionType


class Scales(NamedTuple):
    """D(x; sigma) = c_skip x + c_out F(c_in x + shift, c_noise): Karras et al. 2022 (arXiv 2206.00364), eq. 7."""

    skip: Tensor | float
    out: Tensor
    scale: Tensor | float
    noise: Tensor
    shift: float = 0.0


class SigmaDenoiser:
    """A network F behind its preconditioning.

    Args:
        network: as a denoiser, of whatever F predicts.
        scales: from sigma (), fp32, to the scales of eq. 7.
    """

    prediction_type: PredictionType = "sample"

    def __init__(self, network: Denoiser, scales: Callable[[Tensor], Scales]):
        self.network, self.scales = network, scales

    def check_labels(self, labels: Iterable[int]) -> None:
        """As the network's own."""
        if check := getattr(self.network, "check_labels", None):
            check(labels)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """E[x_0 | x] (B, C, H, W) fp32 from x (B, C, H, W), sigma () and labels (B,)."""
        # a sigma for each row where its time is disturbed
        skip, out, scale, noise, shift = self.scales(t.float()[:, None, None, None] if t.ndim else t.float())
        noise = noise.flatten() if t.ndim else noise
        return skip * x_t + out * self.network(scale * x_t + shift, noise, labels)


def preconditioned(network: Denoiser, scheduler_config: Mapping[str, Any]) -> Denoiser:
    """A network behind the preconditioning that goes with its scheduler; itself where alpha is not 1."""
    if not in_sigma(scheduler_config):
        return network
    config = own_scheduler(scheduler_config).config
    name = scheduler_config["_class_name"]
    if name in EDM_CLASSES:
        return SigmaDenoiser(network, lambda sigma: edm(sigma, config.sigma_data, config.prediction_type))
    if name == "CMStochasticIterativeScheduler":
        return SigmaDenoiser(network, lambda sigma: consistency(sigma, config.sigma_data, config.sigma_min))
    return SigmaDenoiser(network, karras_ve if name == "KarrasVeScheduler" else score)


def edm(sigma: Tensor, data: float = 0.5, prediction_type: str = "epsilon") -> Scales:
    """EDM's (table 1), with the signs of diffusers' EDM schedulers; `data` is the standard deviation of the data."""
    total = sigma**2 + data**2
    out = sigma * data / total.sqrt()
    return Scales(data**2 / total, out if prediction_type == "epsilon" else -out, 1 / total.sqrt(), 0.25 * sigma.log())


def consistency(sigma: Tensor, data: float = 0.5, least: float = 0.002) -> Scales:
    """Those of consistency models: D(x; least) = x (Song et al. 2023, arXiv 2303.01469, appendix C)."""
    total = sigma**2 + data**2
    skip, out = data**2 / ((sigma - least) ** 2 + data**2), (sigma - least) * data / total.sqrt()
    return Scales(skip, out, 1 / total.sqrt(), 250 * torch.log(sigma + 1e-44))


def score(sigma: Tensor) -> Scales:
    """Of a network of the score of x at sigma, as those of variance exploding SDEs are."""
    return Scales(1.0, sigma**2, 1.0, sigma)


def karras_ve(sigma: Tensor) -> Scales:
    """Of a network of the score of images in [0, 1], of images in [-1, 1] (2206.00364, eq. 213)."""
    return Scales(1.0, sigma**2 / 2, 0.5, sigma / 2, 0.5)
