"""What is known of a classifier without its weights: what it distinguishes and which input it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from guidegen.errors import CheckpointError, UsageError
from guidegen.models.hub import download_weights
from guidegen.models.labels import Labels
from guidegen.models.python_ref import label_names
from guidegen.models.weight_files import DEFAULT_ACCESS, Access, weights_sha256

if TYPE_CHECKING:
    import torch

    from guidegen.models.classifiers.preprocessing import Preprocessing

SEPARATOR = ", "
"""Between the entries of several classifiers in run.json."""
TEMPLATE = "a photo of a {}"
"""What a label's name becomes for a zero-shot classifier (Radford et al. 2021, arXiv 2103.00020, section 3.1.4)."""


class Source(NamedTuple):
    """What a reference leads to, before its kind is known.

    Attributes:
        ref: as the user named it.
        folder: holds config.json and the weights; the parent of a Python file.
        revision: the hub commit; None for a plain folder.
        config: its config.json; empty for a Python file.
    """

    ref: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]

    @property
    def architectures(self) -> str:
        """The classes of transformers that its config.json names, separated by commas."""
        return ", ".join(self.config.get("architectures") or [])

    def read_labels(self) -> Labels:
        """The labels that its config.json names.

        Raises:
            CheckpointError: it names none.
        """
        names = label_names(self.config.get("id2label"), f"{self.folder}/config.json: id2label", CheckpointError)
        if not names:
            raise CheckpointError(f"{self.folder}/config.json has no id2label, which names what it distinguishes.")
        return Labels(names)

    def refuse_noisy(self, input: str | None) -> None:
        """Raises UsageError where `input` is noisy: for networks without a timestep."""
        if input == "noisy":
            raise UsageError(
                f"--classifier-input noisy: {self.architectures} takes no timestep, so it reads denoised images only."
            )


