"""`guidegen sweep` in the loops of text-to-image pipelines, against the pictures of the pipelines themselves.

Networks are small, with random weights. w = 1 and w = 4 are held against the ordinary pipeline's own weight, w = 0 against
its picture of the negative prompt alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_pipelines
import torch
from conftest import call
from PIL import Image
from pipelines import clip, stable_diffusion_xl
from setups import options_of

from guidegen import load_classifier, open_classifier
from guidegen.cli.drawing import open_networks
from guidegen.cli.resolve import plan_job
from guidegen.diffusers import Guidance
from guidegen.errors import GuidegenError
from guidegen.models.families import FAMILIES, Family
from guidegen.pipelines import sampler
from guidegen.pipelines.ordinary import OrdinaryLoop, Scale
from guidegen.pipelines.sampler import PipelineSampler, PipelineSamplers

STEPS, SEEDS, PROMPT, NEGATIVE = 2, [0, 1], "a red fox", "blue"
WEIGHTS = [0.0, 1.0, 4.0]
SDXL = next(family for family in FAMILIES if family.network == "unet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("text")
    return cache(lambda name: text_pipelines.save(name, home / name))


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Loads each folder once for all tests."""
    load, kept = sampler.load_parts, {}

    def cached(checkpoint: Any, *how: Any) -> Any:
        key = (checkpoint.folder, *map(str, how))
        return kept[key] if key in kept else kept.setdefault(key, load(checkpoint, *how))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "load_parts", cached)
        yield


def family_of(folder: Path) -> Family:
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return next(family for family in FAMILIES if name in family.pipelines)


class Guiding(float):
    """A weight at which a pipeline that guides above 1 alone does so too."""

    def __gt__(self, other: float) -> bool:
        return True


def their_images(folder: Path, family: Family) -> Callable[[float], list[np.ndarray]]:
    """What the ordinary pipeline draws at a weight, at w = 0 of the negative prompt."""
    import diffusers

    parts = parts_of(opened(folder)[1])
    pipeline = getattr(diffusers, family.pipelines[0])(**parts)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": STEPS, **family.call}
    negative = NEGATIVE if family.negative else ""

    def draw(w: float) -> list[np.ndarray]:
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        how = {**given, "num_images_per_prompt": len(SEEDS), "generator": generators}
        if w == 0 and family.renormalised:
            if family.blocks:
                return guided_by_diffusers(pipeline, family, 0.0, how)
            how["guidance_scale"] = Guiding(0.0)
            return [np.asarray(image) for image in pipeline(prompt=PROMPT, negative_prompt=negative, **how).images]
        prompt = {"prompt": PROMPT if w else negative} | ({"negative_prompt": negative} if w > 1 and family.negative else {})
        if family.name == "Sana" and not w:
            prompt["complex_human_instruction"] = None  # as it encodes a negative prompt
        scale = {family.scale: max(w, 1.0) - family.offset}
        return [np.asarray(image) for image in pipeline(**prompt, **scale, **how).images]

    return draw


def guided_by_diffusers(pipeline: Any, family: Family, w: float, how: dict[str, Any]) -> list[np.ndarray]:
    """By the guider of diffusers in the modular pipeline."""
    import diffusers

    modular = getattr(diffusers, str(family.blocks))().init_pipeline()
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    modular.update_components(**parts, guider=diffusers.ClassifierFreeGuidance(guidance_scale=w))
    prompts = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    return [np.asarray(image) for image in modular(**prompts, **how, output="images")]


def sweep(folder: Path, out: Path, *more: object, command: str = "sweep", code: int = 0) -> Any:
    family = family_of(folder)
    negative = ["--negative-prompt", NEGATIVE] if family.negative else []
    words = ["-m", folder, "--prompt", PROMPT, *negative, "--size", 32, "--steps", STEPS, "--device", "cpu", "-q"]
    return call(command, *words, "-o", f"{out}/", *more, code=code)


