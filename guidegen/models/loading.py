"""Loading the networks of a checkpoint: its parts, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from guidegen.arguments import instance, one_of
from guidegen.errors import CheckpointError, first_line
from guidegen.models.checkpoint import Checkpoint
from guidegen.models.lazy import without_compiler
from guidegen.models.networks import LoadOptions
from guidegen.models.pretrained import Device, empty_model, load_model
from guidegen.models.weight_files import DEFAULT_ACCESS, Access


def load_network(
    checkpoint: Checkpoint, device: Device, access: Access = DEFAULT_ACCESS, autocast: torch.dtype | None = None
) -> nn.Module:
    """The network that is called at each step, a diffusers model, in eval mode, on `device`.

    Its weights are fp32, or what `cast_weights` makes of them for calls under autocast to that dtype.
    """
    instance("checkpoint", checkpoint, Checkpoint, "what open_checkpoint returns")
    one_of("autocast", autocast, (None, torch.float16, torch.bfloat16))
    return load_part(checkpoint, checkpoint.network, device, access, autocast)


def ready_network(checkpoint: Checkpoint, options: LoadOptions) -> nn.Module:
    """`load_network` in the memory layout that it runs fastest in."""
    network = load_network(checkpoint, options.device, options.access, options.autocast)
    if checkpoint.channels_last and options.device.type in ("cpu", "cuda"):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def load_part(
    checkpoint: Checkpoint,
    part: str,
    device: Device,
    access: Access = DEFAULT_ACCESS,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """One part of a checkpoint in eval mode, on `device`, with weights as `load_model` has them.

    Raises:
        CheckpointError: the weights do not load, or diffusers and transformers have no such class.
    """
    return load_model(_class_of(checkpoint, part), checkpoint.part_folders[part], device, access, autocast, dtype)


def empty_part(checkpoint: Checkpoint, part: str) -> nn.Module:
    """One part of a checkpoint without its weights: its layers on torch's meta device.

    Raises:
        CheckpointError: its config does not make one.
    """
    return empty_model(_class_of(checkpoint, part), checkpoint.configs[part], checkpoint.part_folders[part])


def check_prediction(checkpoint: Checkpoint) -> None:
    """Calls a UNet without numbers, which shows whether it gives predictions of what it draws.

    Raises:
        CheckpointError: it does not.
    """
    x_t = torch.empty((1, *checkpoint.shape), device="meta")
    labels = torch.zeros(1, dtype=torch.long, device="meta") if checkpoint.class_conditional else None
    t = torch.zeros((), device="meta")
    network = empty_part(checkpoint, checkpoint.network).eval()
    why = ""
    try:
        with torch.no_grad(), without_compiler():
            found = network(x_t, t, class_labels=labels, return_dict=False)[0]
        if found.shape[2:] != x_t.shape[2:] or found.shape[1] not in (x_t.shape[1], 2 * x_t.shape[1]):
            why = f"it gives {tuple(found.shape[1:])} for images of {checkpoint.shape}"
    except Exception as error:  # the library raises whatever its layers raise
        why = f"{type(error).__name__}: {first_line(error)[:200]}"
    if why:
        raise CheckpointError(f"{checkpoint.folder}: config.json makes a network that does not draw: {why}.")


def check_decoding(checkpoint: Checkpoint, part: str) -> None:
    """Decodes latents without numbers, which shows whether images come of those that the network draws.

    Raises:
        CheckpointError: they do not.
    """
    decoder: Any = empty_part(checkpoint, part).eval()
    try:
        with torch.no_grad():
            found = decoder.decode(torch.empty((1, *checkpoint.shape), device="meta"), return_dict=False)[0]
    except Exception as error:  # the library raises whatever its layers raise
        why = f"{type(error).__name__}: {first_line(error)[:200]}"
    else:
        shape = checkpoint.image_shape
        why = "" if found.shape[1:] == shape else f"it gives {tuple(found.shape[1:])} for {shape}"
    if why:
        raise CheckpointError(f"{checkpoint.folder}: {part} does not decode what the {checkpoint.network} draws: {why}.")


def _class_of(checkpoint: Checkpoint, part: str) -> Any:
    """The class that the config of the network says, and model_index.json of any other part."""
    import diffusers

    from guidegen.models import adm_unet, edm2_unet, edm_unet, sit

    ours = (adm_unet, edm_unet, edm2_unet, sit) if part == checkpoint.network else ()
    name = checkpoint.config["_class_name"] if part == checkpoint.network else checkpoint.index[part][1]
    for library in (diffusers, *ours):
        cls: Any = getattr(library, name, None)
        if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
            return cls
    import transformers  # most checkpoints need none of it, and it takes long

    cls = getattr(transformers, name, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    raise CheckpointError(f"{checkpoint.folder}: the {part} is a {name}, which diffusers and transformers do not have.")
