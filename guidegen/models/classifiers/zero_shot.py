"""CLIP-like models as classifiers of whatever texts they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from guidegen.models.classifiers.preprocessing import Preprocessing


class ZeroShotClassifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to logits (B, K), one for each text.

    The logits are the `logits_per_image` of the model: scaled cosine similarities of image and text
    (Radford et al. 2021, arXiv 2103.00020, figure 3). The texts are read once.

    Args:
        network: a transformers model with `get_text_features` and `get_image_features`.
        preprocessing: of its images.
        tokenizer: of its texts.
        texts: K texts.
    """

    def __init__(self, network: Any, preprocessing: Preprocessing, tokenizer: Any, texts: Sequence[str]):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing
        # SigLIP was trained on texts padded to their full length
        siglip = network.config.model_type.startswith("siglip")
        limit = getattr(network.config.text_config, "max_position_embeddings", None)
        tokens = tokenizer(
            list(texts), padding="max_length" if siglip else True, truncation=True, max_length=limit, return_tensors="pt"
        )
        with torch.no_grad():
            features = _pooled(network.get_text_features(**tokens.to(network.device)))
        self.texts: Tensor
        self.register_buffer("texts", normalize(features, dim=-1))
        self.scale = float(network.logit_scale.detach().exp())

    def forward(self, images: Tensor) -> Tensor:
        """Un-normalised logits; a bias that all texts share would drop out of their softmax."""
        features = _pooled(self.network.get_image_features(pixel_values=self.preprocessing(images)))
        return self.scale * normalize(features.to(self.texts.dtype), dim=-1) @ self.texts.T


def _pooled(output: Any) -> Tensor:
    """The projected features: older releases of transformers give them bare."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
