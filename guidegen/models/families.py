"""Text-to-image pipelines of diffusers that draw in their own loop: one table of families, and what w is in each.

w is always 0 for the unconditional prediction and 1 for the conditional one. A guidance weight that is fed to the network
(embedded) is none of those: it stays as the pipeline has it, or the family is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    Attributes:
        name: for people.
        pipelines: the classes that model_index.json or modular_model_index.json name.
        steps: that the pipeline takes by default.
        usual: the weight that the pipeline has by default, as our w; None where it guides only if asked to.
        blocks: those of its modular pipeline, whose guider is ours; None for an ordinary pipeline, guided by its argument.
        scale: the argument of the ordinary pipeline that is its weight.
        offset: w less that argument.
        network: the part that is called at each step.
        edge: of its images by default, in pixels; None: `sample_size` of the network times the VAE's factor.
        multiple: what the edges of its images are multiples of, in pixels.
        packed: whether its latents are tokens (B, L, C), without height and width.
        renormalised: whether the pipeline gives each guided prediction the length of the conditional one.
        negative: whether its pipeline takes a negative prompt.
        sign: -1 where the ordinary pipeline turns the sign of the prediction after guidance.
        call: further arguments of the ordinary pipeline.
        note: what people should know of it.
    """

    name: str
    pipelines: tuple[str, ...]
    steps: int
    usual: float | None
    blocks: str | None = None
    scale: str = "guidance_scale"
    offset: int = 0
    network: str = "transformer"
    edge: int | None = 1024
    multiple: int = 16
    packed: bool = False
    renormalised: bool = False
    negative: bool = True
    sign: int = 1
    call: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    note: str = ""

    @property
    def convention(self) -> str:
        """What w is in the terms of its pipeline."""
        scale = f"{self.scale} {'+ ' + str(self.offset) if self.offset else ''}".strip()
        notes = [self.note] if self.note else []
        if self.renormalised:
            notes.append("guided predictions get the length of the conditional one, so that w = 0 is not the null model")
        return "; ".join([f"w is {scale} of {self.pipelines[0]}", *notes])


_EXACT_SIZE = MappingProxyType({"use_resolution_binning": False})

FAMILIES = (
    Family(
        "Stable Diffusion 3",
        ("StableDiffusion3Pipeline", "StableDiffusion3ModularPipeline"),
        28,
        7.0,
        "StableDiffusion3AutoBlocks",
        edge=None,
    ),
    Family(
        "Stable Diffusion XL (modular)",
        ("StableDiffusionXLModularPipeline",),
        50,
        7.5,
        "StableDiffusionXLAutoBlocks",
        network="unet",
        edge=None,
        multiple=8,
    ),
    Family(
        "Qwen-Image",
        ("QwenImagePipeline", "QwenImageModularPipeline"),
        50,
        4.0,
        "QwenImageAutoBlocks",
        scale="true_cfg_scale",
        packed=True,
        renormalised=True,
    ),
    Family(
        "Z-Image",
        ("ZImagePipeline", "ZImageModularPipeline"),
        50,
        6.0,
        "ZImageAutoBlocks",
        offset=1,
        note="Z-Image-Turbo is distilled, and drawn at w = 1 with about 9 steps",
    ),
    Family(
        "FLUX.2-klein base",
        ("Flux2KleinPipeline", "Flux2KleinBaseModularPipeline"),
        50,
        4.0,
        "Flux2KleinBaseAutoBlocks",
        packed=True,
        negative=False,
    ),
    Family(
        "Krea 2",
        ("Krea2Pipeline", "Krea2ModularPipeline"),
        28,
        5.5,
        "Krea2AutoBlocks",
        offset=1,
        packed=True,
    ),
    Family("ERNIE-Image", ("ErnieImagePipeline", "ErnieImageModularPipeline"), 50, 4.0, "ErnieImageAutoBlocks"),
    Family("PixArt-alpha", ("PixArtAlphaPipeline",), 20, 4.5, edge=None, call=_EXACT_SIZE),
    Family("PixArt-Sigma", ("PixArtSigmaPipeline",), 20, 4.5, edge=None, call=_EXACT_SIZE),
    Family("Sana", ("SanaPipeline",), 20, 4.5, multiple=32, call=_EXACT_SIZE),
    Family("AuraFlow", ("AuraFlowPipeline",), 50, 3.5),
    Family("Hunyuan-DiT", ("HunyuanDiTPipeline",), 50, 5.0, edge=None, call=_EXACT_SIZE),
    Family("CogView4", ("CogView4Pipeline",), 50, 5.0, edge=None),
    Family("Chroma", ("ChromaPipeline",), 35, 5.0, packed=True),
    Family("Lumina 2", ("Lumina2Pipeline",), 30, 4.0, edge=None, renormalised=True, sign=-1),
    Family(
        "FLUX.1",
        ("FluxPipeline",),
        28,
        None,
        scale="true_cfg_scale",
        packed=True,
        note="its guidance_scale is embedded, stays 3.5, and is not w",
    ),
)
"""All that were drawn with in tests, with small networks of random weights."""

