"""Autoguidance: a model against a weaker one, from a second checkpoint or made of its own network."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from conftest import NAMES, save_pipeline, settings_of, tiny_unet
from PIL import Image
from setups import draw_job, open_sampler, options_of
from torch import Tensor, nn

from guidegen.cli.dry_run import print_costs
from guidegen.cli.resolve import plan_job
from guidegen.errors import CheckpointError, UsageError
from guidegen.evaluate.measure import open_drawn
from guidegen.models.autoguidance import open_guide
from guidegen.models.checkpoint import Checkpoint, open_checkpoint, open_classifier
from guidegen.models.weaken import pick_layers, weakened
from guidegen.report import grid
from guidegen.runs.directory import Run
from guidegen.sampling.loop import to_uint8
from guidegen.sampling.sampler import Sampler, Tally
from guidegen.sampling.setup import plan_scheduler
from guidegen.sampling.worker import draw
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import NULL
from guidegen.scores.noise import Level
from guidegen.spec.cell import Cell
from guidegen.spec.plan import make_cells

T = torch.tensor(500)
LEVEL = Level(0.6, 0.8)
ONE_GREY = 1 / 255
"""Equal sums in another order, or of another batch, may round to the next grey level."""


class Fixed:
    """A network whose answer is known: a tensor for each label."""

    prediction_type = "epsilon"

    def __init__(self, **answers: Tensor):
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.asked += labels.tolist()
        return torch.cat([self.answers["null" if label == NULL else "label"] for label in labels.tolist()])


def weak_unet(seed: int = 9, **others: Any) -> Any:
    return tiny_unet(seed, block_out_channels=(4, 8), **({"num_class_embeds": 6} | others))


def attentive(unet: Any, times: float = 5) -> Any:
    """The text-conditional UNet with self-attention that is not nearly even, so that it shows."""
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn1.to" in name:
                weight *= times
    return unet


@pytest.fixture(scope="module")
def folders(with_null: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with a guiding network in its folder, that network as a checkpoint, and the published kinds."""
    from diffusers import DDIMScheduler

    home = tmp_path_factory.mktemp("guides")
    shutil.copytree(with_null, home / "beside")
    weak_unet().save_pretrained(home / "beside" / "unet_weak")
    save_pipeline(home / "guiding", weak_unet(), DDIMScheduler(clip_sample=False), id2label=NAMES)
    found = {name: home / name for name in ("beside", "guiding")}
    found |= {kind: getattr(pipelines, kind)(home / kind) for kind in ("dit", "stable_diffusion")}
    attentive(pipelines.tiny_text_unet()).save_pretrained(found["stable_diffusion"] / "unet")
    return found


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import UNet2DConditionModel

    folder = pipelines.stable_diffusion_xl(tmp_path_factory.mktemp("guides") / "sdxl")
    attentive(UNet2DConditionModel.from_pretrained(folder / "unet"), 2).save_pretrained(folder / "unet")
    return folder


def sampler_of(
    folder: Path, guide: str | None, mode: str = "cfg", steps: int = 4, scheduler: str = "ddim", **others: Any
) -> Sampler:
    checkpoint = open_checkpoint(folder)
    walker = plan_scheduler(checkpoint, scheduler, steps, None)
    settings = settings_of(mode, steps, guide_model=guide, **others)
    guiding = open_guide(guide, checkpoint) if guide else None
    classifier = open_classifier(checkpoint.bundled_classifier) if checkpoint.bundled_classifier else None
    return open_sampler(checkpoint, classifier, walker, settings, torch.device("cpu"), guide=guiding)


def drawn(sampler: Sampler, cells: Sequence[Cell]) -> Tensor:
    """(B, H, W, C) in [0, 1], in whole grey levels."""
    return to_uint8(sampler.draw(cells)[0]).float() / 255


def flags(model: Path | str, out: Path, **given: Any) -> Any:
    return options_of(**({"model": str(model), "out": str(out), "steps": 3, "label": ["1"]} | given))


