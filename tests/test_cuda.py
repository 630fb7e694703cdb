"""Half precision on CUDA against fp32 there, and what a small card does. They skip themselves where there is none.

GUIDEGEN_TEST_DEVICE=cpu runs the same on the CPU, slowly, but for what only CUDA can be asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from conftest import settings_of
from PIL import Image
from setups import open_sampler
from test_memory import small_device
from torch import Tensor

from guidegen import BUNDLED, open_checkpoint, open_classifier, to_uint8
from guidegen.runs.directory import Run
from guidegen.sampling.device import DTYPES, pick_dtype
from guidegen.sampling.sampler import Sampler
from guidegen.sampling.schedulers import SCHEDULERS
from guidegen.sampling.setup import plan_scheduler
from guidegen.sampling.worker import draw
from guidegen.scores.noise import Level
from guidegen.spec.cell import Cell

pytestmark = pytest.mark.cuda

CHECKPOINT = open_checkpoint(BUNDLED)
JUDGE = open_classifier(CHECKPOINT.bundled_classifier or "")
LABELS = [207, 779, 950, 1]
TIMESTEPS = [0, 1, 2, 5, 10, 20, *range(50, 1000, 50), 999]
STEPS = 6


@pytest.fixture(scope="session")
def device() -> torch.device:
    name = os.environ.get("GUIDEGEN_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA")
    return torch.device(name)


@lru_cache(maxsize=8)
def sampler(mode: str, dtype: str, device: torch.device, scheduler: str = "ddim", steps: int = STEPS) -> Sampler:
    classifier = JUDGE if mode in ("classifier", "both") else None
    walker = plan_scheduler(CHECKPOINT, scheduler, steps, None)
    return open_sampler(CHECKPOINT, classifier, walker, settings_of(mode, steps, dtype=dtype), device)


def cells_of(mode: str, count: int = 4) -> list[Cell]:
    both = 2.0 if mode == "both" else None
    return [Cell(LABELS[seed % 4], seed, 3.0, w_classifier=both) for seed in range(count)]


def noised(t: int, device: torch.device) -> tuple[Tensor, Tensor, Level]:
    """Pictures of the grid in the card at the noise of t, t itself, and its level."""
    scheduler = plan_scheduler(CHECKPOINT, "ddpm", 1000, None)
    kept = float(scheduler.alphas_cumprod.double()[t])
    level = Level(kept**0.5, (1 - kept) ** 0.5)
    noise = torch.randn((4, 3, 32, 32), generator=torch.Generator().manual_seed(t))
    return (level.alpha * pictures() + level.sigma * noise).to(device), torch.tensor(t, device=device), level


@lru_cache(maxsize=1)
def pictures() -> Tensor:
    """Four pictures of the bundled checkpoint in fp32, on the CPU."""
    drawn, _ = sampler("cfg", "fp32", torch.device("cpu"), steps=10).draw(cells_of("cfg"))
    return drawn.clamp(-1, 1)


def apart(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of what is exact."""
    return float((found - exact).double().norm() / exact.double().norm())


def psnr(found: Tensor, exact: Tensor) -> Tensor:
    error = (to_uint8(found).double() - to_uint8(exact).double()).square().flatten(1).mean(1)
    return 10 * (255**2 / error.clamp(min=1e-9)).log10()


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 0.02), ("bf16", 0.15)])
def test_predictions_are_those_of_fp32_at_every_noise_level(device: torch.device, dtype: str, bound: float) -> None:
    """fp16 rounds at 2^-11 and bf16 at 2^-8; some forty layers add up to about ten times that at the least noise."""
    labels = torch.tensor(LABELS, device=device)
    exact, half = (sampler("cfg", name, device).condition([])[0] for name in ("fp32", dtype))
    for t in TIMESTEPS:
        x_t, when, _ = noised(t, device)
        with torch.no_grad():
            found, expected = half(x_t, when, labels), exact(x_t, when, labels)
        assert (found.dtype, found.device.type) == (torch.float32, device.type)
        assert apart(found, expected) < bound, t


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 0.02), ("bf16", 0.1)])
@pytest.mark.parametrize("towards", ["its own label", "another label"])
def test_gradients_neither_underflow_nor_overflow(device: torch.device, dtype: str, bound: float, towards: str) -> None:
    """Where the classifier is sure of the label the gradient is smallest, and where it is sure of another, largest."""
    labels = torch.tensor(LABELS if towards == "its own label" else LABELS[1:] + LABELS[:1], device=device)
    exact, half = (sampler("classifier", name, device).classifier for name in ("fp32", dtype))
    assert exact is not None
    assert half is not None
    for t in TIMESTEPS:
        x_t, when, level = noised(t, device)
        found, expected = (score(x_t, when, labels, level, x_t) for score in (half, exact))
        assert found.isfinite().all(), t
        assert ((found == 0) & (expected != 0)).double().mean() < 0.005, t
        for one, other in zip(found, expected, strict=True):
            assert apart(one, other) < bound, t


