"""Networks of ours from the files of others, and the VAE of those that draw latents, which such files do not hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from guidegen.errors import CheckpointError, UsageError, first_line
from guidegen.models.configs import read_config
from guidegen.models.hub import download_weights, locate
from guidegen.models.presets import Preset, published
from guidegen.models.weight_files import Access, find_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

Vae = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="ID|DIR",
        help="The AutoencoderKL that makes images of latents, such as stabilityai/sd-vae-ft-mse. Without one a network "
        "of latents can only guide another.",
    ),
]


def find_vae(ref: str, channels: int) -> Path:
    """The folder of an `AutoencoderKL` with its weights.

    Args:
        ref: a folder or hub id.
        channels: of the latents.

    Raises:
        CheckpointError: it is missing, incomplete or unreachable.
        UsageError: it is something else, or of other latents.
    """
    folder, revision = locate(ref)
    if not (folder / "config.json").is_file():
        raise UsageError(f"--vae {ref}: there is no config.json in it. Name the folder of an AutoencoderKL.")
    config = read_config(folder / "config.json")
    if config.get("_class_name") != "AutoencoderKL":
        found = str(config.get("_class_name"))[:80]
        raise UsageError(f"--vae {ref} is a {found}; an AutoencoderKL is needed.")
    if (found := config.get("latent_channels", 4)) != channels:
        raise UsageError(f"--vae {ref} decodes {found} channels, and the network draws {channels}.")
    download_weights(ref, revision, [folder], Access())
    find_weights(folder)
    return folder


class Extras(NamedTuple):
    """What goes into a folder beside a network of ours.

    Attributes:
        vae: the folder of the VAE; None without.
        names: label id -> name; None where there are none.
        presets: published settings for it.
    """

    vae: Path | None
    names: Mapping[int, str] | None
    presets: list[Preset]

    def lines(self) -> list[str]:
        """The presets, a line each, for people."""
        return [f"{preset.name}: {preset.line()}" for preset in self.presets]


def save_pipeline(
    folder: Path, pipeline: str, part: str, network: Any, scheduler: Any, extras: Extras, more: Mapping[str, Any]
) -> None:
    """Writes a pipeline folder.

    Args:
        folder: empty.
        pipeline: `_class_name` of model_index.json.
        part: the name of the network there.
        network: of ours.
        scheduler: of diffusers.
        extras: what else.
        more: further keys of model_index.json, of which `default_steps` counts where no steps are published.
    """
    import diffusers

    network.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        part: ["guidegen", type(network).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        **more,
    }
    if extras.vae is not None:
        index["vae"] = ["diffusers", "AutoencoderKL"]
        (folder / "vae").mkdir()
        for path in (extras.vae / "config.json", *find_weights(extras.vae).files):
            shutil.copyfile(path, folder / "vae" / path.name)
    if extras.names is not None:
        index["id2label"] = {str(label): name for label, name in extras.names.items()}
    if extras.presets:
        index |= {"published": published(extras.presets), "default_steps": extras.presets[0].steps}
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def fill(cls: Any, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """A network of ours with its weights.

    Raises:
        CheckpointError: the config makes none, or the weights are not those of it.
    """
    import torch

    with torch.device("meta"):
        try:
            network: nn.Module = cls(**config)
        except Exception as error:  # whatever layers of impossible sizes raise
            raise CheckpointError(f"it makes no network: {first_line(error)[:200]}") from error
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = found.get(name, "none"), wanted.get(name, "none")
            raise CheckpointError(f"its tensor {name[:120]} is {here} where its network has {there}.")
    network.load_state_dict(dict(weights), assign=True)
    return network.eval().requires_grad_(False)


def shape_of(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor; raises CheckpointError where there is none of so many dimensions."""
    if name not in state or state[name].ndim != dimensions:
        raise CheckpointError(f"it lacks {name} of {dimensions} dimensions: it is incomplete, or another network.")
    return tuple(state[name].shape)