def run_of(model: Path | str, out: Path, **given: Any) -> list[dict[str, Any]]:
    draw_job(flags(model, out, **given))
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def picture(folder: Path, row: dict[str, Any]) -> Any:
    with Image.open(folder / row["file"]) as image:
        return np.asarray(image).astype(int)


# How predictions are combined, against diffusers' guiders


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.8, 7.0])
def test_mode_auto_equals_the_auto_guider_of_diffusers(w: float) -> None:
    from diffusers.guiders import AutoGuidance

    strong, guiding = torch.randn((2, 1, 3, 8, 8)).unbind()
    theirs = AutoGuidance(guidance_scale=w, auto_guidance_layers=[0], dropout=0.1)
    ours = Guide(Fixed(label=strong), [3], [1.0], guiding=Fixed(label=guiding), w_guide=[w])
    expected = theirs.forward(pred_cond=strong, pred_uncond=guiding).pred
    assert (ours(torch.zeros_like(strong), T, LEVEL) - expected).abs().max() < 1e-5, "fp32, weights up to 7"


@pytest.mark.parametrize("w", [0.5, 3.0])
def test_on_top_of_cfg_equals_the_pag_guider_of_diffusers(w: float) -> None:
    from diffusers.guiders import PerturbedAttentionGuidance

    null, label, perturbed = torch.randn((3, 1, 3, 8, 8)).unbind()
    theirs = PerturbedAttentionGuidance(guidance_scale=w, perturbed_guidance_scale=2.5, perturbed_guidance_layers=[0])
    guiding = Fixed(label=perturbed)
    ours = Guide(Fixed(null=null, label=label), [3], [w], guiding=guiding, w_guide=[1 + 2.5])
    expected = theirs.forward(pred_cond=label, pred_uncond=null, pred_cond_skip=perturbed).pred
    assert (ours(torch.zeros_like(null), T, LEVEL) - expected).abs().max() < 1e-5
    assert guiding.asked == [3]
    assert ours.calls == [3]


class Gaussian:
    """The exact denoiser of one Gaussian, N(m, s^2)."""

    prediction_type = "epsilon"

    def __init__(self, mean: Tensor, spread: float):
        self.mean, self.spread = mean, spread

    def variance(self) -> float:
        return LEVEL.alpha**2 * self.spread**2 + LEVEL.sigma**2

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return LEVEL.sigma * (x_t - LEVEL.alpha * self.mean) / self.variance()


def test_against_a_wider_gaussian_the_score_is_that_of_a_narrower_one() -> None:
    """Scores of Gaussians of one mean are linear: the precisions mix as the scores do (Karras et al. 2024, section 3)."""
    mean, x, w = torch.randn((2, 1, 1)), torch.randn((64, 2, 1, 1)), 2.0
    strong, guiding = Gaussian(mean, 0.5), Gaussian(mean, 1.0)
    guided = Guide(strong, [0] * 64, [1.0] * 64, guiding=guiding, w_guide=[w] * 64)(x, T, LEVEL)
    precision = w / strong.variance() + (1 - w) / guiding.variance()
    assert precision > 1 / strong.variance()
    expected = LEVEL.sigma * precision * (x - LEVEL.alpha * mean)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


# Weaker networks that are made of the model's own


def tiny_dit(layers: int = 3) -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).eval()


NETWORKS: dict[str, tuple[Callable[[], Any], int, Callable[[int], dict[str, Any]]]] = {
    "unet": (lambda: tiny_unet(num_class_embeds=6), 3, lambda n: {"class_labels": torch.arange(n)}),
    "text": (lambda: attentive(pipelines.tiny_text_unet()), 4, lambda n: {"encoder_hidden_states": torch.ones((n, 5, 16))}),
    "dit": (tiny_dit, 4, lambda n: {"class_labels": torch.arange(n)}),
}


