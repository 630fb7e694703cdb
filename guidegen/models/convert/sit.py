"""SiT and REPA (Ma et al. 2024, arXiv 2401.08740; Yu et al. 2024, 2410.06940): state dicts."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isqrt
from pathlib import Path
from typing import Annotated, Any

import typer

from guidegen.errors import CheckpointError, UsageError, first_line
from guidegen.models.convert.format import Format, Heads, Labels, read_label_names
from guidegen.models.convert.latents import Extras, Vae, fill, find_vae, save_pipeline, shape_of
from guidegen.models.pickles import read_pickle
from guidegen.models.presets import presets_of
from guidegen.models.weight_files import refuse_pointer

_PANEL = "SiT and its kin"
_MARK = b"x_embedder.proj.weight"
_HEAD = 1 << 20
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads of each width of DiT's and SiT's."""
_STEPS = 250


class Network(StrEnum):
    sit = "sit"
    repa = "repa"


@dataclass(frozen=True)
class Options:
    """The flags for SiT and REPA."""

    network: Annotated[
        Network | None,
        typer.Option(
            "--network",
            help="sit: data at time 1, velocity x0 - eps. repa: data at time 0, velocity eps - x0. Both have the shapes of "
            "DiT, which is neither.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    heads: Heads = None
    vae: Vae = None
    labels: Labels = None


@dataclass(frozen=True)
class Conversion:
    """A converted network, not yet written.

    Attributes:
        config: what it is made with.
        network: with its weights.
        extras: VAE, names of labels, and published settings.
    """

    config: Mapping[str, Any]
    network: Any
    extras: Extras

    def describe(self) -> str:
        """Kind, sizes and what is published of it, a line each."""
        c = self.config
        words = [
            f"{'SiT' if c['data_time'] else 'REPA'} of {c['sample_size']}x{c['sample_size']} latents",
            f"{c['num_embeds_ada_norm']} labels and a null label",
            f"{c['num_layers']} blocks of {c['num_attention_heads']} heads of {c['attention_head_dim']} channels",
            f"patches of {c['patch_size']}x{c['patch_size']}",
        ]
        if self.extras.vae is None:
            words.append("no --vae: it can only guide another (--guide-model)")
        return "\n".join(["; ".join(words), *self.extras.lines()])

    def save(self, folder: Path) -> None:
        """Writes a pipeline folder."""
        import diffusers

        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.config["train_steps"], shift=1.0)
        more = {"default_steps": _STEPS}
        save_pipeline(folder, "SiTPipeline", "transformer", self.network, scheduler, self.extras, more)


class SiT(Format):
    """State dicts of SiT and REPA."""

    name = "SiT"
    expected = "a .pt, .pth or .safetensors of SiT or REPA"
    help = """Of SiT and REPA: state dicts and training checkpoints (of which the ema), with a linear path and a velocity. A
learned sigma is dropped. A file that neither its name nor its tensors tell from DiT's needs --network.

- guidegen convert SiT-XL-2-256x256.pt sit --vae stabilityai/sd-vae-ft-mse"""
    options = Options
    written = frozenset({"transformer", "scheduler", "vae", "model_index.json"})

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_file() and _MARK in _head(path)

    @classmethod
    def convert(cls, path: Path, options: Any) -> Conversion:
        o: Options = options
        refuse_pointer(path)
        names = read_label_names(o.labels) if o.labels else None
        state, arguments = _read(path)
        try:
            config = _config(state, o.heads, _data_time(path, state, arguments, o.network))
            network = _made(config, state)
        except (CheckpointError, UsageError) as error:
            raise type(error)(f"{path}: {error}") from error
        count = config["num_embeds_ada_norm"]
        if names is not None and set(names) != set(range(count)):
            raise UsageError(f"--labels names {len(names)} labels; the model has {count}, from 0 to {count - 1}.")
        vae = find_vae(o.vae, config["in_channels"]) if o.vae else None
        # the name of REPA's file is anybody's
        known = path.name.startswith("SiT") or (config["data_time"] == 0 and config["num_layers"] == 28)
        return Conversion(config, network, Extras(vae, names, presets_of(path.name) if known else []))


def _head(path: Path) -> bytes:
    """Where the names of tensors are: the pickle of a zip archive, or the beginning of another file."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(inner) as file:
                    return file.read(16 * _HEAD)
        except Exception:  # damaged, or no archive of torch
            return b""
    with path.open("rb") as file:
        return file.read(_HEAD)


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Tensors by name, and the arguments of the training where they are beside them."""
    from torch import Tensor

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            data: Any = load_file(path)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged or cut short: {first_line(error)[:200]}.") from error
    else:
        data = read_pickle(path)
    outer = data if isinstance(data, Mapping) else {}
    state = outer.get("ema", outer.get("model", outer))
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(f"{path} is no state dict of SiT or REPA, nor a training checkpoint with one as 'ema'.")
    plain = {re.sub(r"^(module|_orig_mod)\.", "", key): value for key, value in state.items()}
    return plain, vars(outer["args"]) if hasattr(outer.get("args"), "__dict__") else {}


def _data_time(path: Path, state: Mapping[str, Any], arguments: Mapping[str, Any], network: Network | str | None) -> int:
    """The time of data in the network: 1 in SiT, 0 in REPA."""
    for key, served in {"path_type": ("linear",), "prediction": ("velocity", "v")}.items():
        found = arguments.get(key, served[0])
        if not isinstance(found, str) or found.lower() not in served:
            said = found[:40] if isinstance(found, str) else type(found).__name__
            raise CheckpointError(f"it was trained with {key} {said!r}; guidegen opens {served[0]}.")
    aligned = any(name.startswith("projectors.") for name in state)
    known = {"linear": "repa", "Linear": "sit"}.get(arguments.get("path_type", ""))
    name = path.name.casefold()
    asked = network or ("repa" if aligned else known) or next((each for each in ("repa", "sit") if each in name), None)
    if aligned and asked == "sit":
        raise UsageError("--network sit: it has REPA's projectors.")
    if asked is None:
        raise UsageError(
            "its tensors may be those of SiT, REPA or DiT. Say which of the first two: --network sit or repa; "
            "DiT is in diffusers, as facebook/DiT-XL-2-256."
        )
    return int(asked == "sit")


def _config(state: Mapping[str, Any], heads: int | None, data_time: int) -> dict[str, Any]:
    """What the network is made with, by its shapes."""
    width, channels, patch, _ = shape_of(state, "x_embedder.proj.weight", 4)
    _, tokens, _ = shape_of(state, "pos_embed", 3)
    rows, _ = shape_of(state, "y_embedder.embedding_table.weight", 2)
    mlp, _ = shape_of(state, "blocks.0.mlp.fc1.weight", 2)
    if extra := next((name for name in state if re.search(r"mlp\.w|rope|\.norm[12]\.weight", name)), None):
        raise CheckpointError(f"its {extra[:80]} is of another network than SiT's; of LightningDiT guidegen opens none.")
    edge = isqrt(tokens)
    heads = heads or _HEADS.get(width)
    if heads is None or width % heads:
        raise UsageError(f"its attention heads are not known by its width, {width}: give --heads.")
    if edge * edge != tokens:
        raise CheckpointError(f"its pos_embed has {tokens} tokens, which make no square.")
    if rows == 1000:  # ImageNet's without one for dropped labels
        raise CheckpointError("its 1000 rows of labels leave none for dropped ones: it has no null label.")
    return {
        "sample_size": edge * patch,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch,
        "num_layers": 1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d{1,4})\.", name))),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "mlp_channels": mlp,
        "num_embeds_ada_norm": rows - 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "data_time": data_time,
        "train_steps": 1000,
    }


def _made(config: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    from guidegen.models.sit import SiTTransformer2DModel

    kept = {name: value.float() for name, value in state.items() if not name.startswith("projectors.")}
    outputs = config["patch_size"] ** 2 * config["out_channels"]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in kept and len(kept[name]) == 2 * outputs:  # of each pixel of a patch the velocity, then a learned sigma
            halves = kept[name].unflatten(0, (config["patch_size"] ** 2, 2, config["out_channels"]))
            kept[name] = halves[:, 0].flatten(0, 1).contiguous()
    return fill(SiTTransformer2DModel, config, kept)
