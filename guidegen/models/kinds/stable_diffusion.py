"""Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752) and SDXL (Podell et al. 2023, arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from guidegen.errors import CheckpointError
from guidegen.models.kinds.folder import FolderCheckpoint

if TYPE_CHECKING:
    from guidegen.models.networks import Condition, LoadOptions, Networks
    from guidegen.scores.interfaces import Denoiser

_ZEROS = "force_zeros_for_empty_prompt"


class StableDiffusion(FolderCheckpoint):
    """A StableDiffusionPipeline; its safety checker is not loaded."""

    kind = "Stable Diffusion"
    pipeline = "StableDiffusionPipeline"
    network = "unet"
    network_classes = ("UNet2DConditionModel",)
    default_channels = 4
    others: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    not_loaded = ("safety_checker", "feature_extractor", "image_encoder")
    scheduler_changes: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}
    """As diffusers' pipeline corrects old configs."""
    decoder = "vae"
    reads_prompts = True
    channels_last = True

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """What the diffusers pipeline takes beside its parts."""
        return {"safety_checker": None, "requires_safety_checker": False}

    def check_config(self) -> None:
        super().check_config()
        folder, channels = self.part_folders[self.network], self.config["in_channels"]
        if channels != self.config["out_channels"]:
            raise CheckpointError(
                f"{folder} reads {channels} channels: an inpainting or image-to-image model, which guidegen does not open."
            )
        if self.config.get("time_cond_proj_dim") is not None:
            raise CheckpointError(
                f"{folder} has guidance distilled into it (time_cond_proj_dim): there is no score left to guide."
            )

    def load(self, options: LoadOptions) -> Networks:
        from guidegen.models.denoisers import TextDenoiser
        from guidegen.models.loading import ready_network
        from guidegen.models.networks import Networks, by_prompt
        from guidegen.models.text import PromptEncoder

        network = ready_network(self, options)
        pipeline = self._text_pipeline(network, options)
        encoder = PromptEncoder(pipeline, self.size, options.device, options.negative_prompt)

        def condition_on(network: Any, null_label: int | None) -> Condition:
            compiled = options.compiled(network)

            def denoiser(prompts: Sequence[str]) -> Denoiser:
                texts = encoder(prompts)
                return self.preconditioned(TextDenoiser(compiled, self.prediction_type, texts, options.autocast))

            return by_prompt(denoiser)

        condition = condition_on(network, None)
        return Networks(condition, self.load_decoder(options), encoder.is_cut, network, condition_on)

    def _text_pipeline(self, unet: Any, options: LoadOptions) -> Any:
        """The diffusers pipeline without what draws, for its `encode_prompt`."""
        import diffusers

        from guidegen.models.loading import load_part
        from guidegen.models.pretrained import load_tokenizer

        parts: dict[str, Any] = {"vae": None, "scheduler": None, "feature_extractor": None, "unet": unet}
        parts |= {part: load_tokenizer(self.folder / part) for part in self.tokenizers}
        encoders = [part for part in self.others if part != self.decoder]
        parts |= {part: load_part(self, part, options.device, options.access) for part in encoders}
        return getattr(diffusers, self.pipeline)(**parts, **self.pipeline_options)


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline; no watermark is added."""

    kind = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    others = ("vae", "text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    scheduler_changes: ClassVar[Mapping[str, Any]] = {}

    @property
    def recommended(self) -> str | None:
        """What Playground v2.5 was published with, the one of this kind with an EDM scheduler."""
        weight = {"EDMDPMSolverMultistepScheduler": 3, "EDMEulerScheduler": 5}.get(
            self.scheduler_config.get("_class_name", "")
        )
        return weight and f"--w {weight}, 50 steps (the model card of Playground v2.5)"  # type: ignore[return-value]

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.configs, self.scheduler_config, self.index.get(_ZEROS))

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {_ZEROS: self.index.get(_ZEROS, True), "add_watermarker": False}
