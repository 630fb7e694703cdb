"""Classifiers and guiding networks in modular pipelines of diffusers: against finite differences and against `sample`."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipelines
import pytest
import torch
from conftest import settings_of
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, guiders
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig, apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from diffusers.modular_pipelines import Flux2KleinBaseAutoBlocks, QwenImageEditAutoBlocks
from modular import FAMILIES, SEED, STEPS, Denoiser, Made, close, drawn, sd3_transformer, without_encoders
from PIL import Image
from test_image_classifiers import VIT, make
from torch import Tensor, nn

from guidegen.diffusers import Guidance, guider
from guidegen.diffusers.pipelines import Caller
from guidegen.models.autoguidance import open_guide
from guidegen.models.checkpoint import open_checkpoint
from guidegen.models.classifiers.opening import load_classifier, open_classifier
from guidegen.sampling.loop import sample
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Samplers
from guidegen.sampling.schedulers import levels_after, noise_levels
from guidegen.sampling.setup import make_setup, plan_scheduler
from guidegen.scores.gradient import DenoisedScore, DetachedScore
from guidegen.scores.guided import Guide
from guidegen.scores.methods import METHODS
from guidegen.scores.noise import to_x0
from guidegen.scores.schedule import make_schedule
from guidegen.spec.cell import Cell

TEXTS = ["a fox", "blue"]
# w, w_classifier, w_guide of the samples of one batch
WEIGHTS = [(0.4, 0, 1), (3, 0, 1), (2, 1.5, 1), (0, 4, 0.5), (1, 2, 2), (-1, 1, 1)]
GUIDED_ONLY = [(1, 0, 0), (0, 0, 3), (0, 4, 1)]
SETTINGS = {"interval": "0.2:inf", "w_schedule": "linear"}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Any:
    return load_classifier(open_classifier(clip_folder), "cpu", texts=TEXTS)


def guidance_of(weights: Any = WEIGHTS, **others: Any) -> Guidance:
    w, w_classifier, w_guide = ([float(each) for each in column] for column in zip(*weights, strict=True))
    return Guidance(w=w, w_classifier=w_classifier, w_guide=w_guide, **SETTINGS, **others)


def kept_gradients(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the gradient is asked for, and gives, at each step from now on."""
    kept: list[Any] = []

    def asked(*given: Any) -> Tensor:
        kept.append((*given, gradient(*given)))
        return kept[-1][-1]

    gradient = guider.gradient
    monkeypatch.setattr(guider, "gradient", asked)
    return kept


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "exact") for name in FAMILIES), ("SDXL", "detached"), ("Qwen-Image", "detached")]
)
def test_gradient_against_finite_differences(
    families: Any, clip: Any, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Of log p(text | decoded estimate), in one direction; the noise is held fixed in the detached one."""
    made, kept = families(name), kept_gradients(monkeypatch)
    drawn(made, Guidance(w=[0, 2], w_classifier=3, classifier=clip, classifier_labels=[0, 1], classifier_gradient=kind), 2)
    classifier, labels, decode, step, null, call, found = kept[2]
    x, sign = step.x_t, -1 if name == "Z-Image" else 1
    noise = (x - step.level.alpha * step.to_x0(null)) / step.level.sigma
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    h = 0.01 * x.std()

    def log_probability(moved: Tensor) -> Tensor:
        if kind == "exact":
            x0 = to_x0(sign * call.again(moved), moved, step.level, step.kind)
        else:
            x0 = (moved - step.level.sigma * noise) / step.level.alpha
        return classifier(decode(x0)).double().log_softmax(-1).gather(1, torch.tensor(labels)[:, None])[:, 0]

    with torch.no_grad():
        slope = (log_probability(x + h * direction) - log_probability(x - h * direction)) / (2 * h)
    torch.testing.assert_close((found * direction).flatten(1).sum(1).double(), slope, rtol=0.03, atol=1e-3)
    assert found.flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_sees_what_the_pipeline_decodes(
    families: Any, clip: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The denoised estimate at the last step, with hardly any guidance, is the image."""
    made, kept = families(name), kept_gradients(monkeypatch)
    null = {}
    if name == "Qwen-Image":  # whose pipeline renormalises u to c
        null = {f"negative_{key}": each.clone() for key, each in made.given.items() if key.startswith("prompt")}
    images = drawn(made, Guidance(w=0, w_classifier=1e-9, classifier=clip), output="images", output_type="pt", **null)
    _, _, decode, step, prediction, *_ = kept[-1]
    seen = decode(step.to_x0(prediction))
    assert seen.std() > 0.01
    assert ((seen / 2 + 0.5).clamp(0, 1) - images).abs().max() < 2e-3 if name == "SDXL" else 1e-4  # its last sigma is not 0


@pytest.fixture(scope="module")
def samplers(families: Any, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The samplers of `guidegen sample` on SDXL, its classifier and another UNet as the guiding model, by the gradient."""
    folder = tmp_path_factory.mktemp("guide") / "unet"
    other = type(families("SDXL").network).from_config(families("SDXL").network.config)
    torch.manual_seed(5)
    for weight in other.parameters():
        nn.init.normal_(weight, std=0.1)
    other.save_pretrained(folder)
    checkpoint = open_checkpoint(families("SDXL").folder)
    models = Models(checkpoint, open_classifier(clip_folder), open_guide(str(folder), checkpoint))
    settings = settings_of("both", STEPS, classifier_texts=TEXTS, negative_prompt="blue", **SETTINGS)

    @cache
    def sampler_of(method: str, kind: str) -> Any:
        wanted = replace(settings, guidance=method, classifier_gradient=kind)
        return loaded(kind)(make_setup(models, wanted, plan_scheduler(checkpoint, None, STEPS, None)))

    @cache
    def loaded(kind: str) -> Any:
        return Samplers(models, replace(settings, classifier_gradient=kind), torch.device("cpu"))

    return sampler_of, other.eval()


@pytest.mark.parametrize(("method", "kind"), [*((name, "exact") for name in METHODS), ("cfg", "detached")])
def test_pictures_are_those_of_guidegen_sample(families: Any, clip: Any, samplers: Any, method: str, kind: str) -> None:
    """Every method, with a classifier and a guiding network beside it, in one batch of six weights."""
    sampler_of, other = samplers
    cells = [Cell(None, SEED, w, w_classifier, "a fox", 0, w_guide) for w, w_classifier, w_guide in WEIGHTS]
    expected = (sampler_of(method, kind).draw(cells)[0] / 2 + 0.5).clamp(0, 1)
    guidance = guidance_of(method=method, classifier=clip, classifier_gradient=kind, guide_model=other)
    images = drawn(families("SDXL"), guidance, len(cells), output="images", output_type="pt")
    assert (images - expected).abs().max() < 1e-4
    assert (images[0] - images[1:]).flatten(1).abs().amax(1).min() > 0.003


@pytest.mark.parametrize(
    ("method", "kind", "weights"),
    [
        ("cfg", "exact", WEIGHTS),
        ("cfg", "detached", GUIDED_ONLY),
        ("cfg++", "exact", GUIDED_ONLY),
        ("apg", "detached", WEIGHTS),
        ("threshold", "exact", WEIGHTS),
    ],
)
def test_flow_with_all_kinds_of_guidance_is_that_of_sample(
    families: Any, clip: Any, method: str, kind: str, weights: Any
) -> None:
    made, weak = families("SD3"), sd3_transformer(9)
    scheduler, vae, denoiser = made.pipeline.scheduler, made.pipeline.vae, Denoiser(made)
    guidance = guidance_of(weights, method=method, classifier=clip, classifier_gradient=kind, guide_model=weak)
    latents = drawn(made, guidance, len(weights))
    scheduler.set_timesteps(STEPS)

    def logits_of(x0: Tensor) -> Tensor:
        return clip(vae.decode(x0 / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0])

    of = DenoisedScore(logits_of, {0: 0}, denoiser) if kind == "exact" else DetachedScore(logits_of, {0: 0}, "flow")
    after = levels_after(scheduler) if METHODS[method].gain else None
    schedule = make_schedule(noise_levels(scheduler), *SETTINGS.values(), METHODS[method], after)
    w, w_classifier, w_guide = zip(*weights, strict=True)
    guide = Guide(
        denoiser,
        [0] * len(w),
        w,
        w_classifier,
        of,
        guiding=Denoiser(made, weak),
        w_guide=w_guide,
        method=METHODS[method],
        schedule=schedule.weights,
        steps=STEPS,
    )
    expected = sample(guide, scheduler, [SEED] * len(w), latents.shape[1:], STEPS)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_classifier_of_transformers_draws_its_label(families: Any, tmp_path: Path) -> None:
    make("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT))
    vit = load_classifier(open_classifier(tmp_path), "cpu")
    guidance = Guidance(w=0, classifier=vit, w_classifier=[0, 200, 200], classifier_labels=[1, 1, 2])
    images = drawn(families("SD3"), guidance, 3, output="images", output_type="pt")
    p = vit(images * 2 - 1).softmax(-1)
    assert p[1, 1] > p[0, 1] + 0.001
    assert p[2, 2] > p[0, 2] + 0.001


@pytest.mark.parametrize("name", ["Qwen-Image", "FLUX.2-klein", "Krea 2"])
def test_packed_tokens_are_unpacked_for_frequencies(families: Any, name: str) -> None:
    made = families(name)
    plain, neutral = Guidance(w=4.0), Guidance(w=4.0, method="frequency", options={"low": 1})
    close(drawn(made, neutral), drawn(made, plain))
    both = drawn(made, Guidance(w=[4.0, 0.0], method="frequency"), 2)
    close(both[:1], drawn(made, Guidance(w=4.0, method="frequency")))
    assert (both[:1] - drawn(made, plain)).abs().max() > 0.001
    state = made.pipeline(**made.given, num_inference_steps=1, output_type="pt")
    caller, tokens = Caller(made.pipeline, state), torch.arange(256.0).view(16, 16)
    image = tokens.flatten()[caller.layout(tokens.shape, torch.device("cpu"))]
    # token by token: the four numbers of a channel are a patch of the image, or its channels stay as they are
    if name == "FLUX.2-klein":
        assert torch.equal(image, tokens.T.reshape(16, 4, 4))
    else:
        assert torch.equal(image, tokens.view(4, 4, 4, 2, 2).permute(2, 0, 3, 1, 4).reshape(4, 8, 8))


def test_guiding_networks_are_called_where_they_weigh_and_taken_out_again(families: Any) -> None:
    made, weak = families("SD3"), sd3_transformer(9)
    calls: list[str] = []
    hooks = [
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, network in (("own", made.network), ("guide", weak))
    ]
    expected = {(1, 2): ["own", "guide"], (1, 0): ["guide"], (0, 2): ["own", "guide"], (2, 2): ["own", "own", "guide"]}
    for (w, w_guide), names in expected.items():
        calls.clear()
        drawn(made, Guidance(w=w, guide_model=weak, w_guide=w_guide))
        assert [name for name in calls if name == "guide"] == ["guide"] * STEPS
        assert len(calls) == (len(names) + names.count("guide")) * STEPS  # the hook of the pipeline's sees both
    for hook in hooks:
        hook.remove()
    with pytest.raises(Exception):  # noqa: B017, PT011
        drawn(made, Guidance(w=1, guide_model=weak, w_guide=2), prompt_embeds=torch.zeros(1, 5, 3))
    assert "forward" not in vars(made.network)
    close(drawn(made, Guidance(w=3.0)), drawn(made, Guidance(w=3.0, guide_model=weak, w_guide=1)))


class Odd(nn.Module):
    """A classifier whose output is not logits."""

    def forward(self, images: Tensor) -> Any:
        return SimpleNamespace(logits=images.mean((1, 2, 3))[:, None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_classifier": 2}, "there is no classifier: give that too"),
        ({"w_guide": 2}, "there is no guide_model: give that too"),
        ({"classifier": nn.Identity()}, "classifier has no effect without w_classifier"),
        ({"guide_model": nn.Identity()}, "guide_model has no effect without w_guide"),
        ({"classifier": "openai/clip-vit-base-patch32", "w_classifier": 2}, "classifier takes a network, as guidegen.load"),
        ({"classifier": nn.Identity(), "w_classifier": 2, "classifier_gradient": "cheap"}, "exact, detached; found 'cheap'"),
        ({"classifier": nn.Identity(), "w_classifier": 2, "classifier_labels": -1}, "classifier_labels takes whole numbers"),
        ({"w": [1, 2], "classifier": nn.Identity(), "w_classifier": [1, 2, 3]}, "found w 2, w_classifier 3"),
    ],
)
def test_arguments_are_refused_at_once(settings: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Guidance(**({"w": 1} | settings))


def test_what_a_pipeline_cannot_serve_is_refused(families: Any, clip: Any) -> None:
    made, with_clip = families("SD3"), {"w": 0, "classifier": clip, "w_classifier": 2}
    vae = made.pipeline.vae
    with pytest.raises(TypeError, match="classifier gives a SimpleNamespace and not logits"):
        drawn(made, Guidance(w=0, classifier=Odd(), w_classifier=2))
    with pytest.raises(ValueError, match="no column 7"):
        drawn(made, Guidance(**with_clip, classifier_labels=7))
    with pytest.raises(ValueError, match="reads 16 channels"):
        drawn(made, Guidance(w=1, guide_model=families("FLUX.2-klein").network, w_guide=2))
    made.pipeline.update_components(vae=None)
    with pytest.raises(ValueError, match="no block and no VAE"):
        drawn(made, Guidance(**with_clip))
    made.pipeline.update_components(vae=vae)
    close(drawn(made, Guidance(**with_clip)), drawn(made, Guidance(**with_clip)))


def test_guiders_of_two_modalities_are_refused() -> None:
    guidance = Guidance(w=2)
    components = SimpleNamespace(guider=guidance, audio_guider=guidance)
    with pytest.raises(ValueError, match="LTX 2 guides"):
        components.guider.set_state(0, STEPS, torch.tensor(0))


def test_schedulers_that_are_not_exact_are_refused(families: Any, clip: Any) -> None:
    def refused(name: str, scheduler: Any, message: str, guidance: Guidance, **given: Any) -> None:
        made = families(name)
        own = made.pipeline.scheduler
        made.pipeline.update_components(scheduler=type(scheduler).from_config(own.config, **scheduler.config))
        try:
            with pytest.raises(ValueError, match=message):
                drawn(made, guidance, **given)
            if given:
                drawn(made, Guidance(w=3), **given)
        finally:
            made.pipeline.update_components(scheduler=own)

    with_clip = Guidance(w=0, classifier=clip, w_classifier=2)
    ddim, flow = DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler
    refused("SDXL", ddim, "of DDIM with eta 0; this is eta 0.5", Guidance(w=0.6, method="cfg++"), eta=0.5)
    refused("SDXL", DDIMScheduler(clip_sample=True), "clip_sample of the scheduler undoes", with_clip)
    apart = DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    refused("SDXL", apart, "another number of num_inference_steps, timestep_spacing leading", Guidance(w=3, method="apg"))
    refused("SDXL", apart, "would keep noise", with_clip)
    refused("SD3", flow(invert_sigmas=True), "from less noise to more", Guidance(w=3, interval="0.2:5"))
    refused("SD3", flow(stochastic_sampling=True), "exact only with", Guidance(w=0.6, method="cfg++"))


def test_networks_are_not_saved(families: Any, clip: Any, tmp_path: Path) -> None:
    made, weak = families("SD3"), sd3_transformer(9)
    networks = {"classifier": clip, "guide_model": weak}
    guidance = Guidance(w=[1, 3], w_classifier=2, classifier_labels=[0, 1], w_guide=1.5, **networks)
    with pytest.warns(UserWarning, match="give classifier and guide_model to from_pretrained again"):
        guidance.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="w_classifier is given, and there is no classifier: give that too, which a saved"):
        Guidance.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="w_guide is given, and there is no guide_model"):
        Guidance.from_pretrained(tmp_path, classifier=clip)
    expected = drawn(made, guidance, 2)
    assert torch.equal(drawn(made, Guidance.from_pretrained(tmp_path, **networks), 2), expected)
    assert torch.equal(drawn(made, guidance.new(), 2), expected)
    assert guidance.new(w_classifier=3.0).config.w_classifier == 3
    assert len(pickle.dumps(Guidance(w=2))) < 10_000
    assert guidance._caller.state is None  # nothing of a run is kept


SKIPPED = {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}
PERTURBED = LayerSkipConfig(**SKIPPED, skip_attention=False, skip_attention_scores=True, skip_ff=False)
SMOOTHED = SmoothedEnergyGuidanceConfig(**SKIPPED)


class Smoothed(guiders.SmoothedEnergyGuidance):
    """That of diffusers 0.42 does not count the calls, so that its hook is never there."""

    def prepare_models(self, denoiser: Any) -> None:
        self._count_prepared += 1
        super().prepare_models(denoiser)


@pytest.mark.parametrize(
    ("theirs", "scale", "settings", "hook"),
    [
        (guiders.SkipLayerGuidance, "skip_layer_guidance", {"skip_layer_config": SKIPPED}, LayerSkipConfig(**SKIPPED)),
        (guiders.PerturbedAttentionGuidance, "perturbed_guidance", {"perturbed_guidance_config": PERTURBED}, PERTURBED),
        (Smoothed, "seg_guidance", {"seg_guidance_config": SMOOTHED}, SMOOTHED),
        (guiders.AutoGuidance, None, {"auto_guidance_config": SKIPPED}, LayerSkipConfig(**SKIPPED)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_guiders_that_disturb_layers_are_those_with_a_guiding_network(
    families: Any, theirs: Any, scale: str | None, settings: dict[str, Any], hook: Any
) -> None:
    """A copy of the network with diffusers' own hooks in it. Theirs start to disturb after the step that they name."""
    made = families("SDXL")
    smooth = partial(_apply_smoothed_energy_guidance_hook, blur_sigma=1e7)
    weak = deepcopy(made.network)
    (apply_layer_skip if isinstance(hook, LayerSkipConfig) else smooth)(weak, hook)
    others, limits = {}, {"start": 1 / STEPS, "stop": 1.0}
    if scale is None:  # its one scale weighs the disturbed network without the prompt: here with it
        others = {"negative_prompt": made.given["prompt"]}
        w, settings = 1, settings | {"guidance_scale": 2.5} | limits
    else:
        w, steps = 3.0, {f"{scale}_start": 0.0, f"{scale}_stop": 1.0}
        scale = "perturbed_guidance_scale" if scale == "perturbed_guidance" else f"{scale}_scale"
        settings = settings | {"guidance_scale": w, scale: 1.5} | limits | steps
    expected = drawn(made, theirs(**settings), **others)
    guidance = Guidance(w=w, guide_model=weak, w_guide=2.5, interval=f"{100 / STEPS}%:100%")
    close(drawn(made, guidance, **others), expected)
    assert (expected - drawn(made, Guidance(w=w, interval=f"{100 / STEPS}%:100%"), **others)).abs().max() > 1e-4


def edits(families: Any, name: str) -> Made:
    """A pipeline that edits an image, whose tokens follow those of the latents."""
    made = families(name)
    if name == "Qwen-Image":
        pipeline = without_encoders(QwenImageEditAutoBlocks(), "denoise", "decode")
        image = {"image_latents": torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(3))}
    else:
        pipeline = without_encoders(Flux2KleinBaseAutoBlocks(), "vae_encoder", "denoise", "decode")
        image = {"image": Image.linear_gradient("L").resize((64, 64)).convert("RGB")}
    pipeline.update_components(**{part: getattr(made.pipeline, part) for part in ("transformer", "vae", "scheduler")})
    return made._replace(pipeline=pipeline, given={**made.given, **image})


class OfTheImage(guiders.AdaptiveProjectedGuidance):
    """That of diffusers over the tokens of the image that is drawn; those of the one that is edited are dropped later."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor) -> Any:
        made = super().forward(pred_cond[:, :16], pred_uncond[:, :16])
        pred = torch.cat([made.pred, pred_cond[:, 16:]], 1)
        return type(made)(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


@pytest.mark.parametrize("name", ["Qwen-Image", "FLUX.2-klein"])
def test_tokens_of_an_image_to_edit_are_left_out(
    families: Any, clip: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made, kept = edits(families, name), kept_gradients(monkeypatch)
    close(drawn(made, Guidance(w=4.0)), drawn(made, guiders.ClassifierFreeGuidance(guidance_scale=4.0)))
    settings = {"eta": 0.2, "adaptive_projected_guidance_rescale": 5.0, "use_original_formulation": True}
    expected = drawn(made, OfTheImage(guidance_scale=3.0, start=0.0, stop=1.0, **settings))
    options = {"eta": 0.2, "norm_threshold": 5.0, "space": "native", "momentum": 0}
    close(drawn(made, Guidance(w=4.0, method="apg", options=options)), expected)
    both = drawn(made, Guidance(w=[4.0, 0.0], method="threshold", w_classifier=[2, 0], classifier=clip), 2)
    close(both[:1], drawn(made, Guidance(w=4.0, method="threshold", w_classifier=2, classifier=clip)))
    assert all(found.shape[1:] == (16, 16) and found[0].any() for *_, found in kept)
