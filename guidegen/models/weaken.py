"""A worse version of a network, made of its own weights: for guidance away from it, where no second checkpoint exists."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from guidegen.errors import UsageError

_WORDS = {"mid": "mid_block"}
_LISTED = 6


def weakened(network: nn.Module, how: str, layers: Sequence[str] = ()) -> nn.Module:
    """A second network on the very weights of the first, which stays as it is.

    `pag` puts the identity in the place of self-attention maps, so that values pass as they are:
    perturbed-attention guidance, Ahn et al. 2024 (arXiv 2403.17377). `skip` leaves layers out, as
    Stability AI did for Stable Diffusion 3.5 and Hyung et al. 2024 (arXiv 2411.18664). Both through
    diffusers' layer-skip hooks.

    Args:
        network: a diffusers model.
        how: pag or skip.
        layers: as in `pick_layers`.

    Raises:
        UsageError: it has no such layers.
    """
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    picked = pick_layers(network, how, layers)
    shared = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    guiding = copy.deepcopy(network, shared)
    for name in picked:
        stack, _, index = name.rpartition(".")
        perturbed = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
        left_out = {"skip_attention": True, "skip_ff": not _is_attention(network.get_submodule(name))}
        apply_layer_skip(guiding, LayerSkipConfig([int(index)], stack, **(perturbed if how == "pag" else left_out)))
    return guiding


def pick_layers(network: nn.Module, how: str, layers: Sequence[str] = ()) -> list[str]:
    """Names of the layers that `weakened` disturbs: transformer blocks, and self-attention that stands alone.

    Args:
        network: a diffusers model, perhaps without weights (on the meta device).
        how: pag or skip.
        layers: names of layers or of what holds them, such as `mid_block` or `up_blocks.1`; a number is a
            transformer block of a DiT, `mid` is mid_block. None of them: the middle block of a UNet, as
            diffusers' PAG pipelines have it; of a DiT, for pag block 1, as their PixArt pipeline has it, and
            for skip as many and as deep as 7, 8 and 9 of the 24 of Stable Diffusion 3.5 Medium.

    Raises:
        UsageError: it has no such layers.
    """
    known = _layers(network, how)
    if not known:
        raise UsageError(f"--guide-model {how}: the network has no self-attention to disturb. Name a second model.")
    picked: dict[str, None] = {}
    for word in layers or _usual(network, how):
        found = [name for name in known if f"{name}.".startswith(f"{_full(word)}.")]
        if not found:
            listed = ", ".join(known[:_LISTED]) + (f" and {len(known) - _LISTED} more" if len(known) > _LISTED else "")
            raise UsageError(f"--guide-model {how}: the network has no such layer as {word}. Name some of: {listed}.")
        picked |= dict.fromkeys(found)
    return list(picked)


def _layers(network: nn.Module, how: str) -> list[str]:
    from diffusers.models.attention import BasicTransformerBlock

    found: list[str] = []
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BasicTransformerBlock):
            attends = any(_is_attention(part) for part in module.modules())
            found += [name] if attends or how == "skip" else []
        elif not inside and _is_attention(module) and name.rpartition(".")[2].isdecimal():
            found.append(name)
    return found


def _is_attention(module: nn.Module) -> bool:
    """Whether it is self-attention, of diffusers."""
    from diffusers.models.attention_processor import Attention

    return isinstance(module, Attention) and not module.is_cross_attention


def _usual(network: nn.Module, how: str) -> list[str]:
    blocks: Any = getattr(network, "transformer_blocks", None)
    if blocks is None:
        return ["mid_block"]
    count = len(blocks)
    if how == "pag":
        return [str(min(1, count - 1))]
    first = 7 * count // 24
    return [str(i) for i in range(first, max(first + 1, 10 * count // 24))]


def _full(word: str) -> str:
    return f"transformer_blocks.{word}" if word.isdecimal() else _WORDS.get(word, word)
