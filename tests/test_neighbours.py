"""Copies of training photographs are found, and what is no copy is not called one."""

from __future__ import annotations

import pytest
import torch

from guidegen.zoo import neighbours

LABELS, EACH, HELD_OUT = 4, 30, 10


def photographs(each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (LABELS * each, 3, 6, 6), generator=draw, dtype=torch.uint8)
    return images, torch.arange(LABELS).repeat(each)


TRAIN, TRAIN_LABELS = photographs(EACH, 1)
VAL, VAL_LABELS = photographs(HELD_OUT, 2)


def share(samples: torch.Tensor) -> float:
    to_train, to_val = (neighbours.distances(samples, images, neighbours.pixels) for images in (TRAIN, VAL))
    return neighbours.nearer_to_training(to_train, to_val, TRAIN_LABELS, VAL_LABELS)


def test_distance_is_in_grey_levels_to_the_nearer_of_photograph_and_mirror_image() -> None:
    found = neighbours.distances(torch.stack([TRAIN[3].flip(2), TRAIN[5]]), TRAIN, neighbours.pixels)
    assert found.shape == (2, len(TRAIN))
    assert found.argmin(1).tolist() == [3, 5]
    assert found.min(1).values.max() < 0.1  # of 255: rounding of the matrix product
    by_hand = ((TRAIN[5].float() - TRAIN[7].float()).square().mean().sqrt(), (TRAIN[5].float() - TRAIN[7].flip(2)).square())
    torch.testing.assert_close(found[1, 7], torch.minimum(by_hand[0], by_hand[1].mean().sqrt()), rtol=1e-4, atol=0)


def test_copies_of_training_photographs_are_counted() -> None:
    # one set in three holds the photograph that was copied; elsewhere half the samples are nearer to training
    assert share(TRAIN) == pytest.approx(1 / 3 + 2 / 3 * 0.5, abs=0.12)
    assert share(VAL) == 0.0


def test_what_is_no_copy_is_as_near_to_either() -> None:
    samples, _ = photographs(100, 3)
    # 400 samples in 3 sets that share their held-out photographs: 4 standard errors of a proportion
    assert share(samples) == pytest.approx(0.5, abs=0.1)


def test_samples_in_the_picture_are_the_first_of_each_label() -> None:
    rows = [{"label": label, "seed": seed} for label in (3, 1, 2) for seed in (1, 0)]
    chosen = neighbours.first_of_each(rows, 4)
    assert [(row["label"], row["seed"]) for row in chosen] == [(1, 0), (2, 0), (3, 0), (1, 1)]


def test_picture_holds_the_images() -> None:
    sheet = neighbours.picture([("sample", TRAIN[:2]), ("pixels 1", VAL[:2])])
    tile, gap, left = neighbours.TILE, neighbours._GAP, neighbours._LEFT
    assert sheet.size == (left + 2 * (tile + gap), 2 * (tile + gap) + gap)
    assert sheet.getpixel((left + tile + gap, gap + tile + gap)) == tuple(VAL[1, :, 0, 0].tolist())
