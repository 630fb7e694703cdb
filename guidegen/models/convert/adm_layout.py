"""Recognises guided-diffusion networks by the names and shapes of their state dict, and by options.

The shapes show the kind of the network and all of its sizes (`Layout`); the number of attention heads,
the order of queries, keys and values, the noise schedule and the size of the images leave no trace
there (`Choices`), and come from the published flags (`PRESETS`) or from the user. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from guidegen.errors import CheckpointError, UsageError

Shapes = Mapping[str, tuple[int, ...]]

_ATTENTION_AT = (32, 16, 8)  # resolutions with attention, in every published flag
_WIDTHS = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
"""Channels of each level over the model's, by size: `create_model` of guided-diffusion's script_util.py."""
_NEEDED = (
    "time_embed.0.weight",
    "input_blocks.0.0.weight",
    "middle_block.0.in_layers.2.weight",
    "middle_block.1.qkv.weight",
)


@dataclass(frozen=True)
class Layout:
    """What the shapes of a state dict show.

    Attributes:
        kind: unet (`UNetModel`) or classifier (`EncoderUNetModel`).
        in_channels: channels of the images.
        out_channels: of the prediction, twice `in_channels` with a learned variance; a classifier's classes.
        time_channels: sinusoids of the timestep.
        channels: of each level, from the full resolution down.
        layers: ResNet blocks of each level on the way down.
        attention: whether each level has attention.
        resample: between levels: resnet (`resblock_updown`), conv, or none (pooling and repeating alone).
        scale_shift: whether the timestep scales and shifts, or only shifts.
        classes: labels of a class-conditional UNet; None for others.
        pool: a classifier's attention pool: height and width of what it pools; None for a mean, and for UNets.
    """

    kind: str
    in_channels: int
    out_channels: int
    time_channels: int
    channels: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    resample: str
    scale_shift: bool
    classes: int | None
    pool: int | None

    @property
    def attended(self) -> list[int]:
        """Channels of each attention layer; the middle always has one."""
        return [c for c, attends in zip(self.channels, self.attention, strict=True) if attends] + [self.channels[-1]]

    @property
    def labels(self) -> int | None:
        """How many labels it knows; None for an unconditional UNet."""
        return self.out_channels if self.kind == "classifier" else self.classes


@dataclass(frozen=True)
class Choices:
    """What the shapes do not show; None where it is not known.

    Attributes:
        size: height and width of the images.
        heads: attention heads of every layer (`num_heads`), or else
        head_channels: channels of each head (`num_head_channels`).
        attention_order: legacy (heads, then q, k, v) or new (q, k, v, then heads: `use_new_attention_order`).
        schedule: linear or cosine (`noise_schedule`).
    """

    size: int | None = None
    heads: int | None = None
    head_channels: int | None = None
    attention_order: str | None = None
    schedule: str | None = None


class Preset(NamedTuple):
    """One published network: what its shapes show and what they do not."""

    layout: Layout
    choices: Choices


def _published_unet(size: int, width: int, layers: int, classes: int | None, **choices: Any) -> Preset:
    layout = _published_layout("unet", size, width, layers, 6, classes, None)
    return Preset(layout, Choices(size, **({"attention_order": "legacy", "schedule": "linear"} | choices)))


def _published_classifier(size: int, layers: int) -> Preset:
    pool = size >> (len(_WIDTHS[size]) - 1)
    return Preset(
        _published_layout("classifier", size, 128, layers, 1000, None, pool),
        Choices(size, head_channels=64, attention_order="legacy"),
    )


def _published_layout(
    kind: str, size: int, width: int, layers: int, out_channels: int, classes: int | None, pool: int | None
) -> Layout:
    attention = tuple(size >> level in _ATTENTION_AT for level in range(len(_WIDTHS[size])))
    channels = tuple(int(width * factor) for factor in _WIDTHS[size])
    return Layout(kind, 3, out_channels, width, channels, layers, attention, "resnet", True, classes, pool)


# The flags of guided-diffusion's README, section "Sampling from pre-trained models"; those of the
# classifiers are the defaults of its script_util.py, but for the depth of 4 at 64x64.
PRESETS: dict[str, dict[str, Preset]] = {
    "64": {
        "unet": _published_unet(64, 192, 3, 1000, head_channels=64, attention_order="new", schedule="cosine"),
        "classifier": _published_classifier(64, 4),
    },
    "128": {"unet": _published_unet(128, 256, 2, 1000, heads=4), "classifier": _published_classifier(128, 2)},
    "256": {"unet": _published_unet(256, 256, 2, 1000, head_channels=64), "classifier": _published_classifier(256, 2)},
    "256-uncond": {
        "unet": _published_unet(256, 256, 2, None, head_channels=64),
        "classifier": _published_classifier(256, 2),
    },
    "512": {"unet": _published_unet(512, 256, 2, 1000, head_channels=64), "classifier": _published_classifier(512, 2)},
}
# The names they are published under; the LSUN models have the flags of the unconditional one of 256x256.
FILES: dict[str, str] = {
    **{f"{size}x{size}_{kind}.pt": str(size) for size in _WIDTHS for kind in ("diffusion", "classifier")},
    "256x256_diffusion_uncond.pt": "256-uncond",
    **{f"lsun_{scene}.pt": "256-uncond" for scene in ("bedroom", "cat", "horse", "horse_nodropout")},
}


def recognise(
    shapes: Shapes, file_name: str, asked: Choices, preset: str | None = None, layers: int | None = None
) -> tuple[Layout, Choices]:
    """Recognises a network by the shapes of its state dict and by options.

    Args:
        shapes: name -> shape.
        file_name: of the `.pt`; a published one counts as its preset if the shapes are those.
        asked: choices of the user, which take precedence over a preset.
        preset: a key of `PRESETS`.
        layers: ResNet blocks of each level, for a classifier whose shapes allow several.

    Raises:
        CheckpointError: not a network of guided-diffusion, or one that cannot be converted exactly.
        UsageError: no such preset, or not of these shapes; or something is missing, contradicts the
            shapes, or is of no use here.
    """
    kind = _kind(shapes)
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset {preset}: no such preset. There are {', '.join(PRESETS)}.")
    named = PRESETS[preset][kind] if preset is not None else None
    layout = read_layout(shapes, layers, named.layout.layers if named else None)
    if named and named.layout != layout:
        raise UsageError(f"this is not the {kind} of --preset {preset}: {_difference(layout, named.layout)}.")
    if named is None and file_name in FILES and PRESETS[FILES[file_name]][kind].layout == layout:
        named = PRESETS[FILES[file_name]][kind]
    choices = _merge(asked, named.choices if named else Choices())
    if kind == "classifier":
        choices = _classifier_choices(layout, choices, asked)
    _check_complete(layout, choices)
    _check_choices(layout, choices)
    return layout, choices


def read_layout(shapes: Shapes, layers: int | None = None, likely: int | None = None) -> Layout:
    """The sizes of a network from the shapes of its state dict.

    ResNet blocks that halve the resolution look like any other; they are found by the levels that
    they separate: where the channels change, where attention begins and ends, and, in a UNet, where the
    way up has them.

    Raises:
        CheckpointError: not the shapes of a guided-diffusion network.
        UsageError: a classifier whose blocks can be split in several ways, and `layers` does not decide.
    """
    kind = _kind(shapes)
    out_channels, pool = _head(shapes, kind)
    first = shapes["input_blocks.0.0.weight"]
    blocks = _input_blocks(shapes)
    ups = _ups(shapes) if kind == "unet" else None
    found = [n for n in range(1, len(blocks) + 1) if _levels(blocks, n) and ups in (None, _expected_ups(blocks, n))]
    if not found or (layers is not None and layers not in found):
        asked = f" of {layers} ResNet blocks" if layers and found else ""
        raise CheckpointError(f"its {len(blocks)} input blocks do not fall into levels{asked} as guided-diffusion's do.")
    found = next(([n] for n in (layers, likely) if n in found), found)
    if len(found) > 1:
        ways = " or ".join(map(str, found))
        raise UsageError(f"its blocks can be split into levels of {ways} ResNet blocks. Choose one: --res-blocks N.")
    levels, between = _levels(blocks, found[0]) or ([], [])
    layout = Layout(
        kind=kind,
        in_channels=first[1],
        out_channels=out_channels,
        time_channels=shapes["time_embed.0.weight"][1],
        channels=tuple(level[0].channels_out for level in levels),
        layers=found[0],
        attention=tuple(level[0].attention for level in levels),
        resample=between[0].kind if between else "conv",
        scale_shift=levels[0][0].scale_shift,
        classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        pool=pool,
    )
    _check_channels(layout)
    return layout


# --- shapes


class _Block(NamedTuple):
    kind: str  # resnet, conv, or none: nothing there that has weights
    attention: bool = False
    channels_in: int = 0
    channels_out: int = 0
    scale_shift: bool = False


def _kind(shapes: Shapes) -> str:
    lacks = next((name for name in _NEEDED if name not in shapes), None)
    if lacks:
        raise CheckpointError(
            f"not a network of guided-diffusion: {lacks} is missing. Found {len(shapes)} tensors, "
            f"such as {', '.join(list(shapes)[:3]) or 'none'}."
        )
    return "unet" if any(name.startswith("output_blocks.") for name in shapes) else "classifier"


def _head(shapes: Shapes, kind: str) -> tuple[int, int | None]:
    """Channels of the output, and the side of what a classifier's attention pools."""
    if kind == "unet" and "out.2.weight" in shapes:
        return shapes["out.2.weight"][0], None
    if kind == "classifier" and "out.2.c_proj.weight" in shapes and "out.2.positional_embedding" in shapes:
        positions = shapes["out.2.positional_embedding"][1] - 1
        side = round(positions**0.5)
        if side * side != positions:
            raise CheckpointError(f"its attention pool has {positions} positions, which are no square.")
        return shapes["out.2.c_proj.weight"][0], side
    if kind == "classifier" and len(shapes.get("out.3.weight", ())) == 4:
        return shapes["out.3.weight"][0], None
    if kind == "classifier" and "out.0.weight" in shapes and len(shapes["out.0.weight"]) == 2:
        raise CheckpointError(
            "a classifier with spatial pooling (--classifier_pool spatial), which guidegen does not convert. "
            "The published ones pool by attention; adaptive pooling converts too."
        )
    raise CheckpointError("its output layers (out.*) are not those of guided-diffusion.")


