"""CLIP-like models of transformers as zero-shot classifiers, which distinguish any texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from guidegen.models.classifiers.info import ClassifierInfo, Source
from guidegen.models.labels import Labels
from guidegen.models.weight_files import DEFAULT_ACCESS, Access

if TYPE_CHECKING:
    import torch

_CLASSES = ("CLIPModel", "SiglipModel", "ChineseCLIPModel", "AltCLIPModel", "MetaClip2Model")
"""Models of transformers with get_text_features and get_image_features."""


class ZeroShot(ClassifierInfo):
    """A CLIP-like model. Its columns are the texts that it is loaded with."""

    expected = f"a CLIP-like model ({', '.join(_CLASSES)})"
    zero_shot = True

    @classmethod
    def matches(cls, source: Source) -> bool:
        return source.architectures in _CLASSES

    @classmethod
    def open(cls, source: Source, input: str | None) -> ZeroShot:
        from guidegen.models.classifiers.preprocessing import Preprocessing

        source.refuse_noisy(input)
        return cls(*source, Preprocessing.from_folder(source.folder, source.config), Labels({}), "denoised")

    def columns(self, labels: Labels) -> dict[int, int]:
        """Label id of the denoiser -> column of the logits with `label_texts` of the same labels."""
        return {label: column for column, label in enumerate(i for i, name in labels.names.items() if name)}

    def renumbers(self, labels: Labels) -> bool:
        """Never: it has no label ids."""
        return False

    def load(
        self,
        device: torch.device | str,
        access: Access = DEFAULT_ACCESS,
        texts: Sequence[str] = (),
        autocast: torch.dtype | None = None,
    ) -> torch.nn.Module:
        from transformers import AutoModelForZeroShotImageClassification

        from guidegen.models.classifiers.zero_shot import ZeroShotClassifier
        from guidegen.models.pretrained import load_model, load_tokenizer

        assert self.preprocessor is not None
        network = load_model(AutoModelForZeroShotImageClassification, self.folder, device, access)
        return ZeroShotClassifier(network, self.preprocessor, load_tokenizer(self.folder), texts)

    def load_features(self, device: torch.device | str, access: Access = DEFAULT_ACCESS) -> torch.nn.Module:
        """The image features, before they are normalised."""
        from guidegen.models.classifiers.networks import load_pooled

        return load_pooled(self.folder, self.preprocessor, device, access)