def call(name: str, network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = network(x, T.expand(len(x)), return_dict=False, **NETWORKS[name][2](len(x)))[0]
    return output


@pytest.mark.parametrize("name", NETWORKS)
def test_pag_equals_the_attention_processor_of_diffusers(name: str) -> None:
    """Their processor takes the batch twice and perturbs its second half."""
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    make, channels, condition = NETWORKS[name]
    network, x = make(), torch.randn((2, channels, 8, 8))
    before = call(name, network, x)
    ours = call(name, weakened(network, "pag"), x)
    (layer,) = pick_layers(network, "pag")
    theirs, where = copy.deepcopy(network), {"unet": layer, "text": f"{layer}.attn1", "dit": f"{layer}.attn1"}[name]
    theirs.get_submodule(where).set_processor(PAGIdentitySelfAttnProcessor2_0())
    twice = {key: torch.cat([value, value]) for key, value in condition(2).items()}
    with torch.no_grad():
        expected = theirs(torch.cat([x, x]), T.expand(4), return_dict=False, **twice)[0]
    assert (ours - expected[2:]).abs().max() < 1e-5, "fp32, sums of another batch"
    assert (before - expected[:2]).abs().max() < 1e-5
    assert (ours - before).abs().max() > 1e-3, "it makes a difference"


def without(name: str, network: Any) -> Any:
    """A copy of the network that really lacks the layer that `skip` leaves out by default."""

    class Passing(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states

    cut = copy.deepcopy(network)
    if name == "unet":
        cut.mid_block.attentions[0] = Passing()
    elif name == "text":
        cut.mid_block.attentions[0].transformer_blocks = nn.ModuleList()
    else:
        passing = Passing()
        passing.norm1 = cut.transformer_blocks[0].norm1  # the condition of the output layer comes from there
        cut.transformer_blocks[0] = passing
    return cut


@pytest.mark.parametrize("name", NETWORKS)
def test_skip_equals_a_network_without_that_layer(name: str) -> None:
    make, channels, _ = NETWORKS[name]
    network, x = make(), torch.randn((2, channels, 8, 8))
    before = call(name, network, x)
    ours = call(name, weakened(network, "skip"), x)
    assert torch.equal(ours, call(name, without(name, network), x))
    assert (ours - before).abs().max() > 1e-3
    assert torch.equal(call(name, network, x), before), "the network itself is as it was"


def test_guiding_network_has_the_weights_of_the_first() -> None:
    network = tiny_unet(num_class_embeds=6)
    guiding = weakened(network, "skip", ["mid", "up_blocks"])
    assert [id(p) for p in guiding.parameters()] == [id(p) for p in network.parameters()]
    x = torch.randn((1, 3, 8, 8))
    before = call("unet", guiding, x)
    with torch.no_grad():
        network.conv_out.bias += 1.0
    torch.testing.assert_close(call("unet", guiding, x), before + 1.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["pag", "skip"])
def test_guiding_network_compiles_to_itself_and_leaves_the_first_alone(how: str) -> None:
    network, x = tiny_dit(2), torch.randn((1, 4, 8, 8))
    guiding = weakened(network, how)
    for net in (network, guiding):
        compiled: Any = torch.compile(net, backend="eager")  # its tracer is what hooks could escape
        assert (call("dit", compiled, x) - call("dit", net, x)).abs().max() < 1e-6
    assert (call("dit", network, x) - call("dit", guiding, x)).abs().max() > 1e-4


def test_layers_are_found_by_name() -> None:
    unet, text, dit = tiny_unet(), pipelines.tiny_text_unet(), tiny_dit(24)
    assert pick_layers(unet, "pag", ["mid"]) == ["mid_block.attentions.0"] == pick_layers(unet, "pag")
    assert pick_layers(unet, "skip", ["down_blocks.1"]) == ["down_blocks.1.attentions.0"]
    assert pick_layers(text, "pag", ["mid_block", "mid"]) == ["mid_block.attentions.0.transformer_blocks.0"]
    assert pick_layers(text, "skip", ["up_blocks.0.attentions.1"]) == ["up_blocks.0.attentions.1.transformer_blocks.0"]
    assert pick_layers(dit, "pag") == ["transformer_blocks.1"]
    assert pick_layers(dit, "skip") == [f"transformer_blocks.{i}" for i in (7, 8, 9)]
    assert pick_layers(dit, "skip", ["2", "transformer_blocks.11"]) == ["transformer_blocks.2", "transformer_blocks.11"]
    with pytest.raises(UsageError, match=r"no such layer as down_blocks\.0\. Name some of: down_blocks\.1\.attentions\.0, "):
        pick_layers(unet, "pag", ["down_blocks.0"])
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    with pytest.raises(UsageError, match="no self-attention to disturb"):
        pick_layers(tiny_unet(**blocks), "pag")


# Pictures, against diffusers' PAG pipelines


def their_pag(folder: Path, cls: str, prompts: list[str], w: float, pag_scale: float, steps: int) -> Tensor:
    import diffusers

    plain = diffusers.DiffusionPipeline.from_pretrained(folder)
    parts = {name: part for name, part in plain.components.items() if name not in ("image_encoder", "feature_extractor")}
    if "safety_checker" in parts:
        parts |= {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    pipeline = getattr(diffusers, cls)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    size = {"height": pipelines.EDGE, "width": pipelines.EDGE}
    asked = {"guidance_scale": w, "pag_scale": pag_scale, "generator": seeds, "output_type": "np", **size}
    negative = ["dull"] * len(prompts)
    return torch.from_numpy(pipeline(prompts, negative_prompt=negative, num_inference_steps=steps, **asked).images)


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def test_pag_on_top_of_cfg_equals_the_pag_pipelines_of_diffusers(folders: dict[str, Path], sdxl: Path, kind: str) -> None:
    folder, cls = {
        "stable_diffusion": (folders["stable_diffusion"], "StableDiffusionPAGPipeline"),
        "stable_diffusion_xl": (sdxl, "StableDiffusionXLPAGPipeline"),
    }[kind]
    prompts, w, scale = ["a red fox", "snow"], 4.0, 3.0
    cells = [Cell(None, i, w, None, text, i, 1 + scale) for i, text in enumerate(prompts)]
    sampler = sampler_of(folder, "pag", negative_prompt="dull")
    ours = drawn(sampler, cells)
    assert (ours - their_pag(folder, cls, prompts, w, scale, 4)).abs().max() <= ONE_GREY
    plain = drawn(sampler, [Cell(None, i, w, None, text, i) for i, text in enumerate(prompts)])
    assert (ours - plain).abs().max() > 3 * ONE_GREY, "what is compared is not the picture without it"


# Second checkpoints


def test_mode_auto_goes_from_the_guiding_network_to_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    given = {"mode": "autoguidance", "sweep": True, "w": "0,1,3", "label": ["1", "tabby, tabby cat"], "num": 2}
    job = plan_job(flags(folders["beside"], tmp_path / "run", **given))
    rows = run_of(folders["beside"], tmp_path / "run", **given)
    assert [row["nfe"] for row in rows] == [3, 3, 6] * 2, "a call of the guiding network is a call"
    assert (job.settings.guide_model, job.models.guide and job.models.guide.shares) == ("unet_weak", True)
    alone = {
        0.0: run_of(folders["guiding"], tmp_path / "guiding", mode="none", num=2),
        1.0: run_of(folders["beside"], tmp_path / "strong", mode="none", num=2),
    }
    for row in rows:
        if row["w"] == 3.0:
            continue
        where = {0.0: "guiding", 1.0: "strong"}[row["w"]]
        other = picture(tmp_path / where, alone[row["w"]][row["seed"]])
        assert np.abs(picture(tmp_path / "run", row) - other).max() <= 1
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["settings"]["guide_model"] == "unet_weak"
    assert len(about["settings"]["guide_model_sha256"]) == 64
    assert about["guide_model"]["path"].endswith("unet_weak")
    assert "autoguidance against unet_weak" in grid.title_of(about["settings"])


@pytest.mark.parametrize("mode", ["cfg", "classifier", "both", "none", "autoguidance"])
def test_the_model_as_its_own_guide_changes_nothing(folders: dict[str, Path], mode: str) -> None:
    wc = 2.0 if mode == "both" else None
    plain = Cell(1, 0, {"none": 1.0, "autoguidance": 1.0}.get(mode, 3.0), wc)
    guided = Cell(1, 0, 5.0) if mode == "autoguidance" else Cell(1, 0, plain.w, wc, w_guide=5.0)
    sampler = sampler_of(folders["beside"], str(folders["beside"]), mode)
    # the difference of the networks is zero but for the rounding of calls of another batch, times four
    assert (drawn(sampler, [guided]) - drawn(sampler, [plain])).abs().max() <= ONE_GREY


@pytest.mark.parametrize("guide", ["folder", "unet", "checkpoint", "bundled", "./unet_weak"])
def test_same_network_however_it_is_named(folders: dict[str, Path], guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders["beside"])
    ref = {"folder": str(folders["beside"] / "unet_weak"), "unet": str(folders["guiding"] / "unet")}.get(guide, guide)
    ref = str(folders["guiding"]) if guide == "checkpoint" else ref
    cell = Cell(1, 0, 3.0, w_guide=2.0)
    ours = drawn(sampler_of(folders["beside"], ref), [cell])
    plain = drawn(sampler_of(folders["beside"], None), [Cell(1, 0, 3.0)])
    assert torch.equal(ours, drawn(sampler_of(folders["beside"], "bundled"), [cell]))
    assert (ours - plain).abs().max() > 3 * ONE_GREY


def test_guiding_checkpoint_reads_prompts_with_its_own_encoder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPTextModel

    torch.manual_seed(77)
    other = shutil.copytree(folders["stable_diffusion"], tmp_path / "other")
    CLIPTextModel(pipelines.clip_text_config()).eval().save_pretrained(other / "text_encoder")
    cells = [Cell(None, 0, 3.0, None, "a red fox", 0, 2.0)]
    model = folders["stable_diffusion"]
    same, alone, theirs = (drawn(sampler_of(model, str(ref)), cells) for ref in (model, model / "unet", other))
    assert (same - alone).abs().max() <= ONE_GREY, "the same network, alone in its folder"
    assert (same - theirs).abs().max() > ONE_GREY


def test_own_models_guide_each_other(tmp_path: Path) -> None:
    code = """
import torch
from guidegen import Model

class Pull:
    prediction_type = "sample"
    def __init__(self, way): self.way = way
    def __call__(self, x_t, t, labels): return torch.full_like(x_t, self.way) * (labels + 1)[:, None, None, None]

SCHEDULER = {"_class_name": "DDIMScheduler", "prediction_type": "sample", "clip_sample": False}
def model(way, **more): return Model(lambda device: Pull(way), (3, 8, 8), SCHEDULER, {0: "cat"}, **more)
STRONG, WEAK, OTHER = model(0.4), model(0.1), Model(lambda device: Pull(0.1), (3, 8, 8), SCHEDULER, {1: "dog"})
"""
    (tmp_path / "own.py").write_text(code)
    strong, guiding, other = (f"{tmp_path}/own.py:{name}" for name in ("STRONG", "WEAK", "OTHER"))
    given = {"mode": "autoguidance", "w": "2", "label": ["cat"], "guide_model": guiding}
    (row,) = run_of(strong, tmp_path / "run", **given)
    assert np.abs(picture(tmp_path / "run", row) - (0.4 + 0.3 + 1) / 2 * 255).max() <= 1, "0.1 + 2 (0.4 - 0.1)"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["guide_model"] == "WEAK"
    with pytest.raises(UsageError, match="does not know label 0 cat"):
        plan_job(flags(strong, tmp_path / "other", **(given | {"guide_model": other})))
    with pytest.raises(UsageError, match="layers of a custom model"):
        plan_job(flags(strong, tmp_path / "other", **(given | {"guide_model": "pag"})))


# What a run knows of it


def test_sweep_of_both_weights_is_resumed_counted_and_told(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"sweep": True, "w": "1,3", "w_guide": "1,2,0", "guide_model": str(folders["guiding"])}
    job = plan_job(flags(folders["beside"], tmp_path, json_rows=True, **given))
    print_costs(job)
    told = json.loads(capsys.readouterr().out)
    rows = run_of(folders["beside"], tmp_path, **given)
    nfe = {(row["w"], row["w_guide"]): row["nfe"] / 3 for row in rows}
    # at (1, 0) the guiding network alone is asked; at (3, 0) it is needed beside both terms of CFG
    assert nfe == {(1.0, 1.0): 1, (1.0, 2.0): 2, (1.0, 0.0): 1, (3.0, 1.0): 2, (3.0, 2.0): 3, (3.0, 0.0): 3}
    assert told["nfe"] == sum(row["nfe"] for row in rows)
    assert rows[1]["file"] == "images/w1.0_g2.0/label0001/000000.png"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("images/*/*/*.png")}
    (tmp_path / rows[1]["file"]).unlink()
    again = run_of(folders["beside"], tmp_path, **given)
    assert sorted(again, key=str) == sorted(rows, key=str)
    kept = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
    assert len(kept) == len(before) - 1
    assert open_drawn(tmp_path).axes == ("w", "w_guide")
    page = grid.layout(rows, (8, 8), ["w_guide"])
    assert list(page.heads.values()) == ["guide w = 0", "guide w = 1", "guide w = 2"]
    with pytest.raises(UsageError, match="guide_model"):
        run_of(folders["beside"], tmp_path, **(given | {"guide_model": "pag"}))


def test_interval_and_mixtures_of_labels_with_a_guiding_model(folders: dict[str, Path], tmp_path: Path) -> None:
    given = {"mode": "autoguidance", "w": "2", "steps": 4}
    (half,) = run_of(folders["beside"], tmp_path / "half", interval="0%:50%", **given)
    assert half["nfe"] == 2 * 2 + 2 * 1, "outside of the interval the model alone is asked"
    (mixed,) = run_of(folders["beside"], tmp_path / "mixed", **(given | {"label": ["1:2,4:-0.5"]}))
    assert mixed["nfe"] == 4 * (3 + 3), "two labels and none, of both networks"
    without = given | {"label": ["1:2,4:-0.5"], "guide_model": "pag"}
    assert plan_job(flags(folders["guiding"], tmp_path / "made", **without)).settings.guide_model == "pag"
    given |= {"mode": "cfg", "w": "3", "w_guide": "2", "guide_model": "bundled"}
    (both,) = run_of(folders["beside"], tmp_path / "apg", guidance="apg", **given)
    assert both["nfe"] == 4 * 3


def test_unguided_cells_share_an_image_for_each_weight_against_the_guiding_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    sampler, tally = sampler_of(folders["beside"], "bundled"), Tally()
    cells = make_cells([0, 1, 2], [0], [0.0], guide_weights=[1.0, 2.0])
    with Run(tmp_path, settings_of("cfg", 4), {}) as run:
        rows = dict(draw(sampler, cells, run, str, 16, tally=tally))
    pictures = {cell: picture(tmp_path, row) for cell, row in rows.items()}
    for cell in cells:
        assert (pictures[cell] == pictures[Cell(0, 0, 0.0, w_guide=cell.w_guide)]).all()
    assert (pictures[cells[0]] != pictures[cells[1]]).any()
    assert tally.made == 4 * (1 + 1 + 1) - 1, "at the first step both ask the model for the same"


def test_fixed_rows_and_half_precision_reach_the_guiding_network(folders: dict[str, Path]) -> None:
    from dataclasses import replace

    cells = make_cells([0, 1], [0, 1], [1.0, 3.0], guide_weights=[2.0])
    fixed = replace(sampler_of(folders["beside"], "bundled"), fixed_rows=4)
    whole, _ = fixed.draw(cells)
    for i, cell in enumerate(cells):
        assert torch.equal(fixed.draw([cell])[0][0], whole[i])
    half = sampler_of(folders["beside"], "bundled", dtype="bf16")
    assert half.in_fp32 is not None
    assert torch.equal(half.in_fp32().draw(cells)[0], sampler_of(folders["beside"], "bundled").draw(cells)[0])
    assert (half.draw(cells)[0] - whole).abs().mean() < 0.05 * whole.abs().mean()
    assert not torch.equal(half.draw(cells)[0], half.in_fp32().draw(cells)[0])


# Refusals


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "autoguidance"}, "there is no guiding model beside it. Name one: --guide-model"),
        ({"w_guide": "2"}, "there is none beside the model. Name one"),
        ({"mode": "autoguidance", "guide_model": "bundled"}, "has no guiding network in its folder"),
        ({"mode": "autoguidance", "guide_model": "pag", "w_guide": "2"}, "in mode autoguidance the weight is --w"),
        ({"mode": "autoguidance", "guide_model": "pag", "label": None}, "needs --label"),
        (
            {"mode": "autoguidance", "guide_model": "pag", "guidance": "apg"},
            "combines predictions with and without the label",
        ),
        ({"guide_model": "skip:up_blocks.9"}, "no such layer as up_blocks.9"),
        ({"guide_model": "skip:"}, "name layers after the colon"),
        ({"guide_model": "pag", "w_guide": "much"}, "--w-guide takes a finite number"),
        ({"guide_model": "pag", "w_guide": "1"}, "--w-guide 1 is the model without autoguidance"),
        ({"guide_model": "pag", "w_guide": "1,1.0", "sweep": True}, "--w-guide 1 is the model without autoguidance"),
        ({"mode": "none", "guide_model": "pag"}, "--mode none draws the network as it is.*--mode autoguidance"),
        (
            {"mode": "none", "guide_model": "pag", "w_guide": "3"},
            "--mode none draws the network as it is.*--mode autoguidance",
        ),
        (
            {"mode": "none", "w_guide": "3", "interval": "0.3:5"},
            "--mode none draws the network as it is.*--mode autoguidance",
        ),
    ],
)
def test_usage(with_null: Path, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_job(flags(with_null, tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_command_line(folders: dict[str, Path], guidegen: Callable[..., Any], tmp_path: Path) -> None:
    done = guidegen(
        "sample", "-m", folders["beside"], "--mode", "autoguidance", "--w", 2, "--label", 1, "--steps", 2, "--json"
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["mode"], row["w"], row["nfe"]) == ("autoguidance", 2.0, 4)
    assert "w_guide" not in row
    done = guidegen("sample", "-m", folders["beside"], "--guide-model", folders["dit"], "--label", 1, "-o", "run")
    assert done.returncode == 2
    assert "shape 4x8x8 where the model's is 3x8x8" in done.stderr
    assert not (tmp_path / "run").exists()
    facts = json.loads(guidegen("inspect", folders["beside"], "--json").stdout)
    assert "autoguidance" in facts["modes"]


def other_schedule(folder: Path, home: Path, **scheduler: Any) -> Path:
    copied = shutil.copytree(folder, home / "scheduled")
    path = copied / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return copied


def refused(model: Checkpoint, ref: Path | str) -> str:
    with pytest.raises(UsageError) as error:
        open_guide(str(ref), model)
    return str(error.value)


def test_checkpoints_that_do_not_fit(
    folders: dict[str, Path], unconditional: Path, without_null: Path, tmp_path: Path
) -> None:
    model = open_checkpoint(folders["beside"])
    changed = other_schedule(folders["guiding"], tmp_path, prediction_type="v_prediction", beta_schedule="scaled_linear")
    said = refused(model, changed)
    assert "prediction type v_prediction where the model's is epsilon" in said
    assert "beta_schedule scaled_linear where the model's is linear" in said
    assert "condition none where the model's is labels" in refused(model, unconditional)
    assert "condition prompts where the model's is labels" in refused(model, folders["stable_diffusion"])
    weak_unet(sample_size=16, num_class_embeds=7).save_pretrained(tmp_path / "net")
    said = refused(model, tmp_path / "net")
    assert "num_class_embeds 7 where the model's is 6" in said
    with pytest.raises(CheckpointError, match="No checkpoint at"):
        open_guide(str(tmp_path / "nowhere"), model)


def test_labels_that_the_guiding_checkpoint_does_not_know(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    model, walker = open_checkpoint(folders["beside"]), DDIMScheduler(clip_sample=False)
    few = save_pipeline(tmp_path / "few", weak_unet(num_class_embeds=3), walker, id2label={"0": NAMES["0"], "1": "snail"})
    guide = open_guide(str(few), model)
    guide.check_labels([0], model, needs_null=True)
    with pytest.raises(UsageError, match="label 1 is 'snail' there, and 'tabby' in the model"):
        guide.check_labels([0, 1], model, needs_null=True)
    with pytest.raises(UsageError, match="does not know label 4 lion"):
        guide.check_labels([4], model, needs_null=True)
    weak_unet().save_pretrained(tmp_path / "alone")
    path = tmp_path / "alone" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": NAMES | {"1": "snail"}}))
    with pytest.raises(UsageError, match="label 1 is 'snail' there"):
        open_guide(str(tmp_path / "alone"), model).check_labels([1], model, needs_null=True)
    named = {str(i): NAMES.get(str(i), "more") for i in range(6)}
    bare = open_guide(str(save_pipeline(tmp_path / "bare", weak_unet(), walker, id2label=named)), model)
    bare.check_labels([0, 1], model, needs_null=False)
    with pytest.raises(UsageError, match="has no null label"):
        bare.check_labels([0, 1], model, needs_null=True)


def test_null_label_may_be_another_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same network with its null row at another place is the same guide."""
    from diffusers import DDIMScheduler, UNet2DModel

    guiding = UNet2DModel.from_pretrained(folders["guiding"] / "unet")
    rows = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 9: 5}
    moved = weak_unet(num_class_embeds=10)
    state = guiding.state_dict()
    table = torch.randn((10, state["class_embedding.weight"].shape[1]))
    table[list(rows)] = state["class_embedding.weight"][list(rows.values())]
    moved.load_state_dict(state | {"class_embedding.weight": table})
    walker = DDIMScheduler(clip_sample=False)
    folder = save_pipeline(tmp_path / "moved", moved.eval(), walker, id2label=NAMES, null_label=9)
    cells = [Cell(1, 0, 0.0, w_guide=3.0), Cell(2, 0, 2.0, w_guide=3.0)]
    ours, theirs = (drawn(sampler_of(folders["beside"], str(ref)), cells) for ref in (folder, folders["guiding"]))
    assert torch.equal(ours, theirs)


def test_hub_checkpoints_from_the_cache(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache that huggingface_hub keeps, filled by hand: the guiding network comes with the commit of its checkpoint."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, source in (("tiny", "beside"), ("net", "beside/unet_weak")):
        repo = tmp_path / f"models--someone--{name}"
        shutil.copytree(folders["beside"].parent / source, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    given = {"mode": "autoguidance", "w": "2", "offline": True}
    rows = run_of("someone/tiny", tmp_path / "run", **given)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["guide_model"] == {"path": "someone/tiny/unet_weak", "revision": commit}
    assert about["settings"]["guide_model"] == "unet_weak"
    alone = run_of("someone/tiny", tmp_path / "alone", guide_model="someone/net@main", **given)
    assert (picture(tmp_path / "run", rows[0]) == picture(tmp_path / "alone", alone[0])).all()
    assert json.loads((tmp_path / "alone" / "run.json").read_text())["guide_model"]["revision"] == commit
