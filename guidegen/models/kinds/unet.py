"""UNets that draw pixels: diffusers' `UNet2DModel`, and our `AdmUNet2DModel` for what that cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guidegen.errors import CheckpointError
from guidegen.models.checkpoint import Source
from guidegen.models.kinds.folder import LabelCheckpoint
from guidegen.models.noise_schedule import EDM_CLASSES
from guidegen.python_file import split_python_ref

if TYPE_CHECKING:
    from guidegen.models.networks import LoadOptions
    from guidegen.scores.interfaces import Denoiser

_ADM = "AdmUNet2DModel"


class UNet(LabelCheckpoint):
    """A UNet alone, or any pipeline of a UNet and a scheduler (Ho et al. 2020, arXiv 2006.11239)."""

    network = "unet"
    network_classes = ("UNet2DModel", _ADM)
    channels_last = True
    asked_last = True

    @property
    def kind(self) -> str:
        return "guided-diffusion UNet" if self.config["_class_name"] == _ADM else "pixel UNet"

    @property
    def recommended(self) -> str | None:
        """What Karras et al. 2022 give for EDM's networks."""
        if self.scheduler_config.get("_class_name") not in EDM_CLASSES:
            return None
        return (
            "--scheduler edm: 18 steps for CIFAR-10, 40 for FFHQ and AFHQ at 64, 256 with S_churn=40 S_tmin=0.05 S_tmax=50 "
            "S_noise=1.003 for ImageNet at 64 (Karras et al. 2022, arXiv 2206.00364, table 5)"
        )

    @classmethod
    def matches(cls, source: Source) -> bool:
        return super().matches(source) if cls.pipeline else split_python_ref(source.ref) is None

    def check_config(self) -> None:
        super().check_config()
        channels = self.config["in_channels"]
        if channels not in (1, 3):
            folder = self.part_folders[self.network]
            raise CheckpointError(f"{folder} draws {channels} channels; guidegen opens models of 1 or 3.")

    def check_networks(self) -> None:
        from guidegen.models.loading import check_prediction

        super().check_networks()
        check_prediction(self)

    def denoiser(self, network: Any, null_label: int | None, options: LoadOptions) -> Denoiser:
        from guidegen.models.denoisers import UNetDenoiser

        return UNetDenoiser(network, self.prediction_type, null_label, options.autocast)
