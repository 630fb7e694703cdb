"""LDMPipeline folders: the images of diffusers' own pipeline, guidance by label and by classifier, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NAMES, settings_of, tiny_unet
from PIL import Image
from pipelines import EDGE, LATENT, tiny_vae
from setups import open_sampler
from torch import Tensor

from guidegen.errors import CheckpointError, GuidegenError, UnsafeError
from guidegen.models.checkpoint import open_checkpoint
from guidegen.sampling.loop import to_uint8
from guidegen.sampling.schedulers import SCHEDULERS
from guidegen.sampling.setup import plan_scheduler
from guidegen.spec.cell import Cell

Command = Callable[..., Any]
STEPS = 6
NULL = 5
GREY_LEVEL = 1 / 255  # sums run in another order, and the image is rounded


def tiny_vq() -> Any:
    """A VQModel that doubles the edges, with codes far enough apart that latents are near different ones."""
    from diffusers import VQModel

    torch.manual_seed(0)
    decoder = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        sample_size=EDGE,
        scaling_factor=0.3,
    ).eval()
    torch.nn.init.normal_(decoder.quantize.embedding.weight)
    return decoder


def save(folder: Path, decoder: Any, classes: int | None = None) -> Path:
    """A folder as `LDMPipeline` saves it; with classes, the names of all but the last in model_index.json."""
    from diffusers import DDIMScheduler, LDMPipeline

    channels = decoder.config.latent_channels
    unet = tiny_unet(sample_size=LATENT, in_channels=channels, out_channels=channels, num_class_embeds=classes)
    LDMPipeline(decoder, unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    if classes:
        edit(folder / "model_index.json", id2label=NAMES)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes a key."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("ldm")
    made = {"vq": tiny_vq(), "kl": tiny_vae()}
    plain = {name: save(top / name, decoder) for name, decoder in made.items()}
    return plain | {f"{name}-labels": save(top / f"{name}-labels", decoder, NULL + 1) for name, decoder in made.items()}


def draw(folder: Path, mode: str, cells: list[Cell], scheduler: str = "ddim") -> Tensor:
    """Images (B, H, W, 3) in [0, 1], of 8 bits."""
    checkpoint = open_checkpoint(folder)
    walker = plan_scheduler(checkpoint, scheduler, STEPS, None)
    sampler = open_sampler(checkpoint, None, walker, settings_of(mode, STEPS), torch.device("cpu"))
    return to_uint8(sampler.draw(cells)[0]).float() / 255


def their_pipeline(folder: Path, scheduler: str = "ddim") -> Any:
    import diffusers

    pipeline = diffusers.LDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipeline.scheduler.config)
    return pipeline


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])  # of which Euler scales the initial noise
@pytest.mark.parametrize("name", ["vq", "kl"])
def test_unconditional_images_are_those_of_the_pipeline(folders: dict[str, Path], name: str, scheduler: str) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    pipeline = their_pipeline(folders[name], scheduler)
    pipeline.scheduler.set_timesteps(STEPS)  # it scales the noise before it does so itself
    theirs = pipeline(3, generators, num_inference_steps=STEPS, output_type="np").images
    images = draw(folders[name], "none", [Cell(None, seed, 0.0) for seed in range(3)], scheduler)
    assert (images - torch.from_numpy(theirs)).abs().max() <= GREY_LEVEL
    assert images.std() > 0.1
    assert (images[0] - images[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["vq-labels", "kl-labels"])
def test_labels_are_guided_as_a_loop_by_hand_does_it(folders: dict[str, Path], name: str) -> None:
    labels, pipeline = [1, 4, 1], their_pipeline(folders[name])
    assert (open_checkpoint(folders[name]).null_label, len(open_checkpoint(folders[name]).labels)) == (NULL, NULL)
    for w in (0.0, 0.5, 1.0, 4.0):
        noise = [torch.randn(1, *shape_of(pipeline), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        x = torch.cat(noise)
        pipeline.scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for t in pipeline.scheduler.timesteps:
                u, c = (pipeline.unet(x, t, torch.tensor(ids)).sample for ids in ([NULL] * 3, labels))
                x = pipeline.scheduler.step(u + w * (c - u), t, x).prev_sample
            decoded = pipeline.vqvae.decode(x / pipeline.vqvae.config.scaling_factor).sample
        theirs = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        images = draw(folders[name], "cfg", [Cell(label, seed, w) for seed, label in enumerate(labels)])
        assert (images - theirs).abs().max() <= GREY_LEVEL, w
    unguided = draw(folders[name], "cfg", [Cell(label, seed, 0.0) for seed, label in enumerate(labels)])
    assert (images - unguided).abs().max() > 0.1


def shape_of(pipeline: Any) -> tuple[int, int, int]:
    return (pipeline.unet.config.in_channels, LATENT, LATENT)


@pytest.mark.parametrize("name", ["vq", "kl"])
def test_the_decoder_may_be_called_vae(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(folders[name], tmp_path / name))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "vqvae").rename(folder / "vae")
    edit(folder / "model_index.json", vae=index["vqvae"], vqvae=None)
    cells = [Cell(None, 0, 0.0)]
    assert torch.equal(draw(folder, "none", cells), draw(folders[name], "none", cells))


def test_sample_and_inspect(folders: dict[str, Path], guidegen: Command, tmp_path: Path) -> None:
    model = folders["vq-labels"]
    facts = json.loads(guidegen("inspect", model, "--json").stdout)
    assert facts["kind"] == "latent diffusion UNet, class-conditional with a null label"
    assert (facts["resolution"], facts["latents"]) == ("16x16, 3 channels", "8x8, 3 channels")
    assert (facts["labels"], facts["null label"], facts["modes"]) == (NULL, NULL, ["cfg", "none"])
    assert list(facts["other parts"]) == ["vqvae"]
    done = guidegen("sample", "-m", model, "--label", "tabby", "--w", 4, "--steps", STEPS, "--seeds", 1, "-o", "one.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "one.png") as image:
        drawn = torch.tensor(list(image.tobytes())).view(EDGE, EDGE, 3) / 255
    assert torch.equal(drawn, draw(model, "cfg", [Cell(1, 1, 4.0)])[0])


@pytest.mark.parametrize("name", ["vq", "kl-labels"])
def test_a_classifier_reads_what_is_decoded(
    folders: dict[str, Path], classifier_folder: Path, guidegen: Command, tmp_path: Path, name: str
) -> None:
    flags = ["-m", folders[name], "-c", classifier_folder, "--classifier-input", "denoised", "--mode", "classifier"]
    done = guidegen("sample", *flags, "--label", "tabby,lion", "--w", 300, "--steps", 2, "-o", "run")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()]
    assert [row["nfe"] for row in rows] == [
        6,
        6,
    ]  # null, and two for the gradient through the denoiser
    tabby, lion = (Image.open(tmp_path / "run" / row["file"]).tobytes() for row in rows)
    assert tabby != lion


def named(folder: Path, **parts: Any) -> None:
    edit(folder / "model_index.json", **parts)


def configured(part: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / part / "config.json", **changes)


REFUSED: list[tuple[str, Callable[[Path], None], type[GuidegenError], str]] = [
    ("another part", lambda f: named(f, bert=["transformers", "BertModel"]), CheckpointError, "with bert; guidegen opens"),
    ("two decoders", lambda f: named(f, vae=["diffusers", "AutoencoderKL"]), CheckpointError, "with vae; guidegen opens"),
    ("no decoder", lambda f: named(f, vqvae=None), CheckpointError, "has a vqvae, and model_index.json names none"),
    ("no scheduler", lambda f: named(f, scheduler=None), CheckpointError, "has a scheduler, and model_index"),
    ("another network", lambda f: named(f, unet=["diffusers", "UNet1DModel"]), CheckpointError, "with unet UNet1DModel"),
    ("another decoder", lambda f: named(f, vqvae=["diffusers", "AutoencoderTiny"]), CheckpointError, "VQModel or Auto"),
    ("another config", configured("vqvae", _class_name="AutoencoderTiny"), CheckpointError, "AutoencoderTiny by its config"),
    ("code of its own", lambda f: named(f, vqvae=["mine", "VQModel"]), UnsafeError, "no remote code"),
    ("other latents", configured("vqvae", latent_channels=8), CheckpointError, "vqvae does not decode what the unet draws"),
    ("shifted latents", configured("vqvae", shift_factor=0.1), CheckpointError, "decodes without one"),
    ("many channels", configured("vqvae", out_channels=4), CheckpointError, "gives 4 channels"),
]


@pytest.mark.parametrize(("damage", "error", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_served_is_refused(
    folders: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], error: type[GuidegenError], words: str
) -> None:
    folder = Path(shutil.copytree(folders["kl"], tmp_path / "copy"))
    damage(folder)
    with pytest.raises(error, match=words):
        open_checkpoint(folder).check_networks()
