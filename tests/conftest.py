"""Small checkpoints, made with diffusers itself, and the command as a stranger runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from guidegen.cli import app
from guidegen.errors import GuidegenError

NAMES = {"0": "goldfish, Carassius auratus", "1": "tabby, tabby cat", "2": "crane", "3": "crane, hoist", "4": "lion"}
SIZE = 8
os.environ["GUIDEGEN_CACHE"] = ""  # nothing is kept outside of the tests
torch.set_num_threads(1)  # threads of tiny networks only wait for each other


def tiny_unet(seed: int = 0, **config: Any) -> Any:
    """A UNet2DModel of a few thousand parameters whose output is not near zero."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    settings = {
        "sample_size": SIZE,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**(settings | config)).eval()


def tiny_classifier(seed: int = 0, names: dict[str, str] | None = None) -> Any:
    """A NoisyClassifier of a few thousand parameters."""
    from guidegen.models.classifiers.noisy import NoisyClassifier

    torch.manual_seed(seed)
    return NoisyClassifier(
        sample_size=SIZE,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        id2label=names or NAMES,
    ).eval()


def settings_of(mode: str = "cfg", steps: int = 10, **others: Any) -> Any:
    """Settings as a run has them, of what a sampler reads."""
    from guidegen.spec.settings import Settings

    given = {"model": "", "model_sha256": "", "scheduler": "", "eta": None, "dtype": "fp32", "null_label": None}
    return Settings(mode=mode, steps=steps, **(given | others))


def save_pipeline(folder: Path, unet: Any, scheduler: Any, classifier: Any = None, **index: Any) -> Path:
    """A DDIM pipeline folder, with the keys of guidegen in model_index.json."""
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    if classifier is not None:
        classifier.save_pretrained(folder / "classifier")
    about = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(about | index))
    return folder


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Small modular pipelines, by the names of `modular.FAMILIES`."""
    from modular import FAMILIES

    return cache(lambda name: FAMILIES[name](tmp_path_factory.mktemp("pipeline") / "parts"))


@pytest.fixture(scope="session")
def with_null(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class-conditional, names for 0-4, null label 5, and a noise-aware classifier beside it."""
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("models") / "with-null"
    scheduler = DDIMScheduler(clip_sample=False)
    return save_pipeline(folder, tiny_unet(num_class_embeds=6), scheduler, tiny_classifier(), id2label=NAMES)


@pytest.fixture(scope="session")
def without_null(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class-conditional, five classes, no null label and no names; a plain UNet folder."""
    folder = tmp_path_factory.mktemp("models") / "without-null"
    tiny_unet(num_class_embeds=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unconditional, as diffusers' own DDPMPipeline saves it."""
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = tmp_path_factory.mktemp("models") / "unconditional"
    DDPMPipeline(tiny_unet(), DDPMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A noise-aware classifier of its own, labels 0-4."""
    folder = tmp_path_factory.mktemp("models") / "noisy-classifier"
    tiny_classifier(seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of the commands: offline, no colours, one thread."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GUIDEGEN")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "GUIDEGEN_CACHE": ""}


@pytest.fixture
def guidegen(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m guidegen ARGS` in `tmp_path` as a process of its own."""

    def run(*args: object, text: bool = True, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "guidegen", *map(str, args)]
        settings = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": text, "timeout": 240}
        return subprocess.run(command, **(settings | kwargs))

    return run


def call(*args: object, code: int = 0) -> Result:
    """The command in this process; its error is checked by its exit code."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    error = result.exception
    assert error is None or isinstance(error, GuidegenError | SystemExit), repr(error)
    assert (error.code if isinstance(error, GuidegenError) else result.exit_code) == code, (error, result.output)
    return result


def on_a_terminal(
    command: list[str], cwd: Path, environment: dict[str, str], size: tuple[int, int, int, int] | None = None
) -> tuple[int, bytes]:
    """Exit code of a command and what it writes where standard output and error are a terminal.

    Args:
        command: the words.
        cwd: where it runs.
        environment: all of it.
        size: rows, columns, width and height in pixels of the terminal, which then is standard input too; None for no size.
    """
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    if size is not None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size))
    stdin = subprocess.DEVNULL if size is None else theirs
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=stdin, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    return process.wait(timeout=60), shown