def rows_of(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.glob("manifest*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", text_pipelines.FOLDERS)
def test_equals_the_pipeline(folders: Any, name: str, tmp_path: Path) -> None:
    if name == "krea2":
        pytest.importorskip("accelerate")  # without which diffusers does not load its network
    folder = folders(name)
    family = family_of(folder)
    sweep(folder, tmp_path / "run", "-w", "0,1,4", "-n", len(SEEDS), "--batch-size", 6)
    rows = {(row["w"], row["seed"]): row for row in rows_of(tmp_path / "run")}
    ours = {key: np.asarray(Image.open(tmp_path / "run" / row["file"])).astype(int) for key, row in rows.items()}
    theirs = their_images(folder, family)
    for w in WEIGHTS:
        for seed, expected in zip(SEEDS, theirs(w), strict=True):
            assert np.abs(ours[w, seed] - expected).max() <= 1, (w, seed)
    assert np.abs(ours[0.0, 0] - ours[4.0, 0]).max() > 4
    null = STEPS * (2 if family.renormalised or family.blocks is None else 1)
    assert [rows[w, 0]["nfe"] for w in WEIGHTS] == [null, STEPS, 2 * STEPS]


def opened(folder: Path, **given: Any) -> tuple[Any, Any]:
    """A job of the folder, and its sampler."""
    words = {
        "model": str(folder),
        "prompt": [PROMPT],
        "size": "32",
        "steps": STEPS,
        "w": "0.5,2,4",
        "seeds": "0",
        "num": None,
    }
    job = plan_job(options_of(sweep=True, **(words | given)))
    [setup] = job.setups.values()
    return job, open_networks(job)(setup)


def latents_of(drawer: Any, cells: Any) -> torch.Tensor:
    """What the pipeline decodes for some cells."""
    found: list[torch.Tensor] = []
    vae = drawer.loop.pipeline.vae
    decode = vae.decode
    vae.decode = lambda z, *args, **kwargs: (found.append(z), decode(z, *args, **kwargs))[1]
    drawer.draw(cells)
    del vae.decode
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("sd3", "apg"), ("qwen-image", "cfg"), ("z-image", "apg"), ("flux2-klein", "apg"), ("ernie-image", "cfg")),
        *(("pixart-sigma", "cfg"), ("sana", "apg")),
    ],
)
def test_three_weights_in_one_batch_are_three_runs(folders: Any, name: str, method: str) -> None:
    job, drawer = opened(folders(name), guidance=method)
    rows: list[int] = []
    network = getattr(drawer.loop.pipeline, job.models.checkpoint.network)
    hook = network.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    three = latents_of(drawer, job.cells)
    hook.remove()
    assert sum(rows) == 2 * STEPS * len(job.cells)
    assert len(rows) <= 2 * STEPS
    alone = torch.cat([latents_of(drawer, [cell]) for cell in job.cells])
    assert (three[0] - three[2]).abs().max() > 1e-3
    torch.testing.assert_close(three, alone, rtol=0, atol=1e-6 * alone.abs().max().item())


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma"])
def test_prompts_are_encoded_once_a_sweep(folders: Any, name: str) -> None:
    job, drawer = opened(folders(name), prompt=[PROMPT, "snow"], w="1,2")
    calls: list[int] = []
    pipeline = drawer.loop.pipeline if hasattr(drawer.loop.pipeline, "text_encoder") else drawer.loop.encoder
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for cell in job.cells:
        drawer.draw([cell])
    assert 2 <= len(calls) <= 4  # with its negative prompt, which is the same in both


