"""Classifiers behind the `Classifier` interface of `guidegen.scores.guidance`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_FIRST_SCALE = 2.0**10
_SCALE_STEP = 2.0**5
_SCALE_TRIES = 6


def gradient_of_log_probability(logits_of: Callable[[Tensor], Tensor], x: Tensor, columns: Tensor, scaled: bool) -> Tensor:
    """grad of log softmax(logits_of(x))[columns] with respect to x, in fp32.

    Half precision underflows below 6e-8 and overflows above 65504 inside the network, so with
    `scaled` the log-probability of each sample is multiplied by a power of two before backward
    and its gradient divided by it after; a sample whose gradient overflows is done again with a
    smaller one. Each sample has its own scale: the batch around it changes nothing.

    Args:
        logits_of: images (B, C, H, W) -> logits (B, K).
        x: images (B, C, H, W), fp32.
        columns: the column of each sample's label (B,).
        scaled: whether the network runs in fp16.

    Returns:
        (B, C, H, W) fp32; not finite only where no scale makes it so.
    """
    scale = torch.full((len(x),), _FIRST_SCALE if scaled else 1.0, device=x.device)
    for attempt in range(_SCALE_TRIES):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            log_p = logits_of(leaf).float().log_softmax(dim=-1).gather(1, columns[:, None])[:, 0]
            (gradient,) = torch.autograd.grad((log_p * scale).sum(), leaf)
        gradient = gradient.float() / scale[:, None, None, None]
        if not scaled or attempt == _SCALE_TRIES - 1:
            break
        overflow = ~gradient.flatten(1).isfinite().all(dim=1)
        if not overflow.any():
            break
        scale = torch.where(overflow, scale / _SCALE_STEP, scale)
    return gradient


class NoisyScore:
    """grad log p(y | x_t) of a noise-aware classifier, one that takes (x_t, t).

    Args:
        network: `forward(x_t (B, C, H, W), t (B,)) -> logits (B, K)`, such as `NoisyClassifier`;
            trained on the noise schedule of the denoiser that it will guide.
        columns: label id -> column of the logits.
        autocast: fp16 or bf16; None computes in fp32. The softmax is fp32 always.
    """

    def __init__(self, network: nn.Module, columns: Mapping[int, int], autocast: torch.dtype | None = None):
        self.network, self.autocast = network.requires_grad_(False), autocast
        self._column = torch.full((max(columns) + 1,), -1, dtype=torch.long)
        for label, column in columns.items():
            self._column[label] = column

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """grad log p(label | x_t), (B, C, H, W) fp32."""
        self._column = self._column.to(x_t.device)

        def logits_of(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                logits: Tensor = self.network(x, t.expand(len(x)))
            return logits

        return gradient_of_log_probability(logits_of, x_t, self._column[labels], scaled=self.autocast == torch.float16)
