"""What `guidegen convert` makes of guided-diffusion's networks computes the same as they do.

The reference is ours (`adm_reference.py`), from the paper and the published layout. The sums are the
same in another order, of outputs whose size is about one: 1e-4 in fp32 (1e-5 was seen), and 1e-10 in
fp64 (1e-13 was seen), which rounding cannot explain away.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adm_reference import Classifier, Options, UNet, ddim_times, guided_ddim, randomise
from conftest import settings_of
from setups import open_sampler
from torch import Tensor

from guidegen.models.checkpoint import open_checkpoint, open_classifier
from guidegen.models.classifiers.opening import load_classifier
from guidegen.models.convert import adm
from guidegen.models.convert.adm_layout import Choices
from guidegen.models.loading import load_network
from guidegen.sampling.loop import initial_noise
from guidegen.sampling.schedulers import make_scheduler
from guidegen.spec.cell import Cell

TOLERANCE, TOLERANCE_FP64 = 1e-4, 1e-10
DEEP = {"mult": (1, 2, 3), "size": 8}

UNETS = {
    "uncond": Options(),
    "class-cond": Options(classes=7),
    "fixed-variance": Options(classes=7, learned_variance=False),
    "new-order": Options(new_order=True, **DEEP),
    "heads": Options(heads=4, head_channels=None, attention=()),
    "heads-of-several-widths": Options(heads=4, head_channels=None, attention=(2, 4), classes=7, **DEEP),
    "heads-in-new-order": Options(heads=2, head_channels=None, attention=(1, 2, 4), new_order=True, **DEEP),
    "one-head": Options(heads=1, head_channels=None),
    "conv": Options(resample="conv", res_blocks=2, **DEEP),
    "neither": Options(resample="none", res_blocks=2, attention=(1,), **DEEP),
    "shift": Options(scale_shift=False, res_blocks=2),
    "shift-conv": Options(scale_shift=False, resample="conv", attention=(1, 2)),
    "half-width-first": Options(width=64, mult=(0.5, 1, 1), attention=(4,), classes=7),
    "three-blocks": Options(res_blocks=3, mult=(1, 1, 2), attention=(2, 4), classes=7),
    "one-level": Options(mult=(1,), attention=(1,), res_blocks=2),
    "grey": Options(channels=1),
}
CLASSIFIERS = {
    "attention-pool": Options(),
    "new-order": Options(new_order=True, **DEEP),
    "mean-pool": Options(pool="adaptive", scale_shift=False),
    "mean-pool-heads": Options(pool="adaptive", heads=4, head_channels=None, attention=(2, 4), **DEEP),
    "conv": Options(resample="conv", res_blocks=2, classes=9, **DEEP),
    "neither": Options(resample="none", res_blocks=2, attention=(1,)),
    "half-width-first": Options(width=64, mult=(0.5, 1, 1), attention=(4,)),
    "four-blocks": Options(res_blocks=4, mult=(1, 2), attention=(2,)),
}


def draw_options(seed: int) -> Options:
    """One option of each kind at random."""
    choose = random.Random(seed)
    mult = choose.choice([(1, 2), (1, 1, 2), (1, 2, 3), (2, 1), (1, 3)])
    heads = choose.choice([None, 1, 2, 4])
    return Options(
        mult=mult,
        res_blocks=choose.randint(1, 3),
        attention=tuple(choose.sample([1, 2, 4], choose.randint(0, 3))),
        heads=heads,
        head_channels=None if heads else choose.choice([8, 16, 32]),
        new_order=choose.random() < 0.5,
        resample=choose.choice(["resnet", "resnet", "conv", "none"]),
        scale_shift=choose.random() < 0.5,
        classes=choose.choice([None, 4]),
        learned_variance=choose.random() < 0.5,
    )


def choices_of(o: Options) -> Choices:
    return Choices(o.size, o.heads, o.head_channels, "new" if o.new_order else "legacy", "linear")


def converted(network: Any, folder: Path, choices: Choices, layers: int | None = None) -> Path:
    """The network's state dict as a `.pt`, read back by `guidegen.models.convert.adm` and written as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / "model.pt")
    adm.convert(folder / "model.pt", choices, layers=layers).save(folder / "made")
    return folder / "made"


