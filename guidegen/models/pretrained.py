"""Models of diffusers and transformers from their folders: the only place that opens their weights."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guidegen.errors import CheckpointError, first_line
from guidegen.models.configs import read_config
from guidegen.models.pickles import read_pickle
from guidegen.models.weight_files import DEFAULT_ACCESS, Access, Weights, count_numbers, find_weights

Device = torch.device | str
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)
_CAST_AT_EVERY_CALL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def load_model(
    cls: Any,
    folder: Path,
    device: Device,
    access: Access = DEFAULT_ACCESS,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A model of diffusers or transformers from its folder, in eval mode, with weights as `load_network` has them.

    Args:
        cls: its class.
        folder: where it is.
        device: where to.
        access: how it may be read.
        autocast: as `load_network` has it.
        dtype: of the weights, but for those that its class keeps in fp32.

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
        model, info = cls.from_pretrained(folder, **settings, output_loading_info=True, **_quietly(cls, dtype))
    except Exception as error:  # the libraries raise whatever their readers raise
        if (found := _MISMATCH.search(str(error))) is not None:
            name, there, wanted = found[1][:200], found[2], found[3]
            why = f"{name} has the shape {there}, and config.json makes it {wanted}"
            raise CheckpointError(f"{folder}: the weights do not fit config.json: {why}.") from error
        raise CheckpointError(f"{folder}: the weights do not load: {first_line(error)}") from error
    for key, what in (("missing_keys", "missing"), ("mismatched_keys", "of another shape"), ("unexpected_keys", "too many")):
        if (wrong := [str(name) for name in info.get(key, ())]) and (diffusers or key != "unexpected_keys"):
            raise CheckpointError(
                f"{folder}: the weights do not fit config.json: {len(wrong)} tensors {what}, first {wrong[0][:200]}."
            )
    if diffusers and dtype != torch.float32:
        model.to(dtype=dtype)  # without accelerate, diffusers leaves some networks in fp32
    network: nn.Module = cast_weights(model, autocast).to(device).eval().requires_grad_(False)
    return network


def empty_model(cls: Any, config: Mapping[str, Any], folder: Path) -> nn.Module:
    """A model of diffusers without its weights, on torch's meta device.

    Raises:
        CheckpointError: its config does not make one.
    """
    from diffusers.models.modeling_utils import no_init_weights

    _quietly(cls)
    try:
        with torch.device("meta"), no_init_weights():  # numbers that are not there need no random values
            network: nn.Module = cls.from_config(dict(config))
    except Exception as error:  # the library raises whatever its layers raise
        why = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise CheckpointError(f"{folder}: config.json makes no network: {why}") from error
    return network


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


def quiet_transformers() -> None:
    """Has transformers print errors alone."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _quietly(cls: Any, dtype: torch.dtype = torch.float32) -> Mapping[str, Any]:
    """Weights of a dtype and no chatter: each of the two libraries has its own word for both."""
    if cls.__module__.startswith("transformers"):
        quiet_transformers()
        return {"dtype": dtype, "trust_remote_code": False}
    from diffusers.utils import is_accelerate_available, logging

    logging.set_verbosity_error()
    mixed = bool(getattr(cls, "_keep_in_fp32_modules", None))  # which diffusers loads in no other way
    return {"torch_dtype": dtype, "low_cpu_mem_usage": mixed or (dtype != torch.float32 and is_accelerate_available())}


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
