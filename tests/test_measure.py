"""The share of the intended label, with an evaluation classifier that reads the colour of a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from guidegen.models.checkpoint import open_checkpoint, open_classifier
from guidegen.models.classifiers.opening import load_classifier
from guidegen.runs.directory import Run
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings
from guidegen.zoo import BUNDLED, measure


def colour_classifier(images: torch.Tensor) -> torch.Tensor:
    """Sure of column 0 where a picture is bright, of column 4 where it is dark."""
    logits = torch.zeros(len(images), len(measure._COLUMNS))
    bright = images.mean((1, 2, 3)) > 0
    logits[:, 0] = torch.where(bright, 9.0, 0.0)
    logits[:, 4] = torch.where(bright, 0.0, 9.0)
    return logits


def test_share_by_weight(tmp_path: Path) -> None:
    label = measure._COLUMNS[4]
    settings = Settings("cfg", "m", "0" * 64, "DDIMScheduler", 5, None, "fp32", 1000)
    with Run(tmp_path / "run", settings, {}) as run:
        for seed, level in enumerate((0, 0, 0, 255)):
            run.write(Cell(label, seed, 2.0), np.full((32, 32, 3), level, np.uint8), "x", 1)
        run.write(Cell(label, 0, 0.0), np.full((32, 32, 3), 255, np.uint8), "x", 1)
        run.write(Cell(label, 1, 0.0), None, "x", 1)  # not finite: not counted
    none, strong = measure.score_run(colour_classifier, tmp_path / "run")
    assert (none["w"], none["images"], none["share"]) == (0.0, 1, 0.0)
    assert (strong["w"], strong["images"], strong["share"]) == (2.0, 4, 0.75)
    assert strong["p"] == pytest.approx(0.75, abs=0.01)


def test_the_evaluation_classifier_takes_pictures_of_32_pixels() -> None:
    classifier = measure.make_classifier().eval()
    assert measure.probabilities(classifier, torch.zeros((2, 3, 32, 32), dtype=torch.uint8)).shape == (2, 20)
    assert measure.columns_of(torch.tensor([1, 207])).tolist() == [0, measure._COLUMNS.index(207)]


def test_the_evaluation_classifier_comes_back_from_its_folder(tmp_path: Path) -> None:
    classifier = measure.make_classifier().eval()
    measure.save_classifier(classifier, tmp_path / "classifier")
    info = open_classifier(tmp_path / "classifier")
    labels = open_checkpoint(BUNDLED).labels
    assert info.columns(labels) == {label: column for column, label in enumerate(measure._COLUMNS)}
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(load_classifier(info, "cpu")(images), classifier(images))
