"""Prompts as a text-conditional checkpoint reads them: tokenizers and text encoders, through diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from guidegen.models.denoisers import Texts

_CACHED = 256


class PromptEncoder:
    """The text half of a Stable Diffusion or SDXL checkpoint, on the device of its UNet.

    The encoding is that of the diffusers pipeline that model_index.json names: its padding, its choice
    of hidden states, its zeros for SDXL's empty negative prompt.

    Args:
        pipeline: that pipeline with its tokenizers, text encoders and UNet alone.
        size: (height, width) of the images.
        device: where its networks are.
        negative_prompt: what the null condition says; None for the empty prompt.
    """

    def __init__(self, pipeline: Any, size: tuple[int, int], device: torch.device, negative_prompt: str | None):
        self._pipeline = pipeline
        self._tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]
        self._device, self._negative = device, negative_prompt
        self._encode = lru_cache(_CACHED)(self._encode_one)
        self._null = self._encode_one(negative_prompt or "", null=True)
        self._time_ids = self._sizes(size) if self._null[1] is not None else None

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """The null condition and the prompts, in their order."""
        rows = [self._null, *map(self._encode, prompts)]
        pooled = [row[1] for row in rows if row[1] is not None]
        return Texts(torch.cat([row[0] for row in rows]), torch.cat(pooled) if pooled else None, self._time_ids)

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than the encoders read."""
        return any(len(tokenizer(prompt).input_ids) > tokenizer.model_max_length for tokenizer in self._tokenizers)

    @torch.no_grad()
    def _encode_one(self, prompt: str, null: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (1, L, D) and pooled states (1, E) of one prompt, or of the null condition."""
        found = self._pipeline.encode_prompt(
            prompt,
            device=self._device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=null,
            negative_prompt=self._negative if null else None,
        )
        states = found[null]
        return states, found[2 + null] if len(found) > 2 else None

    def _sizes(self, size: tuple[int, int]) -> torch.Tensor:
        """SDXL's original size, crop and target size (6,), as for an image that was never cropped."""
        dim = self._pipeline.text_encoder_2.config.projection_dim
        ids = self._pipeline._get_add_time_ids(size, (0, 0), size, dtype=torch.float32, text_encoder_projection_dim=dim)
        row: torch.Tensor = ids[0].to(self._device)
        return row
