"""OpenAI's guided-diffusion checkpoints (Dhariwal & Nichol 2021, arXiv 2105.05233) as diffusers folders.

A `.pt` file of guided-diffusion is a bare state dict; `guidegen.models.convert.adm_layout` recognises the network that it
belongs to. The converted network computes the same function exactly.

Assumed, since the state dict does not show it and no published flag changes it: 1000 training
steps, epsilon prediction, timesteps that are not rescaled, as many heads on the way up as
on the way down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.errors import CheckpointError, UsageError, first_line
from guidegen.models.convert.adm_layout import Choices, Layout, recognise
from guidegen.models.pickles import read_pickle
from guidegen.models.weight_files import refuse_pointer

if TYPE_CHECKING:
    from torch import Tensor, nn

_TRAINING_STEPS = 1000
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class Conversion:
    """A converted network, not yet written.

    Attributes:
        layout: the sizes that the shapes show.
        choices: the settings that they do not show.
        network: `UNet2DModel`, `AdmUNet2DModel` or `NoisyClassifier`, with its weights.
        names: label id -> name; None where there are none.
    """

    layout: Layout
    choices: Choices
    network: Any
    names: Mapping[int, str] | None

    def describe(self) -> str:
        """Kind, sizes and the choices that were made, in one line."""
        layout, choices = self.layout, self.choices
        heads = f"{choices.heads} heads" if choices.heads else f"heads of {choices.head_channels} channels"
        words = [
            f"{layout.kind} of {choices.size}x{choices.size}",
            "unconditional" if layout.labels is None else f"{layout.labels} labels",
            f"levels of {', '.join(map(str, layout.channels))}",
            f"{heads} in {choices.attention_order or 'either'} order",
        ]
        if layout.kind == "unet":
            variance = "learned" if layout.out_channels > layout.in_channels else "fixed"
            words += [f"{choices.schedule} schedule", f"{variance} variance"]
        else:
            words += ["attention pool" if layout.pool else "mean pool"]
        return "; ".join(words)

    def save(self, folder: Path) -> None:
        """Writes a pipeline folder for a UNet, a model folder for a classifier."""
        if self.layout.kind == "classifier":
            self.network.save_pretrained(folder)
            return
        import diffusers

        scheduler = diffusers.DDIMScheduler(
            clip_sample=True,  # as the published scripts do
            num_train_timesteps=_TRAINING_STEPS,
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[str(self.choices.schedule)],
        )
        self.network.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")
        ours = type(self.network).__name__ != "UNet2DModel"
        index: dict[str, Any] = {
            "_class_name": "DDIMPipeline",
            "_diffusers_version": diffusers.__version__,
            "unet": ["guidegen" if ours else "diffusers", type(self.network).__name__],
            "scheduler": ["diffusers", "DDIMScheduler"],
        }
        if self.names is not None:
            index["id2label"] = {str(label): name for label, name in self.names.items()}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / "model_index.json").write_text(text, encoding="utf-8")


def convert(
    path: Path,
    asked: Choices,
    preset: str | None = None,
    layers: int | None = None,
    names: Mapping[int, str] | None = None,
) -> Conversion:
    """Reads a guided-diffusion `.pt` and makes it a network of diffusers' blocks, which computes the same.

    Args:
        path: the file.
        asked: choices of the user, which take precedence over a preset.
        preset: a key of `PRESETS`; None for that of a published file name, if it has one.
        layers: ResNet blocks of each level, for a classifier whose shapes allow several.
        names: label id -> name.

    Raises:
        CheckpointError: missing, damaged, or not one of guided-diffusion.
        UnsafeError: opening it would run code.
        UsageError: something is missing that no shape shows, or does not fit the shapes.
    """
    state = read_state(path)
    try:
        layout, choices = recognise(
            {key: tuple(value.shape) for key, value in state.items()}, path.name, asked, preset, layers
        )
        _check_names(names, layout)
        network = _fill(build(layout, choices, names), convert_weights(state, layout, choices))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return Conversion(layout, choices, network, names)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, by name, on the CPU; nothing in it is run.

    Raises:
        CheckpointError: missing, damaged, a Git LFS pointer, or no state dict.
        UnsafeError: it is more than tensors, so that opening it would run code.
    """
    if not path.is_file():  # before the seconds that torch takes to load
        raise CheckpointError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}. Name a .pt file of guided-diffusion."
        )
    refuse_pointer(path)
    data = read_pickle(path)
    if not _is_state_dict(data):
        raise CheckpointError(
            f"{path} is no state dict: found {_describe(data)}, where names and their tensors are needed. "
            "guided-diffusion's model*.pt and ema_*.pt are such, its opt*.pt are not."
        )
    return dict(data)


