"""Custom networks, held to what `guidegen.Model` and `guidegen.ClassifierModel` say of them at every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guidegen.errors import CheckpointError, GuidegenError
from guidegen.models.python_ref import ClassifierModel, Model
from guidegen.python_file import blamed, refuse_custom
from guidegen.scores.noise import PREDICTION_TYPES, PredictionType

if TYPE_CHECKING:
    from guidegen.models.checkpoint import Checkpoint


class CustomDenoiser:
    """The denoiser that a `guidegen.Model` loads.

    Args:
        checkpoint: what it was opened as.
        custom: its model.
        kind: what it should predict.
        device: where to.

    Raises:
        CheckpointError: here and at each call, whatever its code raises or gives that is no prediction,
            with its file and line.
    """

    def __init__(self, checkpoint: Checkpoint, custom: Model, kind: PredictionType, device: torch.device):
        self._ref, self._shape, self._image_shape = checkpoint.ref, custom.shape, checkpoint.image_shape
        with blamed(self._ref, CheckpointError, custom.load):
            self._network: Any = custom.load(device)
            said, decode = getattr(self._network, "prediction_type", None), getattr(self._network, "decode", None)
        if not callable(self._network):
            raise refuse_custom(
                self._ref, CheckpointError, custom.load, f"load gives a {_type(self._network)}, no denoiser."
            )
        if said not in PREDICTION_TYPES:
            words = f"its prediction_type is {said!r}; it should be one of {', '.join(PREDICTION_TYPES)}."
            raise self._refuse(f"the denoiser cannot be used: {words}")
        if said != kind:
            raise self._refuse(f"the denoiser predicts {said}, and its scheduler's config says {kind}.")
        if decode is None and custom.image_size is not None:
            raise self._refuse("the model has an image_size, and its denoiser no decode, which would make images of it.")
        self.prediction_type = kind
        self.decode = None if decode is None else self._decode
        self._called = False

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) fp32 from x_t (B, C, H, W), timestep t () and labels (B,)."""
        with blamed(self._ref, CheckpointError, self._network, drawing=True):
            output: Any = self._network(x_t, t, labels)
        self._check(output, (len(x_t), *self._shape), x_t, self._network)
        if not self._called and not output.isfinite().any():
            raise self._refuse("the denoiser gives no finite number at its first call.")
        self._called = True
        prediction: Tensor = output
        return prediction

    def _decode(self, latents: Tensor) -> Tensor:
        with blamed(self._ref, CheckpointError, self._network.decode, drawing=True):
            images: Any = self._network.decode(latents)
        self._check(images, (len(latents), *self._image_shape), latents, self._network.decode)
        decoded: Tensor = images
        return decoded

    def _check(self, found: Any, shape: tuple[int, ...], like: Tensor, what: Any) -> None:
        if message := _difference(found, shape, like):
            raise refuse_custom(self._ref, CheckpointError, what, message)

    def _refuse(self, message: str) -> GuidegenError:
        return refuse_custom(self._ref, CheckpointError, self._network, message)


class CustomClassifier(nn.Module):
    """The classifier that a `guidegen.ClassifierModel` loads; raises as `CustomDenoiser` does.

    Args:
        ref: `path/to/file.py:NAME`.
        custom: the model that it names.
        device: to load it to.
    """

    def __init__(self, ref: str, custom: ClassifierModel, device: torch.device):
        super().__init__()
        self._ref, self._columns = ref, len(custom.labels)
        with blamed(self._ref, CheckpointError, custom.load):
            self.network: Any = custom.load(device)
        if not callable(self.network):
            raise refuse_custom(
                self._ref, CheckpointError, custom.load, f"load gives a {_type(self.network)}, no classifier."
            )

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def forward(self, images: Tensor, *timestep: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W), noisy ones at timesteps (B,)."""
        with blamed(self._ref, CheckpointError, self.network, drawing=True):
            logits: Any = self.network(images, *timestep)
        if message := _difference(logits, (len(images), self._columns), images, floating=True):
            raise refuse_custom(self._ref, CheckpointError, self.network, message)
        found: Tensor = logits
        return found


def _type(value: Any) -> str:
    return type(value).__name__


def _difference(found: Any, shape: tuple[int, ...], like: Tensor, floating: bool = False) -> str | None:
    """What a result is instead of a tensor of that shape beside `like`, fp32 or, with `floating`, of any precision."""
    if not isinstance(found, Tensor):
        return f"gives a {_type(found)}; it should be a tensor of {shape}."
    if tuple(found.shape) != shape:
        return f"gives a tensor of {tuple(found.shape)}; it should be of {shape}."
    if not (found.is_floating_point() if floating else found.dtype == torch.float32):
        return f"gives {found.dtype}; it should be torch.float32."
    if found.device != like.device:
        return f"gives a tensor on {found.device}; it should be on {like.device}, where its input is."
    return None
