"""Reading weights: the only place that opens them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guidegen.checkpoints import Checkpoint, ClassifierInfo
from guidegen.checkpoints.files import DEFAULT_ACCESS, Access, Weights, find_weights
from guidegen.errors import CheckpointError, UsageError, first_line

Device = torch.device | str
_CAST_AT_EVERY_CALL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def load_network(
    checkpoint: Checkpoint, device: Device, access: Access = DEFAULT_ACCESS, autocast: torch.dtype | None = None
) -> nn.Module:
    """The network that is called at each step, a diffusers model, in eval mode, on `device`.

    Its weights are fp32, or what `cast_weights` makes of them for calls under autocast to that dtype.
    """
    return load_part(checkpoint, checkpoint.kind.network, device, access, autocast)


def load_part(
    checkpoint: Checkpoint,
    part: str,
    device: Device,
    access: Access = DEFAULT_ACCESS,
    autocast: torch.dtype | None = None,
) -> nn.Module:
    """One part of a checkpoint in eval mode, on `device`, with weights as `load_network` has them.

    The class is the one that guidegen expects there or that model_index.json names, of diffusers or transformers.

    Raises:
        CheckpointError: the weights do not load, or there is no such class.
    """
    return _load(_class_of(checkpoint, part), checkpoint.part_folders[part], device, access, autocast)


def empty_network(checkpoint: Checkpoint) -> nn.Module:
    """The network without its weights: its layers on torch's meta device.

    Raises:
        CheckpointError: its config does not make one.
    """
    cls = _class_of(checkpoint, checkpoint.kind.network)
    try:
        with torch.device("meta"):
            network: nn.Module = cls.from_config(dict(checkpoint.config))
    except Exception as error:  # the library raises whatever its layers raise
        raise CheckpointError(f"{checkpoint.folder}: config.json makes no network: {first_line(error)}") from error
    return network


def _class_of(checkpoint: Checkpoint, part: str) -> Any:
    import diffusers
    import transformers

    from guidegen.checkpoints import adm_unet

    kind = checkpoint.kind
    name = kind.network_class if part == kind.network else checkpoint.index[part][1]
    cls: Any = next(
        (getattr(library, name) for library in (diffusers, transformers, adm_unet) if hasattr(library, name)), None
    )
    if not (isinstance(cls, type) and hasattr(cls, "from_pretrained")):
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


def load_tokenizer(checkpoint: Checkpoint, part: str) -> Any:
    """A tokenizer of a text-conditional checkpoint."""
    return _tokenizer(checkpoint.folder / part)


def load_classifier(
    classifier: ClassifierInfo,
    device: Device,
    access: Access = DEFAULT_ACCESS,
    texts: Sequence[str] = (),
    autocast: torch.dtype | None = None,
) -> nn.Module:
    """The classifier with fp32 weights, in eval mode, on `device`.

    `NoisyClassifier` for noisy input; for denoised input, a module from images in [-1, 1] to logits.

    Args:
        classifier: what to load.
        device: where to.
        access: how it may be read.
        texts: what a zero-shot classifier tells apart, one column each.
        autocast: a `NoisyClassifier` keeps its weights for calls under autocast to that dtype, see `cast_weights`.
    """
    from guidegen.checkpoints.preprocessing import CleanClassifier, ImageClassifier

    if classifier.own is not None:
        own: nn.Module = classifier.own.load(torch.device(device))
        return own
    if classifier.preprocessor is None:
        from guidegen.checkpoints.noisy_classifier import NoisyClassifier

        network = _load(NoisyClassifier, classifier.folder, device, access, autocast)
        return network if classifier.input == "noisy" else CleanClassifier(network)
    from transformers import AutoModelForImageClassification, AutoModelForZeroShotImageClassification

    if classifier.zero_shot:
        from guidegen.checkpoints.zero_shot import ZeroShotClassifier

        network = _load(AutoModelForZeroShotImageClassification, classifier.folder, device, access)
        return ZeroShotClassifier(network, classifier.preprocessor, _tokenizer(classifier.folder), texts)
    network = _load(AutoModelForImageClassification, classifier.folder, device, access)
    return ImageClassifier(network, classifier.preprocessor)


def load_backbone(folder: Path, config: Mapping[str, Any], device: Device, access: Access = DEFAULT_ACCESS) -> nn.Module:
    """An image model without its head, with fp32 weights, in eval mode, on `device`.

    transformers' `AutoModel`, or timm's where config.json is timm's.

    Raises:
        CheckpointError: the weights do not load.
        UsageError: it is timm's, and timm is not installed.
    """
    if "pretrained_cfg" in config:
        return _load_timm(folder, config, device)
    from transformers import AutoModel

    return _load(AutoModel, folder, device, access)


def _load_timm(folder: Path, config: Mapping[str, Any], device: Device) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"{folder} is a timm model, and timm is not installed: pip install timm") from error
    from safetensors.torch import load_file

    (file, *_) = check_weights(folder).files
    try:
        network: nn.Module = timm.create_model(config["architecture"], pretrained=False, num_classes=0)
        missing, _ = network.load_state_dict(load_file(file), strict=False)  # its head stays behind
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: the weights do not load: {str(error).splitlines()[0]}") from error
    if missing:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {len(missing)} tensors missing, first {missing[0]}."
        )
    return network.to(device).eval().requires_grad_(False)


def check_weights(folder: Path, access: Access = DEFAULT_ACCESS) -> Weights:
    """A folder's weights, which are there and whole.

    Raises:
        CheckpointError: none, cut short or damaged.
        UnsafeError: pickles that were not asked for.
    """
    weights = find_weights(folder, access)
    for path in weights.files if weights.safe else ():
        _check_safetensors(path)
    return weights


def _load(cls: Any, folder: Path, device: Device, access: Access, autocast: torch.dtype | None = None) -> nn.Module:
    weights = check_weights(folder, access)
    settings = {"use_safetensors": weights.safe, "variant": weights.variant, "local_files_only": True}
    try:
        model, info = cls.from_pretrained(folder, **settings, output_loading_info=True, **_quietly(cls))
    except Exception as error:  # the libraries raise whatever their readers raise
        raise CheckpointError(f"{folder}: the weights do not load: {first_line(error)}") from error
    wrong = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind, ())]
    if wrong:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {len(wrong)} tensors missing, first {wrong[0]}."
        )
    network: nn.Module = cast_weights(model, autocast).to(device).eval().requires_grad_(False)
    return network


def _tokenizer(folder: Path) -> Any:
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


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path} is damaged or cut short ({size} bytes): {error}. Download it again.") from error
