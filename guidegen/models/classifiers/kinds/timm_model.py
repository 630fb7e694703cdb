"""Image models of timm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.classifiers.info import ImageModel, Source
from guidegen.models.weight_files import DEFAULT_ACCESS, Access

if TYPE_CHECKING:
    import torch


class TimmModel(ImageModel):
    """What timm's `create_model` makes, without its head."""

    expected = "an image model of timm"

    @classmethod
    def matches(cls, source: Source) -> bool:
        return "pretrained_cfg" in source.config

    @classmethod
    def open(cls, source: Source, input: str | None) -> TimmModel:
        from guidegen.models.classifiers.preprocessing import Preprocessing

        return cls(*source, Preprocessing.from_timm(source.config["pretrained_cfg"], source.folder / "config.json"))

    def load_features(self, device: torch.device | str, access: Access = DEFAULT_ACCESS) -> torch.nn.Module:
        try:
            import timm
        except ImportError as error:
            raise UsageError(f"{self.folder} is a timm model, and timm is not installed: pip install timm") from error
        from safetensors.torch import load_file

        from guidegen.models.classifiers.networks import Pooled
        from guidegen.models.pretrained import check_weights

        (file, *_) = check_weights(self.folder).files
        try:
            network = timm.create_model(self.config["architecture"], pretrained=False, num_classes=0)
            missing, _ = network.load_state_dict(load_file(file), strict=False)  # its head stays behind
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: the weights do not load: {str(error).splitlines()[0]}") from error
        if missing:
            raise CheckpointError(
                f"{self.folder}: the weights do not fit config.json: {len(missing)} tensors missing, first {missing[0]}."
            )
        assert self.preprocessor is not None
        return Pooled(network.to(device).eval().requires_grad_(False), self.preprocessor)
