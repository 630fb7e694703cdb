"""Batches that do not fit: halved once, for good; latents are decoded one at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from conftest import settings_of
from setups import open_sampler

from guidegen.errors import GuidegenError
from guidegen.models.checkpoint import open_checkpoint
from guidegen.models.denoisers import latent_decoder
from guidegen.runs.directory import Run
from guidegen.sampling import setup, worker
from guidegen.sampling.device import pick_batch_size
from guidegen.sampling.sampler import Sampler
from guidegen.spec.cell import Cell

CELLS = [Cell(i % 5, i, 2.0) for i in range(11)]
ERRORS: list[Callable[[], RuntimeError]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
]


def small_device(sampler: Sampler, fits: int, error: Callable[[], RuntimeError], sizes: list[int]) -> Any:
    """The sampler on a device with room for `fits` images."""

    class Small(Sampler):
        def draw(self, cells: Any, *others: Any, **named: Any) -> Any:
            sizes.append(len(cells))
            if len(cells) > fits:
                raise error()
            return super().draw(cells, *others, **named)

    return Small(**{field.name: getattr(sampler, field.name) for field in fields(sampler)})


@pytest.fixture
def sampler(with_null: Path) -> Sampler:
    checkpoint = open_checkpoint(with_null)
    walker = setup.plan_scheduler(checkpoint, None, 2, None)
    return open_sampler(checkpoint, None, walker, settings_of("cfg", 2), torch.device("cpu"))


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_that_does_not_fit_is_halved(sampler: Sampler, error: Callable[[], RuntimeError], tmp_path: Path) -> None:
    sizes: list[int] = []
    with Run(tmp_path / "run", settings_of("cfg", 2), {}) as run:
        drawn = list(worker.draw(small_device(sampler, 3, error, sizes), CELLS, run, str, 8))
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert [cell for cell, _ in drawn] == CELLS
    assert {row["status"] for _, row in drawn} == {"ok"}


@pytest.mark.parametrize("error", [*ERRORS, lambda: RuntimeError("CUDA error: out of memory"), MemoryError])
def test_memory_is_given_back_once_nothing_of_the_failed_batch_holds_it(
    sampler: Sampler, error: Callable[[], BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[list[bool]] = []

    class Hungry(Sampler):
        def draw(self, cells: Any, *others: Any, **named: Any) -> Any:
            if len(cells) < 4:
                return super().draw(cells, *others, **named)
            activations = torch.zeros(9)
            knot: list[Any] = [activations]
            knot.append(knot)  # a cycle, which only the garbage collector ends
            tensors.append(weakref.ref(activations))
            try:
                raise error()
            except (RuntimeError, MemoryError) as inner:  # as libraries do, which keep the first traceback
                raise inner from ValueError(str(activations.shape))

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append([tensor() is not None for tensor in tensors]))
    fields_of = {field.name: getattr(sampler, field.name) for field in fields(sampler)}
    with Run(tmp_path / "run", settings_of("cfg", 2), {}) as run:
        gc.disable()
        try:
            free = worker._free_memory
            monkeypatch.setattr(worker, "_free_memory", lambda _: free(torch.device("cuda")))
            drawn = list(worker.draw(Hungry(**fields_of), CELLS, run, str, 8))
        finally:
            gc.enable()
    assert alive == [[False], [False, False]]
    assert [cell for cell, _ in drawn] == CELLS


def test_one_image_that_does_not_fit_is_told(sampler: Sampler, tmp_path: Path) -> None:
    with Run(tmp_path / "run", settings_of("cfg", 2), {}) as run, pytest.raises(GuidegenError, match="Not even one image"):
        list(worker.draw(small_device(sampler, 0, ERRORS[0], []), CELLS, run, str, 8))


def test_other_errors_are_not_taken_for_it(sampler: Sampler, tmp_path: Path) -> None:
    def broken() -> RuntimeError:
        return RuntimeError("shapes do not fit")

    with Run(tmp_path / "run", settings_of("cfg", 2), {}) as run, pytest.raises(RuntimeError, match="shapes do not fit"):
        list(worker.draw(small_device(sampler, 0, broken, []), CELLS, run, str, 8))


@pytest.mark.parametrize(
    ("device", "shape", "size"),
    [("cuda", (3, 64, 64), 64), ("cuda", (3, 512, 512), 1), ("cpu", (3, 32, 32), 16), ("cpu", (3, 128, 128), 4)],
)
def test_automatic_batches_shrink_with_the_image(device: str, shape: tuple[int, int, int], size: int) -> None:
    assert pick_batch_size("auto", torch.device(device), shape) == size
    assert pick_batch_size("7", torch.device(device), shape) == 7


def test_latents_are_decoded_one_at_a_time() -> None:
    vae = pipelines.tiny_vae()
    seen, whole = [], vae.decode

    def decode(z: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(len(z))
        return whole(z, **kwargs)

    latents = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = whole(latents / vae.config.scaling_factor).sample
        vae.decode = decode
        images = latent_decoder(vae)(latents)
    assert seen == [1, 1, 1]
    torch.testing.assert_close(images, together, rtol=1e-5, atol=1e-5)
