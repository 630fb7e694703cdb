"""What goes between host and device in the loop, with the meta device for a GPU.

A value read back from it raises, and each tensor that is sent there is counted: on CUDA either waits for all that
was launched before.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from guidegen.sampling.loop import sample
from guidegen.sampling.schedulers import SCHEDULERS, make_scheduler
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import Cost
from guidegen.scores.noise import Level

META = torch.device("meta")
CONFIG = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon"}


class Sent(TorchFunctionMode):
    """Counts the tensors that are made of numbers on the device or copied there."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        there = any(str(value) == "meta" for value in (*args, *kwargs.values()) if not isinstance(value, Tensor))
        away = name == "to" and there and args[0].device != META
        self.count += away or (name in ("tensor", "as_tensor") and there)
        return function(*args, **kwargs)


class Network:
    """Stands for a denoiser and a classifier on the device."""

    prediction_type, cost = "epsilon", Cost(1)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, *others: Tensor | Level) -> Tensor:
        assert x.device == t.device == labels.device == META
        return x * 0.5


def copies(scheduler: str, steps: int, w_classifier: float = 0.0) -> int:
    guide = Guide(Network(), [1, 2], [3.0, 0.0], [w_classifier] * 2, Network(), META)  # type: ignore[arg-type]
    with Sent() as sent:
        drawn = sample(guide, make_scheduler(CONFIG, scheduler), [0, 1], (3, 8, 8), steps, None, META)
    assert (drawn.shape, drawn.device) == ((2, 3, 8, 8), META)
    return sent.count


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.keys() - {"ddpm", "unipc"}))
@pytest.mark.parametrize("w_classifier", [0.0, 2.0])
def test_steps_send_nothing_and_read_nothing_back(scheduler: str, w_classifier: float) -> None:
    assert copies(scheduler, 4, w_classifier) == copies(scheduler, 8, w_classifier)


def test_ddpm_sends_the_noise_of_its_seeds() -> None:
    assert copies("ddpm", 8) - copies("ddpm", 4) == 4