@pytest.mark.parametrize(("dtype", "decibels"), [("fp16", 30.0), ("bf16", 20.0)])
@pytest.mark.parametrize("mode", ["cfg", "classifier", "both"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_images_are_those_of_fp32(device: torch.device, scheduler: str, mode: str, dtype: str, decibels: float) -> None:
    """Least PSNR of four images, which feed each step's rounding into the next."""
    expected, _ = sampler(mode, "fp32", device, scheduler).draw(cells_of(mode))
    found, _ = sampler(mode, dtype, device, scheduler).draw(cells_of(mode))
    assert found.isfinite().all()
    assert psnr(found, expected).min() > decibels, psnr(found, expected)


@pytest.mark.parametrize("kind", ["dit", "stable_diffusion", "stable_diffusion_xl"])
def test_latent_networks_keep_half_their_weights_in_half_precision(device: torch.device, kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(getattr(pipelines, kind)(tmp_path / kind))
    text = kind != "dit"
    cells = [Cell(None, seed, 3.0, prompt="a red fox") if text else Cell(207, seed, 3.0) for seed in range(2)]
    drawn: dict[str, Tensor] = {}
    for dtype in ("fp32", "fp16"):
        walker = plan_scheduler(checkpoint, "ddim", 4, None)
        opened = open_sampler(checkpoint, None, walker, settings_of("cfg", 4, dtype=dtype), device)
        drawn[dtype], _ = opened.draw(cells)
        network: Any = opened.condition(cells)[0].network  # type: ignore[attr-defined]
        kept = {weight.dtype for name, weight in network.named_parameters() if "to_q.weight" in name}
        assert kept == {DTYPES[dtype] or torch.float32}
        assert {weight.device.type for weight in network.parameters()} == {device.type}
    assert psnr(drawn["fp16"], drawn["fp32"]).min() > 25.0


def test_the_networks_in_fp32_are_read_again(device: torch.device) -> None:
    half = sampler("both", "fp16", device)
    assert half.in_fp32 is not None
    again = half.in_fp32()
    assert half.in_fp32().classifier is again.classifier, "they are read once"
    cells = cells_of("both", 2)
    # sums on a GPU differ between two runs of one sampler: by up to 0.002 on an H100
    apart = 0.01 if device.type == "cuda" else 0.0
    torch.testing.assert_close(again.draw(cells)[0], sampler("both", "fp32", device).draw(cells)[0], atol=apart, rtol=0.0)


def test_auto_is_fp16_on_cuda_alone(device: torch.device) -> None:
    assert pick_dtype("auto", device) == ("fp16" if device.type == "cuda" else "fp32")


@contextmanager
def room_for(count: int, whole: Sampler) -> Iterator[Sampler]:
    """The sampler with memory for `count` images: the allocator's own limit on CUDA, elsewhere a stand-in."""
    if whole.device.type != "cuda":
        yield small_device(whole, count, lambda: torch.OutOfMemoryError("a stand-in"), [])
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(whole.device)
    whole.draw(cells_of(whole.setup.settings.mode, count))
    peak = torch.cuda.max_memory_reserved(whole.device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(whole.device).total_memory
    torch.cuda.set_per_process_memory_fraction(1.05 * peak / total)  # of the current device: "cuda" has no index
    try:
        yield whole
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_out_of_memory_is_recovered_from(device: torch.device, mode: str, tmp_path: Path) -> None:
    dtype = "fp16" if device.type == "cuda" else "fp32"
    whole, batches = sampler(mode, dtype, device, steps=2), []
    fits, count = (32, 256) if device.type == "cuda" else (2, 6)
    settings = settings_of(mode, 2, dtype=dtype)
    cells = cells_of(mode, count)
    with room_for(fits, whole) as small, Run(tmp_path / "run", settings, {}) as run:
        rows = [row for _, row in draw(small, cells, run, str, count, on_step=batches.append)]
    assert [row["status"] for row in rows] == ["ok"] * count
    assert 0 < max(batches) < count, "it was halved"
    expected = to_uint8(whole.draw(cells[:fits])[0]).double()
    found = np.stack([np.asarray(Image.open(tmp_path / "run" / row["file"])) for row in rows[:fits]])
    error = (torch.from_numpy(found).double() - expected).square().flatten(1).mean(1)
    assert (10 * (255**2 / error.clamp(min=1e-9)).log10()).min() > 30.0, "and the images are the same"


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.keys() - {"ddpm", "unipc"}))
def test_steps_do_not_wait_for_the_device(device: torch.device, scheduler: str) -> None:
    """DDPM copies the noise of the seeds' generators at each step, and UniPC solves its equations on the device."""
    if device.type != "cuda":
        pytest.skip("only CUDA tells of synchronisations")
    opened, done = sampler("cfg", "fp16", device, scheduler), 0
    opened.draw(cells_of("cfg"))

    def on_step() -> None:
        nonlocal done
        done += 1
        torch.cuda.set_sync_debug_mode("error" if done < len(opened.scheduler.timesteps) else "default")

    try:
        opened.draw(cells_of("cfg"), on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done == len(opened.scheduler.timesteps)
