"""What a transformers image processor does to an image, in torch, so that gradients flow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor
from torch.nn.functional import pad

from guidegen.errors import CheckpointError, first_line
from guidegen.models.classifiers.resampling import FILTERS, resize
from guidegen.models.configs import read_json
from guidegen.schema import convert

LEVELS = 1.5
"""Grey levels of 255 by which a preprocessing may differ from its processor: Pillow rounds to whole levels after each
of two passes, half a level each, of which its bicubic and Lanczos filters, whose weights are below 2 in absolute sum,
enlarge the first."""

_Edge = Annotated[int, Meta(ge=1, le=2048)]
_Size = _Edge | dict[str, _Edge | None] | list[_Edge] | None
_Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
_Positive = Annotated[float, Meta(ge=1e-6, le=1e6)]
_Share = Annotated[float, Meta(ge=0.5, le=1)]
_THREE = Meta(min_length=3, max_length=3)


class _Named(msgspec.Struct):
    """Whose `preprocessor_config.json` it is."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None


class _Stated(msgspec.Struct):
    """`preprocessor_config.json`: of what decides the pixels, what may be stated; the processor's class has the rest."""

    do_resize: bool | None = None
    size: _Size = None
    resample: Annotated[int, Meta(ge=0, le=5)] | None = None
    do_center_crop: bool | None = None
    crop_size: _Size = None
    crop_pct: _Share | None = None
    size_divisor: _Edge | None = None
    do_flip_channel_order: bool | None = None
    do_rescale: bool | None = None
    rescale_factor: _Number | None = None
    rescale_offset: bool | None = None
    do_normalize: bool | None = None
    image_mean: _Number | Annotated[list[_Number], _THREE] | None = None
    image_std: _Positive | Annotated[list[_Positive], _THREE] | None = None
    include_top: bool | None = None


