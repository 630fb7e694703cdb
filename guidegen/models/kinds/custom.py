"""Custom models: `file.py:NAME` of a `guidegen.Model`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.checkpoint import Checkpoint, Source
from guidegen.models.configs import check_scheduler
from guidegen.models.labels import Labels
from guidegen.models.python_ref import Model
from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.python_file import python_sha256, read_python_ref, split_python_ref

if TYPE_CHECKING:
    from guidegen.models.networks import LoadOptions, Networks


@dataclass(frozen=True, kw_only=True)
class CustomCheckpoint(Checkpoint):
    """A model that a Python file declares; it has no parts.

    Attributes:
        model: what it declares.
    """

    model: Model

    kind = "custom model"
    network = "own"
    has_layers = False

    @classmethod
    def matches(cls, source: Source) -> bool:
        return split_python_ref(source.ref) is not None

    @classmethod
    def open(cls, source: Source, null_label: int | None, size: tuple[int, int] | None) -> CustomCheckpoint:
        ref = source.ref
        model: Model = read_python_ref(ref, Model)
        if null_label is not None or size is not None:
            raise UsageError("--null-label and --size: a custom model declares them itself.")
        check_scheduler(model.scheduler, f"{ref}: its scheduler")
        if "_class_name" not in model.scheduler:
            raise CheckpointError(f"{ref}: its scheduler has no _class_name, such as DDIMScheduler.")
        channels, height, width = model.shape
        config = {"in_channels": channels, "out_channels": channels, "num_class_embeds": len(model.labels) or None}
        return cls(
            ref=ref,
            folder=source.folder,
            revision=None,
            configs={cls.network: config | {"sha256": python_sha256(ref, model.version)}},
            scheduler_config=model.scheduler,
            index={},
            labels=Labels(model.labels),
            null_label=None,
            size=model.image_size or (height, width),
            steps=model.steps,
            model=model,
        )

    @property
    def name(self) -> str:
        return self.ref.rpartition(":")[2]

    @property
    def part_folders(self) -> dict[str, Path]:
        return {}

    @property
    def has_null(self) -> bool:
        return self.model.has_null or self.uncond is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.model.shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.model.shape[0] if self.model.image_size is None else 3, *self.size)

    def sha256(self, access: Access = DEFAULT_ACCESS, parts: Collection[str] | None = None) -> str:
        return str(self.config["sha256"])

    def check_variant(self, variant: str | None) -> None:
        """It has no files of weights that are known."""

    def check_networks(self) -> None:
        """They are made by its own code alone."""

    def load(self, options: LoadOptions) -> Networks:
        from guidegen.models.custom_networks import CustomDenoiser
        from guidegen.models.networks import Networks, by_label

        denoiser = CustomDenoiser(self, self.model, self.prediction_type, options.device)
        return Networks(by_label(denoiser), denoiser.decode)
