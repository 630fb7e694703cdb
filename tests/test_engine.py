"""The sweep engine: what images share, what is drawn again, and how they reach the disk."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings_of, tiny_unet
from PIL import Image
from setups import open_sampler
from torch import Tensor

from guidegen.errors import GuidegenError
from guidegen.models.checkpoint import open_checkpoint, open_classifier
from guidegen.models.denoisers import UNetDenoiser
from guidegen.runs.directory import Run
from guidegen.runs.manifest import read_rows
from guidegen.sampling.device import pick_device
from guidegen.sampling.sampler import Sampler, Tally
from guidegen.sampling.setup import plan_scheduler
from guidegen.sampling.worker import draw
from guidegen.scores.fixed_rows import FixedClassifier, FixedDenoiser
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import NULL, Cost
from guidegen.scores.noise import Level
from guidegen.spec.cell import Cell
from guidegen.spec.plan import make_cells


def sampler_of(folder: Path, mode: str, steps: int, dtype: str = "fp32", fixed_rows: int | None = None) -> Sampler:
    checkpoint = open_checkpoint(str(folder))
    classifier = open_classifier(checkpoint.bundled_classifier or "")
    scheduler = plan_scheduler(checkpoint, "ddim", steps, None)
    settings = settings_of(mode, steps, dtype=dtype)
    return open_sampler(checkpoint, classifier, scheduler, settings, torch.device("cpu"), fixed_rows=fixed_rows)


def drawn(
    sampler: Sampler, cells: Sequence[Cell], folder: Path, size: int, dtype: str = "fp32"
) -> tuple[dict[Cell, Any], int]:
    """Rows of the cells, and the network calls that were made."""
    tally = Tally()
    with Run(folder, settings_of(sampler.setup.settings.mode, sampler.setup.settings.steps, dtype=dtype), {}) as run:
        rows = dict(draw(sampler, cells, run, str, size, tally=tally))
    return rows, tally.made


def pixels(folder: Path, row: dict[str, Any]) -> Any:
    with Image.open(folder / row["file"]) as image:
        return np.asarray(image).astype(int)


class Counted:
    """A denoiser that remembers the labels of each call."""

    prediction_type = "epsilon"

    def __init__(self) -> None:
        self.denoiser = UNetDenoiser(tiny_unet(num_class_embeds=6), "epsilon", 5)
        self.calls: list[list[int]] = []

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append(labels.tolist())
        with torch.no_grad():
            return self.denoiser(x_t, t, labels)


class Judge:
    """A gradient that depends on the sample and the label."""

    cost = Cost(1)

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: Level, null: Tensor) -> Tensor:
        self.rows += len(x_t)
        return x_t * labels[:, None, None, None]


def test_first_step_makes_each_call_of_a_start_and_label_once_and_predicts_the_same() -> None:
    network, classifier = Counted(), Judge()
    labels, starts = [1, 1, 1, 1, 2, 1], [7, 7, 7, 7, 7, 8]
    w, w_classifier = [0.0, 1.0, 3.0, 5.0, 3.0, 2.0], [0.0, 0.0, 2.0, 4.0, 2.0, 1.0]
    guide = Guide(network, labels, w, w_classifier, classifier, starts=starts)
    noise = {7: torch.randn((3, 8, 8)), 8: torch.randn((3, 8, 8))}
    x = torch.stack([noise[start] for start in starts])
    level = Level(0.6, 0.8)
    every = guide(x, torch.tensor(500), level, 1)
    made = guide.made
    first = guide(x, torch.tensor(500), level, 0)
    assert (every - first).abs().max() < 1e-4, "equal up to the batch of the call, in fp32"
    assert sorted(network.calls[0]) == sorted([NULL] * 5 + [1, 1, 1, 2, 1])
    assert sorted(network.calls[1]) == [NULL, NULL, 1, 1, 2]
    assert classifier.rows == 4 + 3
    assert (made, guide.made - made) == (10 + 4, 5 + 3)


def test_guide_without_starts_shares_nothing() -> None:
    network = Counted()
    guide = Guide(network, [1, 1], [3.0, 3.0])
    guide(torch.zeros((2, 3, 8, 8)), torch.tensor(1), Level(0.6, 0.8), 0)
    assert (len(network.calls[0]), guide.made) == (4, 4)


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_sweep_in_one_batch_is_the_same_images_as_one_by_one_for_fewer_calls(
    with_null: Path, tmp_path: Path, mode: str
) -> None:
    cells, steps = make_cells([0, 1], [0, 1], [0.0, 1.0, 3.0]), 4
    sampler = sampler_of(with_null, mode, steps)
    swept, made = drawn(sampler, cells, tmp_path / "a", 12)
    assert set(swept) == set(cells)
    for cell in cells:
        alone, calls = sampler.draw([cell])
        assert swept[cell]["nfe"] == calls[0]
        theirs = ((alone[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
        assert np.abs(pixels(tmp_path / "a", swept[cell]) - theirs.numpy()).max() <= 1
    seeds, samples = 2, 4
    guided = {"cfg": 1 + 2, "classifier": 2 + 2}[mode]  # calls a step of w = 1 and of w = 3
    expected = seeds * steps + samples * guided * steps  # w = 0 is one image for each seed
    # at the first step one null call for each seed, and one call or gradient for each label and seed
    expected -= seeds + samples * guided - (seeds + samples)
    assert made == expected < sum(row["nfe"] for row in swept.values())
    assert sampler.setup.plain_cost(12) == 12 * 2 * steps


def test_unguided_cells_of_one_seed_are_drawn_once_whatever_the_batch(with_null: Path, tmp_path: Path) -> None:
    cells, steps = make_cells([0, 1, 2, 3], [0, 1], [0.0]), 3
    rows, made = drawn(sampler_of(with_null, "cfg", steps), cells, tmp_path, 3)
    assert made == 2 * steps
    assert [row["nfe"] for row in rows.values()] == [steps] * 8, "the calls behind each image"
    first = {cell.seed: pixels(tmp_path, rows[cell]) for cell in cells[:2]}
    assert all((pixels(tmp_path, rows[cell]) == first[cell.seed]).all() for cell in cells)
    assert not (first[0] == first[1]).all()


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
def test_fixed_rows_give_the_same_bits_in_any_batch(with_null: Path, mode: str) -> None:
    cells = make_cells([0, 1], [0, 1], [0.0, 1.0, 3.0])
    sampler = sampler_of(with_null, mode, 3, fixed_rows=4)
    together = sampler.draw(cells)[0]
    assert torch.equal(together[:5], sampler.draw(cells[:5])[0])
    assert torch.equal(together[[7, 3]], sampler.draw([cells[7], cells[3]])[0])


def test_every_call_has_the_fixed_number_of_rows() -> None:
    network, classifier = Counted(), Judge()
    x, labels, t = torch.randn((5, 3, 8, 8)), torch.tensor([0, 1, 2, 3, 4]), torch.tensor(9)
    mine = FixedDenoiser(network, 4)(x, t, labels)
    assert network.calls == [[0, 1, 2, 3], [4, 4, 4, 4]]
    assert (mine - network(x, t, labels)).abs().max() < 1e-4
    gradient = FixedClassifier(classifier, 4)(x, t, labels, Level(1.0, 0.0), x)
    assert classifier.rows == 8
    assert torch.equal(gradient, x * labels[:, None, None, None])


# --- memory


class Small:
    """A denoiser whose memory holds so many rows."""

    prediction_type = "epsilon"

    def __init__(self, denoiser: Any, most: int):
        self.denoiser, self.most = denoiser, most

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if len(x_t) > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory")
        prediction: Tensor = self.denoiser(x_t, t, labels)
        return prediction


def in_memory_of(sampler: Sampler, most: int) -> Sampler:
    def condition(cells: Sequence[Cell]) -> tuple[Any, list[int]]:
        denoiser, labels = sampler.condition(cells)
        return Small(denoiser, most), labels

    return replace(sampler, condition=condition)


@pytest.mark.parametrize("most", [4, 2, 1])
def test_batch_that_is_out_of_memory_is_halved_and_a_single_image_is_split(
    with_null: Path, tmp_path: Path, most: int
) -> None:
    cells = make_cells([0, 1], [0, 1, 2], [3.0])
    sampler = sampler_of(with_null, "cfg", 2)
    rows, _ = drawn(in_memory_of(sampler, most), cells, tmp_path / "small", 6)
    plain, _ = drawn(sampler, cells, tmp_path / "large", 6)
    for cell in cells:
        apart = np.abs(pixels(tmp_path / "small", rows[cell]) - pixels(tmp_path / "large", plain[cell]))
        assert apart.max() <= 1


def test_image_that_does_not_fit_at_all_is_an_error(with_null: Path, tmp_path: Path) -> None:
    sampler = sampler_of(with_null, "cfg", 2)
    with pytest.raises(GuidegenError, match="Not even one image"):
        drawn(in_memory_of(sampler, 0), [Cell(0, 0, 3.0)], tmp_path, 4)
    fixed = in_memory_of(sampler_of(with_null, "cfg", 2, fixed_rows=8), 4)
    with pytest.raises(GuidegenError, match="smaller --batch-size"):
        drawn(fixed, [Cell(0, 0, 3.0)], tmp_path, 8)


# --- images that are not finite


class Overflowing:
    """Stands for a sampler: label 1 is never finite, label 2 only in fp32."""

    def __init__(self, fp32: bool):
        self.setup = SimpleNamespace(settings=settings_of("cfg", 2), image_key=lambda cell: cell)
        self.device, self.fixed_rows = torch.device("cpu"), None
        self.in_fp32 = None if fp32 else cache(lambda: Overflowing(True))
        self.fp32, self.batches, self.most = fp32, [], 2 if fp32 else 99
        self.drop_fp32 = None

    def draw(self, cells: Sequence[Cell], on_step: Any, tally: Tally) -> tuple[Tensor, list[int]]:
        self.batches.append([cell.label for cell in cells])
        if len(cells) > self.most:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        tally.made += 4 * len(cells)
        images = torch.zeros((len(cells), 3, 8, 8))
        for image, cell in zip(images, cells, strict=True):
            if cell.label == 1 or (cell.label == 2 and not self.fp32):
                image[0, 0, 0] = float("inf")
        return images, [4] * len(cells)


def test_non_finite_images_are_drawn_again_in_fp32_and_say_so(tmp_path: Path) -> None:
    sampler: Any = Overflowing(fp32=False)
    cells = [Cell(label, seed, 3.0) for label in (0, 1, 2) for seed in (0, 1)]
    rows, made = drawn(sampler, cells, tmp_path, 6, "fp16")
    assert sampler.in_fp32().batches == [[1, 1, 2, 2], [1, 1], [2, 2]], "halved to what fits"
    assert [(row["status"], row.get("dtype"), row["nfe"]) for row in rows.values()] == [
        *[("ok", None, 4)] * 2,
        *[("nonfinite", "fp32", 8)] * 2,
        *[("ok", "fp32", 8)] * 2,
    ]
    assert made == 6 * 4 + 4 * 4
    assert read_rows(tmp_path) == list(rows.values())
    for cell, dtype in ((cells[0], "fp16"), (cells[4], "fp32")):
        with Image.open(tmp_path / cell.file) as image:
            assert json.loads(image.text["guidegen"])["settings"]["dtype"] == dtype  # type: ignore[attr-defined]
    assert not (tmp_path / cells[2].file).exists()


def test_no_room_for_the_networks_in_fp32_leaves_the_image_a_row(tmp_path: Path) -> None:
    sampler: Any = Overflowing(fp32=False)

    def no_room() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sampler.in_fp32 = no_room
    rows, _ = drawn(sampler, [Cell(label, 0, 3.0) for label in (0, 2)], tmp_path, 2, "fp16")
    assert [(row["status"], row.get("dtype")) for row in rows.values()] == [("ok", None), ("nonfinite", None)]


@pytest.mark.parametrize(("fits", "fixed_rows"), [(1, None), (1, 4), (0, 4)])
def test_image_that_does_not_fit_in_fp32_is_a_row_and_the_run_goes_on(
    tmp_path: Path, fits: int, fixed_rows: int | None
) -> None:
    sampler: Any = Overflowing(fp32=False)
    sampler.in_fp32().most, sampler.in_fp32().fixed_rows = fits, fixed_rows
    cells = [Cell(label, seed, 3.0) for label in (0, 2) for seed in (0, 1, 2)]
    rows, _ = drawn(sampler, cells, tmp_path, 4, "fp16")
    again = ("ok", "fp32") if fits else ("nonfinite", None)
    assert [(row["status"], row.get("dtype")) for row in rows.values()] == [("ok", None)] * 3 + [again] * 3
    assert sampler.batches == [[0, 0, 0, 2], [2, 2]], "what does not fit in fp32 makes no batch of the others smaller"


def test_single_image_that_does_not_fit_in_fp32_row_by_row_is_a_row_and_the_run_goes_on(
    with_null: Path, tmp_path: Path
) -> None:
    half, exact = sampler_of(with_null, "cfg", 2, "bf16"), in_memory_of(sampler_of(with_null, "cfg", 2), 0)

    class Overflow:
        prediction_type = "epsilon"

        def __init__(self, denoiser: Any):
            self.denoiser = denoiser

        def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            out: Tensor = self.denoiser(x_t, t, labels)
            return torch.where((labels == 1)[:, None, None, None], float("inf"), out)

    def condition(cells: Sequence[Cell]) -> Any:
        denoiser, labels = half.condition(cells)
        return Overflow(denoiser), labels

    sampler = replace(half, condition=condition, in_fp32=lambda: exact)
    rows, _ = drawn(sampler, [Cell(label, 0, 3.0) for label in (0, 1, 2)], tmp_path, 2, "bf16")
    assert [row["status"] for row in rows.values()] == ["ok", "nonfinite", "ok"]


def test_networks_in_fp32_for_which_there_is_no_room_are_loaded_once(tmp_path: Path) -> None:
    sampler: Any = Overflowing(fp32=False)
    tried = []

    def no_room() -> Any:
        tried.append(1)
        raise RuntimeError("CUDA error: out of memory")

    sampler.in_fp32 = no_room
    rows, _ = drawn(sampler, [Cell(2, seed, 3.0) for seed in range(6)], tmp_path, 2, "fp16")
    assert [row["status"] for row in rows.values()] == ["nonfinite"] * 6
    assert len(tried) == 1


def test_networks_in_fp32_make_room_before_a_batch_is_halved(with_null: Path, tmp_path: Path) -> None:
    sampler = sampler_of(with_null, "cfg", 2, "bf16")
    assert sampler.in_fp32 is not None
    networks = weakref.ref(sampler.in_fp32().condition([])[0])
    sizes = []

    def condition(cells: Sequence[Cell]) -> Any:
        sizes.append(len(cells))
        if networks() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sampler.condition(cells)

    rows, _ = drawn(replace(sampler, condition=condition), [Cell(0, seed, 3.0) for seed in range(4)], tmp_path, 4, "bf16")
    assert sizes == [4, 4]
    assert [row["status"] for row in rows.values()] == ["ok"] * 4


def test_run_in_fp32_does_not_draw_again(tmp_path: Path) -> None:
    sampler: Any = Overflowing(fp32=True)
    rows, _ = drawn(sampler, [Cell(1, 0, 3.0)], tmp_path, 1)
    assert sampler.batches == [[1]]
    assert [(row["status"], "dtype" in row) for row in rows.values()] == [("nonfinite", False)]


def test_half_precision_sampler_has_its_networks_in_fp32(with_null: Path) -> None:
    sampler = sampler_of(with_null, "classifier", 2, "bf16")
    assert sampler.in_fp32 is not None
    cells = [Cell(0, 0, 2.0)]
    half, exact = sampler.draw(cells)[0], sampler.in_fp32().draw(cells)[0]
    assert not torch.equal(half, exact)
    assert torch.equal(exact, sampler_of(with_null, "classifier", 2).draw(cells)[0])


# --- the writer


class Breaking(Run):
    """A run whose disk is full after three images."""

    def write(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if len(read_rows(self.folder)) == 3:
            raise OSError(28, "No space left on device")
        return super().write(*args, **kwargs)


@pytest.mark.parametrize("size", [1, 2, 64])
def test_error_of_the_writer_ends_the_drawing_with_all_before_it_saved_and_told(tmp_path: Path, size: int) -> None:
    sampler: Any = Overflowing(fp32=False)
    told: list[Any] = []
    with Breaking(tmp_path, settings_of(dtype="fp16"), {}) as run, pytest.raises(OSError, match="No space left"):
        told.extend(row for _, row in draw(sampler, [Cell(0, seed, 3.0) for seed in range(100)], run, str, size))
    assert [row["seed"] for row in told] == [0, 1, 2]
    assert read_rows(tmp_path) == told
    assert len(sampler.batches) < 10, "it does not go on drawing"


class Stopping(Overflowing):
    """A sampler that ends in an error at its sixth batch."""

    def __init__(self, error: BaseException | None):
        super().__init__(fp32=False)
        self.error = error

    def draw(self, cells: Sequence[Cell], on_step: Any, tally: Tally) -> tuple[Tensor, list[int]]:
        if len(self.batches) == 5 and self.error:
            raise self.error
        return super().draw(cells, on_step, tally)


@pytest.mark.parametrize("where", ["between", "inside"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), GuidegenError("stopped"), RuntimeError("shapes"), torch.OutOfMemoryError("full")]
)
def test_all_that_was_drawn_is_saved_and_told_before_the_drawing_ends(
    tmp_path: Path, where: str, error: BaseException
) -> None:
    sampler: Any = Stopping(error if where == "inside" else None)
    sampler.fixed_rows = 1  # a batch is not split

    def stop() -> None:
        if len(sampler.batches) == 5 and where == "between":
            raise error

    told: list[tuple[Cell, Any]] = []
    cells = [Cell(0, seed, 3.0) for seed in range(100)]
    with Run(tmp_path, settings_of(dtype="fp16"), {}) as run, pytest.raises((type(error), GuidegenError)):
        told.extend(draw(sampler, cells, run, str, 2, between=stop))
    assert [row["seed"] for row in read_rows(tmp_path)] == list(range(10))
    assert [cell for cell, _ in told] == cells[:10]
    assert [row for _, row in told] == read_rows(tmp_path)


def test_who_leaves_the_drawing_leaves_nobody_writing(tmp_path: Path) -> None:
    sampler: Any = Overflowing(fp32=False)
    with Run(tmp_path, settings_of(dtype="fp16"), {}) as run:
        with closing(draw(sampler, [Cell(0, seed, 3.0) for seed in range(100)], run, str, 2)) as told:
            next(told)
        assert "guidegen-writer" not in [thread.name for thread in threading.enumerate()]
    assert len(read_rows(tmp_path)) == 2 * len(sampler.batches)


def test_each_process_of_a_launcher_gets_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        for place, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0"), ("", "cuda")):
            monkeypatch.setenv(name, place)
            assert pick_device("auto") == torch.device(device)