_EMBEDDED = (
    "its guidance is distilled into the network as an embedded guidance_scale, which is not w: no score is left to guide"
)
_DISTILLED = "its guidance is distilled into the network: no score is left to guide"
_VIDEO = "it draws video, and guidegen draws images"
_EDITS = "it draws from an image, and guidegen draws from text alone"
_UNTRIED = "guidegen was not held against it yet"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("Flux2Pipeline", "Flux2ModularPipeline"), _EMBEDDED),
    "FluxModularPipeline": f"{_EMBEDDED}; its ordinary FluxPipeline is guided by true_cfg_scale, and guidegen opens that",
    **dict.fromkeys(
        ("Flux2KleinModularPipeline", "Krea2TurboModularPipeline", "QwenImage21TurboModularPipeline"), _DISTILLED
    ),
    "Flux3DistilledModularPipeline": _DISTILLED,
    **dict.fromkeys(
        ("LTX2Pipeline", "LTX2ModularPipeline", "LTX25ModularPipeline"),
        "its two guiders, of video and audio, work on x_0 and tell the network which predictions they want",
    ),
    **dict.fromkeys(
        ("Ideogram4Pipeline", "Ideogram4ModularPipeline"),
        "a second network makes its unconditional prediction, with a list of weights over the steps and no guider",
    ),
    **dict.fromkeys(
        ("Cosmos3OmniPipeline", "Cosmos3OmniModularPipeline", "Cosmos3DistilledModularPipeline"),
        "it guides along two axes, text and control, within its own blocks, and has no guider",
    ),
    "OmniGenPipeline": "it has two weights, of the text and of the image, over three predictions",
    **dict.fromkeys(
        ("WanPipeline", "WanModularPipeline", "Wan22ModularPipeline", "LTXPipeline", "LTXModularPipeline"), _VIDEO
    ),
    **dict.fromkeys(("HunyuanVideoPipeline", "HunyuanVideo15Pipeline", "HunyuanVideo15ModularPipeline"), _VIDEO),
    **dict.fromkeys(("HeliosPipeline", "HeliosModularPipeline", "CogVideoXPipeline", "MochiPipeline"), _VIDEO),
    **dict.fromkeys(("FluxKontextPipeline", "FluxKontextModularPipeline", "QwenImageEditPipeline"), _EDITS),
    **dict.fromkeys(("QwenImageEditModularPipeline", "QwenImageEditPlusPipeline"), _EDITS),
    **dict.fromkeys(("QwenImageEditPlusModularPipeline", "QwenImageLayeredPipeline"), _EDITS),
    "QwenImageLayeredModularPipeline": _EDITS,
    **dict.fromkeys(("QwenImage21Pipeline", "QwenImage21ModularPipeline", "AnimaModularPipeline"), _UNTRIED),
    **dict.fromkeys(("Flux3ModularPipeline", "HunyuanImagePipeline", "HiDreamImagePipeline", "BriaPipeline"), _UNTRIED),
    **dict.fromkeys(("BriaFiboPipeline", "Kandinsky5T2IPipeline", "LuminaPipeline", "GlmImagePipeline"), _UNTRIED),
    **dict.fromkeys(("PRXPipeline", "OvisImagePipeline", "LongCatImagePipeline", "KolorsPipeline"), _UNTRIED),
}
"""Classes that it does not draw with, and why."""


def family_of(index: Mapping[str, Any]) -> Family | str | None:
    """The family of a pipeline's index, or why it is refused; None where it is in neither table."""
    name = str(index.get("_class_name"))
    if index.get("is_distilled") and name in ("Flux2KleinPipeline", "Krea2Pipeline"):
        return _DISTILLED
    return next((family for family in FAMILIES if name in family.pipelines), REFUSED.get(name))