def build(layout: Layout, choices: Choices, names: Mapping[int, str] | None = None) -> nn.Module:
    """The network of diffusers' blocks, on torch's meta device: shapes without numbers."""
    import torch
    from diffusers import UNet2DModel

    from guidegen.models.adm_unet import AdmUNet2DModel
    from guidegen.models.classifiers.noisy import NoisyClassifier

    resnet = layout.resample == "resnet"
    down = "ResnetDownsampleBlock2D" if resnet else "DownBlock2D"
    head_dims = {choices.head_channels or c // (choices.heads or 1) for c in layout.attended}
    head_dim = head_dims.pop() if len(head_dims) == 1 else None
    config: dict[str, Any] = {
        "sample_size": choices.size,
        "in_channels": layout.in_channels,
        "block_out_channels": layout.channels,
        "down_block_types": tuple("AttnDownBlock2D" if attends else down for attends in layout.attention),
        "layers_per_block": layout.layers,
        "downsample_type": "resnet" if resnet else "conv",
        "resnet_time_scale_shift": "scale_shift" if layout.scale_shift else "default",
    }
    wide = layout.time_channels != layout.channels[0]
    extra = {"attention_head_dim": head_dim, "num_attention_heads": None if head_dim else choices.heads}
    extra |= {"time_channels": layout.time_channels if wide else None}
    with torch.device("meta"):
        if layout.kind == "classifier":
            labels = {str(i): (names or {}).get(i, "") for i in range(layout.out_channels)}
            pooling = "mean" if layout.pool is None else "attention"
            config |= {"norm_num_groups": 32, "attn_norm_num_groups": 32, "pooling": pooling, "id2label": labels}
            network: nn.Module = NoisyClassifier(**config, **extra)
            return network.eval()
        up = "ResnetUpsampleBlock2D" if resnet else "UpBlock2D"
        config |= {
            "out_channels": layout.out_channels,
            "up_block_types": tuple("AttnUpBlock2D" if attends else up for attends in reversed(layout.attention)),
            "upsample_type": config["downsample_type"],
            "num_class_embeds": layout.classes,
        }
        if wide or head_dim is None:
            network = AdmUNet2DModel(**config, **extra)
            return network.eval()
        network = UNet2DModel(**config, attention_head_dim=head_dim, attn_norm_num_groups=32)
        return network.eval()


def convert_weights(state: Mapping[str, Tensor], layout: Layout, choices: Choices) -> dict[str, Tensor]:
    """The state dict of `build(layout, choices)`, fp32, from guided-diffusion's.

    Raises:
        CheckpointError: it lacks a tensor, or has one too many.
    """
    left = {key: value.float() for key, value in state.items()}
    converted: dict[str, Tensor] = {}
    for kind, old, new in _modules(layout):
        parts = {key.removeprefix(f"{old}."): left.pop(key) for key in list(left) if key.startswith(f"{old}.")}
        if not parts and kind not in ("down", "up"):
            raise CheckpointError(f"it lacks {old}: it is incomplete, or not of guided-diffusion.")
        try:
            made = _convert_module(kind, parts, layout, choices, new)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{old} is not as in guided-diffusion: {first_line(error)}") from error
        converted |= {f"{new}.{name}": value for name, value in made.items()}
    if left:
        raise CheckpointError(
            f"it has {len(left)} tensors that guided-diffusion's networks do not have, first {next(iter(left))}."
        )
    return converted


def _fill(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"its shapes are not those of guided-diffusion's networks: {first[0].strip()}") from error
    return network


def _check_names(names: Mapping[int, str] | None, layout: Layout) -> None:
    if names is None:
        return
    if layout.labels is None:
        raise UsageError("--labels: the model is unconditional, it has no labels to name.")
    counts = (layout.labels,) if layout.kind == "classifier" else (layout.labels, layout.labels - 1)
    if len(names) not in counts or set(names) != set(range(len(names))):
        last = layout.labels - 1
        raise UsageError(f"--labels names {len(names)} labels; the model has {layout.labels}, from 0 to {last}.")


def _is_state_dict(data: Any) -> bool:
    from torch import Tensor

    return (
        isinstance(data, Mapping)
        and bool(data)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in data.items())
    )


def _describe(data: Any) -> str:
    if not isinstance(data, Mapping):
        return f"a {type(data).__name__}"
    return "{" + ", ".join(f"{key!r}: {type(value).__name__}" for key, value in list(data.items())[:4]) + "}"


# --- weights


