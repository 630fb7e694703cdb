"""The recipe of a latent checkpoint, on photographs made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from conftest import settings_of
from photographs import NAMES, write_photographs
from PIL import Image
from setups import open_sampler
from torch import nn

from guidegen.models.checkpoint import open_checkpoint, open_classifier
from guidegen.sampling.loop import to_uint8
from guidegen.sampling.setup import plan_scheduler
from guidegen.spec.cell import Cell
from guidegen.zoo import autoencoder, batches, classifier
from guidegen.zoo import train as recipe

pa = pytest.importorskip("pyarrow")

SEEN = "autoencoder=8,unet=8,pretraining=16,classifier=8,drawn=9,negatives=16,scores=8"
STEPS = 3


@pytest.fixture(scope="module")
def small() -> Any:
    """Networks of the recipe that train in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        for config in (autoencoder.AUTOENCODER, recipe.LATENT_UNET, classifier.LATENT_CLASSIFIER):
            patch.setitem(config, "block_out_channels", (16, 16, 32))
        patch.setitem(recipe.LATENT_UNET, "attention_head_dim", 8)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labels, ten photographs each, of smooth colours."""
    draw = np.random.default_rng(0)
    colours = (Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)) for _ in range(40))
    images = [each.resize((64, 64), Image.Resampling.BICUBIC) for each in colours]
    return write_photographs(tmp_path_factory.mktemp("photographs") / "data", images)


@pytest.fixture(scope="module")
def trained(small: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one command makes."""
    out = tmp_path_factory.mktemp("trained")
    recipe.main(data, out, classes="all", size=32, images=SEEN, batch=4, latent=True)
    return out


def draw(folder: Path, mode: str, cells: list[Cell]) -> torch.Tensor:
    """Images (B, H, W, 3) in [0, 1], of 8 bits."""
    checkpoint = open_checkpoint(folder)
    walker = plan_scheduler(checkpoint, "ddim", STEPS, None)
    judge = open_classifier(checkpoint.bundled_classifier or "") if mode == "classifier" else None
    sampler = open_sampler(checkpoint, judge, walker, settings_of(mode, STEPS), torch.device("cpu"))
    return to_uint8(sampler.draw(cells)[0]).float() / 255


def test_one_command_makes_a_latent_checkpoint(trained: Path) -> None:
    checkpoint = open_checkpoint(trained)
    checkpoint.check_networks()
    assert checkpoint.kind == "latent diffusion UNet"
    assert (checkpoint.shape, checkpoint.image_shape) == ((4, 8, 8), (3, 32, 32))
    assert (checkpoint.null_label, checkpoint.prediction_type) == (1000, "v_prediction")
    assert checkpoint.labels.names == {int(label): name for label, name in NAMES.items()}
    judge = open_classifier(checkpoint.bundled_classifier or "")
    assert judge.columns(checkpoint.labels) == {1: 0, 207: 1, 281: 2, 500: 3}
    assert not checkpoint.refusal("both", classifier=True)


def test_its_images_are_those_of_a_loop_by_hand(trained: Path) -> None:
    from diffusers import LDMPipeline

    pipeline, labels, w = LDMPipeline.from_pretrained(trained), [207, 1], 3.0
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    pipeline.scheduler.set_timesteps(STEPS)
    assert not pipeline.scheduler.config.clip_sample
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            u, c = (pipeline.unet(x, t, torch.tensor(ids)).sample for ids in ([1000, 1000], labels))
            x = pipeline.scheduler.step(u + w * (c - u), t, x).prev_sample
        decoded = pipeline.vqvae.decode(x / pipeline.vqvae.config.scaling_factor).sample
    theirs = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    images = draw(trained, "cfg", [Cell(label, seed, w) for seed, label in enumerate(labels)])
    assert (images - theirs).abs().max() <= 1 / 255
    assert images.std() > 0.01


def test_its_classifier_guides_latents(trained: Path) -> None:
    plain, guided = (draw(trained, "classifier", [Cell(1, 0, w)]) for w in (0.0, 300.0))
    assert not torch.equal(plain, guided)


