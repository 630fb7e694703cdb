"""Image classifiers of transformers, which read denoised images through their preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from guidegen.models.classifiers.info import ClassifierInfo, Source
from guidegen.models.weight_files import DEFAULT_ACCESS, Access

if TYPE_CHECKING:
    import torch


class TransformersClassifier(ClassifierInfo):
    """What transformers' `AutoModelForImageClassification` loads."""

    expected = "a transformers ...ForImageClassification"

    @classmethod
    def matches(cls, source: Source) -> bool:
        return "ForImageClassification" in source.architectures

    @classmethod
    def open(cls, source: Source, input: str | None) -> TransformersClassifier:
        from guidegen.models.classifiers.preprocessing import Preprocessing

        source.refuse_noisy(input)
        preprocessor = Preprocessing.from_folder(source.folder, source.config)
        return cls(*source, preprocessor, source.read_labels(), "denoised")

    def load(
        self,
        device: torch.device | str,
        access: Access = DEFAULT_ACCESS,
        texts: Sequence[str] = (),
        autocast: torch.dtype | None = None,
    ) -> torch.nn.Module:
        from transformers import AutoModelForImageClassification

        from guidegen.models.classifiers.networks import ImageClassifier
        from guidegen.models.pretrained import load_model

        assert self.preprocessor is not None
        return ImageClassifier(load_model(AutoModelForImageClassification, self.folder, device, access), self.preprocessor)
