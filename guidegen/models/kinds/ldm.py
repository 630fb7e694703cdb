"""Latent diffusion without prompts (Rombach et al. 2022, arXiv 2112.10752): diffusers' `LDMPipeline`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from guidegen.errors import CheckpointError
from guidegen.models.kinds.folder import LabelCheckpoint

if TYPE_CHECKING:
    from guidegen.models.networks import LoadOptions
    from guidegen.scores.interfaces import Denoiser

_DECODERS = ("VQModel", "AutoencoderKL")
_IGNORED = ("latents_mean", "latents_std", "shift_factor")
"""Keys of an `AutoencoderKL` that change its latents, and that `LDMPipeline` does not read."""


class LatentDiffusion(LabelCheckpoint):
    """An LDMPipeline: a `UNet2DModel` that draws latents, with or without classes, and a part that decodes them.

    That part is called `vqvae` or `vae`, and is a `VQModel` or an `AutoencoderKL`.
    """

    kind = "latent diffusion UNet"
    pipeline = "LDMPipeline"
    network = "unet"
    network_classes = ("UNet2DModel",)
    channels_last = True

    @classmethod
    def others_among(cls, named: Collection[str]) -> Sequence[str]:
        return ("vae",) if "vae" in named and "vqvae" not in named else ("vqvae",)

    @property
    def decoder(self) -> str:
        return next(part for part in self.configs if part != self.network)

    def check_config(self) -> None:
        super().check_config()
        config, where = self.decoder_config, f"{self.folder}/{self.decoder}"
        if self.index:
            named, found = self.index[self.decoder][1], config.get("_class_name")
            if named != found or found not in _DECODERS:
                what = found if named == found else f"{named} by model_index.json and a {found} by its config.json"
                raise CheckpointError(f"{where} is a {what}; guidegen opens {' or '.join(_DECODERS)} there.")
        if ignored := [key for key in _IGNORED if config.get(key)]:
            raise CheckpointError(f"{where} has a {ignored[0]}, and {self.pipeline} decodes without one.")
        if self.image_shape[0] not in (1, 3):
            raise CheckpointError(f"{where} gives {self.image_shape[0]} channels; guidegen opens models of 1 or 3.")

    def check_networks(self) -> None:
        from guidegen.models.loading import check_decoding, check_prediction

        super().check_networks()
        check_prediction(self)
        if self.index:
            check_decoding(self, self.decoder)

    def denoiser(self, network: Any, null_label: int | None, options: LoadOptions) -> Denoiser:
        from guidegen.models.denoisers import UNetDenoiser

        return UNetDenoiser(network, self.prediction_type, null_label, options.autocast)
