"""One image key decides which cells are one image: equal keys are equal pixels drawn alone, and other keys are others."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import settings_of
from setups import setup_of

from guidegen.models.checkpoint import open_checkpoint
from guidegen.models.classifiers.opening import open_classifier
from guidegen.sampling.equal_images import EqualImages
from guidegen.sampling.sampler import open_sampler
from guidegen.sampling.setup import plan_scheduler
from guidegen.spec.cell import Cell
from guidegen.spec.plan import Plan

STEPS = 4
VARIED = [
    {"guidance": None},
    {"guidance": "apg"},
    {"guidance": "rescale"},
    {"interval": "0%:50%"},
    {"interval": "0%:50%", "guidance": "apg"},
    {"w_schedule": "linear"},
    {"eta": 0.5},
]


@pytest.mark.parametrize("mode", ["cfg", "classifier", "both"])
def test_equal_keys_are_equal_images_and_others_are_not(with_null: Path, mode: str) -> None:
    checkpoint = open_checkpoint(with_null)
    classifier = open_classifier(checkpoint.bundled_classifier or "") if mode != "cfg" else None
    images: dict[object, list[torch.Tensor]] = {}
    for varied in VARIED:
        settings = settings_of(mode, STEPS, **varied)
        scheduler = plan_scheduler(checkpoint, "ddim", STEPS, settings.eta)
        sampler = open_sampler(setup_of(checkpoint, classifier, scheduler, settings), torch.device("cpu"))
        weights = itertools.product((0.0, 1.0, 3.0), (0.0, 2.0) if mode == "both" else (None,))
        for (w, w_classifier), label in itertools.product(weights, (1, 2)):
            cell = Cell(label, 0, w, w_classifier)
            images.setdefault(sampler.setup.image_key(cell), []).append(sampler.draw([cell])[0][0])
    shared = [same for same in images.values() if len(same) > 1]
    assert len(shared) >= 2
    assert all((image - same[0]).abs().max() <= 1e-5 for same in shared for image in same)
    firsts = [same[0] for same in images.values()]
    # what differs in one step alone may differ by little, but not by nothing
    assert all((one - other).abs().max() > 1e-5 for one, other in itertools.combinations(firsts, 2))


def test_the_first_of_equal_cells_is_drawn_for_all_that_are_still_to_draw(with_null: Path) -> None:
    checkpoint = open_checkpoint(with_null)
    by = (("guidance", ("cfg", "apg")),)
    plan = Plan([1, 2], range(3), [0.0, 1.0, 3.0], by=by)
    setups = {
        variant: setup_of(
            checkpoint,
            None,
            plan_scheduler(checkpoint, "ddim", STEPS, None),
            settings_of("cfg", STEPS, guidance=None if dict(variant)["guidance"] == "cfg" else "apg"),
        )
        for variant in plan.variants()
    }
    cells = plan.cells()
    equal = EqualImages(cells, setups)
    first = equal.first(cells)
    # w = 0 is one image a seed, w = 1 one a label and seed, w = 3 one a method, label and seed
    assert len(first) == 3 * (1 + 2 + 2 * 2)
    assert sorted(cell.file for each in first for cell in equal.group(each)) == sorted(cell.file for cell in cells)
    left = cells.without(range(5))  # some are there already: the others are still drawn once each
    rest = EqualImages(left, setups)
    drawn = [cell.file for each in rest.first(left) for cell in rest.group(each)]
    assert sorted(drawn) == sorted(cell.file for cell in left)
    apart = replace(plan, seeds_per_label=True).cells()
    assert len(EqualImages(apart, setups).first(apart)) == 3 * 2 * (1 + 1 + 2), "no label shares an image of w = 0"
    listed = EqualImages([replace(cell) for cell in cells], setups)
    assert [cell.file for cell in listed.first(list(cells))] == [cell.file for cell in first]