def test_the_methods_are_those_of_the_modular_pipeline(folders: Any) -> None:
    """SD3 has both: the hook of its ordinary pipeline gives what the guider of its modular one does."""
    _, drawer = opened(folders("sd3"))
    job, _ = opened(folders("sd3"))
    checkpoint = job.models.checkpoint
    ordinary = OrdinaryLoop(replace(checkpoint, family=replace(checkpoint.family, blocks=None)), parts_of(drawer), None)
    how = {"height": 32, "width": 32, "num_inference_steps": STEPS}
    for method in ("cfg", "apg", "rescale", "threshold", "cfg-zero", "cfg++", "power"):
        drawn = []
        for loop in (drawer.loop, ordinary):
            guidance = Guidance(w=[0.7, 3.0], method=method, interval="0%:70%")
            guidance.scheduler = loop.scheduler
            generators = [torch.Generator().manual_seed(0) for _ in range(2)]
            with torch.no_grad():
                drawn.append(loop(PROMPT, guidance, generators, False, **how))
        torch.testing.assert_close(*drawn, rtol=0, atol=2e-5, msg=method)


def parts_of(drawer: Any) -> dict[str, Any]:
    pipelines = [getattr(drawer.loop, name) for name in ("pipeline", "encoder") if hasattr(drawer.loop, name)]
    unwanted = ("guider", "image_processor", "pachifier")
    return {name: part for each in pipelines for name, part in each.components.items() if name not in unwanted}


def test_another_multiplication_is_refused() -> None:
    class Network(torch.nn.Module):
        def forward(self, x_t: torch.Tensor) -> tuple[torch.Tensor]:
            return (x_t,)

    network = Network()
    scale = Scale(Guidance(w=3.0), network, None, 1)
    [both] = network(torch.ones(2, 2))
    assert 3.0 * scale == 6.0
    with pytest.raises(GuidegenError, match="something else than c - u"):
        scale * (both[1:] - both[:1] + 1)
    scale.close()


