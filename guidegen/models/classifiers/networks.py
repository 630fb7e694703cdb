"""Networks with their preprocessing: from images in [-1, 1] to logits or features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guidegen.errors import CheckpointError
from guidegen.models.classifiers.preprocessing import Preprocessing
from guidegen.models.pretrained import load_model
from guidegen.models.weight_files import Access


class ImageClassifier(nn.Module):
    """A transformers image classifier with its preprocessing: [-1, 1] images (B, C, H, W) -> logits (B, K)."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, images: Tensor) -> Tensor:
        """Un-normalised logits."""
        logits: Tensor = self.network(pixel_values=self.preprocessing(images)).logits
        return logits


class Penultimate(nn.Module):
    """The input of a classifier's last linear layer: images (B, C, H, W) -> features (B, D).

    Args:
        classifier: from images to logits (B, K).
        labels: K.

    Raises:
        CheckpointError: it has no linear layer of K outputs, or, at a call, that layer reads no single vector an image.
    """

    def __init__(self, classifier: nn.Module, labels: int):
        super().__init__()
        heads = [part for part in classifier.modules() if isinstance(part, nn.Linear) and part.out_features == labels]
        if not heads:
            raise CheckpointError(f"The classifier has no linear layer of {labels} logits to take features from.")
        self.classifier = classifier
        heads[-1].register_forward_pre_hook(self._keep)
        self._kept: Tensor | None = None

    def _keep(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._kept = given[0]

    def forward(self, images: Tensor) -> Tensor:
        """Features, before the dropout and the matrix of the head."""
        self.classifier(images)
        if self._kept is None or self._kept.dim() != 2:
            raise CheckpointError("The classifier's last linear layer does not read one vector an image.")
        return self._kept


class Pooled(nn.Module):
    """A transformers or timm model without a head, with its preprocessing: images (B, C, H, W) -> features (B, D)."""

    def __init__(self, network: Any, preprocessing: Preprocessing):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, images: Tensor) -> Tensor:
        """The pooled output; else the class token of a transformer, or the mean over the positions."""
        x = self.preprocessing(images)
        if hasattr(self.network, "get_image_features"):
            out = self.network.get_image_features(pixel_values=x)
        elif hasattr(self.network, "main_input_name"):
            out = self.network(pixel_values=x)
        else:
            out = self.network(x)  # timm
        if isinstance(out, Tensor):
            return out.flatten(1)
        if getattr(out, "pooler_output", None) is not None:
            return out.pooler_output.flatten(1)  # type: ignore[no-any-return]
        last: Tensor = out.last_hidden_state
        return last[:, 0] if last.dim() == 3 else last.mean(dim=(2, 3))


def load_pooled(folder: Path, preprocessing: Preprocessing | None, device: torch.device | str, access: Access) -> Pooled:
    """The features of what transformers' `AutoModel` loads."""
    from transformers import AutoModel

    assert preprocessing is not None
    return Pooled(load_model(AutoModel, folder, device, access), preprocessing)
