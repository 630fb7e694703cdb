"""The networks of a checkpoint, loaded, with the conditions that they draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.scores.interfaces import NULL, Denoiser, Mixture
from guidegen.spec.cell import Cell

Condition = Callable[[Sequence[Cell]], tuple[Denoiser, list[Mixture]]]
"""From the cells of a batch to the denoiser that draws them and the labels it knows them by."""


@dataclass(frozen=True)
class LoadOptions:
    """How networks are loaded.

    Attributes:
        device: where to.
        access: how their files may be read.
        autocast: fp16 or bf16 of the calls; None computes in fp32.
        compile_networks: whether by `torch.compile`.
        negative_prompt: what the null condition of a model that reads prompts says; None for the empty prompt.
        decodes: whether a decoder of latents is loaded too.
    """

    device: torch.device
    access: Access = DEFAULT_ACCESS
    autocast: torch.dtype | None = None
    compile_networks: bool = False
    negative_prompt: str | None = None
    decodes: bool = True

    def compiled(self, network: Any) -> Any:
        """The network, compiled where that is asked for."""
        return torch.compile(network) if self.compile_networks else network


@dataclass(frozen=True)
class Networks:
    """What a checkpoint loads.

    Attributes:
        condition: from cells to the network and the labels that it is asked for.
        decode: from what it draws to images; None where it draws images.
        is_cut: whether a prompt has more tokens than it reads; None where there are no prompts.
        network: the network itself; None for a custom one.
        condition_on: from a second network of the kind, and its null label, to one that reads labels and
            prompts as the first does; None for a custom one.
        guiding: the same of a guiding network; None without autoguidance.
    """

    condition: Condition
    decode: Callable[[Tensor], Tensor] | None = None
    is_cut: Callable[[str], bool] | None = None
    network: Any = None
    condition_on: Callable[[Any, int | None], Condition] | None = None
    guiding: Condition | None = None

    @property
    def null_denoiser(self) -> Denoiser:
        """The network for the null condition alone."""
        return self.condition(())[0]


def by_label(denoiser: Denoiser) -> Condition:
    """The condition of a denoiser whose labels are those of the cells."""
    return lambda cells: (denoiser, [label_ids(cell) for cell in cells])


def label_ids(cell: Cell) -> Mixture:
    """The labels of a cell with their weights; `NULL` where it has none."""
    return tuple((NULL if label is None else int(label), weight) for label, weight in cell.label_parts)


def by_prompt(denoiser: Callable[[Sequence[str]], Denoiser]) -> Condition:
    """The condition of a network that reads prompts.

    Args:
        denoiser: from prompts to a denoiser whose label i is prompt i.
    """

    def condition(cells: Sequence[Cell]) -> tuple[Denoiser, list[Mixture]]:
        prompts = list(dict.fromkeys(text for cell in cells for text, _ in cell.prompt_parts if text is not None))
        index: dict[str | None, int] = {None: NULL} | {prompt: i for i, prompt in enumerate(prompts)}
        labels = [tuple((index[text], weight) for text, weight in cell.prompt_parts) for cell in cells]
        return denoiser(prompts), labels

    return condition
