"""The layouts of checkpoint that guidegen opens, and what of a folder does not fit them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidegen.errors import CheckpointError, UnsafeError, UsageError
from guidegen.models.configs import read_config
from guidegen.models.python_ref import LARGEST_EDGE

_LARGEST_DIT = 512
"""Latents of an edge: their positions are a table, which is made before any weight is read."""


@dataclass(frozen=True)
class Kind:
    """A layout of checkpoint that guidegen opens.

    Attributes:
        name: for people.
        network: the part that is called at each step.
        network_class: its diffusers class.
        others: the parts with weights beside it.
        tokenizers: the parts that turn a prompt into tokens.
    """

    name: str
    network: str
    network_class: str
    others: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()

    @property
    def latent(self) -> bool:
        """Whether it draws latents, which a VAE decodes."""
        return "vae" in self.others

    @property
    def text(self) -> bool:
        """Whether prompts condition it, not labels."""
        return bool(self.tokenizers)


PIXEL = Kind("pixel UNet", "unet", "UNet2DModel")


ADM = Kind("guided-diffusion UNet", "unet", "AdmUNet2DModel")


CUSTOM = Kind("own model", "own", "")


KINDS = {
    "DiTPipeline": Kind("DiT", "transformer", "DiTTransformer2DModel", ("vae",)),
    "StableDiffusionPipeline": Kind(
        "Stable Diffusion", "unet", "UNet2DConditionModel", ("vae", "text_encoder"), ("tokenizer",)
    ),
    "StableDiffusionXLPipeline": Kind(
        "Stable Diffusion XL",
        "unet",
        "UNet2DConditionModel",
        ("vae", "text_encoder", "text_encoder_2"),
        ("tokenizer", "tokenizer_2"),
    ),
}
"""By the `_class_name` of model_index.json; any other pipeline of a UNet2DModel and a scheduler is `PIXEL`."""


_NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder")


def kind_of(index: Mapping[str, Any], folder: Path) -> Kind:
    """The layout that model_index.json describes; refuses code of its own and parts that nobody here reads."""
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise UnsafeError(
            f"{folder}/model_index.json names a pipeline of its own ({pipeline}); guidegen runs no remote code."
        )
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    adm = parts.get("unet") == ["guidegen", ADM.network_class]
    for part, (library, _) in parts.items():
        if library not in (None, "diffusers", "transformers", "stable_diffusion") and not (adm and part == "unet"):
            raise UnsafeError(f"{folder}: the part {part!r} comes from {library!r}; guidegen runs no remote code.")
    named = {part: entry[1] for part, entry in parts.items() if any(entry)}
    kind = KINDS.get(pipeline, ADM if adm else PIXEL)
    known = {kind.network, *kind.others, *kind.tokenizers, "scheduler"} | (set(_NOT_LOADED) if kind.text else set())
    if extra := sorted(named.keys() - known):
        raise CheckpointError(f"{folder} is a {pipeline} with {', '.join(extra)}; {_opens()}")
    if named.get(kind.network) != kind.network_class:
        raise CheckpointError(f"{folder} is a {pipeline} with {kind.network} {named.get(kind.network, 'none')}; {_opens()}")
    for part in (*kind.others, *kind.tokenizers, "scheduler"):
        if part not in named:
            raise CheckpointError(f"{folder} is incomplete: a {pipeline} has a {part}, and model_index.json names none.")
    return kind


def _opens() -> str:
    return f"guidegen opens {', '.join(KINDS)}, and pipelines of a UNet2DModel and a scheduler."


def part_config(folder: Path, part: str) -> dict[str, Any]:
    path = folder / part / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is incomplete: model_index.json names a {part}, but {part}/config.json is missing.")
    return read_config(path)


def check_tokenizers(folder: Path, kind: Kind) -> None:
    for part in kind.tokenizers:
        if not any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(
                f"{folder} is incomplete: model_index.json names a {part}, but {part} has no tokenizer.json or vocab.json."
            )


def check_network(kind: Kind, config: Mapping[str, Any], folder: Path) -> None:
    """Refuses networks of another class, or with inputs that guidegen does not feed."""
    if config.get("_class_name") != kind.network_class:
        found = str(config.get("_class_name") or ", ".join(config.get("architectures") or []) or "no _class_name")[:80]
        raise CheckpointError(f"{folder}/config.json says {found}; guidegen opens {kind.network_class} there.")
    if is_dit(config) and isinstance(size := config.get("sample_size"), int) and size > _LARGEST_DIT:
        raise CheckpointError(f"{folder} draws {size}x{size} latents; guidegen opens a DiT of up to {_LARGEST_DIT}.")
    channels = config.get("in_channels", 3)
    if not kind.latent and channels not in (1, 3):
        raise CheckpointError(f"{folder} draws {channels} channels; guidegen opens models of 1 or 3.")
    if kind.text and channels != config.get("out_channels", 4):
        raise CheckpointError(
            f"{folder} reads {channels} channels: an inpainting or image-to-image model, which guidegen does not open."
        )
    if kind.text and config.get("time_cond_proj_dim") is not None:
        raise CheckpointError(
            f"{folder} has guidance distilled into it (time_cond_proj_dim): there is no score left to guide."
        )


def is_dit(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == KINDS["DiTPipeline"].network_class


def class_count(config: Mapping[str, Any]) -> int | None:
    """Classes that the network's embedding tells apart, the null class included; None without labels."""
    if is_dit(config):  # its embedding has one row more, for dropped labels
        return int(config.get("num_embeds_ada_norm") or 1000) + 1
    classes: int | None = config.get("num_class_embeds")
    return classes


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels of the image for one of the latents."""
    halvings = len(vae.get("block_out_channels", ())) - 1
    return 1 << max(0, halvings)


def native_size(kind: Kind, configs: Mapping[str, Mapping[str, Any]], folder: Path) -> tuple[int, int]:
    """(height, width) of the images that the config names."""
    size = configs[kind.network].get("sample_size")
    factor = vae_factor(configs["vae"]) if kind.latent else 1
    if isinstance(size, int):
        return size * factor, size * factor
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]) * factor, int(size[1]) * factor
    raise CheckpointError(f"{folder}: the config of the network has no usable sample_size (found {size!r}).")


def check_size(kind: Kind, configs: Mapping[str, Mapping[str, Any]], size: tuple[int, int], own: tuple[int, int]) -> None:
    if is_dit(configs[kind.network]) and size != own:
        raise UsageError(f"--size: a DiT draws the size it was trained at, {own[1]}x{own[0]}.")
    factor = vae_factor(configs["vae"]) if kind.latent else 1
    step = factor * 2 ** (len(configs[kind.network].get("block_out_channels", (0, 0, 0, 0))) - 1)
    if max(size) > LARGEST_EDGE:
        raise UsageError(f"--size {size[1]}x{size[0]}: images have edges of {LARGEST_EDGE} pixels at most.")
    if any(edge < step or edge % step for edge in size):
        raise UsageError(f"--size {size[1]}x{size[0]}: both edges should be multiples of {step} for this model.")
