"""Preprocessing against every image processor of the installed transformers, and against Pillow's and timm's resizing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guidegen.errors import CheckpointError
from guidegen.models.checkpoint import open_classifier
from guidegen.models.classifiers.preprocessing import LEVELS, PROCESSORS, Preprocessing
from guidegen.models.classifiers.resampling import FILTERS, resize

NAMES = sorted({re.sub("(Fast|Pil)$", "", n) for n in dir(transformers) if re.search("ImageProcessor(Fast|Pil)?$", n)})
SIZES = [(32, 32), (64, 48), (300, 240), (240, 300), (97, 33)]


def with_pillow(name: str) -> Any:
    """The class that works with Pillow; None where there is none that works here."""
    kinds = (getattr(transformers, name + end, None) for end in ("Pil", ""))
    return next((kind for kind in kinds if kind is not None and not getattr(kind, "is_dummy", False)), None)


def defaults(name: str) -> dict[str, Any]:
    """What the processor saves of itself, as checkpoints have it."""
    try:
        saved: dict[str, Any] = json.loads(with_pillow(name)().to_json_string())
    except Exception:  # no class that works here, or one that needs arguments
        return {"image_processor_type": name}
    return saved | {"image_processor_type": name}


def follows(name: str) -> bool:
    try:
        Preprocessing.from_config(defaults(name))
    except CheckpointError:
        return False
    assert name in PROCESSORS
    return True


def noise(size: tuple[int, int], seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def assert_equal(ours: Preprocessing, processor: Any, sizes: list[tuple[int, int]] = SIZES) -> None:
    for size in sizes:
        pixels = noise(size, 1)
        theirs = processor(images=[pixels], return_tensors="pt")["pixel_values"]
        mine = ours(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
        assert mine.shape == theirs.shape
        levels = (mine - theirs).abs() / torch.tensor(ours.gain)[:, None, None]
        assert levels.max() <= LEVELS
        assert levels.mean() <= 0.5  # rounding twice is off by about a third on average


@pytest.mark.parametrize("name", NAMES)
def test_each_processor_is_followed_or_refused_by_name(name: str) -> None:
    if follows(name):
        assert_equal(Preprocessing.from_config(defaults(name)), with_pillow(name)())
        return
    with pytest.raises(CheckpointError, match=name) as refusal:
        Preprocessing.from_config(defaults(name))
    assert "\n" not in str(refusal.value)


def test_the_two_kinds_are_counted() -> None:
    followed = [name for name in NAMES if follows(name)]
    print(f"transformers {transformers.__version__}: {len(followed)} followed, {len(NAMES) - len(followed)} refused")
    # DINOv3's needs torchvision; the oldest releases have a ChineseCLIP one that fails with its own defaults
    assert set(PROCESSORS) - set(followed) <= {"DINOv3ViTImageProcessor", "ChineseCLIPImageProcessor"}
    assert len(NAMES) > len(PROCESSORS) + 40


VARIED: list[tuple[str, dict[str, Any]]] = [
    ("ViT", {"do_rescale": False}),
    ("ViT", {"rescale_factor": 1 / 127.5}),
    ("ViT", {"do_normalize": False}),
    ("ViT", {"do_resize": False}),
    ("DeiT", {"do_resize": False, "crop_size": {"height": 41, "width": 70}}),
    ("ViT", {"size": 40}),
    ("ViT", {"size": [40, 51]}),
    ("ViT", {"image_mean": 0.4, "image_std": [0.1, 0.2, 0.3]}),
    *[("ViT", {"size": {"height": 50, "width": 37}, "resample": number}) for number in FILTERS],
    ("CLIP", {"size": {"shortest_edge": 41}, "crop_size": {"height": 30, "width": 31}}),
    ("CLIP", {"size": {"shortest_edge": 40}, "crop_size": {"height": 61, "width": 44}}),
    ("CLIP", {"size": {"shortest_edge": 50}, "do_center_crop": False}),
    ("MobileViT", {"do_flip_channel_order": False}),
    ("EfficientNet", {"include_top": False}),
    ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    ("EfficientNet", {"do_normalize": False, "resample": 0}),
    ("ConvNext", {"size": {"shortest_edge": 224}}),
    ("ConvNext", {"size": {"shortest_edge": 64}, "crop_pct": 0.95}),
    ("ConvNext", {"size": {"shortest_edge": 400}}),
    ("PoolFormer", {"crop_pct": 0.95, "size": {"shortest_edge": 100}}),
    ("PoolFormer", {"size": {"height": 100, "width": 100}}),
    ("PoolFormer", {"size": {"height": 100, "width": 140}}),
    ("Levit", {"size": {"height": 50, "width": 60}}),
    ("TextNet", {"size": {"shortest_edge": 50}}),
    ("TextNet", {"size": {"shortest_edge": 50}, "size_divisor": 7}),
    ("Perceiver", {"do_center_crop": False}),
    ("Perceiver", {"do_resize": False}),
    ("DeiT", {"size": {"height": 40, "width": 60}, "crop_size": {"height": 32, "width": 30}}),
]


@pytest.mark.parametrize(("name", "given"), VARIED)
def test_settings_that_are_not_the_defaults(name: str, given: dict[str, Any]) -> None:
    """Only what is stated is in the file: the class has the rest."""
    ours = Preprocessing.from_config({"image_processor_type": f"{name}ImageProcessor", **given})
    assert_equal(ours, with_pillow(f"{name}ImageProcessor")(**given), [(64, 48), (240, 300), (31, 32)])


REFUSED: list[tuple[Any, str]] = [
    ({"image_processor_type": "TomorrowsImageProcessor"}, "for TomorrowsImageProcessor, whose preprocessing"),
    ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor"),
    ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 32}}, "longest_edge"),
    ({"image_processor_type": "ViTImageProcessor", "resample": 99}, "expected int <= 5 at resample"),
    ({"image_processor_type": "ViTImageProcessor", "image_mean": [float("nan")] * 3}, r"at image_mean\[0\]"),
    ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5]}, "at image_mean"),
    ({"image_processor_type": "ViTImageProcessor", "image_std": [1, 0, 1]}, r"at image_std\[1\]"),
    ({"image_processor_type": "ViTImageProcessor", "size": {"height": 10**7, "width": 10**7}}, "size"),
    ({"image_processor_type": "ViTImageProcessor", "do_resize": "yes"}, "expected bool"),
    ({"image_processor_type": "ViTImageProcessor", "preprocess": 3}, "fails with these settings"),
    ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 16, "width": 16}}, "ConvNextImageProcessor"),
    ({"image_processor_type": 3}, "at image_processor_type"),
    ({}, "names no image_processor_type"),
    ([1], "expected object"),
    (None, "expected object"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_cannot_be_followed_is_refused(config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Preprocessing.from_config(config)


def test_a_processor_that_does_something_else_is_found_by_running_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a release changes a class: what guidegen knows of it is not trusted."""
    config = {"image_processor_type": "LevitImageProcessor"}
    assert Preprocessing.from_config(config).size == (256, None)
    monkeypatch.setitem(PROCESSORS, "LevitImageProcessor", PROCESSORS["ViTImageProcessor"])
    with pytest.raises(CheckpointError, match=r"LevitImageProcessor, from which .* differs by \d+ grey levels"):
        Preprocessing.from_config(config)
    monkeypatch.setitem(PROCESSORS, "VideoMAEImageProcessor", PROCESSORS["ViTImageProcessor"])
    with pytest.raises(CheckpointError, match="VideoMAEImageProcessor, which makes"):
        Preprocessing.from_config({"image_processor_type": "VideoMAEImageProcessor"})


