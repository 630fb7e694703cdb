"""An image does not depend on its batch: every method, mode, schedule and interval, and methods of one's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from guidegen import NULL, Guide
from guidegen.scores.interfaces import Cost, Step, Weights
from guidegen.scores.methods import METHODS, Method, find_method
from guidegen.scores.noise import Level
from guidegen.scores.schedule import make_schedule

STEPS = 5
LEVELS = [Level(math.cos(a), math.sin(a)) for a in torch.linspace(1.5, 0.1, STEPS).tolist()]
SCHEDULES = [None, "v", "linear", "lambda", "inverse-linear", "inverse-v", "beta:2,3"]
INTERVALS = [None, "20%:60%", "0.3:2"]
WEIGHTS = [3.0, 0.5, 0.0, 1.0, -1.5]  # of five samples; the first alone and in other orders too
MODES = ["cfg", "classifier", "both", "auto on top"]


class Network:
    """Elementwise, so that a row has the same bits whatever stands beside it."""

    prediction_type = "epsilon"

    def __init__(self, strength: float = 1.0):
        self.strength = strength

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        label = (labels.float() - NULL)[:, None, None, None]
        return x_t * 0.3 + self.strength * label * torch.sin(x_t * (1 + 0.1 * t)) + 0.01 * t


class Judge:
    cost = Cost(1)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor) -> Tensor:
        return torch.cos(x_t + labels[:, None, None, None]) - 0.2 * x_t


def noise(seeds: Sequence[int]) -> Tensor:
    return torch.cat([torch.randn((1, 3, 6, 6), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def drawn(samples: Sequence[int], mode: str, method: Method, w_schedule: str | None, interval: str | None) -> list[Tensor]:
    """The samples with these numbers, in one batch."""
    w = [WEIGHTS[i] for i in samples]
    if method.gain:
        w = [each / 5 for each in w]  # CFG++ is for w up to 1
    zero, other = [0.0] * len(w), [WEIGHTS[i - 2] for i in samples]
    pairs = {"classifier": (zero, w), "both": (w, other)}
    w_label, w_classifier = pairs.get(mode, (w, zero))
    top = mode == "auto on top"
    guide = Guide(
        Network(),
        [i % 3 for i in samples],
        w_label,
        w_classifier,
        Judge(),
        starts=[i % 2 for i in samples],
        guiding=Network(0.5) if top else None,
        w_guide=[1.0 + i % 3 for i in samples] if top else None,
        method=method,
        schedule=make_schedule(LEVELS, interval, w_schedule, method, [*LEVELS[1:], Level(1.0, 0.0)]).weights,
        steps=STEPS,
    )
    x = noise([i % 2 for i in samples])
    for index, level in enumerate(LEVELS):
        x = x - 0.2 * guide(x, torch.tensor(float(index)), level, index)
    assert x.isfinite().all()
    return list(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_a_sample_is_the_same_alone_in_a_batch_and_in_another_order(name: str, mode: str) -> None:
    """To the last bit: all that the toy network and the methods do to a row is done to it alone."""
    everyone, turned = range(len(WEIGHTS)), [4, 2, 0, 3, 1]
    for w_schedule, interval in itertools.product(SCHEDULES, INTERVALS):
        setting = (mode, METHODS[name], w_schedule, interval)
        together = drawn(everyone, *setting)
        in_another_order = drawn(turned, *setting)
        pair = drawn([0, 1], *setting)  # beside w = 0.5, and no third one that mixes
        for i in everyone:
            if i in (0, 1, 4):
                assert torch.equal(together[i], drawn([i], *setting)[0]), (i, w_schedule, interval)
            assert torch.equal(together[i], in_another_order[turned.index(i)]), (i, w_schedule, interval)
        assert torch.equal(pair[0], together[0]), (w_schedule, interval)


CUSTOM = '''
def Mixing(unconditional, conditional, w, step):
    """Reads the whole batch, and remembers."""
    before = step.memory.get("mean", conditional)
    step.memory["mean"] = 0.5 * before + 0.5 * conditional
    step.memory["steps"] = step.memory.get("steps", 0) + 1
    difference = conditional - unconditional
    difference = difference / difference.norm().clamp(min=1e-6)
    conditional = conditional * (1 + 0.1 * step.memory["steps"])
    return conditional + (w - 1) * difference + 0.1 * step.memory["mean"].mean()
'''


@pytest.mark.parametrize("mode", MODES)
def test_a_method_of_ones_own_cannot_mix_samples(tmp_path: Path, mode: str) -> None:
    (tmp_path / "own.py").write_text(CUSTOM)
    method = find_method(f"{tmp_path / 'own.py'}:Mixing")[0]
    for w_schedule, interval in itertools.product(SCHEDULES, INTERVALS):
        together = drawn(range(5), mode, method, w_schedule, interval)
        for i in range(5):
            assert torch.equal(together[i], drawn([i], mode, method, w_schedule, interval)[0]), (i, w_schedule, interval)


def test_momentum_rests_where_a_sample_combines_nothing() -> None:
    """As in diffusers' guider: steps where guidance is off neither feed the momentum nor let it fade."""
    seen: list[tuple[int, float]] = []

    def watched(unconditional: Tensor, conditional: Tensor, w: Tensor, step: Step) -> Tensor:
        guided = METHODS["apg"].combine(unconditional, conditional, w, step)
        seen.append((step.index, step.memory["apg"].abs().sum().item()))
        return guided

    def off_at_step_one(index: int, asked: Weights) -> Weights:
        return asked if index != 1 else asked._replace(w=1.0)

    guide = Guide(
        Network(), [1, 2], [3.0, 1.0], method=Method("own", watched, "", "", ""), schedule=off_at_step_one, steps=3
    )
    for index in range(3):
        guide(noise([0, 1]), torch.tensor(0.0), LEVELS[2], index)
    (first, before), (last, after) = seen  # w = 1, the second sample, has nothing to combine
    assert (first, last) == (0, 2)
    assert after == pytest.approx(0.5 * before), "the same difference again, and a momentum of -0.5"