def test_a_run_goes_on_in_shards_with_its_metadata(folders: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, out, whole = folders("pixart-sigma"), tmp_path / "run", tmp_path / "whole"
    words = ["-w", "1,3", "-n", 2, "--batch-size", 1]
    sweep(folder, whole, *words)
    drawn: list[int] = []
    draw = PipelineSampler.draw

    def counted(self: PipelineSampler, cells: Any, *args: Any) -> Any:
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(len(cells))
        return draw(self, cells, *args)

    monkeypatch.setattr(PipelineSampler, "draw", counted)
    sweep(folder, out, *words, "--shard", "0/2", code=130)
    assert len(rows_of(out)) == 1
    drawn += [0]  # draws on
    sweep(folder, out, *words, "--shard", "0/2")
    sweep(folder, out, *words, "--shard", "1/2")
    assert sum(drawn) == 4
    expected = {row["file"]: row["sha256"] for row in rows_of(whole)}
    assert {row["file"]: row["sha256"] for row in rows_of(out)} == expected
    written = json.loads(Image.open(out / next(iter(expected))).info["guidegen"])
    settings = written["settings"]
    assert written["convention"] == "w is guidance_scale of PixArtSigmaPipeline"
    assert json.loads((out / "run.json").read_text())["convention"] == written["convention"]
    assert "--w" in call("again", out / next(iter(expected)), "--show").output
    assert (settings["negative_prompt"], settings["size"], settings["steps"]) == (NEGATIVE, [32, 32], STEPS)


def test_a_modular_folder_and_one_that_points_to_it(folders: Any, tmp_path: Path) -> None:
    from diffusers.modular_pipelines import StableDiffusion3AutoBlocks

    _, drawer = opened(folders("sd3"))
    modular = StableDiffusion3AutoBlocks().init_pipeline()
    modular.update_components(**parts_of(drawer))
    modular.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    (tmp_path / "pointing").mkdir()
    shutil.copy(tmp_path / "modular" / "modular_model_index.json", tmp_path / "pointing")
    words = ["--prompt", PROMPT, "--size", 32, "--steps", STEPS, "--device", "cpu", "-q", "-w", 3]
    for name, folder in (("a", folders("sd3")), ("b", tmp_path / "modular"), ("c", tmp_path / "pointing")):
        call("sample", "-m", folder, *words, "-o", f"{tmp_path / name}/")
    images = [np.asarray(Image.open(tmp_path / name / rows_of(tmp_path / name)[0]["file"])) for name in "abc"]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


def test_stable_diffusion_xl_by_its_modular_index(tmp_path: Path, clip_folder: Path) -> None:
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(stable_diffusion_xl(tmp_path / "sdxl"))
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    modular = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    modular.update_components(**parts)
    modular.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    words = ["--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--steps", STEPS, "--device", "cpu", "-q", "-w", "0,1,4"]
    call("sweep", "-m", tmp_path / "modular", *words, "-o", f"{tmp_path}/run/")
    how = {"num_inference_steps": STEPS, "height": 16, "width": 16}
    for row in rows_of(tmp_path / "run"):
        [expected] = guided_by_diffusers(pipeline, SDXL, row["w"], how | {"generator": torch.Generator().manual_seed(0)})
        assert np.abs(np.asarray(Image.open(tmp_path / "run" / row["file"])).astype(int) - expected).max() <= 1
    (config,) = (tmp_path / "modular").rglob("scheduler_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "DDIMScheduler"}))
    index = tmp_path / "modular" / "modular_model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "DDIMScheduler"))
    result = call("sweep", "-m", tmp_path / "modular", *words, "--mode", "both", "-c", clip_folder, code=2)
    assert "clip_sample of its DDIMScheduler undoes the gradient" in str(result.exception)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("sd3", ["--mode", "classifier", "--w", "0,500"]),
        ("z-image", ["--mode", "classifier", "--w", "0,20", "--classifier-gradient", "detached"]),
        ("flux2-klein", ["--mode", "both", "--w", "0,3", "--w-classifier", 20]),
        ("qwen-image", ["--mode", "both", "--w", "1,3", "--w-classifier", 20]),
    ],
)
def test_a_classifier_guides_as_in_the_guider(
    folders: Any, clip_folder: Path, name: str, more: list[object], tmp_path: Path
) -> None:
    """Whose gradient `test_modular_networks` holds against finite differences. Two prompts, which are the classes."""
    words = ["--prompt", "snow", "-c", clip_folder, *more]
    sweep(folders(name), tmp_path / "run", *words)
    job, drawer = opened(folders(name))
    negative = NEGATIVE if job.models.checkpoint.family.negative else ""
    classifier = load_classifier(open_classifier(clip_folder), "cpu", texts=[PROMPT, "snow", negative])
    both, detached = "both" in more, "detached" in more
    pictures = set()
    for row in rows_of(tmp_path / "run"):
        guidance = Guidance(
            w=row["w"] if both else 0.0,
            classifier=classifier,
            w_classifier=20.0 if both else row["w"],
            classifier_labels=[PROMPT, "snow"].index(row["prompt"]),
            classifier_gradient="detached" if detached else "exact",
        )
        how = {"height": 32, "width": 32, "num_inference_steps": STEPS}
        drawer.loop._negative = {"negative_prompt": negative} if negative else {}
        drawer.loop._encode.cache_clear()
        with torch.no_grad():
            [expected] = drawer.loop(row["prompt"], guidance, [torch.Generator().manual_seed(0)], False, **how)
        found = np.asarray(Image.open(tmp_path / "run" / row["file"])).transpose(2, 0, 1) / 255
        pictures.add(found.tobytes())
        assert np.abs(found - expected.clamp(0, 1).numpy()).max() <= 1.01 / 255
        conditional, null = (row["w"] != 0 or not both) and both, True
        gradient = (row["w"] != 0 or both) * (1 if detached else 2)
        assert row["nfe"] == STEPS * (conditional + null + gradient)
    assert len(pictures) == (4 if both else 3)  # at w = 0 of mode classifier a prompt is not read