def _modules(layout: Layout) -> Iterator[tuple[str, str, str]]:
    """Kind, old name and new name of every module."""
    yield "same", "time_embed.0", "time_embedding.linear_1"
    yield "same", "time_embed.2", "time_embedding.linear_2"
    if layout.classes is not None:
        yield "same", "label_emb", "class_embedding"
    yield "same", "input_blocks.0.0", "conv_in"
    index, count = 1, len(layout.channels)
    for level, attends in enumerate(layout.attention):
        for i in range(layout.layers):
            yield from _layer(f"input_blocks.{index}", f"down_blocks.{level}", i, attends)
            index += 1
        if level < count - 1:
            yield _resampling(layout, "down", f"input_blocks.{index}.0", level)
            index += 1
    yield "resnet", "middle_block.0", "mid_block.resnets.0"
    yield "attention", "middle_block.1", "mid_block.attentions.0"
    yield "resnet", "middle_block.2", "mid_block.resnets.1"
    if layout.kind == "classifier":
        yield "same", "out.0", "norm_out"
        yield ("mean", "out.3", "head") if layout.pool is None else ("pool", "out.2", "head")
        return
    for level, attends in enumerate(reversed(layout.attention)):
        for i in range(layout.layers + 1):
            index = level * (layout.layers + 1) + i
            yield from _layer(f"output_blocks.{index}", f"up_blocks.{level}", i, attends)
        if level < count - 1:
            yield _resampling(layout, "up", f"output_blocks.{index}.{1 + attends}", level)
    yield "same", "out.0", "conv_norm_out"
    yield "same", "out.2", "conv_out"


def _layer(old: str, new: str, i: int, attends: bool) -> Iterator[tuple[str, str, str]]:
    yield "resnet", f"{old}.0", f"{new}.resnets.{i}"
    if attends:
        yield "attention", f"{old}.1", f"{new}.attentions.{i}"


def _resampling(layout: Layout, way: str, old: str, level: int) -> tuple[str, str, str]:
    new = f"{way}_blocks.{level}.{way}samplers.0"
    if layout.resample == "resnet":
        return "resnet", old, new
    if layout.resample == "conv":
        return "same", f"{old}.{'op' if way == 'down' else 'conv'}", f"{new}.conv"
    return way, old, f"{new}.conv"


def _convert_module(kind: str, parts: dict[str, Tensor], layout: Layout, choices: Choices, new: str) -> dict[str, Tensor]:
    if kind == "resnet":
        return {
            f"{_RESNET[old]}.{end}": value for (old, _, end), value in ((k.rpartition("."), v) for k, v in parts.items())
        }
    if kind == "attention":
        heads = choices.heads or len(parts["norm.weight"]) // (choices.head_channels or len(parts["norm.weight"]))
        made = {"group_norm.weight": parts["norm.weight"], "group_norm.bias": parts["norm.bias"]}
        for end in ("weight", "bias"):
            made |= {f"to_{n}.{end}": part for n, part in _split_qkv(parts[f"qkv.{end}"], heads, choices.attention_order)}
            made[f"to_out.0.{end}"] = parts[f"proj_out.{end}"].flatten(1) if end == "weight" else parts["proj_out.bias"]
        return made
    if kind == "pool":
        made = {"positional_embedding": parts["positional_embedding"].T.contiguous()}
        for end in ("weight", "bias"):
            made |= {f"to_{n}.{end}": part for n, part in _split_qkv(parts[f"qkv_proj.{end}"], 1, "new")}
            made[f"to_out.{end}"] = parts[f"c_proj.{end}"].flatten(1) if end == "weight" else parts["c_proj.bias"]
        return made
    if kind == "mean":
        return {"weight": parts["weight"].flatten(1), "bias": parts["bias"]}
    if kind in ("down", "up"):
        level = int(new.split(".")[1])
        return _fixed_conv(kind, (layout.channels if kind == "down" else layout.channels[::-1])[level])
    return parts


def _split_qkv(joint: Tensor, heads: int, order: str | None) -> Iterator[tuple[str, Tensor]]:
    """Queries, keys and values (C, ...) from a joint projection (3 C, ..., 1), heads outermost.

    The legacy order keeps the three of each head together; the new one keeps each of the three together.
    """
    width = len(joint) // (3 * heads)
    rest = joint.shape[1:2]  # a weight's input channels; the convolution's length of 1 goes
    split = (
        joint.reshape(heads, 3, width, *rest).transpose(0, 1) if order == "legacy" else joint.reshape(3, heads, width, *rest)
    )
    for name, part in zip("qkv", split, strict=True):
        yield name, part.reshape(heads * width, *rest).clone()


def _fixed_conv(way: str, channels: int) -> dict[str, Tensor]:
    """A 3x3 convolution, padded by 1, that does what the weightless resampling of guided-diffusion does.

    Down, with a stride of 2, it is the mean of each 2x2; up, after each pixel was repeated, nothing.
    """
    import torch

    kernel = torch.zeros(3, 3)
    if way == "down":
        kernel[1:, 1:] = 0.25
    else:
        kernel[1, 1] = 1.0
    return {"weight": torch.eye(channels)[:, :, None, None] * kernel, "bias": torch.zeros(channels)}
