"""Draws that stand in for what a network was not trained with, each sample's from its seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ASIDE = 0x9E3779B97F4A7C15
"""Added to a seed, so that these draws shift none of the sample's noise and do not repeat it."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed((int(seed) + _ASIDE) % 2**64)


def independent_labels(seeds: Sequence[int], labels: Sequence[int], steps: int) -> Tensor:
    """A label for each evaluation (steps, B), uniform over `labels`, whatever the sample's own.

    Independent condition guidance (Sadat et al. 2024, arXiv 2407.02687, section 4) takes the prediction under such a
    label for the unconditional one: of a label that says nothing of x_t, p(x_t | y) = p(x_t). The network takes it at
    its word, though: its mean over labels is sum_y p(y) score(x_t | y), and the unconditional score has p(y | x_t) there.
    The two are one where x_t is noise, and drift apart as x_t shows its class.
    """
    table = torch.tensor(list(labels), dtype=torch.long)
    return torch.stack([table[torch.randint(len(table), (steps,), generator=_generator(s))] for s in seeds], dim=1)


def disturbed_times(seeds: Sequence[int], spread: float, steps: int) -> Tensor:
    """What timesteps are multiplied by, 1 + spread n with n standard normal and not below 0, for each evaluation (steps, B).

    Time-step guidance (Sadat et al. 2024, arXiv 2407.02687, section 5) is autoguidance by the network itself at a
    timestep with noise. They add it to the timestep's embedding, s t^alpha n; this is the timestep itself, and alpha = 1.
    """
    drawn = [torch.randn((steps,), generator=_generator(seed)) for seed in seeds]
    return (1 + spread * torch.stack(drawn, dim=1)).clamp(min=0)
