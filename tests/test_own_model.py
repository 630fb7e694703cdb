"""Networks of one's own: the example of the README on the command line, and what is wrong with broken ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"
Command = Callable[..., Any]
CLASSIFIER = """
import torch
from guidegen import ClassifierModel

class Reddish(torch.nn.Module):
    def forward(self, images):  # how red, how blue
        return 5 * images.mean((2, 3))[:, [0, 2]]

JUDGE = ClassifierModel(load=lambda device: Reddish().to(device), labels={0: "cat", 1: "dog"}, input="denoised")
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    (code,) = re.findall(r"```python\n(# my_model.py.*?)```", README.read_text(), re.DOTALL)
    assert code.count("\n") < 30
    path = tmp_path / "my_model.py"
    path.write_text(code)
    return path


def test_the_example_of_the_readme(example: Path, guidegen: Command, tmp_path: Path) -> None:
    flags = ["sweep", "-m", "my_model.py:MODEL", "--label", "cat,dog", "--w", "0,1,3", "--steps", 4, "-o", "run"]
    done = guidegen(*flags, "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["label_name"] for row in rows} == {"cat", "dog"}
    image = {(row["label_name"], row["w"]): np.asarray(Image.open(tmp_path / "run" / row["file"])) for row in rows}
    assert (image["cat", 0.0] == image["dog", 0.0]).all()
    assert (image["cat", 3.0] != image["dog", 3.0]).any()
    assert (tmp_path / "run" / "grid.png").is_file()
    example.write_text(example.read_text() + "\n# trained again\n")
    other = guidegen(*flags)
    assert other.returncode == 2
    assert "model_sha256" in other.stderr
    facts = json.loads(guidegen("inspect", "my_model.py:MODEL", "--json").stdout)
    assert facts["kind"] == "custom model, class-conditional with a null label"
    assert facts["modes"] == ["cfg", "none"]


def test_a_classifier_of_ones_own(example: Path, guidegen: Command, tmp_path: Path) -> None:
    (tmp_path / "classifier.py").write_text(CLASSIFIER)
    flags = ["sample", "-m", "my_model.py:MODEL", "-c", "classifier.py:JUDGE", "--mode", "classifier", "--steps", 4]
    flags += ["--classifier-gradient", "detached"]  # the network is not trained: its derivative means nothing
    done = guidegen(*flags, "--label", "cat,dog", "--w", 10, "--json", "-o", "run")
    assert done.returncode == 0, done.stderr
    cat, dog = (np.asarray(Image.open(tmp_path / "run" / json.loads(line)["file"])) for line in done.stdout.splitlines())
    assert cat[..., 0].mean() > dog[..., 0].mean() + 5
    assert cat[..., 2].mean() < dog[..., 2].mean() - 5


@pytest.mark.parametrize(
    ("ref", "code", "words"),
    [
        ("my_model.py:MISSING", 4, "is not there; it should be a guidegen.Model"),
        ("my_model.py:torch", 4, "is a module"),
        ("other.py:MODEL", 4, "No Python file"),
    ],
)
def test_what_is_no_model(example: Path, guidegen: Command, ref: str, code: int, words: str) -> None:
    done = guidegen("sample", "-m", ref, "--label", 0)
    assert done.returncode == code
    assert words in done.stderr


def test_a_folder_never_runs_code(with_null: Path, guidegen: Command, tmp_path: Path) -> None:
    """Only a path that ends in .py:NAME does."""
    (tmp_path / "evil.py").write_text("raise SystemExit(99)\n")
    done = guidegen("sample", "-m", "evil.py", "--label", 0)
    assert done.returncode == 4
    assert "is a file" in done.stderr
