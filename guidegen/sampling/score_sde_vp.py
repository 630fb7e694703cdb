"""The variance preserving SDE of Song et al. 2021 (arXiv 2011.13456), walked as diffusers' deprecated class walks it."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from guidegen.sampling.sigma_schedulers import EvaluationScheduler, Generators, noise_like


class ScoreSdeVpScheduler(EvaluationScheduler):
    """Euler-Maruyama over the reverse SDE with linear betas (eq. 11 and appendix B), in the steps of diffusers' class.

    That class has no `step` and no pipeline, and its config does not say what timesteps its networks read. Here it walks
    the networks of other classes: time t is told as the timestep at the same noise level, between two of the training.

    Args:
        num_train_timesteps: T, timesteps of the training.
        beta_start: T times less than beta at time 0.
        beta_end: T times less than beta at time 1.
        beta_schedule: linear alone.
        prediction_type: epsilon alone.
        sampling_eps: the time of the last step, from 1.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        sampling_eps: float = 1e-3,
    ):
        if not 0 < sampling_eps < 1:
            raise ValueError("sampling_eps should be between 0 and 1")
        if beta_schedule != "linear":
            raise ValueError(f"it walks linear betas, not {beta_schedule}")
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Sets the times, their `alpha_bars`, and the timesteps of the network at these levels."""
        config, count = self.config, self.config.num_train_timesteps
        self._times = torch.linspace(1, config.sampling_eps, num_inference_steps).double().tolist()
        low, high = count * config.beta_start, count * config.beta_end
        self._betas = [low + t * (high - low) for t in self._times]
        self.alpha_bars = [math.exp(-0.5 * t**2 * (high - low) - t * low) for t in self._times]
        logs = self.alphas_cumprod.double().log()
        wanted = torch.tensor(self.alpha_bars).double().log()
        after = torch.searchsorted(-logs, -wanted).clamp(1, count - 1)
        part = (wanted - logs[after - 1]) / (logs[after] - logs[after - 1])
        self.timesteps = (after - 1 + part.clamp(0, 1)).float()
        self._evaluation = 0

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """From a prediction of the noise at x to the x of the next time; the last step adds no noise."""
        i, count = self._evaluation, len(self._times)
        self._evaluation += 1
        score = -model_output / math.sqrt(1 - self.alpha_bars[i])
        mean = sample + self._betas[i] / count * (0.5 * sample + score)
        if self._evaluation == count:
            return (mean,)
        return (mean + math.sqrt(self._betas[i] / count) * noise_like(sample, generator),)
