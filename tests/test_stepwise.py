"""`--stepwise`: strips of the denoised estimates, whose last frame is the image where all noise is taken away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from PIL import Image


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def frames(path: Path, side: int = 8) -> list[Any]:
    with Image.open(path) as image:
        strip = np.asarray(image.convert("RGB")).astype(int)
    scale = 96 // side
    starts = range(0, strip.shape[1], side * scale + 4)
    return [strip[::scale, start : start + side * scale : scale] for start in starts]


@pytest.mark.parametrize("more", [(), ("--mode", "classifier"), ("--scheduler", "euler")])
def test_a_frame_for_each_step_and_the_image_last(with_null: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    args = ("-m", with_null, "--label", "0,1", "-w", 3, "--steps", 5, "-q", *more)
    call("sample", *args, "-o", "run", "--stepwise", "strips")
    call("sample", *args, "-o", "plain")
    assert sorted(path.name for path in (tmp_path / "strips").iterdir()) == [
        "w3.0_label0000_000000.png",
        "w3.0_label0001_000000.png",
    ]
    for label in (0, 1):
        found = frames(tmp_path / "strips" / f"w3.0_label000{label}_000000.png")
        assert len(found) == 5
        assert abs(found[0] - found[-1]).max() > 3
        file = f"images/w3.0/label000{label}/000000.png"
        with Image.open(tmp_path / "run" / file) as image, Image.open(tmp_path / "plain" / file) as plain:
            assert np.array_equal(np.asarray(image), np.asarray(plain)), "looking changes nothing"
            if not more:  # DDIM's last step leads to the estimate itself: alpha is one there
                assert abs(found[-1] - np.asarray(image).astype(int)).max() <= 1


def test_it_is_for_few_images_and_a_folder(with_null: Path, tmp_path: Path) -> None:
    args = ("sample", "-m", with_null, "--steps", 2, "-q")
    assert "16 images at most, and these are 20" in str(
        call(*args, "--label", 1, "-n", 20, "--stepwise", "strips", code=2).exception
    )
    (tmp_path / "file").write_text("x")
    assert "is a file" in str(call(*args, "--label", 1, "--stepwise", "file", code=2).exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
