"""What guidegen reads of a checkpoint's JSON: read at one border, and held to types.

Keys that are not named here belong to diffusers and transformers, and pass as they are.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from guidegen.errors import CheckpointError, UnsafeError
from guidegen.models.presets import Preset
from guidegen.models.python_ref import MOST_LABELS, Channels, Edge, Steps
from guidegen.schema import convert, read_bytes

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
"""What a scheduler's config may say that a network predicts; that of a flow says so in other ways."""
FLOW = "flow_prediction"
_LARGEST = 16 << 20
"""Bytes of the largest config: ImageNet-21k's names take 2 MB."""
_Count = Annotated[int, Meta(ge=1, le=1024)]
"""Layers or blocks: what a network is built of one by one."""
_Counts = _Count | Annotated[list[_Count | list[_Count]], Meta(max_length=64)]
_Some = Annotated[int, Meta(ge=0, le=1024)]
_Somes = _Some | Annotated[list[_Some | list[_Some]], Meta(max_length=64)]
_Levels = Annotated[list[Channels], Meta(min_length=1, max_length=12)]
_Classes = Annotated[int, Meta(ge=1, le=MOST_LABELS)]
_Number = Annotated[float, Meta(gt=0, le=1e9)]
_Name = Annotated[str, Meta(max_length=256)]


class Network(Struct, rename={"class_name": "_class_name"}):
    """config.json of a network of diffusers or guidegen, and what guidegen adds to it."""

    class_name: _Name
    sample_size: Edge | Annotated[list[Edge], Meta(min_length=2, max_length=2)] | None = None
    in_channels: Channels = 3
    out_channels: Channels | None = None
    latent_channels: Channels = 4
    block_out_channels: _Levels | None = None
    layers_per_block: _Counts | None = None
    transformer_layers_per_block: _Somes | None = None
    reverse_transformer_layers_per_block: _Somes | None = None
    num_layers: _Counts | None = None
    norm_num_groups: _Count | None = None
    attention_head_dim: _Counts | None = None
    num_attention_heads: _Counts | None = None
    num_class_embeds: _Classes | None = None
    num_embeds_ada_norm: _Classes | None = None
    class_embed_type: _Name | None = None
    scaling_factor: _Number = 1.0
    train_steps: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    null_label: int | None = None
    default_steps: Steps | None = None


class Transformer(Struct, rename={"class_name": "_class_name"}):
    """config.json of a model of transformers or timm."""

    class_name: None = None
    architectures: list[_Name] | None = None
    architecture: _Name | None = None
    model_type: _Name | None = None
    num_hidden_layers: _Counts | None = None
    num_channels: Channels | None = None
    pretrained_cfg: dict[str, Any] | None = None


class Latents(Struct):
    """How latents are standardised, a number a channel, and the range of the images that their decoder gives."""

    mean: Annotated[list[float], Meta(min_length=1, max_length=64)]
    std: Annotated[list[_Number], Meta(min_length=1, max_length=64)]
    image_range: tuple[float, float] = (-1.0, 1.0)


class ModelIndex(Struct, rename={"class_name": "_class_name"}):
    """model_index.json, and what guidegen adds to it; each part is a pair of library and class."""

    class_name: _Name | list[Any] | None = None
    force_zeros_for_empty_prompt: bool | None = None
    sample_size: Edge | Annotated[list[Edge], Meta(min_length=2, max_length=2)] | None = None
    null_label: int | None = None
    default_steps: Steps | None = None
    latents: Latents | None = None
    published: dict[str, Preset] = {}


class Scheduler(Struct, rename={"class_name": "_class_name"}):
    """scheduler_config.json."""

    class_name: _Name = "DDPMScheduler"
    num_train_timesteps: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    prediction_type: _Name = "epsilon"
    use_flow_sigmas: bool | None = None


class ShardIndex(Struct):
    """*.safetensors.index.json: which file has which tensor."""

    weight_map: dict[str, _Name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, in which schedulers of diffusers write -Infinity too.

    Raises:
        CheckpointError: anything else.
    """
    data = read_bytes(path, CheckpointError, _LARGEST)
    if data.startswith(codecs.BOM_UTF8):
        raise CheckpointError(f"{path} begins with a byte order mark: save it as UTF-8 without one.")
    try:
        found = json.loads(data.decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be printed
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{path} cannot be read as JSON: {what}.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(found).__name__}.")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a part with weights, held to `Network` or `Transformer`.

    Raises:
        CheckpointError: it is something else.
        UnsafeError: it names code that comes with the checkpoint.
    """
    config = read_json(path)
    if "auto_map" in config:
        raise UnsafeError(f"{path} asks for code of its own (auto_map); guidegen runs no remote code.")
    convert(config, Network if config.get("_class_name") is not None else Transformer, path, CheckpointError)
    return config


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, held to `ModelIndex`.

    Raises:
        CheckpointError: it is something else.
        UnsafeError: its pipeline is code that comes with the checkpoint.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    convert(index, ModelIndex, path, CheckpointError)
    for part, entry in named_parts(index).items():
        convert(entry, list[_Name | None], f"{path}: {part!r}", CheckpointError)
    if not isinstance(pipeline := index.get("_class_name"), str):
        raise UnsafeError(f"{path} names a pipeline of its own ({pipeline}); guidegen runs no remote code.")
    return index


def read_modular_index(folder: Path) -> dict[str, Any]:
    """modular_model_index.json of a modular pipeline.

    Raises:
        CheckpointError: it is something else.
        UnsafeError: its blocks are code that comes with the checkpoint.
    """
    path = folder / "modular_model_index.json"
    index = read_json(path)
    if "auto_map" in index or not isinstance(index.get("_class_name"), str):
        raise UnsafeError(f"{path} names blocks of its own; guidegen runs no remote code.")
    return index


def named_parts(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The parts of model_index.json: name -> library and class."""
    return {
        part: entry
        for part, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and part != "sample_size" and not part.startswith("_")
    }


def check_scheduler(config: Mapping[str, Any], where: object) -> None:
    """Raises CheckpointError where a scheduler's config is not as `Scheduler` has it."""
    found = convert(dict(config), Scheduler, where, CheckpointError)
    if found.prediction_type not in (*PREDICTION_TYPES, FLOW):
        known = ", ".join((*PREDICTION_TYPES, FLOW))
        raise CheckpointError(f"{where}: unknown prediction_type {found.prediction_type[:40]!r}; guidegen knows {known}.")
