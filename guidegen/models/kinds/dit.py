"""Diffusion transformers (Peebles & Xie 2022, arXiv 2212.09748)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.kinds.folder import LabelCheckpoint

if TYPE_CHECKING:
    from guidegen.models.networks import LoadOptions
    from guidegen.scores.interfaces import Denoiser

_LARGEST = 512
"""Latents of an edge: their positions are a table, which is made before any weight is read."""


class DiT(LabelCheckpoint):
    """A DiTPipeline: a `DiTTransformer2DModel` that draws latents, of which an `AutoencoderKL` makes images."""

    kind = "DiT"
    pipeline = "DiTPipeline"
    network = "transformer"
    network_classes = ("DiTTransformer2DModel",)
    default_channels = 4
    others = ("vae",)
    decoder = "vae"
    last_is_null = True

    @property
    def classes(self) -> int:
        return int(self.config.get("num_embeds_ada_norm") or 1000) + 1  # one row more, for dropped labels

    def check_config(self) -> None:
        super().check_config()
        size = self.config.get("sample_size")
        if isinstance(size, int) and size > _LARGEST:
            folder = self.part_folders[self.network]
            raise CheckpointError(f"{folder} draws {size}x{size} latents; guidegen opens a DiT of up to {_LARGEST}.")

    def check_size(self, size: tuple[int, int], native: tuple[int, int]) -> None:
        if size != native:
            raise UsageError(f"--size: a DiT draws the size it was trained at, {native[1]}x{native[0]}.")

    def denoiser(self, network: Any, null_label: int | None, options: LoadOptions) -> Denoiser:
        from guidegen.models.denoisers import DiTDenoiser

        return DiTDenoiser(network, self.prediction_type, null_label, options.autocast)
