"""The networks whose features published numbers are of, with the preprocessing that they were published with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from guidegen.errors import CheckpointError, first_line
from guidegen.evaluate.features import Reader
from guidegen.evaluate.metrics import require
from guidegen.models.classifiers.opening import open_image_model
from guidegen.models.hashes import sha256_of
from guidegen.models.pickles import read_pickle
from guidegen.models.pretrained import load_model
from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.spec.cell import digest

_INCEPTION_SHA256 = "6726825d"  # how that of the published weights begins: it is in the name of their file
DINOV2, CLIP = "facebook/dinov2-large", "openai/clip-vit-large-patch14-336"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PublishedReader(Reader):
    """A reader whose features are made as published ones are.

    Attributes:
        layers: which columns are of which layer.
        head: (K, D) from features to logits without their bias; None where there is none.
        preprocessing: a sentence's part, for the rows.
    """

    layers: Mapping[str, slice] = field(default_factory=dict)
    head: Tensor | None = None
    preprocessing: str = ""


def _tensorflow(pixels: Tensor) -> Tensor:
    """As TensorFlow 1 resizes: bilinear, from the corner and not from the centre of a pixel."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(299, 299), align_corners=False)
    return (resized - 128) / 128


def _pytorch_fid(pixels: Tensor) -> Tensor:
    return 2 * interpolate(pixels.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1


def _clean(pixels: Tensor) -> Tensor:
    """As clean-fid does (Parmar et al. 2022, arXiv 2104.11222): Pillow's bicubic filter, antialiased, on floats."""
    from PIL import Image

    planes = pixels.flatten(0, 1).cpu().numpy().astype(np.float32)
    resized = [np.asarray(Image.fromarray(one).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for one in planes]
    images = torch.from_numpy(np.stack(resized)).reshape(*pixels.shape[:2], 299, 299)
    return (images.to(pixels.device) - 128) / 128


RESIZING: Mapping[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "tensorflow": (_tensorflow, "resized to 299 px as TensorFlow 1 does"),
    "pytorch-fid": (_pytorch_fid, "resized to 299 px, bilinear"),
    "clean-fid": (_clean, "resized to 299 px, bicubic and antialiased"),
}


class _Inception(nn.Module):
    """uint8 images to pool3 (B, 2048) and, where wanted, 7 channels of mixed_6 (B, 2023), by row, column, channel."""

    def __init__(self, network: Any, resizing: str, spatial: bool):
        super().__init__()
        self.body = nn.Sequential(*list(network.children())[:-1])  # all but the head, in their order
        self.resize = RESIZING[resizing][0]
        self._kept: Tensor | None = None
        if spatial:
            network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, made: Tensor) -> None:
        self._kept = made[:, :7].permute(0, 2, 3, 1).flatten(1)

    def forward(self, pixels: Tensor) -> Tensor:
        pool = self.body(self.resize(pixels)).flatten(1)
        return pool if self._kept is None else torch.cat([pool, self._kept], 1)


def inception_weights(path: Path | None, offline: bool) -> Path:
    """The file of Inception's weights: the given one, or torch-fidelity's in torch's cache, downloaded if need be.

    Raises:
        CheckpointError: it is not there, and cannot be downloaded.
        UsageError: torch-fidelity is not installed.
    """
    require("torch_fidelity", "Inception")
    if path is not None:
        if not path.is_file():
            raise CheckpointError(f"--inception {path}: no such file.")
        return path
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    cached: Path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    reason = "--offline is given"
    if not cached.is_file() and not offline:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(cached), _INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
    if not cached.is_file():
        raise CheckpointError(
            f"The weights of Inception are not at {cached}, and they could not be downloaded ({reason}). "
            f"Download {URL_INCEPTION_V3} to there, or name the file with --inception."
        )
    return cached


def open_inception(
    path: Path | None, device: torch.device, access: Access, resizing: str = "tensorflow", spatial: bool = False
) -> PublishedReader:
    """The Inception-v3 of FID, of torch-fidelity, which is the network of 2015 to 3e-5.

    Args:
        path: of weights in torch-fidelity's form; None for the published ones.
        device: to load it to.
        access: how weights may be read.
        resizing: a key of `RESIZING`.
        spatial: whether to give the features of sFID too.

    Raises:
        CheckpointError, UsageError: as `inception_weights`; or the weights are of another network.
        UnsafeError: they are pickled code.
    """
    path = inception_weights(path, access.offline)
    read_pickle(path)  # refuses code, which the next line would run
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} holds no weights of Inception-v3 as torch-fidelity has them.") from error
    model = _Inception(network, resizing, spatial).to(device).eval()
    weights = sha256_of([path])
    return PublishedReader(
        "Inception-v3",
        digest("inception", weights, resizing, spatial),
        lambda pixels: model(pixels.to(device)),
        None,
        weights,
        weights.startswith(_INCEPTION_SHA256),
        {"pool": slice(0, 2048), "spatial": slice(2048, 4071)} if spatial else {"pool": slice(0, 2048)},
        network.fc.weight.detach().double().cpu(),
        RESIZING[resizing][1],
    )


def _whole(size: int, pixels: Tensor) -> Tensor:
    """As EDM2 resizes for DINOv2: the whole image, bicubic and antialiased, on floats."""
    return interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True)