@dataclass(frozen=True)
class Preprocessing:
    """Crop, resize, centre crop and an affine map of the grey levels, in this order.

    Attributes:
        zoom: (height, width) of a first centre crop, in shorter edges; None crops nothing.
        size: (height, width) to resize to; None for the width makes the height the shorter edge; None keeps the size.
        multiple: both edges are enlarged to a multiple of it.
        filter: of the resize, one of `FILTERS`.
        crop: (height, width) of the centre crop; None crops nothing.
        halves: how the crop rounds half a pixel at its upper left: down, or to even.
        flip: the channels are blue, green and red.
        gain: of each channel of the output, per grey level in [0, 255].
        bias: of each channel of the output.
    """

    zoom: tuple[float, float] | None = None
    size: tuple[int, int | None] | None = None
    multiple: int = 1
    filter: str = "bilinear"
    crop: tuple[int, int] | None = None
    halves: str = "down"
    flip: bool = False
    gain: tuple[float, ...] = (1 / 255,) * 3
    bias: tuple[float, ...] = (0.0,) * 3

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], model_type: str | None = None, where: object = "preprocessor_config.json"
    ) -> Preprocessing:
        """What the image processor that transformers makes of `preprocessor_config.json` does.

        The processor has the defaults of what the file leaves out. It is run on a few images, where
        guidegen's result must be the same within `LEVELS`.

        Args:
            config: of the image processor.
            model_type: of the network, whose processor it is where `config` names none.
            where: names `config` in errors.

        Raises:
            CheckpointError: a value of a wrong type, or a processor that guidegen does not follow.
        """
        name = _processor_name(convert(config, _Named, where, CheckpointError), model_type, where)
        if name not in PROCESSORS:
            raise CheckpointError(
                f"{where} is for {name}, whose preprocessing guidegen does not follow. "
                f"It follows those of {', '.join(sorted(name.removesuffix('ImageProcessor') for name in PROCESSORS))}."
            )
        convert(config, _Stated, where, CheckpointError)
        try:
            processor = _processor(name)(**{key: value for key, value in config.items() if key not in _NAMES})
            resolved = json.loads(processor.to_json_string())
        except Exception as error:  # whatever a key that makes no sense runs into
            raise CheckpointError(f"{where}: transformers makes no {name} of it: {first_line(error)}") from error
        known = convert(resolved, _Stated, f"{where} as {name}", CheckpointError)
        try:
            found = PROCESSORS[name](replace(_plain(known), **_colours(known)), known)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{where}: guidegen does not follow {name} with {first_line(error)}.") from error
        found.compare(processor, f"{where} is for {name}")
        return found

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> Preprocessing:
        """That of a transformers model; where there are two files, the newer kind, as transformers does.

        Args:
            folder: of the model.
            config: its config.json.

        Raises:
            CheckpointError: there is none, or as `from_config` does.
        """
        if "pretrained_cfg" in config:
            raise CheckpointError(
                f"{folder} has timm's preprocessing (TimmWrapperImageProcessor), which guidegen does not follow for "
                "classifiers."
            )
        path = folder / "processor_config.json"
        stated = read_json(path).get("image_processor") if path.is_file() else None
        if stated is None:
            path = folder / "preprocessor_config.json"
            if not path.is_file():
                raise CheckpointError(f"{folder} is incomplete: preprocessor_config.json is missing.")
            stated = read_json(path)
        return cls.from_config(stated, config.get("model_type"), path)

    @classmethod
    def from_timm(cls, config: Mapping[str, Any], where: object = "config.json") -> Preprocessing:
        """What timm does to an image before it is classified, as `pretrained_cfg` has it.

        Raises:
            CheckpointError: a value of a wrong type, or a crop that guidegen does not follow.
        """
        stated = convert(config, _Timm, where, CheckpointError)
        _, height, width = stated.input_size
        if height != width or stated.crop_mode != "center" or stated.interpolation not in FILTERS.values():
            raise CheckpointError(
                f"{where}: guidegen follows timm's crop_mode center of a square image with a filter of Pillow, found "
                f"{stated.crop_mode} of {height}x{width} with {stated.interpolation}."
            )
        gain = tuple(1 / 255 / std for std in stated.std)
        bias = tuple(-mean / std for mean, std in zip(stated.mean, stated.std, strict=True))
        edge = math.floor(height / stated.crop_pct)
        return cls(None, (edge, None), 1, stated.interpolation, (height, width), "even", False, gain, bias)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], C 1 or 3, to what the network takes (B, 3, h, w), fp32 or fp64.

        What lies outside [-1, 1], as estimates of an image do, keeps its gradient.
        """
        x = (images.to(torch.promote_types(images.dtype, torch.float32)) + 1) * 127.5
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.zoom is not None:
            x = self._crop(x, *(int(share * min(x.shape[-2:])) for share in self.zoom))
        if self.size is not None:
            x = resize(x, *self._resized(*x.shape[-2:]), self.filter)
        if self.crop is not None:
            x = self._crop(x, *self.crop)
        if self.flip:
            x = x.flip(1)
        gain, bias = (x.new_tensor(values)[:, None, None] for values in (self.gain, self.bias))
        return x * gain + bias

    def compare(self, processor: Any, what: str) -> None:
        """Runs the processor and itself on noise of several shapes.

        Args:
            processor: of transformers.
            what: names the processor in the error.

        Raises:
            CheckpointError: they differ by more than `LEVELS`.
        """
        noise = np.random.default_rng(0)
        for height, width in ((32, 32), (64, 48), (43, 60), (400, 431)):
            pixels = noise.integers(0, 256, (height, width, 3), np.uint8)
            try:
                theirs = processor(images=[pixels], return_tensors="pt")["pixel_values"]
            except Exception as error:  # whatever a setting that makes no sense runs into
                raise CheckpointError(f"{what}, which fails with these settings: {first_line(error)}") from error
            ours = self(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
            if ours.shape != theirs.shape:
                raise CheckpointError(
                    f"{what}, which makes {tuple(theirs.shape)} of an image where guidegen makes {tuple(ours.shape)}."
                )
            level = torch.tensor(self.gain).abs()[:, None, None].clamp(min=1e-9)
            off = float(((ours - theirs).abs() / level).amax())
            if not off <= LEVELS:
                raise CheckpointError(
                    f"{what}, from which guidegen's preprocessing differs by {off:.0f} grey levels of 255."
                )

    def _resized(self, high: int, wide: int) -> tuple[int, int]:
        """Height and width that an image has after the resize."""
        assert self.size is not None
        height, width = self.size
        if width is None:
            short, long = height, int(height * max(high, wide) / min(high, wide))
            height, width = (short, long) if high <= wide else (long, short)
        height, width = (math.ceil(edge / self.multiple) * self.multiple for edge in (height, width))
        return height, width

    def _crop(self, x: Tensor, height: int, width: int) -> Tensor:
        """The middle (height, width); what is too small is padded with black."""
        down, right = max(0, height - x.shape[-2]), max(0, width - x.shape[-1])
        x = pad(x, (right - right // 2, right // 2, down - down // 2, down // 2))
        spare = x.shape[-2] - height, x.shape[-1] - width
        top, left = (round(n / 2) if self.halves == "even" else n // 2 for n in spare)
        return x[..., top : top + height, left : left + width]


class _Timm(msgspec.Struct):
    """`pretrained_cfg` of timm: of what decides the pixels, with timm's defaults."""

    input_size: tuple[int, _Edge, _Edge]
    mean: tuple[_Number, _Number, _Number]
    std: tuple[_Positive, _Positive, _Positive]
    crop_pct: _Share = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"


_NAMES = ("image_processor_type", "feature_extractor_type", "processor_class")


def _processor_name(stated: _Named, model_type: str | None, where: object) -> str:
    """The name of the processor as transformers' AutoImageProcessor finds it, without the suffix of its implementation."""
    if stated.image_processor_type:
        return stated.image_processor_type.removesuffix("Fast")
    if stated.feature_extractor_type:
        return stated.feature_extractor_type.replace("FeatureExtractor", "ImageProcessor")
    from transformers import CONFIG_MAPPING, IMAGE_PROCESSOR_MAPPING

    try:
        found = IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING[model_type]]
    except KeyError:
        raise CheckpointError(
            f"{where} names no image_processor_type, and transformers none for the model type {model_type}."
        ) from None
    classes = list(found.values()) if isinstance(found, dict) else list(found)  # a pair before transformers 5
    name: str = next(kind.__name__ for kind in classes if kind)
    return name.removesuffix("Pil").removesuffix("Fast")


