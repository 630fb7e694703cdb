"""Image models of transformers other than classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guidegen.models.classifiers.info import ImageModel, Source
from guidegen.models.weight_files import DEFAULT_ACCESS, Access

if TYPE_CHECKING:
    import torch


class TransformersModel(ImageModel):
    """What transformers' `AutoModel` loads. Its features are its pooled output."""

    expected = "an image model of transformers"

    @classmethod
    def matches(cls, source: Source) -> bool:
        return "model_type" in source.config and "pretrained_cfg" not in source.config

    @classmethod
    def open(cls, source: Source, input: str | None) -> TransformersModel:
        from guidegen.models.classifiers.preprocessing import Preprocessing

        return cls(*source, Preprocessing.from_folder(source.folder, source.config))

    def load_features(self, device: torch.device | str, access: Access = DEFAULT_ACCESS) -> torch.nn.Module:
        from guidegen.models.classifiers.networks import load_pooled

        return load_pooled(self.folder, self.preprocessor, device, access)
