"""Samplers of x_t = x_0 + sigma eps: EDM's own, score SDE's, and those of diffusers.

All have the form of a scheduler of diffusers, with sigma as the timestep. They take denoised estimates, the posterior
mean E[x_0 | x_t], unscaled inputs, and one generator a sample; no sample's step depends on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Generators = Sequence[torch.Generator] | torch.Generator | None


def noise_like(x: Tensor, generator: Generators) -> Tensor:
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


class EvaluationScheduler(diffusers.SchedulerMixin, ConfigMixin):
    """A scheduler that counts the evaluations of the network, of which a step may take several."""

    _evaluation = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts at the first evaluation."""
        self._evaluation = 0


class EDMHeunScheduler(EvaluationScheduler):
    """EDM's sampler: Heun's method, with churn (Karras et al. 2022, arXiv 2206.00364, algorithm 2) or without (algorithm 1).

    A step raises the noise from sigma to (1 + gamma) sigma, and goes from there to the next sigma, which is zero at
    last; it evaluates the denoiser at both ends, and at the last step once. With churn it draws noise at each step, also
    where gamma is zero, as the published code does.

    Args:
        sigma_min: the least sigma but zero.
        sigma_max: the largest.
        rho: how much shorter the steps get towards small sigmas (eq. 5).
        S_churn: noise that is added over all steps; gamma is at most S_churn over their number, and sqrt(2) - 1.
        S_tmin: the least sigma that noise is added at.
        S_tmax: the largest.
        S_noise: standard deviation of that noise.
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        S_churn: float = 0.0,  # noqa: N803, the names of the paper
        S_tmin: float = 0.0,  # noqa: N803
        S_tmax: float = math.inf,  # noqa: N803
        S_noise: float = 1.0,  # noqa: N803
    ):
        if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
            raise ValueError("0 < sigma_min < sigma_max and 0 < rho should hold")
        if not (0 <= S_churn < math.inf and 0 <= S_noise < math.inf and 0 <= S_tmin <= S_tmax):
            raise ValueError("0 <= S_churn, 0 <= S_noise and 0 <= S_tmin <= S_tmax should hold")
        self.init_noise_sigma = sigma_max
        self._churn = (S_churn, S_tmin, S_tmax, S_noise)

    def _sigmas_of(self, steps: int) -> list[float]:
        """The sigmas of the steps, eq. 5."""
        low, high = (sigma ** (1 / self.config.rho) for sigma in (self.config.sigma_min, self.config.sigma_max))
        return [float((high + i / max(steps - 1, 1) * (low - high)) ** self.config.rho) for i in range(steps)]

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Sets the sigmas of the steps, and those of the evaluations as `timesteps`, fp32."""
        churn, low, high, _ = self._churn
        starts = self._sigmas_of(num_inference_steps)
        gammas = [min(churn / num_inference_steps, 2**0.5 - 1) if low <= sigma <= high else 0.0 for sigma in starts]
        self._raised = [sigma + gamma * sigma for sigma, gamma in zip(starts, gammas, strict=True)]
        self._steps = [*starts, 0.0]
        pairs = [pair for i, raised in enumerate(self._raised) for pair in (raised, self._steps[i + 1])]
        self.timesteps = torch.tensor(pairs[:-1])
        self.sigmas = torch.tensor(self._steps)
        self._evaluation = 0
        self._start = self._slope = torch.empty(0)

    def raise_noise(self, sample: Tensor, generator: Generators = None) -> Tensor:
        """x at the sigma of the next evaluation: with the noise of churn where a step begins."""
        i, second = divmod(self._evaluation, 2)
        if second or not self._churn[0]:
            return sample
        added = math.sqrt(max(self._raised[i] ** 2 - self._steps[i] ** 2, 0.0))
        return sample + added * self._churn[3] * noise_like(sample, generator)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """From a denoised estimate at x to the x of the next evaluation; `sample` is what `raise_noise` gave."""
        i, second = divmod(self._evaluation, 2)
        raised, following = self._raised[i], self._steps[i + 1]
        slope = (sample - model_output) / (following if second else raised)
        self._evaluation += 1
        if second:
            return (self._start + (following - raised) * (0.5 * self._slope + 0.5 * slope),)
        self._start, self._slope = sample, slope
        return (sample + (following - raised) * slope,)