@dataclass(frozen=True)
class ImageModel(ABC):
    """An image model, known without its weights. Each subclass is a kind.

    Attributes:
        ref: as the user named it.
        folder: holds config.json and the weights; the parent of a Python file.
        revision: the hub commit; None for a plain folder.
        config: its config.json.
        preprocessor: from images in [-1, 1] to the input of the network; None where they are its input.
    """

    ref: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    preprocessor: Preprocessing | None

    expected: ClassVar[str | None] = None
    """How an error names the kind, as what config.json may be of; None where there is no config.json."""

    @classmethod
    @abstractmethod
    def matches(cls, source: Source) -> bool:
        """Whether it is of this kind."""

    @classmethod
    @abstractmethod
    def open(cls, source: Source, input: str | None) -> ImageModel:
        """Reads all but the weights.

        Args:
            source: of this kind.
            input: noisy or denoised; None for the input that it was trained on.

        Raises:
            CheckpointError: incomplete or damaged.
            UsageError: it does not take that input.
        """

    @abstractmethod
    def load_features(self, device: torch.device | str, access: Access = DEFAULT_ACCESS) -> torch.nn.Module:
        """A module in eval mode on `device`, from images (B, C, H, W) in [-1, 1] to features (B, D).

        Raises:
            CheckpointError: the weights do not load, or it has no such features.
            UsageError: a package that it needs is not installed.
        """

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the images that it reads; None where it reads any."""
        return None

    @property
    def channels(self) -> int | None:
        """Channels of the images that it reads; None where any will do."""
        return None

    @property
    def folders(self) -> list[Path]:
        """Folders with weight files."""
        return [self.folder]

    def download(self, access: Access = DEFAULT_ACCESS) -> None:
        """Downloads its weights into the hub's cache, from the commit that was opened; nothing for a plain folder.

        Raises:
            CheckpointError: the hub does not have them or cannot be reached.
        """
        download_weights(self.ref, self.revision, self.folders, access)

    def sha256(self, access: Access = DEFAULT_ACCESS) -> str:
        """sha256 that identifies its weights."""
        return weights_sha256(self.folders, access)


@dataclass(frozen=True)
class ClassifierInfo(ImageModel):
    """A classifier, known without its weights. Each subclass is a kind.

    Attributes:
        labels: what it distinguishes; empty for a zero-shot one.
        input: noisy (it reads x_t and t) or denoised (it reads clean images).
    """

    labels: Labels
    input: str

    zero_shot: ClassVar[bool] = False
    """Whether it distinguishes any texts that it is given, instead of labels."""

    @abstractmethod
    def load(
        self,
        device: torch.device | str,
        access: Access = DEFAULT_ACCESS,
        texts: Sequence[str] = (),
        autocast: torch.dtype | None = None,
    ) -> torch.nn.Module:
        """What `load_classifier` returns, with the same arguments."""

    @property
    def logits(self) -> int:
        """Outputs of its last linear layer."""
        return len(self.labels)

    def load_features(self, device: torch.device | str, access: Access = DEFAULT_ACCESS) -> torch.nn.Module:
        """The input of its last linear layer; it must have been opened for denoised input."""
        from guidegen.models.classifiers.networks import Penultimate

        return Penultimate(self.load(device, access), self.logits)

    def check_network(self) -> None:
        """Makes the network without its weights, where that shows whether its config is right.

        Raises:
            CheckpointError: config.json does not make a network.
        """

    @property
    def parts(self) -> tuple[tuple[ClassifierInfo, float], ...]:
        """As `Classifiers` has them: itself, with a weight of one."""
        return ((self, 1.0),)

    @property
    def takes_labels(self) -> bool:
        """Whether it has labels."""
        return not self.zero_shot

    @property
    def name(self) -> str:
        """A short name for run.json."""
        return self.folder.resolve().name

    @property
    def identity(self) -> Any:
        """Equal for two references to the same classifier."""
        return self.folder.resolve()

    @property
    def ids(self) -> list[int]:
        """The label id of each column, ascending; the order in config.json says nothing, as it is often that of texts."""
        return list(self.labels)

    def columns(self, labels: Labels) -> dict[int, int]:
        """Label id of the denoiser -> column of the logits: by name where both have names, else by id."""
        by_id = {label: column for column, label in enumerate(self.ids)}
        by_name = {name.casefold(): by_id[label] for label, name in self.labels.names.items() if name}
        found = {}
        for label, name in labels.names.items():
            column = by_name.get(name.casefold()) if name and by_name else by_id.get(label)
            if column is not None:
                found[label] = column
        return found

    def renumbers(self, labels: Labels) -> bool:
        """Whether some label that both know has another id here, so that only its name matches."""
        ids = self.ids
        return any(ids[column] != label for label, column in self.columns(labels).items())


@dataclass(frozen=True)
class Classifiers:
    """Several classifiers with a weight each, or one whose weight is not one, described as `ClassifierInfo` does.

    Attributes:
        parts: each with its weight; none twice.
    """

    parts: tuple[tuple[ClassifierInfo, float], ...]

    @property
    def ref(self) -> str:
        """As the user named them."""
        return SEPARATOR.join(f"{part.ref}:{weight}" for part, weight in self.parts)

    @property
    def name(self) -> str:
        """Their names and weights, for run.json."""
        return SEPARATOR.join(f"{part.name}:{weight}" for part, weight in self.parts)

    @property
    def input(self) -> str:
        """The input of each."""
        return SEPARATOR.join(part.input for part, _ in self.parts)

    @property
    def labels(self) -> Labels:
        """Those of the first that has labels: `--label` names them where the model has none."""
        return next((part.labels for part, _ in self.parts if part.takes_labels), Labels({}))

    @property
    def zero_shot(self) -> bool:
        """Whether any of them reads text."""
        return any(part.zero_shot for part, _ in self.parts)

    @property
    def takes_labels(self) -> bool:
        """Whether any of them has labels."""
        return any(part.takes_labels for part, _ in self.parts)

    @property
    def config(self) -> list[Mapping[str, Any]]:
        """The config of each."""
        return [part.config for part, _ in self.parts]

    @property
    def preprocessor(self) -> list[Preprocessing | None]:
        """The preprocessing of each."""
        return [part.preprocessor for part, _ in self.parts]


AnyClassifier = ClassifierInfo | Classifiers


def label_texts(labels: Labels) -> list[str]:
    """The texts of named labels for a zero-shot classifier, in the order of `ClassifierInfo.columns`."""
    return [TEMPLATE.format(labels.name(label)) for label, name in labels.names.items() if name]
