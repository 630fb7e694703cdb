"""Noise-aware classifiers: folders of a `NoisyClassifier`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from guidegen.models.classifiers.info import ClassifierInfo, Source
from guidegen.models.weight_files import DEFAULT_ACCESS, Access

if TYPE_CHECKING:
    import torch


class NoiseAware(ClassifierInfo):
    """A `NoisyClassifier`. It reads x_t and t, or denoised images at t = 0."""

    expected = "NoisyClassifier"

    @classmethod
    def matches(cls, source: Source) -> bool:
        return source.config.get("_class_name") == "NoisyClassifier"

    @classmethod
    def open(cls, source: Source, input: str | None) -> NoiseAware:
        return cls(*source, None, source.read_labels(), input or "noisy")

    @property
    def size(self) -> tuple[int, int] | None:
        size = self.config.get("sample_size")
        return (size, size) if isinstance(size, int) else None

    @property
    def channels(self) -> int:
        return int(self.config.get("in_channels", 3))

    @property
    def logits(self) -> int:
        return len(self.labels) + bool(self.config.get("negative_class"))

    def check_network(self) -> None:
        from guidegen.models.classifiers.noisy import NoisyClassifier
        from guidegen.models.pretrained import empty_model

        empty_model(NoisyClassifier, self.config, self.folder)

    def load(
        self,
        device: torch.device | str,
        access: Access = DEFAULT_ACCESS,
        texts: Sequence[str] = (),
        autocast: torch.dtype | None = None,
    ) -> torch.nn.Module:
        from guidegen.models.classifiers.noisy import CleanClassifier, NoisyClassifier
        from guidegen.models.pretrained import load_model

        network = load_model(NoisyClassifier, self.folder, device, access, autocast)
        return network if self.input == "noisy" else CleanClassifier(network, len(self.labels))