def _processor(name: str) -> Any:
    """The class that does it with Pillow, where transformers has one."""
    import transformers

    for suffix in ("Pil", "", "Fast"):
        kind = getattr(transformers, name + suffix, None)
        if kind is not None and not getattr(kind, "is_dummy", False):
            return kind
    raise ImportError("this release has none, or one that needs a package that is not installed, such as torchvision")


def _plain(known: Any) -> Preprocessing:
    """Resize and centre crop, as most processors do them."""
    size = _edges(known.size) if known.do_resize else None
    crop = _edges(known.crop_size) if known.do_center_crop else None
    if crop is not None and crop[1] is None:
        raise ValueError(f"crop_size {known.crop_size}")
    filter = FILTERS[2 if known.resample is None else known.resample]
    return Preprocessing(size=size, crop=crop, filter=filter)  # type: ignore[arg-type]


def _colours(known: Any) -> dict[str, Any]:
    """Gain and bias of each channel."""
    gain = np.full(3, known.rescale_factor if known.do_rescale else 1.0)
    bias = np.full(3, -1.0 if known.do_rescale and known.rescale_offset else 0.0)
    if (known.do_normalize or known.include_top) and None in (known.image_mean, known.image_std):
        raise ValueError("no image_mean or no image_std")
    if known.do_normalize:
        gain, bias = gain / known.image_std, (bias - known.image_mean) / known.image_std
    if known.include_top:  # EfficientNet's second division
        gain, bias = gain / known.image_std, bias / known.image_std
    return {"gain": tuple(gain.tolist()), "bias": tuple(bias.tolist()), "flip": bool(known.do_flip_channel_order)}


def _as_it_is(found: Preprocessing, known: Any) -> Preprocessing:
    return found


def _convnext(found: Preprocessing, known: Any) -> Preprocessing:
    """Small images are cropped out of larger ones, large ones are not."""
    if found.size is None:
        return found
    edge = found.size[0]
    if edge >= 384:
        return replace(found, size=(edge, edge))
    return replace(found, size=(int(edge / known.crop_pct), None), crop=(edge, edge))


def _poolformer(found: Preprocessing, known: Any) -> Preprocessing:
    if found.size is None:
        return found
    height, width = found.size
    higher, wider = int(height / known.crop_pct), width and int(width / known.crop_pct)
    return replace(found, size=(higher, None if width == height else wider))


def _levit(found: Preprocessing, known: Any) -> Preprocessing:
    if found.size is None or found.size[1] is not None:
        return found
    return replace(found, size=(int(256 / 224 * found.size[0]), None))


def _textnet(found: Preprocessing, known: Any) -> Preprocessing:
    return replace(found, multiple=known.size_divisor)


def _perceiver(found: Preprocessing, known: Any) -> Preprocessing:
    """The crop comes first, as a share of the shorter edge."""
    if found.crop is None:
        return found
    (height, width), crop = _edges(known.size), found.crop
    if width is None or height > crop[0] or width > crop[1]:
        raise ValueError(f"a crop_size of {crop[0]}x{crop[1]} and a size of {height}x{width}")
    return replace(found, zoom=(height / crop[0], width / crop[1]), crop=None)


def _mobilevit(found: Preprocessing, known: Any) -> Preprocessing:
    """Nothing is normalised."""
    return replace(found, **_colours(msgspec.structs.replace(known, do_normalize=False)))


PROCESSORS: dict[str, Callable[[Preprocessing, Any], Preprocessing]] = dict.fromkeys(
    [
        *("BeitImageProcessor", "BitImageProcessor", "BlipImageProcessor", "ChineseCLIPImageProcessor"),
        *("CLIPImageProcessor", "DeiTImageProcessor", "DINOv3ViTImageProcessor", "EfficientNetImageProcessor"),
        *("MobileNetV1ImageProcessor", "MobileNetV2ImageProcessor", "PvtImageProcessor", "SegformerImageProcessor"),
        *("SiglipImageProcessor", "ViTImageProcessor"),
    ],
    _as_it_is,
)
PROCESSORS |= {
    "ConvNextImageProcessor": _convnext,
    "LevitImageProcessor": _levit,
    "MobileViTImageProcessor": _mobilevit,
    "PerceiverImageProcessor": _perceiver,
    "PoolFormerImageProcessor": _poolformer,
    "TextNetImageProcessor": _textnet,
}
"""Image processors that guidegen follows; the peculiarities of each, from its `to_json_string`."""


def _edges(size: Any) -> tuple[int, int | None]:
    """(height, width), or (shorter edge, None)."""
    stated = {key: value for key, value in size.items() if value is not None} if isinstance(size, dict) else {}
    if stated.keys() == {"shortest_edge"}:
        return stated["shortest_edge"], None
    if stated.keys() == {"height", "width"}:
        return stated["height"], stated["width"]
    raise ValueError(f"size {size}")