@pytest.mark.parametrize("model", ["vit", "resnet", "dinov2", "beit", "mobilevit", "clip", "poolformer"])
def test_the_processor_of_a_file_that_names_none(model: str, tmp_path: Path) -> None:
    """As AutoImageProcessor chooses it, by the model's type."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert_equal(Preprocessing.from_config({}, model), theirs, [(64, 48)])


def classifier_folder(folder: Path, processor: dict[str, Any] | None, nested: Any = None, **config: Any) -> Path:
    """A ViT without weights."""
    names = {"id2label": {"0": "a", "1": "b"}}
    given = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **names, **config}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(given))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if nested is not None:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    return folder


def test_a_classifier_is_refused_before_its_weights_are_read(
    tmp_path: Path, unconditional: Path, guidegen: Callable[..., Any]
) -> None:
    folder = classifier_folder(tmp_path / "donut", {"image_processor_type": "DonutImageProcessor"})
    with pytest.raises(CheckpointError, match="DonutImageProcessor"):
        open_classifier(folder)
    flags = ("--mode", "classifier", "-m", unconditional, "-c", folder, "--label", 0)
    planned = guidegen("sample", *flags, "--dry-run")
    assert planned.returncode == 4
    assert "DonutImageProcessor" in planned.stderr
    timm = classifier_folder(tmp_path / "timm", None, pretrained_cfg={"input_size": [3, 32, 32]})
    with pytest.raises(CheckpointError, match="TimmWrapperImageProcessor"):
        open_classifier(timm)


def test_the_newer_file_wins(tmp_path: Path) -> None:
    old, new = ({"image_processor_type": "ViTImageProcessor", "size": {"height": s, "width": s}} for s in (32, 48))
    found = open_classifier(classifier_folder(tmp_path / "both", old, new)).preprocessor
    assert found is not None
    assert found.size == (48, 48)
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "both").size["height"] == 48
    with pytest.raises(CheckpointError, match=r"processor_config.json is not valid: expected object, got str"):
        open_classifier(classifier_folder(tmp_path / "text", old, "ViT"))


@given(before=st.tuples(*[st.integers(1, 70)] * 2), after=st.tuples(*[st.integers(1, 70)] * 2), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_filter_of_pillow(before: tuple[int, int], after: tuple[int, int], seed: int) -> None:
    pixels = noise(before, seed)
    for number, name in FILTERS.items():
        theirs = np.asarray(Image.fromarray(pixels).resize(after[::-1], number), np.float64)
        ours = resize(torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), *after, name)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - theirs).max() <= (0 if name == "nearest" else LEVELS)


@pytest.mark.parametrize("name", FILTERS.values())
def test_gradients_of_the_resize(name: str) -> None:
    """In range, and far outside of it, where nothing may be cut off."""
    for low, high in ((0, 255), (-300, 700)):
        x = torch.rand((2, 1, 5, 6), generator=torch.Generator().manual_seed(0)).double() * (high - low) + low
        assert torch.autograd.gradcheck(lambda x: resize(x, 8, 4, name), x.requires_grad_())
        flat = torch.full((1, 1, 5, 6), float(high), dtype=torch.float64, requires_grad=True)
        resize(flat, 8, 4, name).sum().backward()
        assert flat.grad is not None
        assert flat.grad.sum() == pytest.approx(8 * 4)  # pure white has a gradient


@pytest.mark.parametrize("name", FILTERS.values())
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    x = torch.rand((3, 3, 9, 11), generator=torch.Generator().manual_seed(0)).double() * 255
    x[1] = x[1] * 9 - 700
    together = resize(x, 16, 7, name)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], resize(x[i : i + 1], 16, 7, name), rtol=0, atol=1e-9)


def test_autocast_does_not_blur_it() -> None:
    x = torch.rand((1, 3, 20, 20), generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = Preprocessing(size=(32, 32), filter="bicubic")
    with torch.autocast("cpu", torch.bfloat16):
        under = ours(x)
    assert torch.equal(under, ours(x))


TIMM = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_pct": 0.9}


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("edge", [32, 39, 224])
def test_timms_preprocessing(filter: str, edge: int) -> None:
    data = pytest.importorskip("timm.data")
    config = TIMM | {"input_size": (3, edge, edge), "interpolation": filter, "crop_mode": "center"}
    transform = data.create_transform(**data.resolve_data_config(config, model=None), is_training=False)
    ours = Preprocessing.from_timm(config | {"input_size": [3, edge, edge]})
    for size in SIZES:
        pixels = noise(size)
        mine = ours(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
        levels = (mine - transform(Image.fromarray(pixels))).abs() / torch.tensor(ours.gain)[:, None, None]
        assert levels.max() <= LEVELS


@pytest.mark.parametrize(
    "change",
    [{"crop_mode": "squash"}, {"interpolation": "random"}, {"input_size": [3, 32, 40]}, {"mean": [0.5]}, {"crop_pct": "a"}],
)
def test_timms_other_ways_are_refused(change: dict[str, Any]) -> None:
    assert Preprocessing.from_timm(TIMM).size == (35, None)
    with pytest.raises(CheckpointError):
        Preprocessing.from_timm(TIMM | change)


def test_one_channel_is_shown_as_three() -> None:
    x = torch.rand((2, 1, 8, 8)) * 2 - 1
    config = {"image_processor_type": "ViTImageProcessor", "size": 16}
    ours = Preprocessing.from_config(config)
    assert torch.equal(ours(x), ours(x.expand(-1, 3, -1, -1)))
