"""EDM and EDM2 (Karras et al. 2022, arXiv 2206.00364; 2024, 2312.02696), as `guidegen convert` writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from guidegen.errors import CheckpointError
from guidegen.models.checkpoint import Source
from guidegen.models.configs import Latents
from guidegen.models.kinds.folder import LabelCheckpoint, WithOptionalVae
from guidegen.models.noise_schedule import convention_of
from guidegen.schema import convert

if TYPE_CHECKING:
    from torch import Tensor

    from guidegen.models.networks import LoadOptions
    from guidegen.scores.interfaces import Denoiser


class Edm(WithOptionalVae, LabelCheckpoint):
    """A network with its preconditioning, which draws pixels, or latents that an `AutoencoderKL` makes images of."""

    pipeline = "EDMPipeline"
    network = "unet"
    network_classes = ("SongUNet", "DhariwalUNet", "Edm2UNet")
    channels_last = True
    guided_by_unconditional = True
    has_layers = False
    default_scheduler = "EDMHeunScheduler"
    default_steps = 32

    @property
    def kind(self) -> str:
        name = self.config["_class_name"]
        return "EDM2" if name == "Edm2UNet" else f"EDM {'ADM' if name == 'DhariwalUNet' else 'DDPM++/NCSN++'}"

    @classmethod
    def matches(cls, source: Source) -> bool:
        return super().matches(source) or source.config.get("_class_name") in cls.network_classes

    @property
    def cannot_draw(self) -> str | None:
        if self.decoder is None and (self.latents is not None or self.config["in_channels"] not in (1, 3)):
            return self.undecoded
        return None

    @property
    def latents(self) -> Latents | None:
        """Statistics of the latents; None where it draws images."""
        found = self.index.get("latents")
        return None if found is None else convert(found, Latents, f"{self.folder}: latents", CheckpointError)

    def check_config(self) -> None:
        super().check_config()
        if convention_of(self.scheduler_config) != "sigma":
            found = self.scheduler_config.get("_class_name")
            raise CheckpointError(f"{self.folder}: {self.kind} draws from x_0 + sigma eps, and its scheduler is a {found}.")
        if self.decoder is None or not self.index:
            return
        channels, latents = self.config["in_channels"], self.latents
        if latents is None or len(latents.mean) != channels or len(latents.std) != channels:
            raise CheckpointError(
                f"{self.folder}: model_index.json has no latents with a mean and std of {channels} channels."
            )

    def check_networks(self) -> None:
        from guidegen.models.loading import check_decoding, check_prediction

        super().check_networks()
        check_prediction(self)
        if self.decoder is not None and self.index:
            check_decoding(self, self.decoder)

    def preconditioned(self, denoiser: Denoiser) -> Denoiser:
        return denoiser  # the network's own, whatever its scheduler

    def load_decoder(self, options: LoadOptions) -> Callable[[Tensor], Tensor] | None:
        from guidegen.models.denoisers import standardized_decoder
        from guidegen.models.loading import load_part

        latents = self.latents
        if self.decoder is None or latents is None or not options.decodes:
            return None
        vae = load_part(self, self.decoder, options.device, options.access)
        return standardized_decoder(vae, latents.mean, latents.std, latents.image_range)

    def denoiser(self, network: Any, null_label: int | None, options: LoadOptions) -> Denoiser:
        from guidegen.models.denoisers import UNetDenoiser

        return UNetDenoiser(network, self.prediction_type, null_label, options.autocast)