def inputs(o: Options, batch: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn((batch, o.channels, o.size, o.size), generator=draw)
    labels = torch.randint(o.classes, (batch,), generator=draw) if o.classes else None
    return x, torch.tensor([0, 417, 999][:batch]), labels


@torch.no_grad()
def unet_errors(o: Options, folder: Path, choices: Choices | None = None) -> list[float]:
    """Largest difference of the outputs in fp32 and in fp64, with a check that they are not trivial."""
    reference = randomise(UNet(o), seed=1)
    made = load_network(open_checkpoint(converted(reference, folder, choices or choices_of(o))), "cpu")
    x, t, labels = inputs(o)
    errors = []
    for dtype in (torch.float32, torch.float64):
        x, reference, made = x.to(dtype), reference.to(dtype), made.to(dtype)
        expected = reference(x, t, labels)
        assert 0.1 < expected.std() < 10
        assert (expected[0] - expected[1]).abs().max() > 0.1
        errors.append((made(x, t, class_labels=labels).sample - expected).abs().max().item())
    return errors


@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_the_reference(name: str, tmp_path: Path) -> None:
    single, double = unet_errors(UNETS[name], tmp_path)
    assert single <= TOLERANCE
    assert double <= TOLERANCE_FP64


@pytest.mark.parametrize("seed", range(12))
def test_random_unet_equals_the_reference(seed: int, tmp_path: Path) -> None:
    single, double = unet_errors(draw_options(seed), tmp_path)
    assert single <= TOLERANCE
    assert double <= TOLERANCE_FP64


def test_the_comparison_sees_wrong_choices(tmp_path: Path) -> None:
    o = UNETS["new-order"]
    wrong = {
        "order": replace(choices_of(o), attention_order="legacy"),
        "heads": replace(choices_of(o), head_channels=32),
    }
    for name, choices in wrong.items():
        assert min(unet_errors(o, tmp_path / name, choices)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_equals_the_reference(name: str, tmp_path: Path) -> None:
    o = CLASSIFIERS[name]
    reference = randomise(Classifier(o), seed=2)
    choices = replace(choices_of(o), schedule=None)
    made = load_classifier(open_classifier(converted(reference, tmp_path, choices, o.res_blocks)), "cpu")
    x, t, _ = inputs(o)
    for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.float64, TOLERANCE_FP64)):
        x = x.detach().to(dtype).requires_grad_()
        expected, logits = reference.to(dtype)(x, t), made.to(dtype)(x, t)
        assert 0.1 < expected.std() < 10
        assert (logits - expected).abs().max() <= tolerance
        wanted, gradient = (torch.autograd.grad(out.log_softmax(1)[:, 1].sum(), x)[0] for out in (expected, logits))
        assert wanted.abs().max() > 0.01
        assert (gradient - wanted).abs().max() <= tolerance


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("mode", "schedule", "count"), [("classifier", "linear", 25), ("classifier", "cosine", 10), ("both", "linear", 10)]
)
def test_guided_samples_equal_the_published_sampler(
    mode: str, schedule: str, count: int, clip: bool, tmp_path: Path
) -> None:
    """DDIM with eta 0 on the original's respaced timesteps: mode classifier over an unconditional UNet, and
    ADM-G, a class-conditional UNet with a classifier, which is mode both with w = 1. The original clips
    the denoised estimate before it adds the gradient, as the converted scheduler says. Clipped images
    stay within a few units, where the untrained network multiplies its rounding by up to 50.
    """
    unet = randomise(UNet(Options(classes=5 if mode == "both" else None)), seed=3)
    network = randomise(Classifier(Options(res_blocks=2)), seed=4)
    checkpoint = open_checkpoint(converted(unet, tmp_path / "unet", replace(choices_of(unet.o), schedule=schedule)))
    classifier = open_classifier(
        converted(network, tmp_path / "classifier", replace(choices_of(network.o), schedule=None), 2)
    )
    assert checkpoint.scheduler_config["clip_sample"] is True
    scheduler = make_scheduler({**checkpoint.scheduler_config, "clip_sample": clip})
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == ddim_times(count)
    sampler = open_sampler(checkpoint, classifier, scheduler, settings_of(mode, count), torch.device("cpu"))
    weights, labels = [0.0, 1.0, 10.0], torch.tensor([0, 1, 4])
    cells = [Cell(y, seed, w) for seed, (y, w) in enumerate(zip(labels.tolist(), weights, strict=True))]
    if mode == "both":
        cells = [replace(cell, w=1.0, w_classifier=cell.w) for cell in cells]
    images, _ = sampler.draw(cells)
    noise, _ = initial_noise(range(3), checkpoint.shape)
    expected = guided_ddim(unet, network, noise, labels, weights, schedule, count, clip=clip)
    unguided = guided_ddim(unet, network, noise, labels, [0.0] * 3, schedule, count, clip=clip)
    size = expected.abs().amax(dim=(1, 2, 3))  # an untrained network's images are not bounded
    error = (images - expected).abs().amax(dim=(1, 2, 3)) / size
    tolerance = 10 * TOLERANCE if clip else TOLERANCE
    assert error.max() <= tolerance, error  # 2e-6 and 1e-4 were seen
    assert (expected - unguided).abs().amax(dim=(1, 2, 3))[2] / size[2] > 100 * tolerance  # guidance shows
    other = guided_ddim(unet, network, noise, labels, weights, schedule, count, clip=not clip)
    assert ((expected - other).abs().amax(dim=(1, 2, 3)) / size).min() > 100 * tolerance  # and so does the clip


def test_diffusers_opens_the_folder_and_draws_the_same(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline

    o = Options(learned_variance=False)
    folder = converted(randomise(UNet(o), seed=3), tmp_path, replace(choices_of(o), schedule="cosine"))
    # without the clip, which is diffusers' own code on both sides: an untrained network multiplies rounding with it
    unclipped = make_scheduler({**open_checkpoint(folder).scheduler_config, "clip_sample": False})
    unclipped.save_pretrained(folder / "scheduler")
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(1, torch.Generator().manual_seed(3), num_inference_steps=10, output_type="np").images
    checkpoint = open_checkpoint(folder)
    scheduler = make_scheduler(checkpoint.scheduler_config)
    sampler = open_sampler(checkpoint, None, scheduler, settings_of("none", 10), torch.device("cpu"))
    images, _ = sampler.draw([Cell(None, 3, 0.0)])
    drawn = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (drawn - torch.from_numpy(theirs)).abs().max() <= TOLERANCE
    assert drawn.std() > 0.1