class KarrasVeScheduler(EDMHeunScheduler):
    """`EDMHeunScheduler` as diffusers' `KarrasVeScheduler` has it, whose images it draws.

    Its sigmas are the squares of those of table 1, and the image starts from sigma_max, not its square: only churn
    brings the noise to what the sigmas say.
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        s_noise: float = 1.007,
        s_churn: float = 80.0,
        s_min: float = 0.05,
        s_max: float = 50.0,
    ):
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError("0 < sigma_min < sigma_max should hold")
        if not (0 <= s_churn < math.inf and 0 <= s_noise < math.inf and 0 <= s_min <= s_max):
            raise ValueError("0 <= s_churn, 0 <= s_noise and 0 <= s_min <= s_max should hold")
        self.init_noise_sigma = sigma_max
        self._churn = (s_churn, s_min, s_max, s_noise)

    def _sigmas_of(self, steps: int) -> list[float]:
        low, high = self.config.sigma_min**2, self.config.sigma_max**2
        return [float(high * (low / high) ** (i / max(steps - 1, 1))) for i in range(steps)]

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)
        kept = math.prod(sigma / raised for sigma, raised in zip(self._steps, self._raised, strict=False)) ** 2
        if kept > 0.02 and self.config.sigma_max > 1:
            raise ValueError(
                f"with so little churn {kept:.0%} of the noise is that of the start, which is not what its sigmas say: "
                "take more s_churn, or edm"
            )


class ScoreSdeVeScheduler(EvaluationScheduler):
    """Predictor and corrector of variance exploding SDEs (Song et al. 2021, arXiv 2011.13456, algorithm 2).

    The images of diffusers' class of this name; there the corrector's step of one sample depends on the rest of its
    batch, so they are equal where that draws them one by one.

    Args:
        num_train_timesteps: steps of the training; sigma is continuous.
        snr: the corrector's ratio of signal to noise.
        sigma_min: the least sigma.
        sigma_max: the largest.
        sampling_eps: the time of the last step, from 1.
        correct_steps: steps of the corrector before each of the predictor.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        snr: float = 0.15,
        sigma_min: float = 0.01,
        sigma_max: float = 1348.0,
        sampling_eps: float = 1e-5,
        correct_steps: int = 1,
    ):
        if not (0 < sigma_min < sigma_max < math.inf and 0 < sampling_eps < 1):
            raise ValueError("0 < sigma_min < sigma_max and 0 < sampling_eps < 1 should hold")
        if not (0 <= snr < math.inf and 0 <= correct_steps <= 100):
            raise ValueError("0 <= snr and 0 <= correct_steps <= 100 should hold")
        self.init_noise_sigma = sigma_max

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Sets the sigmas of the evaluations as `timesteps`, fp32."""
        if num_inference_steps < 2:
            raise ValueError("it takes two steps at least")
        low, high, last = self.config.sigma_min, self.config.sigma_max, num_inference_steps - 1
        times = torch.linspace(1, self.config.sampling_eps, num_inference_steps)
        table = torch.linspace(math.log(low), math.log(high), num_inference_steps).exp()
        # rounded down as in diffusers, in fp32
        self._from = table[(times * last).long()].tolist()
        self._to = [float(table[k - 1]) if k else 0.0 for k in (times * last).long().tolist()]
        self.sigmas = torch.tensor([*(low * (high / low) ** t for t in times.tolist()), 0.0])
        self.timesteps = self.sigmas[:-1].repeat_interleave(self.config.correct_steps + 1)
        self._evaluation = 0

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """From a denoised estimate at x to the x of the next evaluation; the last step adds no noise."""
        i, part = divmod(self._evaluation, self.config.correct_steps + 1)
        score = (model_output - sample) / float(self.sigmas[i]) ** 2
        noise = noise_like(sample, generator)
        self._evaluation += 1
        if part < self.config.correct_steps:
            lengths = [torch.linalg.vector_norm(each, dim=(1, 2, 3), keepdim=True) for each in (noise, score)]
            size = 2 * (self.config.snr * lengths[0] / lengths[1].clamp(min=torch.finfo(score.dtype).tiny)) ** 2
            return (sample + size * score + (2 * size) ** 0.5 * noise,)
        variance = self._from[i] ** 2 - self._to[i] ** 2
        mean = sample + variance * score
        return (mean if self._evaluation == len(self.timesteps) else mean + variance**0.5 * noise,)


class _Unscaled:
    """What makes a class of diffusers a sampler of this form: its network's preconditioning is left to the denoiser."""

    sigmas: Tensor

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self.timesteps = self.sigmas[:-1]
        self.is_scale_input_called = True

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: Any) -> Tensor:
        return model_output


class EDMEulerScheduler(_Unscaled, diffusers.EDMEulerScheduler):
    """That of diffusers, which takes denoised estimates."""


class EDMDPMSolverMultistepScheduler(_Unscaled, diffusers.EDMDPMSolverMultistepScheduler):
    """That of diffusers, which takes denoised estimates."""


class CMStochasticIterativeScheduler(_Unscaled, diffusers.CMStochasticIterativeScheduler):
    """That of diffusers, which takes the consistency function's estimates of the end of the flow.

    Args:
        timesteps: those of the training that are visited, from noise to image, such as "22,0", which was published for two
            steps of ImageNet at 64; None for evenly spaced ones. The others are as in diffusers.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
        timesteps: str | None = None,
    ):
        super().__init__(num_train_timesteps, sigma_min, sigma_max, sigma_data, s_noise, rho, clip_denoised)

    def set_timesteps(self, num_inference_steps: int) -> None:
        if self.config.timesteps is None:
            super().set_timesteps(num_inference_steps)
            return
        visited = [int(float(word)) for word in str(self.config.timesteps).split(",")]
        if len(visited) != num_inference_steps or visited[-1] < 0:
            raise ValueError(f"timesteps={self.config.timesteps} names {len(visited)} steps, from noise to image")
        diffusers.CMStochasticIterativeScheduler.set_timesteps(self, timesteps=visited)
        self.timesteps, self.is_scale_input_called = self.sigmas[:-1], True

    def get_scalings_for_boundary_condition(self, sigma: Any) -> tuple[float, float]:
        return 0.0, 1.0