def _centre(size: int, pixels: Tensor) -> Tensor:
    """As CMMD's code resizes for CLIP: the largest square at the centre, by Pillow's bicubic filter, in 8 bits."""
    from PIL import Image

    side = min(pixels.shape[2:])
    top, left = ((length - side) // 2 for length in pixels.shape[2:])
    squares = pixels[:, :, top : top + side, left : left + side].permute(0, 2, 3, 1).cpu().numpy()
    resized = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in squares]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(pixels.device).float()


class _ViT(nn.Module):
    """uint8 images to one vector of a vision transformer: resized, then normalised."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, resize: Callable[[Tensor], Tensor], mean: tuple[float, ...], std: tuple[float, ...]
    ):
        super().__init__()
        self.network, self.resize = network, resize
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.resize(pixels) / 255
        out = self.network(pixel_values=(x - self.mean) / self.std)
        found: Tensor = out.pooler_output if hasattr(out, "pooler_output") else out.image_embeds
        return found


def open_dinov2(ref: str | None, device: torch.device, access: Access = DEFAULT_ACCESS) -> PublishedReader:
    """The class token of DINOv2 ViT-L/14 of whole images at 224 px, as EDM2 measures FD-DINOv2 (`calculate_metrics.py`).

    Args:
        ref: folder or hub id in transformers' form; None for the published one.
        device: to load it to.
        access: how weights may be read.

    Raises:
        CheckpointError: missing, unreachable, or no DINOv2.
        UnsafeError: only pickled weights, or custom code.
    """
    from transformers import AutoModel

    given = ref or DINOV2
    model = open_image_model(given, True, access)
    if model.config.get("model_type") != "dinov2":
        raise CheckpointError(f"--vit {given} is no DINOv2, found model_type {model.config.get('model_type')!r}.")
    network = load_model(AutoModel, model.folder, device, access)
    _interpolate_positions(network, 224)
    vit = _ViT(network, partial(_whole, 224), _MEAN, _STD).to(device).eval()
    weights = model.sha256(access)
    about = "resized to 224 px, bicubic and antialiased"
    identity = digest("dinov2", weights, model.config)
    layers = {"dinov2": slice(None)}
    published = model.revision is not None and given.partition("@")[0] == DINOV2
    return PublishedReader("DINOv2", identity, lambda x: vit(x.to(device)), None, weights, published, layers, None, about)


def _interpolate_positions(network: Any, size: int) -> None:
    """Position embeddings as DINOv2's code interpolates them: by a scale of (n + 0.1) / m; transformers takes n / m."""
    embeddings = network.embeddings
    positions = embeddings.position_embeddings.detach()
    m, n = round((positions.shape[1] - 1) ** 0.5), size // network.config.patch_size
    if m == n:
        return
    grid = positions[:, 1:].unflatten(1, (m, m)).permute(0, 3, 1, 2).float()
    grid = interpolate(grid, scale_factor=((n + 0.1) / m,) * 2, mode="bicubic", recompute_scale_factor=False)
    merged = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], 1)
    embeddings.position_embeddings = nn.Parameter(merged, requires_grad=False)


def open_clip(ref: str | None, device: torch.device, access: Access = DEFAULT_ACCESS) -> PublishedReader:
    """Unit-length image embeddings of CLIP ViT-L/14 at 336 px, of CMMD (Jayasumana et al. 2024, arXiv 2401.09603).

    Args, Raises: as `open_dinov2`.
    """
    from transformers import CLIPVisionModelWithProjection

    given = ref or CLIP
    model = open_image_model(given, True, access)
    size = (model.config.get("vision_config") or {}).get("image_size") or 224
    if model.config.get("model_type") != "clip":
        raise CheckpointError(f"--vit {given} is no CLIP, found model_type {model.config.get('model_type')!r}.")
    network = load_model(CLIPVisionModelWithProjection, model.folder, device, access)
    vit = _ViT(network, partial(_centre, size), _CLIP_MEAN, _CLIP_STD).to(device).eval()
    weights = model.sha256(access)
    published = model.revision is not None and given.partition("@")[0] == CLIP
    about = f"cropped to a square and resized to {size} px, bicubic, by Pillow"
    return PublishedReader(
        "CLIP",
        digest("clip", weights, model.config, about),
        lambda x: nn.functional.normalize(vit(x.to(device)), dim=1),
        None,
        weights,
        published,
        {"clip": slice(None)},
        None,
        about,
    )


def check(reader: PublishedReader) -> dict[str, Any]:
    """What a network makes of a picture that is made here, to compare between machines, and whether its weights are known.

    The picture: 256 px, red rises with the column, green with the row, blue is their exclusive or.
    """
    ramp = np.arange(256, dtype=np.uint8)
    picture = np.stack([*np.meshgrid(ramp, ramp), ramp[None] ^ ramp[:, None]], 2)
    features = reader(picture[None])[0].astype(np.float64)
    layers = {name: features[columns] for name, columns in reader.layers.items()}
    return {
        "network": reader.name,
        "sha256": reader.weights,
        "published": reader.inception,
        "preprocessing": reader.preprocessing,
        "features": {name: {"norm": float(np.linalg.norm(x)), "first": x[:4].tolist()} for name, x in layers.items()},
        "finite": bool(np.isfinite(features).all()),
    }