@pytest.fixture(scope="module")
def weaker(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a pipeline whose network has other weights."""
    import diffusers

    @cache
    def made(name: str) -> Path:
        folder = Path(shutil.copytree(folders(name), tmp_path_factory.mktemp("weaker") / name))
        index = json.loads((folder / "model_index.json").read_text())
        network = getattr(diffusers, index["transformer"][1]).from_pretrained(folder, subfolder="transformer")
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(0.9)
        network.save_pretrained(folder / "transformer")
        return folder

    return made


@pytest.mark.parametrize(
    ("name", "more", "calls"),
    [
        ("sd3", ["--mode", "autoguidance", "-w", "0,1,3"], [1, 1, 2]),
        ("z-image", ["--mode", "cfg", "-w", "0,1,3", "--w-guide", 2], [2, 2, 3]),
        ("qwen-image", ["--mode", "autoguidance", "-w", "0,1,3"], [2, 1, 2]),
    ],
)
def test_a_guiding_network_guides_as_in_the_guider(
    folders: Any, weaker: Any, name: str, more: list[object], calls: list[int], tmp_path: Path
) -> None:
    """Which `test_modular_networks` holds against the formula; the folder of its network alone is the same."""
    folder, weak = folders(name), weaker(name)
    family = family_of(folder)
    words = ["-m", folder, "--prompt", PROMPT, "--size", 32, "--steps", STEPS, "--device", "cpu", "-q", *more]
    for out, guide in (("whole", weak), ("alone", weak / "transformer")):
        call("sweep", *words, "--guide-model", guide, "-o", f"{tmp_path / out}/")
    rows, alone = rows_of(tmp_path / "whole"), rows_of(tmp_path / "alone")
    assert [row["nfe"] for row in rows] == [STEPS * each for each in calls]
    _, drawer = opened(folder)
    network = opened(weak)[1].loop.pipeline.transformer
    drawer.loop._negative, how = {"negative_prompt": ""} if family.negative else {}, {"height": 32, "width": 32}
    drawer.loop._encode.cache_clear()
    for row, other in zip(rows, alone, strict=True):
        weights = {"w": row["w"], "w_guide": 2.0} if "cfg" in more else {"w": 1.0, "w_guide": row["w"]}
        guidance, generators = Guidance(guide_model=network, **weights), [torch.Generator().manual_seed(0)]
        with torch.no_grad():
            [expected] = drawer.loop(PROMPT, guidance, generators, False, num_inference_steps=STEPS, **how)
        found, same = (
            np.asarray(Image.open(tmp_path / out / each["file"])).transpose(2, 0, 1) / 255
            for out, each in (("whole", row), ("alone", other))
        )
        assert np.abs(found - expected.clamp(0, 1).numpy()).max() <= 1.01 / 255
        assert np.array_equal(found, same)
    assert len({row["sha256"] for row in rows}) == 3


@pytest.mark.parametrize("name", ["qwen-image", "flux2-klein", "krea2"])
def test_frequencies_of_packed_latents(folders: Any, name: str) -> None:
    """With the same weight for low ones it is cfg, and without guidance of those it is not."""
    if name == "krea2":
        pytest.importorskip("accelerate")
    drawn = {}
    for method, more in (("cfg", []), ("frequency", ["low=1"]), ("frequency", ["low=0"])):
        job, drawer = opened(folders(name), guidance=method, guidance_opt=more or None, w="3")
        drawn[method, *more] = latents_of(drawer, job.cells)
    same, other = drawn["frequency", "low=1"], drawn["frequency", "low=0"]
    size = drawn["cfg",].abs().max()
    assert (same - drawn["cfg",]).abs().max() <= 1e-5 * size
    assert (other - drawn["cfg",]).abs().max() > 1e-3 * size


def test_three_weights_of_a_classifier_in_one_batch(folders: Any, clip_folder: Path) -> None:
    job, drawer = opened(folders("sd3"), mode="classifier", classifier=[str(clip_folder)], w="100,3000,90000")
    three, _ = drawer.draw(job.cells)
    alone = torch.cat([drawer.draw([cell])[0] for cell in job.cells])
    assert (three[0] - three[2]).abs().max() > 1e-3
    torch.testing.assert_close(three, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("qwen-image", ["--mode", "classifier"], "--mode both"),
        ("pixart-sigma", ["--mode", "classifier"], "classifier-free guidance alone"),
        ("sd3", ["--mode", "both", "-c", "CLIP:0.5"], "takes one classifier"),
        ("sd3", ["--mode", "both", "-c", "NOISY", "--label", "0"], "decoded for a classifier"),
    ],
)
def test_classifiers_that_its_loop_does_not_take(
    folders: Any, clip_folder: Path, classifier_folder: Path, name: str, more: list[str], message: str, tmp_path: Path
) -> None:
    words = [word.replace("CLIP", str(clip_folder)).replace("NOISY", str(classifier_folder)) for word in more]
    named = [] if "-c" in words else ["-c", clip_folder]
    result = sweep(folders(name), tmp_path / "run", *words, *named, code=2)
    assert message in str(result.exception)


DEVICE = torch.device("cpu:1")
"""Stands for a GPU: torch takes it for the CPU, and the hooks that move networks do not."""


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The ids of the networks that were moved to `DEVICE` last."""
    import diffusers
    import transformers
    from diffusers.utils.torch_utils import TorchDeviceBackend

    there: set[int] = set()
    to = torch.nn.Module.to

    def move(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        where = kwargs.get("device", args[0] if args else None)
        if isinstance(where, str | torch.device):
            (there.add if torch.device(where) == DEVICE else there.discard)(id(module))
        return to(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(TorchDeviceBackend, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    for cls in (diffusers.ModelMixin, transformers.PreTrainedModel):
        real = cls.device.fget
        found = property(lambda module, real=real: DEVICE if id(module) in there else real(module))
        monkeypatch.setattr(cls, "device", found)
    return there


@pytest.mark.parametrize("name", ["sd3", "qwen-image", "z-image", "flux2-klein", "krea2", "ernie-image"])
def test_offload_keeps_the_network_that_works_on_the_device_alone(folders: Any, name: str, moved: set[int]) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    job, drawer = opened(folders(name), prompt=[PROMPT, "snow"], w="1,4")
    expected, _ = drawer.draw(job.cells)
    offloaded = PipelineSamplers(job.models, job.settings, DEVICE, offload="model")(drawer.setup)
    parts = {part: each for part, each in parts_of(offloaded).items() if isinstance(each, torch.nn.Module)}
    worked: list[tuple[str, set[str]]] = []

    def note(part: str) -> None:
        worked.append((part, {other for other, each in parts.items() if id(each) in moved}))

    notes = [each.register_forward_hook(lambda *_, part=part: note(part)) for part, each in parts.items()]
    decode = parts["vae"].decode
    parts["vae"].decode = lambda *args, **kwargs: (decode(*args, **kwargs), note("vae"))[0]
    images, _ = offloaded.draw(job.cells)
    del parts["vae"].decode
    for each in notes:
        each.remove()
    for each in parts.values():  # which other tests share
        hooks.remove_hook_from_module(each, recurse=True)
    assert {part for part, _ in worked} == set(parts)
    assert all(there == {part} for part, there in worked)
    assert torch.equal(images, expected)


REFUSED = {
    "another scheduler": (["--scheduler", "ddim"], "with its own FlowMatchEulerDiscreteScheduler"),
    "steps of its own": (["--timestep-spacing", "trailing"], "sets its steps itself"),
    "an option of the scheduler": (["--scheduler-opt", "shift=2"], "sets its steps itself"),
    "noise levels": (["--interval", "0.3:5"], "sets its noise levels"),
    "a guiding model": (["--guide-model", "skip"], "calls its network as it is"),
    "autoguidance": (["--mode", "autoguidance"], "there is no guiding model"),
    "a classifier without its name": (["--mode", "classifier"], "there is no classifier"),
    "a mixture": (["--prompt", "a AND b:0.5"], "one prompt an image"),
    "a custom method": (["--guidance", "file.py:f"], "file.py"),
    "a size": (["--size", "40"], "multiples of 16"),
    "steps of images": (["--stepwise", "strips"], "denoised estimates"),
    "compilation": (["--compile"], "does not compile"),
    "offload without a GPU": (["--offload", "model"], "this draws on the CPU"),
    "a null label": (["--null-label", "3"], "no classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_its_loop_does_not_do_is_refused(folders: Any, case: str, tmp_path: Path, monkeypatch: Any) -> None:
    words, message = REFUSED[case]
    monkeypatch.setattr("guidegen.models.pretrained.load_model", lambda *_: pytest.fail("weights were read"))
    result = sweep(folders("sd3"), tmp_path / "run", *words, code=2)
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_families_are_refused_by_name_and_conventions_are_printed(folders: Any, tmp_path: Path) -> None:
    for name, reason in (("LTX2Pipeline", "two guiders"), ("OmniGenPipeline", "two weights"), ("Flux2Pipeline", "embedded")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        result = call("inspect", tmp_path, code=4)
        assert name in str(result.exception)
        assert reason in str(result.exception)
    shown = call("inspect", folders("z-image")).output
    assert "w is guidance_scale + 1 of ZImagePipeline" in shown
    assert "--w 6, 50 steps" in shown
    assert "w = 0 is not the null model" in call("inspect", folders("qwen-image")).output
    assert "modes: cfg, none" in shown


def test_offload_is_for_pipelines(with_null: Path, tmp_path: Path) -> None:
    call("sample", "-m", with_null, "--label", 0, "--offload", "group", "-o", f"{tmp_path}/run/", code=2)


def edited(**values: Any) -> Callable[[Path, str], None]:
    """Changes keys of a JSON file, or takes them out (...)."""

    def edit(folder: Path, file: str) -> None:
        found = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return edit


ODD = {
    "no VAE": ("model_index.json", edited(vae=...), 4, "a Stable Diffusion 3 has a vae"),
    "code of its own": ("model_index.json", edited(text_encoder=["mine", "Text"]), 5, "no remote code"),
    "another part": ("model_index.json", edited(vae_2=["diffusers", "AutoencoderKL"]), 4, "vae_2, which is no folder"),
    "another pipeline": (
        "model_index.json",
        edited(_class_name="ZImagePipeline", text_encoder_2=..., text_encoder_3=...),
        4,
        "its network is a ZImageTransformer2DModel",
    ),
    "no tokenizer": ("model_index.json", edited(tokenizer=["transformers", "AutoModel"]), 4, "no tokenizer or processor"),
    "another VAE": ("model_index.json", edited(vae=["diffusers", "VQModel"]), 4, "says AutoencoderKL"),
    "another scheduler": ("scheduler/scheduler_config.json", edited(_class_name="DDIMScheduler"), 4, "says DDIMScheduler"),
    "an odd size": ("transformer/config.json", edited(sample_size=[8, 8]), 4, "makes no network"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_folders_are_refused_with_the_reason(folders: Any, case: str, tmp_path: Path) -> None:
    file, edit, code, message = ODD[case]
    shutil.copytree(folders("sd3"), tmp_path / "odd")
    edit(tmp_path / "odd", file)
    words = ["--prompt", "a", "--size", 32, "--steps", 2, "--device", "cpu"]
    result = call("sample", "-m", tmp_path / "odd", *words, "-o", f"{tmp_path}/run/", code=code)
    assert message in str(result.exception)
    assert not list((tmp_path / "run").rglob("*.png"))


def test_where_a_modular_index_may_point_to(folders: Any, tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusion3ModularPipeline", "vae": ["diffusers", "AutoencoderKL", {"subfolder": "../x"}]}
    for change, code, message in (
        ({}, 4, "outside of its folder"),
        ({"auto_map": {}}, 5, "no remote code"),
        ({"_blocks_class_name": "QwenImageAutoBlocks"}, 4, "draws with StableDiffusion3AutoBlocks"),
        ({"vae": ["diffusers", "AutoencoderKL", 7]}, 4, "a library and a class stand there"),
    ):
        (tmp_path / "modular_model_index.json").write_text(json.dumps(index | change))
        assert message in str(call("inspect", tmp_path, code=code).exception)
