"""Networks of ours from the files of others, and the VAE of those that draw latents, which such files do not hold."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guidegen.errors import CheckpointError, UsageError, first_line
from guidegen.models.configs import read_config
from guidegen.models.hub import download_weights, locate
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


def save_vae(folder: Path, destination: Path) -> None:
    """Copies the config and the weights of a VAE."""
    destination.mkdir()
    for path in (folder / "config.json", *find_weights(folder).files):
        shutil.copyfile(path, destination / path.name)


def part(name: str) -> list[Any]:
    """The entry of a network of ours in model_index.json."""
    return ["guidegen", name]


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
