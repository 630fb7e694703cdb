"""Reading weights: the only place that opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guidegen.checkpoints import Checkpoint, ClassifierInfo, weight_files
from guidegen.errors import CheckpointError, UsageError


def load_unet(checkpoint: Checkpoint, device: torch.device | str, allow_pickle: bool = False) -> nn.Module:
    """The checkpoint's `UNet2DModel` with fp32 weights, in eval mode, on `device`."""
    from diffusers import UNet2DModel

    return _load(UNet2DModel, checkpoint.unet_folder, device, allow_pickle)


def load_classifier(classifier: ClassifierInfo, device: torch.device | str, allow_pickle: bool = False) -> nn.Module:
    """The classifier with fp32 weights, in eval mode, on `device`.

    `NoisyClassifier` for noisy input; for denoised input, a module from images in [-1, 1] to logits.
    """
    from guidegen.checkpoints.preprocessing import CleanClassifier, ImageClassifier, Preprocessing

    if classifier.preprocessor is None:
        from guidegen.checkpoints.noisy_classifier import NoisyClassifier

        network = _load(NoisyClassifier, classifier.folder, device, allow_pickle)
        return network if classifier.input == "noisy" else CleanClassifier(network)
    from transformers import AutoModelForImageClassification

    try:
        preprocessing = Preprocessing.from_config(classifier.preprocessor)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{classifier.folder}/preprocessor_config.json: {error}.") from error
    network = _load(AutoModelForImageClassification, classifier.folder, device, allow_pickle)
    return ImageClassifier(network, preprocessing)


def load_backbone(
    folder: Path, config: Mapping[str, Any], device: torch.device | str, allow_pickle: bool = False
) -> nn.Module:
    """An image model without its head, with fp32 weights, in eval mode, on `device`.

    transformers' `AutoModel`, or timm's where config.json is timm's.

    Raises:
        CheckpointError: the weights do not load.
        UsageError: it is timm's, and timm is not installed.
    """
    if "pretrained_cfg" in config:
        return _load_timm(folder, config, device)
    from transformers import AutoModel

    return _load(AutoModel, folder, device, allow_pickle)


def _load_timm(folder: Path, config: Mapping[str, Any], device: torch.device | str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"{folder} is a timm model, and timm is not installed: pip install timm") from error
    from safetensors.torch import load_file

    files = weight_files(folder)
    check_weights(folder)
    try:
        network: nn.Module = timm.create_model(config["architecture"], pretrained=False, num_classes=0)
        missing, _ = network.load_state_dict(load_file(files[0]), strict=False)  # its head stays behind
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: the weights do not load: {str(error).splitlines()[0]}") from error
    if missing:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {len(missing)} tensors missing, first {missing[0]}."
        )
    return network.to(device).eval().requires_grad_(False)


def _load(cls: Any, folder: Path, device: torch.device | str, allow_pickle: bool) -> nn.Module:
    safe = check_weights(folder, allow_pickle)
    settings = {"use_safetensors": safe, "local_files_only": True, "output_loading_info": True}
    try:
        model, info = cls.from_pretrained(folder, **settings, **_quietly(cls))
    except Exception as error:  # the libraries raise whatever their readers raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: the weights do not load: {first}") from error
    wrong = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind, ())]
    if wrong:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {len(wrong)} tensors missing, first {wrong[0]}."
        )
    network: nn.Module = model.to(device).eval().requires_grad_(False)
    return network


def _quietly(cls: Any) -> dict[str, Any]:
    """fp32 weights and no chatter: each of the two libraries has its own word for both."""
    if cls.__module__.startswith("transformers"):
        from transformers.utils import logging as chatter

        chatter.disable_progress_bar()
        chatter.set_verbosity_error()
        return {"dtype": torch.float32, "trust_remote_code": False}
    from diffusers.utils import logging

    logging.set_verbosity_error()
    return {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}


def check_weights(folder: Path, allow_pickle: bool = False) -> bool:
    """Whether the folder's weights are safetensors, all of them whole (False: pickles that were asked for).

    Raises:
        CheckpointError: none, cut short or damaged.
        UnsafeError: pickles that were not asked for.
    """
    return all(_is_whole(path) for path in weight_files(folder, allow_pickle))


def _is_whole(path: Path) -> bool:
    """Whether `path` is safetensors (False: a pickle that was asked for).

    Raises:
        CheckpointError: it is safetensors, but cut short or damaged.
    """
    if path.suffix != ".safetensors":
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path} is damaged or cut short ({size} bytes): {error}. Download it again.") from error
