"""Checkpoints of x_0 + sigma eps against the pipelines and schedulers of diffusers: same weights, seeds and steps.

Within one grey level of 255. The score SDE's corrector reads the whole batch in diffusers, so there each image is
drawn alone; the noise is drawn in the same order everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from conftest import call, save_pipeline, settings_of, tiny_classifier, tiny_unet
from diffusers.pipelines.deprecated import KarrasVePipeline, ScoreSdeVePipeline
from setups import open_sampler

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.checkpoint import Checkpoint, open_checkpoint
from guidegen.sampling.loop import to_uint8
from guidegen.sampling.setup import plan_scheduler
from guidegen.spec.cell import Cell

NCSNPP = {
    "time_embedding_type": "fourier",
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "block_out_channels": (32, 32),
    "mid_block_scale_factor": 2**0.5,
    "norm_num_groups": None,
    "sample_size": 8,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sigma")
    unet = tiny_unet(4, **NCSNPP)
    ScoreSdeVePipeline(unet, diffusers.ScoreSdeVeScheduler(sigma_max=50.0)).save_pretrained(home / "ve")
    KarrasVePipeline(unet, diffusers.KarrasVeScheduler()).save_pretrained(home / "karras")
    classes = tiny_unet(5, num_class_embeds=6)
    scheduler = diffusers.CMStochasticIterativeScheduler()
    diffusers.ConsistencyModelPipeline(classes, scheduler).save_pretrained(home / "cm")
    save_pipeline(home / "edm", classes, diffusers.EDMEulerScheduler(), null_label=5)
    pipelines.stable_diffusion_xl(home / "sdxl")
    playground: dict[str, Any] = {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "sigma_data": 0.5,
        "final_sigmas_type": "zero",
    }
    (home / "sdxl" / "scheduler" / "scheduler_config.json").write_text(json.dumps(playground))
    index = home / "sdxl" / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", playground["_class_name"]))
    return home


def drawn(checkpoint: Checkpoint, steps: int, cells: list[Cell], scheduler: str | None = None) -> np.ndarray[Any, Any]:
    walker = plan_scheduler(checkpoint, scheduler, steps, None)
    sampler = open_sampler(checkpoint, None, walker, settings_of("cfg", steps), torch.device("cpu"))
    return to_uint8(sampler.draw(cells)[0]).numpy().astype(int)


def close(ours: np.ndarray[Any, Any], theirs: Any) -> None:
    assert np.std(ours) > 10  # no flat images
    assert np.abs(ours - np.asarray(theirs) * 255).max() <= 1.01


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "steps"), [("ve", 8), ("karras", 20)])
def test_variance_exploding_pipelines(home: Path, name: str, steps: int) -> None:
    cls, scheduler = {
        "ve": (ScoreSdeVePipeline, diffusers.ScoreSdeVeScheduler),
        "karras": (KarrasVePipeline, diffusers.KarrasVeScheduler),  # which diffusers does not load as a pipeline
    }[name]
    unet = diffusers.UNet2DModel.from_pretrained(home / name / "unet")
    pipeline = cls(unet, scheduler.from_pretrained(home / name / "scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    ours = drawn(open_checkpoint(home / name), steps, [Cell(None, seed, 0.0) for seed in (0, 7)])
    alone = [pipeline(1, steps, generator=generator(seed), output_type="np").images for seed in (0, 7)]
    close(ours, np.concatenate(alone))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_consistency_pipeline(home: Path, steps: int) -> None:
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(home / "cm")
    pipeline.set_progress_bar_config(disable=True)
    ours = drawn(open_checkpoint(home / "cm"), steps, [Cell(label, seed, 1.0) for seed, label in enumerate((3, 0))])
    draws = [generator(seed) for seed in range(2)]
    close(ours, pipeline(2, [3, 0], steps, generator=draws, output_type="np").images)


def test_timesteps_of_a_consistency_model(home: Path) -> None:
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(home / "cm")
    pipeline.set_progress_bar_config(disable=True)
    checkpoint = open_checkpoint(home / "cm")
    walker = plan_scheduler(checkpoint, None, 2, None, options=["timesteps=22,0"])
    sampler = open_sampler(checkpoint, None, walker, settings_of("cfg", 2), torch.device("cpu"))
    theirs = pipeline(1, [3], None, [22, 0], generator=[generator(0)], output_type="np").images
    close(to_uint8(sampler.draw([Cell(3, 0, 1.0)])[0]).numpy().astype(int), theirs)
    for text, steps in (("22,0", 3), ("0,22", 2), ("40,0", 2), ("x", 1), ("3,-1", 2)):
        with pytest.raises(UsageError):
            plan_scheduler(checkpoint, None, steps, None, options=[f"timesteps={text}"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_edm_preconditioned_unets(home: Path, name: str, prediction_type: str, w: float, tmp_path: Path) -> None:
    """The loop that a user of the parts would write: no pipeline of diffusers walks a UNet2DModel so."""
    scheduler = getattr(diffusers, name)(prediction_type=prediction_type)
    folder = save_pipeline(tmp_path / "edm", tiny_unet(5, num_class_embeds=6), scheduler, null_label=5)
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    scheduler.set_timesteps(8)
    x = torch.randn((1, 3, 8, 8), generator=generator(4)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            null, label = (unet(scaled, t, class_labels=torch.tensor([c])).sample for c in (5, 2))
        x = scheduler.step(null + w * (label - null), t, x).prev_sample
    close(drawn(open_checkpoint(folder), 8, [Cell(2, 4, w)]), (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def test_sdxl_with_an_edm_scheduler(home: Path) -> None:
    """As Playground v2.5."""
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(home / "sdxl")
    pipeline.set_progress_bar_config(disable=True)
    cells = [Cell(None, seed, 3.0, prompt="a red fox", prompt_index=0) for seed in range(2)]
    ours = drawn(open_checkpoint(home / "sdxl"), 6, cells)
    draws = [generator(seed) for seed in range(2)]
    options = {"guidance_scale": 3.0, "num_inference_steps": 6, "output_type": "np"}
    close(ours, pipeline(["a red fox"] * 2, generator=draws, **options).images)


def test_a_pipeline_may_have_its_network_beside_its_index(home: Path, tmp_path: Path) -> None:
    """As the first pipelines of the hub, google/ncsnpp-* among them."""
    for part, name in (
        ("unet", "config.json"),
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("scheduler", "scheduler_config.json"),
    ):
        (tmp_path / name).write_bytes((home / "ve" / part / name).read_bytes())
    (tmp_path / "model_index.json").write_bytes((home / "ve" / "model_index.json").read_bytes())
    cells = [Cell(None, 0, 0.0)]
    assert np.array_equal(*(drawn(open_checkpoint(folder), 3, cells) for folder in (tmp_path, home / "ve")))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ve", ["a score network", "sigma 0.01 to 50", "2000", '"cfg": "the model is unconditional', "arXiv 2011.13456"]),
        ("karras", ["a score network", "sigma 0.02 to 100", "50 steps"]),
        ("cm", ["a consistency function", "sigma 0.002 to 80", "random labels with --uncond icg", "1 or 2 steps"]),
        ("edm", ["EDM preconditioning with sigma_data 0.5", "sigma 0.002 to 80", '"null label": 5', "table 5"]),
        ("sdxl", ["EDM preconditioning", "--w 3, 50 steps"]),
    ],
)
def test_inspect(home: Path, name: str, words: list[str]) -> None:
    told = call("inspect", home / name, "--json").stdout
    assert [word for word in words if word not in told] == []
    text = call("inspect", home / name).stdout
    assert json.loads(told)["parametrisation"] in text


def test_classifiers_guide_variance_exploding_models(home: Path, tmp_path: Path) -> None:
    """One of noisy images, which reads x and sigma, and the same of denoised ones, which reads them in [-1, 1]."""
    tiny_classifier().save_pretrained(tmp_path / "classifier")
    common = ("sample", "-m", home / "ve", "--mode", "classifier", "-c", tmp_path / "classifier", "--label", "1")
    for scheduler, evaluations, kind, each in (("ScoreSdeVeScheduler", 4, "noisy", 2), ("edm", 3, "denoised", 3)):
        out = tmp_path / f"{scheduler}-{kind}"
        options = ("--scheduler", scheduler, "--steps", 2, "--classifier-input", kind, "--w", 2, "-o", out, "--json")
        row = json.loads(call(*common, *options).stdout)
        assert (row["status"], row["nfe"]) == ("ok", evaluations * each)


def test_commands_of_all_of_these(home: Path, tmp_path: Path) -> None:
    churn = ("--scheduler", "edm", "--scheduler-opt", "S_churn=20", "--scheduler-opt", "S_tmax=50", "--steps", 4)
    call("sample", "-m", home / "edm", "--label", 1, *churn, "-o", tmp_path / "edm")
    settings = json.loads((tmp_path / "edm" / "run.json").read_text())["settings"]
    assert settings["scheduler"] == "EDMHeunScheduler"
    image = next((tmp_path / "edm").rglob("*.png"))
    again = call("again", image, "-o", tmp_path / "again.png")
    assert again.exit_code == 0
    call(
        "sweep",
        "-m",
        home / "edm",
        "--label",
        1,
        "--w",
        "0,1,2",
        "--by",
        "scheduler=edm,euler",
        "--steps",
        3,
        "-o",
        tmp_path / "s",
    )
    refused = call("sample", "-m", home / "cm", "--label", 1, "--w", 2, code=2)
    assert "--uncond icg" in str(refused.exception)
    call("sample", "-m", home / "cm", "--label", 1, "--w", 1, "-o", tmp_path / "one.png")
    call("sample", "-m", home / "cm", "--label", 1, "--w", 2, "--uncond", "icg", "--steps", 2, "-o", tmp_path / "icg.png")
    for model, options in (("edm", ["--scheduler", "ddim"]), ("cm", ["--scheduler", "edm"]), ("ve", ["--steps", 1])):
        label = [] if model == "ve" else ["--label", 1]
        mode = "none" if model == "ve" else "cfg"
        call("sample", "-m", home / model, *label, "--mode", mode, "--w", 1, *options, "-o", tmp_path / "no.png", code=2)


def test_a_scheduler_of_another_pipeline_is_refused(home: Path, tmp_path: Path) -> None:
    for scheduler, index, words in (
        (diffusers.ScoreSdeVeScheduler(), {}, "a ScoreSdeVePipeline has one"),
        (diffusers.DDPMScheduler(), {"_class_name": "ScoreSdeVePipeline"}, "it should have a ScoreSdeVeScheduler"),
    ):
        folder = save_pipeline(tmp_path / type(scheduler).__name__, tiny_unet(), scheduler, **index)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(folder)
