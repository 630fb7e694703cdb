"""What the Python API says of arguments that cannot be: it names them, through the public names alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import NAMES, tiny_classifier, tiny_unet

import guidegen as g
from guidegen.errors import GuidegenError
from guidegen.scores.noise import Level

CONFIG = {"_class_name": "DDIMScheduler", "clip_sample": False}
NAN = math.nan
X, T = torch.zeros(2, 3, 8, 8), torch.tensor(5)
CUSTOM: dict[str, Any] = {"load": print, "shape": (3, 8, 8), "scheduler": CONFIG}


def denoiser(**given: Any) -> Any:
    return g.UNetDenoiser(tiny_unet(num_class_embeds=6), **{"prediction_type": "epsilon", "null_label": 5, **given})


def classifier(columns: Any = None) -> Any:
    return g.NoisyScore(tiny_classifier(), {i: i for i in range(len(NAMES))} if columns is None else columns)


def guide(labels: Any = (1, 2), w: Any = (3.0, 1.0), **given: Any) -> Any:
    return g.Guide(given.pop("denoiser", None) or denoiser(), labels, w, **given)


def drawn(**given: Any) -> Any:
    asked: dict[str, Any] = {"guide": guide(), "scheduler": g.make_scheduler(CONFIG, "ddim")}
    return g.sample(**{**asked, "seeds": [0, 1], "shape": (3, 8, 8), "steps": 2, **given})


def linear(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :5]


WEIGHTS: dict[str, dict[str, Any]] = {
    "w": {},
    "w_classifier": {"classifier": classifier()},
    "w_guide": {"guiding": denoiser()},
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bad", [[1.0], [1.0] * 3, [], 3.0, "12", [NAN, 1.0], [math.inf, 1.0], ["3", 1.0], [None, 1.0]])
def test_weights(name: str, bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name} takes "):
        guide(**{name: bad}, **WEIGHTS[name])


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "no labels": (lambda: guide([], []), "^labels is empty"),
    "labels are one": (lambda: guide(3, [1.0]), "^labels takes a list"),
    "labels are text": (lambda: guide("ab"), "^labels takes a list"),
    "label is text": (lambda: guide(["tabby", 1]), "^labels takes label ids.*'tabby'"),
    "label is 1.5": (lambda: guide([1.5, 1]), "^labels takes label ids.*1.5"),
    "label is unknown": (lambda: guide([17, 1]), "^labels: 17 is not one of the network's, which has 6"),
    "label is negative": (lambda: guide([-7, 1]), "^labels takes whole numbers from -1, found -7"),
    "mixture of unknown": (lambda: guide([((1, 2.0), (9, 1.0)), 1]), "^labels: 9 is not"),
    "mixture without weights": (lambda: guide([((1,),), 1]), "^labels takes label ids"),
    "mixture of none": (lambda: guide([(), 1]), "^labels: a mixture of no labels"),
    "mixture of nan": (lambda: guide([((1, NAN),), 1]), "^labels takes finite numbers"),
    "no null label": (lambda: guide(denoiser=denoiser(null_label=None)), "null condition.*no null_label"),
    "classifier labels": (
        lambda: guide(classifier_labels=[1], w_classifier=[1, 1], classifier=classifier()),
        "^classifier_labels",
    ),
    "classifier knows not": (
        lambda: guide(classifier_labels=[1, 17], w_classifier=[1, 1], classifier=classifier()),
        "^labels: the classifier does not know 17",
    ),
    "null for a classifier": (
        lambda: guide([g.NULL, 1], [0.0, 0.0], w_classifier=[1, 1], classifier=classifier()),
        "^labels: the classifier does not know -1",
    ),
    "starts": (lambda: guide(starts=[1]), "^starts takes one value for each label, 2 in all; found 1"),
    "classifier without weights": (lambda: guide(classifier=classifier()), "^classifier has no effect without w_classifier"),
    "weights without classifier": (lambda: guide(w_classifier=[1, 1]), "^w_classifier is not zero"),
    "guiding without weights": (lambda: guide(guiding=denoiser()), "^guiding has no effect without w_guide"),
    "denoiser": (lambda: g.Guide(None, [1], [1.0]), "^denoiser.prediction_type is one of epsilon"),  # type: ignore[arg-type]
    "method": (lambda: guide(method="apg"), "^method takes a Method"),
    "clip": (lambda: guide(clip=-1.0), "^clip takes a number above 0"),
    "steps of a guide": (lambda: guide(steps=0), "^steps takes whole numbers from 1"),
    "x_t of a guide": (lambda: guide()(X[:1], T, (0.6, 0.8)), "^x_t is .* B = 2"),
    "no seeds": (lambda: drawn(seeds=[]), "^seeds is empty"),
    "seeds are one": (lambda: drawn(seeds=3), "^seeds takes a list"),
    "seed is negative": (lambda: drawn(seeds=[0, -1]), "^seeds takes whole numbers from 0 to"),
    "seed is huge": (lambda: drawn(seeds=[0, 2**64]), "^seeds takes whole numbers from 0 to"),
    "seed is 0.5": (lambda: drawn(seeds=[0, 0.5]), "^seeds takes whole numbers, found 0.5"),
    "more seeds than labels": (lambda: drawn(seeds=[0, 1, 2]), "B = 2, one a label; found"),
    "no steps": (lambda: drawn(steps=0), "^steps takes whole numbers from 1, found 0"),
    "negative steps": (lambda: drawn(steps=-1), "^steps takes whole numbers from 1, found -1"),
    "steps is 2.5": (lambda: drawn(steps=2.5), "^steps takes whole numbers, found 2.5"),
    "too many steps": (lambda: drawn(steps=2000), "^steps=2000: DDIMScheduler refuses"),
    "shape of two": (lambda: drawn(shape=(8, 8)), "^shape takes one value for each of C, H and W"),
    "shape of none": (lambda: drawn(shape=(3, 0, 8)), "^shape takes whole numbers from 1"),
    "shape of other channels": (lambda: drawn(shape=(4, 8, 8)), r"^x_t is \(B, 3, H, W\)"),
    "eta": (lambda: drawn(eta=2.0), "^eta is from 0 to 1, found 2.0"),
    "eta is nan": (lambda: drawn(eta=NAN), "^eta takes finite numbers"),
    "eta of euler": (lambda: drawn(eta=0.5, scheduler=g.make_scheduler(CONFIG, "euler")), "^eta is for ddim; EulerDiscrete"),
    "guide": (lambda: drawn(guide=None), "^guide takes"),
    "scheduler": (lambda: drawn(scheduler="ddim"), "^scheduler takes"),
    "config": (lambda: g.make_scheduler("ddim"), "^config takes the config of a scheduler"),  # type: ignore[arg-type]
    "name": (lambda: g.make_scheduler(CONFIG, 3), "^name takes the name of a scheduler"),  # type: ignore[arg-type]
    "no columns": (lambda: classifier({}), "^columns is empty"),
    "columns are a list": (lambda: classifier([0, 1]), "^columns takes a mapping"),
    "negative column": (lambda: classifier({0: -1}), "^columns takes whole numbers from 0"),
    "column past the end": (lambda: classifier({0: 9})(X, T, torch.tensor([0, 0])), "^columns: there is no column 9"),
    "unknown label": (lambda: classifier()(X, T, torch.tensor([0, 9])), "does not know 9"),
    "negative label": (lambda: classifier()(X, T, torch.tensor([0, -1])), "does not know -1"),
    "labels of another batch": (lambda: classifier()(X, T, torch.tensor([0])), "^labels are one a row of x_t, 2 in all"),
    "no logits": (
        lambda: g.DetachedScore(lambda x: x, {0: 0}, "epsilon")(X, T, torch.tensor([0, 0]), Level(0.6, 0.8), X),
        r"^a classifier gives logits \(B, K\)",
    ),
    "detached": (lambda: g.DetachedScore(linear, {0: 0}, "eps"), "^prediction_type is one of"),  # type: ignore[arg-type]
    "denoised": (lambda: g.DenoisedScore(linear, {}, denoiser()), "^columns is empty"),
    "denoised without null": (lambda: g.DenoisedScore(linear, {0: 0}, denoiser(null_label=None)), "no null_label"),
    "prediction type": (lambda: denoiser(prediction_type="eps"), "^prediction_type is one of"),
    "null label": (lambda: denoiser(null_label=99), "^null_label takes whole numbers from 0 to 5"),
    "autocast": (lambda: denoiser(autocast="fp16"), "^autocast is one of"),
    "no unet": (lambda: g.UNetDenoiser(torch.nn.Linear(2, 2), "epsilon"), "^UNetDenoiser takes a network of diffusers"),
    "a row of no class": (lambda: denoiser()(X, T, torch.tensor([1, 9])), "^labels: 9 is not one of"),
    "a row without null": (lambda: denoiser(null_label=None)(X, T, torch.tensor([1, -1])), "no null_label"),
    "an image alone": (lambda: denoiser()(X[0], T, torch.tensor([1])), r"^x_t is \(B, 3, H, W\)"),
    "labels too few": (lambda: denoiser()(X, T, torch.tensor([1])), "^labels are 2 whole numbers"),
    "labels are floats": (lambda: denoiser()(X, T, torch.tensor([1.0, 2.0])), "^labels are 2 whole numbers"),
    "uint8 of one image": (lambda: g.to_uint8(X[0]), r"^images is a tensor \(B, C, H, W\)"),
    "uint8 of uint8": (lambda: g.to_uint8(X.byte()), "^images is a tensor"),
    "load_network": (lambda: g.load_network("x", "cpu"), "^checkpoint takes what open_checkpoint"),  # type: ignore[arg-type]
    "load_classifier": (lambda: g.load_classifier("x", "cpu"), "^classifier takes what open"),  # type: ignore[arg-type]
    "open_classifier": (lambda: g.open_classifier("x", "both"), "^input is one of"),
    "open_checkpoint": (lambda: g.open_checkpoint(g.BUNDLED, size=8), "^size takes a list"),  # type: ignore[arg-type]
    "model: load": (lambda: g.Model(**{**CUSTOM, "load": 3}), "^Model: load should be a function"),
    "model: shape": (lambda: g.Model(**{**CUSTOM, "shape": (8, 8)}), "^Model: shape is not valid"),
    "model: scheduler": (lambda: g.Model(**{**CUSTOM, "scheduler": "ddim"}), "^Model: scheduler is not valid"),
    "model: labels": (lambda: g.Model(**CUSTOM, labels=["a"]), "^Model: labels should map"),  # type: ignore[arg-type]
    "model: label ids": (lambda: g.Model(**CUSTOM, labels={"a": "b"}), "^Model: labels should map"),  # type: ignore[dict-item]
    "model: names": (lambda: g.Model(**CUSTOM, labels={0: 1}), "^Model: labels should map"),  # type: ignore[dict-item]
    "model: steps": (lambda: g.Model(**CUSTOM, steps=0), "^Model: steps is not valid: expected int >= 1"),
    "model: image size": (lambda: g.Model(**CUSTOM, image_size=8), "^Model: image_size is not valid"),  # type: ignore[arg-type]
    "classifier model: input": (lambda: g.ClassifierModel(print, {0: "a"}, "both"), "^ClassifierModel: input is not valid"),
    "classifier model: labels": (lambda: g.ClassifierModel(print, {}), "^ClassifierModel: labels is empty"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_argument_that_cannot_be_is_named(name: str) -> None:
    call, told = CASES[name]
    with pytest.raises((TypeError, ValueError, GuidegenError), match=told):
        call()


def test_numbers_of_other_libraries_are_numbers() -> None:
    import numpy as np

    plain = drawn()
    labels, w = np.array([1, 2]), torch.tensor([3.0, 1.0])
    assert torch.equal(drawn(guide=guide(labels, w), seeds=np.arange(2), steps=np.int64(2)), plain)
    assert torch.equal(drawn(guide=guide(torch.tensor([1, 2]), np.array([3.0, 1.0]))), plain)
    assert drawn(seeds=[0, 2**64 - 1]).isfinite().all()


def test_dit_and_text_denoisers_know_their_labels() -> None:
    import pipelines

    from guidegen.models.denoisers import Texts

    x = torch.zeros(1, 4, 8, 8)
    dit = g.DiTDenoiser(pipelines.tiny_transformer(num_embeds_ada_norm=5), "epsilon", 5)
    text = g.TextDenoiser(pipelines.tiny_text_unet(), "epsilon", Texts(torch.zeros(2, 3, 16)))
    for network, last, told in ((dit, 5, "labels: 6 is not"), (text, 0, "labels: 1 is not")):
        with torch.no_grad():
            assert network(x, T, torch.tensor([last])).shape == x.shape
            assert network(x, T, torch.tensor([g.NULL])).shape == x.shape
        with pytest.raises(ValueError, match=told):
            network(x, T, torch.tensor([last + 1]))
        with pytest.raises(ValueError, match=told):
            g.Guide(network, [last + 1], [2.0])
