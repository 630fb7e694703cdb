"""SiT and REPA (Ma et al. 2024, arXiv 2401.08740; Yu et al. 2024, 2410.06940), as `guidegen convert` writes them."""

from __future__ import annotations

from guidegen.errors import CheckpointError
from guidegen.models.checkpoint import Source
from guidegen.models.kinds.dit import DiT
from guidegen.models.kinds.folder import WithOptionalVae
from guidegen.models.noise_schedule import is_flow


class SiT(WithOptionalVae, DiT):  # type: ignore[misc]  # a DiT always has its vae
    """A flow-matching transformer of latents, of which an `AutoencoderKL` makes images."""

    kind = "SiT"
    pipeline = "SiTPipeline"
    network_classes = ("SiTTransformer2DModel",)
    has_layers = False
    default_steps = 250

    @classmethod
    def matches(cls, source: Source) -> bool:
        return super().matches(source) or source.config.get("_class_name") in cls.network_classes

    @property
    def cannot_draw(self) -> str | None:
        if self.decoder is None:
            return self.undecoded
        return None

    def check_config(self) -> None:
        super().check_config()
        if not is_flow(self.scheduler_config):
            found = self.scheduler_config.get("_class_name")
            raise CheckpointError(f"{self.folder}: a SiT is a flow-matching model, and its scheduler is a {found}.")

    def check_networks(self) -> None:
        from guidegen.models.loading import check_decoding

        super().check_networks()
        if self.decoder is not None and self.index:
            check_decoding(self, self.decoder)
