"""What a guider finds out of the pipeline that calls it: its scheduler, the layout of its latents, and how it decodes them.

All contact with the blocks of modular pipelines is in this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import takewhile
from math import prod
from typing import Any, NamedTuple, NoReturn

import torch
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, PipelineState
from torch import Tensor

from guidegen.diffusers.arguments import without_flags
from guidegen.errors import GuidegenError
from guidegen.models.noise_schedule import convention_of
from guidegen.sampling.level_checks import check_levels
from guidegen.sampling.schedulers import levels_after, noise_levels, takes_eta
from guidegen.scores.interfaces import autocast
from guidegen.scores.noise import PREDICTION_TYPES, Level

_RENORMALISED = ("QwenImageTransformer2DModel",)
"""Networks whose pipelines give each guided token the length of the conditional one, which is then needed at any weight."""
_LATENTS_FIRST = ("QwenImageTransformer2DModel", "Flux2Transformer2DModel")
"""Networks that read the tokens of the latents, then those of images to edit."""


class Noise(NamedTuple):
    """What a scheduler knows of the steps of one run: levels before and after each, and the prediction type."""

    levels: list[Level]
    after: list[Level] | None
    kind: Any


class Unknown:
    """Stands for what a method may read and a pipeline does not tell: any use is refused with the reason."""

    def __init__(self, reason: str):
        self._reason = reason

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(self._reason)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # as copies and pickles look for
            raise AttributeError(name)
        self._refuse()

    __eq__ = __iter__ = __sub__ = __rmul__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def noise_of(scheduler: Any, step: int, timestep: Tensor) -> Any:
    """The `Noise` of a run from its step on, or why it is not known."""
    if scheduler is None:
        return Unknown("the noise levels are not known: set the guider's scheduler to that of the pipeline.")
    name = type(scheduler).__name__
    convention = convention_of({**scheduler.config, "_class_name": name})
    kind = "flow" if convention == "flow" else scheduler.config.get("prediction_type")
    if convention not in ("vp", "flow") or kind not in PREDICTION_TYPES:
        return Unknown(f"what the network predicts under {name} is not known: take another scheduler or method.")
    try:
        levels = noise_levels(scheduler)
        check_levels(scheduler)
        after = None if scheduler.config.get("stochastic_sampling") else levels_after(scheduler)
    except GuidegenError as error:
        return Unknown(without_flags(str(error)))
    # image-to-image starts at a later timestep of the scheduler
    same = [i for i, t in enumerate(scheduler.timesteps.tolist()) if i >= step and t == float(timestep)]
    if not same:
        return Unknown(f"{name} has no timestep {float(timestep):g}, so that its noise level is not known.")
    first = same[0] - step
    return Noise(levels[first:], after and after[first:], kind)


class Caller:
    """The pipeline whose block calls a guider.

    Attributes:
        pipeline: None where it is not found.
        state: the `PipelineState` of its run; None where it is not found.
    """

    def __init__(self, pipeline: Any = None, state: Any = None):
        self.pipeline, self.state = pipeline, state
        if hasattr(pipeline, "audio_guider"):
            raise ValueError(
                f"{self._name}: LTX 2 guides denoised estimates of video and audio by two guiders, which also drop layers. "
                "Use its LTX2Guidance."
            )

    @classmethod
    def of(cls, guider: Any) -> Caller:
        """Looks for it in the frames above.

        Guiders are told the step and the timestep, and nothing else. Every block of diffusers has the pipeline as its
        argument `components`, and that with the loop in it has the state as `state`.
        """
        frame, pipeline = inspect.currentframe(), None
        while frame := frame and frame.f_back:
            found = frame.f_locals.get("components")
            if pipeline is None and any(each is guider for each in getattr(found, "__dict__", {}).values()):
                pipeline = found
            if pipeline is not None and isinstance(state := frame.f_locals.get("state"), PipelineState):
                return cls(pipeline, state)
        return cls(pipeline)

    @property
    def renormalises(self) -> bool:
        """Whether it gives each guided token the length of the conditional one."""
        return self._network in _RENORMALISED

    @property
    def latents_first(self) -> bool:
        """Whether the tokens of the latents come before those of images to edit."""
        return self._network in _LATENTS_FIRST

    def eta(self, scheduler: Any) -> float:
        """DDIM's eta, as the call of the pipeline gave it; 0 where the state of the run is not found."""
        given = self.state.get("eta") if self.state is not None and takes_eta(scheduler) else None
        return float(given or 0)

    @property
    def tokens(self) -> int | None:
        """How many packed tokens its latents are; None where they are not packed or not known."""
        latents = None if self.state is None else self.state.get("latents")
        return latents.shape[1] if isinstance(latents, Tensor) and latents.ndim == 3 else None

    def layout(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Where packed tokens (L, C) have each number of the latent image (C, H, W): int64 of that shape.

        Raises:
            ValueError: the pipeline has no block that unpacks them, or they are not of the latent image alone.
        """
        numbers = torch.arange(prod(shape), device=device).view(1, *shape)
        blocks = list(takewhile(lambda block: "vae" not in block.component_names, self._blocks()))
        try:
            image: Tensor = self._run(blocks, numbers, None).latents[0].squeeze(1)
            whole = image.ndim == 3 and torch.equal(image.flatten().sort().values, numbers.flatten())
        except (RuntimeError, AttributeError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{self._name} has no block that unpacks tokens {tuple(shape)} to a latent image.")
        return image

    def decoder(self) -> Callable[[Tensor], Tensor]:
        """From latents, packed or not, to images (B, 3, H, W) in about [-1, 1]: by its own blocks in fp32, with gradients.

        Raises:
            ValueError: it has no such blocks.
        """
        blocks, vae = self._blocks(), getattr(self.pipeline, "vae", None)
        decodes = [i for i, block in enumerate(blocks) if "vae" in block.component_names]
        if not decodes or vae is None:
            raise ValueError(f"A classifier reads images, and {self._name} has no block and no VAE that decode latents.")
        if vae.dtype != torch.float32:  # a decoder overflows in half precision, and its gradient underflows
            vae = deepcopy(vae).float()

        def decode(latents: Tensor) -> Tensor:
            with autocast(latents, None):
                images = self._run(blocks[: decodes[0] + 1], latents.float(), vae).images
            if not isinstance(images, Tensor) or images.ndim != 4 or (torch.is_grad_enabled() and not images.requires_grad):
                raise ValueError(f"A classifier reads images, and what {self._name} decodes are none, or without gradients.")
            return images

        return decode

    @property
    def _network(self) -> str:
        return type(getattr(self.pipeline, "transformer", None)).__name__

    @property
    def _name(self) -> str:
        return "this loop" if self.pipeline is None else type(self.pipeline).__name__

    def _blocks(self) -> list[Any]:
        """What it runs after its denoising loop."""
        if self.state is None or not getattr(self.pipeline.blocks, "sub_blocks", None):
            return []
        given = {name: value for name, value in self.state.values.items() if value is not None}
        blocks = list(self.pipeline.blocks.get_execution_blocks(**given).sub_blocks.values())
        loops = [i for i, block in enumerate(blocks) if isinstance(block, LoopSequentialPipelineBlocks)]
        return blocks[loops[-1] + 1 :] if loops else []

    def _run(self, blocks: Sequence[Any], latents: Tensor, vae: Any) -> PipelineState:
        """Runs blocks on other latents, without the `torch.no_grad` that decorates them."""
        kinds = {kind: list(names) for kind, names in self.state.kwargs_mapping.items()}
        state = PipelineState({**self.state.values, "latents": latents, "output_type": "pt"}, kinds)
        for block in blocks:
            call = type(block).__call__
            getattr(call, "__wrapped__", call)(block, _Plain(self.pipeline, vae), state)
        return state


class _Plain:
    """A pipeline that leaves what its decoder gives as it is: no watermark, no 8-bit images."""

    watermark = None

    class image_processor:  # noqa: N801
        @staticmethod
        def postprocess(images: Tensor, **_: Any) -> Tensor:
            return images

    def __init__(self, pipeline: Any, vae: Any):
        self._pipeline = pipeline
        if vae is not None:
            self.vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)