def test_latents_have_unit_deviation(trained: Path, data: Path) -> None:
    photographs, _ = batches.load_images(data, "train", [1, 207, 281, 500], 32)
    network = autoencoder.open_autoencoder(trained, "cpu")
    latents = autoencoder.encode(network, photographs)
    assert (latents.shape, latents.dtype) == ((40, 2, 4, 8, 8), torch.float16)
    assert latents.float().std() == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        x = batches.scaled(photographs[:5].flip(3))
        means = network.encode(x).latent_dist.mode() * network.config.scaling_factor
    torch.testing.assert_close(latents[:5, 1].float(), means, atol=2e-3, rtol=2e-3)


@pytest.mark.usefixtures("small")
def test_the_same_command_goes_on(trained: Path, data: Path, tmp_path: Path) -> None:
    """Parts one by one, the UNet begun with the state of fewer images, are those of one command."""
    for part in ("autoencoder", "unet"):
        for _ in range(2):
            recipe.main(data, tmp_path, part=part, classes="all", size=32, images=SEEN, batch=4, latent=True)
        file = Path(autoencoder.PART if part == "autoencoder" else part) / "diffusion_pytorch_model.safetensors"
        assert (tmp_path / file).read_bytes() == (trained / file).read_bytes(), part


def test_the_pool_holds_labels_of_the_recipe_more_often() -> None:
    labels = torch.tensor([500, 207, 1, 207, 500])
    assert labels[recipe.pool(labels)].bincount()[[1, 207, 500]].tolist() == [4, 8, 2]


def test_latents_are_noised_like_images() -> None:
    latents = torch.randn(6, 2, 4, 8, 8).half()
    made = batches.Batches(latents, torch.arange(6), 64, 3, "cpu")
    x_t, t, x0, eps, labels = made(5)
    alpha, sigma = (s[t][:, None, None, None] for s in batches.alphas_sigmas())
    torch.testing.assert_close(x_t, alpha * x0 + sigma * eps)
    sides = torch.stack([(latents[labels, side].float() == x0).flatten(1).all(1) for side in (0, 1)])
    assert torch.equal(sides.sum(0), torch.ones(64).long())
    assert 16 < sides[0].sum() < 48
    images = batches.Batches(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6), 4000, 3, "cpu")
    latent = batches.Batches(latents, torch.arange(6), 4000, 3, "cpu")
    level = [each.log_sigma[each.drawn(0)[1]].mean().item() for each in (images, latent)]
    assert level[1] - level[0] == pytest.approx(0.9 * np.log(2), abs=0.15)


def test_a_pyramid_adds_up() -> None:
    images = torch.rand(2, 3, 16, 16)
    bands = autoencoder.pyramid(images, 2)
    assert [band.shape[-1] for band in bands] == [16, 8, 4]
    for band in reversed(bands[:-1]):
        bands[-1] = band + nn.functional.interpolate(bands[-1], scale_factor=2)
    torch.testing.assert_close(bands[-1], images)


def test_the_autoencoder_learns_photographs(data: Path, small: None) -> None:
    photographs, labels = batches.load_images(data, "train", [1, 207, 281, 500], 32)
    torch.manual_seed(0)
    network = autoencoder.make_autoencoder(32)
    model = autoencoder.Reconstruction(network)
    shape = autoencoder.latent_shape(network)
    assert shape == (4, 8, 8)
    loss_of = autoencoder.autoencoder_loss(batches.Batches(photographs, labels, 8, 0, "cpu"), shape)
    optimizer, before = torch.optim.Adam(model.parameters(), 3e-3), autoencoder.signal_to_noise(network, photographs)
    for step in range(40):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert autoencoder.signal_to_noise(network, photographs) > before + 2


def test_without_an_autoencoder_there_are_no_latents(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train the autoencoder first"):
        recipe.main(data, tmp_path, part="unet", classes="1", size=32, latent=True)
    with pytest.raises(typer.BadParameter, match="with --latent"):
        recipe.main(data, tmp_path, part="autoencoder")
