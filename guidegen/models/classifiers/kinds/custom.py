"""Custom classifiers: a `guidegen.ClassifierModel` in a Python file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.errors import UsageError
from guidegen.models.classifiers.info import ClassifierInfo, Source
from guidegen.models.labels import Labels
from guidegen.models.python_ref import ClassifierModel
from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.python_file import python_sha256, read_python_ref, split_python_ref

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Custom(ClassifierInfo):
    """`path/to/file.py:NAME`, which has no folder.

    Attributes:
        model: what NAME is.
    """

    model: ClassifierModel

    @classmethod
    def matches(cls, source: Source) -> bool:
        return split_python_ref(source.ref) is not None

    @classmethod
    def open(cls, source: Source, input: str | None) -> Custom:
        model: ClassifierModel = read_python_ref(source.ref, ClassifierModel)
        if input not in (None, model.input):
            raise UsageError(f"--classifier-input {input}: {source.ref} reads {model.input} images.")
        config = {
            "id2label": {str(i): name for i, name in model.labels.items()},
            "sha256": python_sha256(source.ref, model.version),
        }
        return cls(*source._replace(config=config), None, Labels(model.labels), model.input, model)

    @property
    def folders(self) -> list[Path]:
        return []

    @property
    def name(self) -> str:
        return self.ref.rpartition(":")[2]

    @property
    def ids(self) -> list[int]:
        """In the order that the file has them."""
        return list(self.model.labels)

    @property
    def identity(self) -> Any:
        return self.config["sha256"]

    def sha256(self, access: Access = DEFAULT_ACCESS) -> str:
        """Of the file and of the version that it declares."""
        return str(self.config["sha256"])

    def load(
        self,
        device: torch.device | str,
        access: Access = DEFAULT_ACCESS,
        texts: Sequence[str] = (),
        autocast: torch.dtype | None = None,
    ) -> torch.nn.Module:
        import torch

        from guidegen.models.custom_networks import CustomClassifier

        return CustomClassifier(self.ref, self.model, torch.device(device))