def _input_blocks(shapes: Shapes) -> list[_Block]:
    indices = {int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.", name))}
    return [_input_block(shapes, f"input_blocks.{i}", i in indices) for i in range(1, max(indices) + 1)]


def _input_block(shapes: Shapes, name: str, there: bool) -> _Block:
    if not there:
        return _Block("none")
    if conv := shapes.get(f"{name}.0.in_layers.2.weight"):
        timestep = shapes.get(f"{name}.0.emb_layers.1.weight", (0,))
        return _Block("resnet", f"{name}.1.qkv.weight" in shapes, conv[1], conv[0], timestep[0] == 2 * conv[0])
    if conv := shapes.get(f"{name}.0.op.weight"):
        return _Block("conv", False, conv[1], conv[0])
    raise CheckpointError(f"{name} is neither a ResNet block nor a downsampling of guided-diffusion.")


def _levels(blocks: list[_Block], layers: int) -> tuple[list[list[_Block]], list[_Block]] | None:
    """Levels of `layers` equal ResNet blocks and what is between them; None where they do not fall so."""
    if (len(blocks) + 1) % (layers + 1):
        return None
    levels = [blocks[i : i + layers] for i in range(0, len(blocks), layers + 1)]
    between = blocks[layers :: layers + 1]
    alike = all(
        {block[:2] + block[3:] for block in level} == {level[0][:2] + level[0][3:]}
        and level[0].kind == "resnet"
        and all(block.channels_in == block.channels_out for block in level[1:])
        for level in levels
    )
    plain = all(not block.attention and block.channels_in == block.channels_out for block in between)
    return (levels, between) if alike and plain and len({block.kind for block in between}) < 2 else None


def _ups(shapes: Shapes) -> set[int]:
    """Output blocks that end with an upsampling that has weights."""
    found = (re.match(r"output_blocks\.(\d+)\.[12]\.(in_layers|conv)\.", name) for name in shapes)
    return {int(match[1]) for match in found if match}


def _expected_ups(blocks: list[_Block], layers: int) -> set[int]:
    if any(block.kind == "none" for block in blocks):
        return set()
    return set(range(layers, len(blocks), layers + 1))


def _check_channels(layout: Layout) -> None:
    if layout.kind == "unet" and layout.in_channels == 6:
        raise CheckpointError(
            "it takes 6 channels: a super-resolution upsampler, which draws from a smaller image, not a label."
        )
    if layout.in_channels not in (1, 3):
        raise CheckpointError(f"it takes {layout.in_channels} channels; guidegen draws images of 1 or 3.")
    if layout.kind == "unet" and layout.out_channels not in (layout.in_channels, 2 * layout.in_channels):
        raise CheckpointError(f"it gives {layout.out_channels} channels for images of {layout.in_channels}.")


# --- what no shape shows


def _merge(asked: Choices, known: Choices) -> Choices:
    if asked.heads or asked.head_channels:
        known = replace(known, heads=None, head_channels=None)
    given = {field.name: getattr(asked, field.name) for field in fields(asked)}
    return replace(known, **{name: value for name, value in given.items() if value is not None})


def _classifier_choices(layout: Layout, choices: Choices, asked: Choices) -> Choices:
    """guided-diffusion's scripts make classifiers in one way (`create_classifier` of script_util.py)."""
    if asked.schedule:
        raise UsageError("--schedule: a classifier has none; it follows that of the UNet it was trained for.")
    if layout.pool is not None and asked.heads:
        raise UsageError("--heads: an attention pool counts its heads by their channels. Give --head-channels instead.")
    side = layout.pool and layout.pool << (len(layout.channels) - 1)
    return _merge(choices, Choices(side, None, None if choices.heads else 64, "legacy", None))


def _check_complete(layout: Layout, choices: Choices) -> None:
    missing = []
    if choices.size is None:
        missing.append("--size")
    if not (choices.heads or choices.head_channels):
        missing.append("--heads or --head-channels")
    one_head = choices.heads == 1 or {choices.head_channels} == set(layout.attended)  # in which both orders are one
    if choices.attention_order is None and not one_head:
        missing.append("--attention-order")
    if choices.schedule is None and layout.kind == "unet":
        missing.append("--schedule")
    if missing:
        like = [name for name, kinds in PRESETS.items() if kinds[layout.kind].layout == layout]
        hint = f" Its shapes are those of --preset {like[0]}, which sets all of them." if like else ""
        raise UsageError(f"a {layout.kind}, whose weights do not show these: give {', '.join(missing)}.{hint}")


def _check_choices(layout: Layout, choices: Choices) -> None:
    size, smallest = choices.size or 0, 1 << (len(layout.channels) - 1)
    if size < 1 or size % smallest:
        raise UsageError(
            f"--size {size}: it halves the image {len(layout.channels) - 1} times, so sizes are multiples of {smallest}."
        )
    if layout.pool is not None and size != layout.pool * smallest:
        raise UsageError(
            f"--size {size}: its attention pool is for images of {layout.pool * smallest}x{layout.pool * smallest}."
        )
    for channels in layout.attended:
        if choices.head_channels and channels % choices.head_channels:
            raise UsageError(
                f"--head-channels {choices.head_channels} does not divide its attention layers' {channels} channels."
            )
        if choices.heads and channels % choices.heads:
            raise UsageError(f"--heads {choices.heads} does not divide its attention layers' {channels} channels.")


def _difference(found: Layout, wanted: Layout) -> str:
    pairs = ((f.name, getattr(found, f.name), getattr(wanted, f.name)) for f in fields(found))
    return "; ".join(f"{name} {mine}, there {theirs}" for name, mine, theirs in pairs if mine != theirs)
