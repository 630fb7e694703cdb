"""Autocast against fp32 on the bundled checkpoint: bf16 and fp16 on the CPU, fp16 on CUDA where there is one."""

from __future__ import annotations

import pytest
import torch
from conftest import settings_of
from torch import Tensor

from guidegen import BUNDLED, open_checkpoint, open_classifier, to_uint8
from guidegen.engine import open_painter, plan_scheduler
from guidegen.plan import Cell

CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")])
CELLS = [Cell(207, 0, 3.0), Cell(779, 1, 1.0), Cell(950, 2, 8.0), Cell(1, 3, 0.0)]
STEPS = 8


def paint(mode: str, dtype: str, device: str) -> Tensor:
    checkpoint = open_checkpoint(BUNDLED)
    judge = open_classifier(checkpoint.bundled_classifier or "") if mode == "classifier" else None
    scheduler = plan_scheduler(checkpoint, None, STEPS, None)
    painter = open_painter(checkpoint, judge, scheduler, settings_of(mode, STEPS, dtype=dtype), torch.device(device))
    images, _ = painter.paint(CELLS)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    return to_uint8(images).float()


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "decibels"), [("bf16", 22.0), ("fp16", 32.0)])
def test_half_precision_draws_the_same_pictures(mode: str, device: str, dtype: str, decibels: float) -> None:
    """PSNR of each image against fp32; bf16 keeps 8 bits and fp16 11, over eight steps of up to three calls."""
    error = (paint(mode, dtype, device) - paint(mode, "fp32", device)).square().flatten(1).mean(1)
    psnr = 10 * (255**2 / error.clamp(min=1e-9)).log10()
    assert psnr.min() > decibels, psnr
