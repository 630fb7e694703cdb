"""Autocast against fp32 on the CPU, and weights that are cast once; `test_cuda.py` asks more of CUDA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from conftest import call, settings_of, tiny_classifier, tiny_unet
from setups import open_sampler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guidegen import (
    BUNDLED,
    NULL,
    DiTDenoiser,
    NoisyScore,
    TextDenoiser,
    UNetDenoiser,
    load_network,
    open_checkpoint,
    open_classifier,
    to_uint8,
)
from guidegen.models.denoisers import Texts
from guidegen.models.pretrained import cast_weights
from guidegen.sampling import device
from guidegen.sampling.device import multiplies_bf16
from guidegen.sampling.setup import plan_scheduler
from guidegen.spec.cell import Cell

CELLS = [Cell(207, 0, 3.0), Cell(779, 1, 1.0), Cell(950, 2, 8.0), Cell(1, 3, 0.0)]
STEPS = 8


def draw(mode: str, dtype: str) -> Tensor:
    checkpoint = open_checkpoint(BUNDLED)
    judge = open_classifier(checkpoint.bundled_classifier or "") if mode == "classifier" else None
    scheduler = plan_scheduler(checkpoint, None, STEPS, None)
    sampler = open_sampler(checkpoint, judge, scheduler, settings_of(mode, STEPS, dtype=dtype), torch.device("cpu"))
    images, _ = sampler.draw(CELLS)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    return to_uint8(images).float()


@pytest.mark.parametrize("mode", ["cfg", "classifier"])
@pytest.mark.parametrize(("dtype", "decibels"), [("bf16", 22.0), ("fp16", 32.0)])
def test_half_precision_draws_the_same_pictures(mode: str, dtype: str, decibels: float) -> None:
    """PSNR of each image against fp32; bf16 keeps 8 bits and fp16 11, over eight steps of up to three calls."""
    error = (draw(mode, dtype) - draw(mode, "fp32")).square().flatten(1).mean(1)
    psnr = 10 * (255**2 / error.clamp(min=1e-9)).log10()
    assert psnr.min() > decibels, psnr


class Casts(TorchDispatchMode):
    """Counts the casts that are made."""

    made = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += call is torch.ops.aten._to_copy.default
        return call(*args, **(kwargs or {}))


def unet_call(network: Any, dtype: torch.dtype) -> Tensor:
    network.requires_grad_(False)
    return UNetDenoiser(network, "epsilon", 5, dtype)(X, T, torch.tensor([2, NULL]))


def gradient_call(network: Any, dtype: torch.dtype) -> Tensor:
    return NoisyScore(network, {i: i for i in range(5)}, dtype)(X, T, torch.tensor([2, 4]))


def dit_call(network: Any, dtype: torch.dtype) -> Tensor:
    network.requires_grad_(False)
    return DiTDenoiser(network, "epsilon", 5, dtype)(X.repeat(1, 2, 1, 1)[:, :4], T, torch.tensor([2, NULL]))


def text_call(network: Any, dtype: torch.dtype) -> Tensor:
    network.requires_grad_(False)
    states = torch.randn((2, 3, 16), generator=torch.Generator().manual_seed(1))
    texts = Texts(states)
    return TextDenoiser(network, "epsilon", texts, dtype)(X.repeat(1, 2, 1, 1)[:, :4], T, torch.tensor([0, NULL]))


X = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
T = torch.tensor(500)
NETWORKS = {
    "unet": (lambda: tiny_unet(num_class_embeds=6), unet_call),
    "adm": (lambda: tiny_unet(num_class_embeds=6, resnet_time_scale_shift="scale_shift", out_channels=6), unet_call),
    "classifier": (tiny_classifier, gradient_call),
    "dit": (lambda: pipelines.tiny_transformer(num_embeds_ada_norm=5), dit_call),
    "text": (pipelines.tiny_text_unet, text_call),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_were_cast_once_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    make, call = NETWORKS[name]
    exact, cast = make(), cast_weights(make(), dtype)
    assert (cast.dtype, next(cast.parameters()).dtype) == (torch.float32, torch.float32), "embeddings follow the first layer"
    assert {weight.dtype for weight in cast.parameters()} == {torch.float32, dtype}
    with Casts() as at_every_call, torch.no_grad():
        expected = call(exact, dtype)
    with Casts() as at_some, torch.no_grad():
        found = call(cast, dtype)
    assert torch.equal(found, expected)
    halves = sum(weight.dtype == dtype for weight in cast.parameters())
    assert at_every_call.made - at_some.made >= halves > 0, "each weight was cast at least once a call"


def test_weights_are_read_as_they_are_without_autocast(with_null: Path) -> None:
    checkpoint = open_checkpoint(with_null)
    plain = load_network(checkpoint, "cpu")
    half = load_network(checkpoint, "cpu", autocast=torch.bfloat16)
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}
    for (name, weight), cast in zip(plain.named_parameters(), half.parameters(), strict=True):
        stays = any(part in name for part in ("norm", "class_embedding", "conv_in"))
        assert cast.dtype == (torch.float32 if stays else torch.bfloat16), name
        assert torch.equal(weight.to(cast.dtype), cast), name


def test_fp16_on_a_cpu_is_told_to_be_slow(with_null: Path) -> None:
    given = ("sample", "-m", with_null, "--label", 1, "--device", "cpu", "--dry-run")
    told = call(*given, "--dtype", "fp16")
    assert "--dtype bf16" in told.stderr
    assert "--dtype" not in told.stdout
    for others in (["--dtype", "bf16"], ["--dtype", "fp32"], ["--dtype", "fp16", "--quiet"], []):
        assert call(*given, *others).stderr == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2\nbugs\t\t: bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", True),
        ("", False),
    ],
)
def test_bf16_is_found_in_what_linux_says_of_the_cpu(text: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_bf16(tmp_path / "cpuinfo") is found
    assert multiplies_bf16(tmp_path / "nothing") is False


def test_fast_is_kept_as_the_precision_that_it_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "multiplies_bf16", lambda: True)
    monkeypatch.setattr("guidegen.cli.drawing._WORTH_A_NOTE", 0.0)
    job = ["sample", "--label", "207", "--steps", "1", "--device", "cpu"]
    first = call(*job, "--fast", "-o", tmp_path / "a").stderr
    assert "--fast is --dtype bf16 here" in first
    assert "saved" not in first
    about = json.loads((tmp_path / "a/run.json").read_text())
    assert (about["settings"]["dtype"], about["options"]["dtype"]) == ("bf16", "bf16")
    assert "fast" not in about["options"]
    assert "--fast (--dtype bf16) would have saved about" in call(*job, "-o", tmp_path / "b").stderr
    assert "--fast chooses the precision" in str(call(*job, "--fast", "--dtype", "fp32", code=2).exception)
    shown = call("again", tmp_path / "b", "--fast", "--show").stdout
    assert "--fast" in shown
    assert "--dtype" not in shown
