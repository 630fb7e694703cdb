"""The parts of a pipeline, loaded as diffusers would, and where they are kept while others work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from guidegen.errors import CheckpointError, UsageError, first_line
from guidegen.models.kinds.pipeline import TextPipeline
from guidegen.models.loading import load_part
from guidegen.models.noise_schedule import build
from guidegen.models.weight_files import DEFAULT_ACCESS, Access

CACHED = 256
"""Prompts whose embeddings are kept."""


def load_parts(
    checkpoint: TextPipeline, device: torch.device, dtype: torch.dtype, access: Access = DEFAULT_ACCESS
) -> dict[str, Any]:
    """All parts of a pipeline by name: networks with weights of a dtype, tokenizers, and the scheduler.

    Raises:
        CheckpointError: one does not load.
    """
    parts: dict[str, Any] = {}
    for name, part in checkpoint.parts.items():
        if name in checkpoint.configs:
            parts[name] = load_part(checkpoint, name, device, access, dtype=dtype)
        elif name == "scheduler":
            parts[name] = _scheduler(checkpoint)
        elif name != "guider":
            parts[name] = _reader(part.name, part.folder)
    return parts


def offload_groups(parts: Mapping[str, Any], device: torch.device) -> None:
    """Keeps the layers of all networks on the CPU but for the one that works."""
    from diffusers.hooks import apply_group_offloading

    for network in parts.values():
        if isinstance(network, torch.nn.Module):
            apply_group_offloading(
                network,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=device.type == "cuda",
            )


def check_offload() -> None:
    """Raises UsageError where a package that moves networks is missing."""
    from diffusers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise UsageError("--offload needs the package accelerate: pip install accelerate.")


def _scheduler(checkpoint: TextPipeline) -> Any:
    import diffusers

    config = checkpoint.own_scheduler_config
    return build(getattr(diffusers, config["_class_name"]), config)


def _reader(cls: str, folder: Any) -> Any:
    """A tokenizer or processor of transformers."""
    import transformers

    found: Any = getattr(transformers, cls, None)
    readers = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)
    known = found in (transformers.AutoTokenizer, transformers.AutoProcessor)
    if not known and not (isinstance(found, type) and issubclass(found, readers)):
        raise CheckpointError(f"{folder} is a {cls}, which is no tokenizer or processor of transformers.")
    try:
        return found.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its readers raise
        raise CheckpointError(f"{folder}: the {cls} does not load: {first_line(error)}") from error
