"""Modular pipelines of diffusers: their blocks draw, and `guidegen.diffusers.Guidance` is their guider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from guidegen.diffusers import Guidance
from guidegen.models.kinds.pipeline import TextPipeline
from guidegen.pipelines.loading import CACHED


class ModularLoop:
    """A modular pipeline, whose text encoder is called once a prompt.

    Args:
        checkpoint: of a family with blocks.
        parts: of it, loaded.
        negative_prompt: what the null condition says; None for the empty prompt.
        offload_to: the device that networks are moved to from the CPU while they work; None leaves them where they are.
    """

    def __init__(
        self,
        checkpoint: TextPipeline,
        parts: Mapping[str, Any],
        negative_prompt: str | None,
        offload_to: torch.device | None = None,
    ):
        import diffusers

        blocks = getattr(diffusers, str(checkpoint.family.blocks))().get_workflow("text2image")
        encoder = blocks.sub_blocks.pop("text_encoder")
        manager = None if offload_to is None else diffusers.ComponentsManager()
        self.encoder, self.pipeline = (each.init_pipeline(components_manager=manager) for each in (encoder, blocks))
        for each in (self.encoder, self.pipeline):
            options = {spec.name: checkpoint.index.get(spec.name, spec.default) for spec in each.blocks.expected_configs}
            each.update_components(**{name: part for name, part in parts.items() if name in each.component_names}, **options)
        if manager is not None:
            manager.enable_auto_cpu_offload(device=offload_to, offload_strategy=lambda hooks, **_: hooks)
        self.pipeline.set_progress_bar_config(disable=True)
        _quiet(self.pipeline.blocks)
        self.encoder.update_components(guider=Guidance(w=2.0))  # by which it encodes the negative prompt
        self._negative = {"negative_prompt": negative_prompt or ""} if checkpoint.family.negative else {}
        self._encode = lru_cache(CACHED)(self._encode_one)

    @property
    def scheduler(self) -> Any:
        """That of the pipeline."""
        return self.pipeline.scheduler

    def __call__(
        self, prompt: str, guidance: Guidance, generators: Sequence[torch.Generator], conditional: bool, **how: Any
    ) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] of one prompt, a generator each.

        Args:
            prompt: the text.
            guidance: with a weight for each of them.
            generators: one for each.
            conditional: whether the prediction with the prompt alone is needed; here the guidance says it.
            how: height, width and steps, as the pipeline takes them.
        """
        self.pipeline.update_components(guider=guidance)
        images: torch.Tensor = self.pipeline(
            state=self._encode(prompt),
            num_images_per_prompt=len(generators),
            generator=list(generators),
            output_type="pt",
            output="images",
            **how,
        )
        return images

    def _encode_one(self, prompt: str) -> Any:
        return self.encoder(prompt=prompt, **self._negative)


def _quiet(blocks: Any) -> None:
    """No progress bars of blocks within blocks."""
    for block in (blocks.sub_blocks or {}).values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        _quiet(block)
