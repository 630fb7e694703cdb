"""Reading weights: the only place that opens them."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guidegen.arguments import instance, one_of
from guidegen.errors import CheckpointError, first_line
from guidegen.models.checkpoint import Checkpoint
from guidegen.models.configs import read_config
from guidegen.models.networks import LoadOptions
from guidegen.models.pickles import read_pickle
from guidegen.models.weight_files import DEFAULT_ACCESS, Access, Weights, count_numbers, find_weights

Device = torch.device | str
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
_CAST_AT_EVERY_CALL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
) -> nn.Module:
    """One part of a checkpoint in eval mode, on `device`, with weights as `load_network` has them.

    Raises:
        CheckpointError: the weights do not load, or diffusers and transformers have no such class.
    """
    return load_model(_class_of(checkpoint, part), checkpoint.part_folders[part], device, access, autocast)


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
        with torch.no_grad():
            found = network(x_t, t, class_labels=labels, return_dict=False)[0]
        if found.shape[2:] != x_t.shape[2:] or found.shape[1] not in (x_t.shape[1], 2 * x_t.shape[1]):
            why = f"it gives {tuple(found.shape[1:])} for images of {checkpoint.shape}"
    except Exception as error:  # the library raises whatever its layers raise
        why = f"{type(error).__name__}: {first_line(error)[:200]}"
    if why:
        raise CheckpointError(f"{checkpoint.folder}: config.json makes a network that does not draw: {why}.")


def empty_model(cls: Any, config: Mapping[str, Any], folder: Path) -> nn.Module:
    """A model of diffusers without its weights, on torch's meta device.

    Raises:
        CheckpointError: its config does not make one.
    """
    _quietly(cls)
    try:
        with torch.device("meta"):
            network: nn.Module = cls.from_config(dict(config))
    except Exception as error:  # the library raises whatever its layers raise
        why = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise CheckpointError(f"{folder}: config.json makes no network: {why}") from error
    return network


def _class_of(checkpoint: Checkpoint, part: str) -> Any:
    """The class that the config of the network says, and model_index.json of any other part."""
    import diffusers
    import transformers

    from guidegen.models import adm_unet

    name = checkpoint.config["_class_name"] if part == checkpoint.network else checkpoint.index[part][1]
    cls: Any = next(
        (getattr(library, name) for library in (diffusers, transformers, adm_unet) if hasattr(library, name)), None
    )
    bases = (diffusers.ModelMixin, transformers.PreTrainedModel)
    if not (isinstance(cls, type) and issubclass(cls, bases)):
        raise CheckpointError(f"{checkpoint.folder}: the {part} is a {name}, which diffusers and transformers do not have.")
    return cls


def cast_weights(network: nn.Module, autocast: torch.dtype | None) -> nn.Module:
    """Keeps the weights of convolutions and linear layers in the dtype that autocast casts them to at every call.

    Autocast remembers the casts of trained weights alone, and those until its region ends, which is one
    call here. Predictions under autocast are the same bits as from fp32 weights: normalisation and
    embeddings stay as they are, and so does the first layer, since diffusers' networks take the dtype of
    their embeddings from it. Without autocast such a network cannot be called.

    Args:
        network: a diffusers model, changed in place.
        autocast: fp16 or bf16; None changes nothing.
    """
    if autocast is not None:
        layers = [layer for layer in network.modules() if isinstance(layer, _CAST_AT_EVERY_CALL)]
        for layer in layers[1:]:
            layer.to(autocast)
    return network


def check_weights(folder: Path, access: Access = DEFAULT_ACCESS) -> Weights:
    """A folder's weights, which are there and whole.

    Raises:
        CheckpointError: none, cut short, damaged, or in a dtype whose scales are unknown.
        UnsafeError: pickles that were not asked for, or that are more than tensors.
    """
    weights = find_weights(folder, access)
    for path in weights.files:
        if weights.safe:
            _check_safetensors(path)
        else:
            read_pickle(path)
    return weights


def load_model(
    cls: Any, folder: Path, device: Device, access: Access = DEFAULT_ACCESS, autocast: torch.dtype | None = None
) -> nn.Module:
    """A model of diffusers or transformers from its folder, in eval mode, with weights as `load_network` has them.

    Raises:
        CheckpointError: the weights do not load, or are not those of its config.
        UnsafeError: they are pickles that were not asked for.
    """
    weights = check_weights(folder, access)
    diffusers = not cls.__module__.startswith("transformers")
    if diffusers and weights.safe:
        _check_size(empty_model(cls, read_config(folder / "config.json"), folder), weights, folder)
    settings = {"use_safetensors": weights.safe, "variant": weights.variant, "local_files_only": True}
    try:
        model, info = cls.from_pretrained(folder, **settings, output_loading_info=True, **_quietly(cls))
    except Exception as error:  # the libraries raise whatever their readers raise
        raise CheckpointError(f"{folder}: the weights do not load: {first_line(error)}") from error
    for key, what in (("missing_keys", "missing"), ("mismatched_keys", "of another shape"), ("unexpected_keys", "too many")):
        if (wrong := [str(name) for name in info.get(key, ())]) and (diffusers or key != "unexpected_keys"):
            raise CheckpointError(
                f"{folder}: the weights do not fit config.json: {len(wrong)} tensors {what}, first {wrong[0][:200]}."
            )
    network: nn.Module = cast_weights(model, autocast).to(device).eval().requires_grad_(False)
    return network


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        CheckpointError: it does not load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its readers raise
        raise CheckpointError(f"{folder}: the tokenizer does not load: {first_line(error)}") from error


def _quietly(cls: Any) -> Mapping[str, Any]:
    """fp32 weights and no chatter: each of the two libraries has its own word for both."""
    if cls.__module__.startswith("transformers"):
        from transformers.utils import logging as chatter

        chatter.disable_progress_bar()
        chatter.set_verbosity_error()
        return {"dtype": torch.float32, "trust_remote_code": False}
    from diffusers.utils import logging

    logging.set_verbosity_error()
    return {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}


def _check_size(network: nn.Module, weights: Weights, folder: Path) -> None:
    """Refuses a config of a network much larger than its weights, before memory is taken for it."""
    described = sum(parameter.numel() for parameter in network.parameters())
    held = sum(map(count_numbers, weights.files))
    if described > 2 * held + 1_000_000:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: it describes {described:,} numbers, and they are {held:,}."
        )


def _check_safetensors(path: Path) -> None:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own, and some of Python's
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EACCES):
            raise
        size = path.stat().st_size
        why = first_line(error)[:200]
        raise CheckpointError(f"{path} is damaged or cut short ({size} bytes): {why}. Download it again.") from error
    if odd := next((key for key, dtype in dtypes.items() if dtype not in _DTYPES), None):
        raise CheckpointError(
            f"{path} holds {dtypes[odd]} numbers ({odd[:80]}), which mean nothing without their scales; "
            "guidegen reads fp32, fp16 and bf16."
        )
