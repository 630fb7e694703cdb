"""Opening a classifier: what it tells apart and what it reads, without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.arguments import one_of
from guidegen.errors import CheckpointError, UsageError
from guidegen.models.configs import read_config, read_json
from guidegen.models.hub import download_weights, locate
from guidegen.models.labels import Labels
from guidegen.models.python_ref import ClassifierModel, label_names
from guidegen.models.weight_files import DEFAULT_ACCESS, Access, weights_sha256
from guidegen.python_file import python_sha256, read_python_ref, split_python_ref

if TYPE_CHECKING:
    from guidegen.models.classifiers.preprocessing import Preprocessing

ZERO_SHOT = ("CLIPModel", "SiglipModel", "ChineseCLIPModel", "AltCLIPModel", "MetaClip2Model")
"""transformers models that tell apart images by texts, each with get_text_features and get_image_features."""
SEPARATOR = ", "
"""Between what run.json says of one classifier and of the next."""
TEMPLATE = "a photo of a {}"
"""What a label's name becomes for a zero-shot classifier (Radford et al. 2021, arXiv 2103.00020, section 3.1.4)."""


@dataclass(frozen=True)
class ClassifierInfo:
    """A classifier on disk.

    Attributes:
        ref: as the person named it.
        folder: where config.json and the weights are.
        revision: the hub commit; None for a plain folder.
        config: its config.json.
        labels: what it tells apart, in the order of its columns; empty for a zero-shot one.
        input: noisy (a `NoisyClassifier`, reads x_t and t) or denoised (reads clean images).
        preprocessor: what a transformers classifier does to an image first; None for a `NoisyClassifier`.
        zero_shot: whether it tells apart whatever texts it is given.
        custom: what a Python file declares (`file.py:NAME`), which has no other files; None for a folder.
    """

    ref: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    labels: Labels
    input: str
    preprocessor: Preprocessing | None
    zero_shot: bool = False
    custom: ClassifierModel | None = None

    def download(self, access: Access = DEFAULT_ACCESS) -> None:
        """Brings its weights into the hub's cache, from the commit that was opened; a plain folder has its own.

        Raises:
            CheckpointError: the hub gives nothing.
        """
        download_weights(self.ref, self.revision, [self.folder], access)

    def sha256(self, access: Access = DEFAULT_ACCESS) -> str:
        """Identity of its weights; a custom classifier says its own."""
        return str(self.config["sha256"]) if self.custom is not None else weights_sha256([self.folder], access)

    @property
    def parts(self) -> tuple[tuple[ClassifierInfo, float], ...]:
        """As `Classifiers` has them: itself, with a weight of one."""
        return ((self, 1.0),)

    @property
    def takes_labels(self) -> bool:
        """Whether it has labels of its own."""
        return not self.zero_shot

    @property
    def name(self) -> str:
        """A short name for run.json."""
        return self.ref.rpartition(":")[2] if self.custom is not None else self.folder.resolve().name

    def columns(self, labels: Labels) -> dict[int, int]:
        """Label id of the UNet -> column of the logits: by name where both have names, else by id."""
        if self.zero_shot:
            return {label: column for column, label in enumerate(i for i, name in labels.names.items() if name)}
        by_id = {int(label): column for column, label in enumerate(self.config["id2label"])}
        by_name = {name.casefold(): by_id[label] for label, name in self.labels.names.items() if name}
        found = {}
        for label, name in labels.names.items():
            column = by_name.get(name.casefold()) if name and by_name else by_id.get(label)
            if column is not None:
                found[label] = column
        return found

    def renumbers(self, labels: Labels) -> bool:
        """Whether some label that both know has another id here, so that only its name matches."""
        if self.zero_shot:
            return False
        ids = list(self.config["id2label"])
        return any(int(ids[column]) != label for label, column in self.columns(labels).items())


@dataclass(frozen=True)
class Classifiers:
    """Several classifiers with a weight each, or one whose weight is not one, described as `ClassifierInfo` does.

    Attributes:
        parts: each with its weight; none twice.
    """

    parts: tuple[tuple[ClassifierInfo, float], ...]

    @property
    def ref(self) -> str:
        """As the person named them."""
        return SEPARATOR.join(f"{part.ref}:{weight}" for part, weight in self.parts)

    @property
    def name(self) -> str:
        """Their names and weights, for run.json."""
        return SEPARATOR.join(f"{part.name}:{weight}" for part, weight in self.parts)

    @property
    def input(self) -> str:
        """What each of them reads."""
        return SEPARATOR.join(part.input for part, _ in self.parts)

    @property
    def labels(self) -> Labels:
        """Those of the first that has labels: what is asked for by them where the model has none."""
        return next((part.labels for part, _ in self.parts if part.takes_labels), Labels({}))

    @property
    def zero_shot(self) -> bool:
        """Whether any of them reads text."""
        return any(part.zero_shot for part, _ in self.parts)

    @property
    def takes_labels(self) -> bool:
        """Whether any of them has labels of its own."""
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
    """What a zero-shot classifier is asked of named labels, in the order of `ClassifierInfo.columns`."""
    return [TEMPLATE.format(labels.name(label)) for label, name in labels.names.items() if name]


def open_classifier(
    ref: str | Path, input: str | None = None, weights: bool = False, access: Access = DEFAULT_ACCESS
) -> ClassifierInfo:
    """Reads what a classifier says of itself.

    Args:
        ref: folder or hub id of a `NoisyClassifier`, of a transformers image classifier, or of a
            CLIP-like model, or `path/to/file.py:NAME` of a `guidegen.ClassifierModel`.
        input: noisy or denoised; None takes what the classifier was made for.
        weights: also download the weights of a hub id.
        access: how it may be read.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for code of its own.
        UsageError: it cannot read noisy images.
        ValueError: `input` is something else.
    """
    one_of("input", input, (None, "noisy", "denoised"))
    ref = str(ref)
    if python_ref := split_python_ref(ref):
        model: ClassifierModel = read_python_ref(ref, ClassifierModel)
        if input not in (None, model.input):
            raise UsageError(f"--classifier-input {input}: {ref} reads {model.input} images.")
        config = {
            "id2label": {str(i): name for i, name in model.labels.items()},
            "sha256": python_sha256(ref, model.version),
        }
        return ClassifierInfo(ref, python_ref[0].parent, None, config, Labels(model.labels), model.input, None, custom=model)
    folder, revision = locate(ref, access.offline)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a classifier: config.json is missing.")
    config = read_config(folder / "config.json")
    noise_aware = config.get("_class_name") == "NoisyClassifier"
    architectures = ", ".join(config.get("architectures") or [])
    zero_shot = architectures in ZERO_SHOT
    if not (noise_aware or zero_shot or "ForImageClassification" in architectures):
        found = config.get("_class_name") or architectures or "no class"
        raise CheckpointError(
            f"{folder} is not a classifier: config.json says {found}, where NoisyClassifier, "
            f"a transformers ...ForImageClassification or a CLIP-like model ({', '.join(ZERO_SHOT)}) is needed."
        )
    if input == "noisy" and not noise_aware:
        raise UsageError(f"--classifier-input noisy: {architectures} takes no timestep, so it reads denoised images only.")
    preprocessor = None if noise_aware else _preprocessor(folder, config)
    labels = Labels({}) if zero_shot else _labels(config, folder)
    if weights:
        download_weights(ref, revision, [folder], access)
    reads = input or ("noisy" if noise_aware else "denoised")
    return ClassifierInfo(ref, folder, revision, config, labels, reads, preprocessor, zero_shot)


def open_classifiers(
    weighted: Sequence[tuple[str, float]], input: str | None = None, access: Access = DEFAULT_ACCESS
) -> AnyClassifier:
    """`open_classifier` of each, with its weight; one of weight 1 is itself.

    Args:
        weighted: what each is named by, and its weight.
        input: for those that can read it; the others keep what they were made for.
        access: as in `open_classifier`.

    Raises:
        CheckpointError, UnsafeError: as `open_classifier` does.
        UsageError: none of them can read that input, or one is named twice.
    """
    parts: list[tuple[ClassifierInfo, float]] = []
    refusals: list[UsageError] = []
    for ref, weight in weighted:
        try:
            part = open_classifier(ref, input, access=access)
        except UsageError as refusal:
            refusals.append(refusal)
            part = open_classifier(ref, access=access)
        if _identity(part) in [_identity(other) for other, _ in parts]:
            raise UsageError(f"--classifier {ref} is named twice: name it once, with the sum of the weights.")
        parts.append((part, weight))
    if len(refusals) == len(parts):
        raise refusals[0]
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else Classifiers(tuple(parts))


def _identity(classifier: ClassifierInfo) -> Any:
    return classifier.config["sha256"] if classifier.custom else classifier.folder.resolve()


def open_backbone(
    ref: str | Path, weights: bool = False, access: Access = DEFAULT_ACCESS
) -> tuple[Path, dict[str, Any], Preprocessing | None]:
    """Folder, config and preprocessing of any image model: a `NoisyClassifier` has no preprocessing of its own.

    Args:
        ref: folder or hub id of a `NoisyClassifier`, or of an image model of transformers or timm.
        weights: also download the weights of a hub id.
        access: how it may be read.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for code of its own.
    """
    folder, revision = locate(str(ref), access.offline)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not an image model: config.json is missing.")
    config = read_config(folder / "config.json")
    if weights:
        download_weights(str(ref), revision, [folder], access)
    if config.get("_class_name") == "NoisyClassifier":
        return folder, config, None
    if "pretrained_cfg" in config:
        from guidegen.models.classifiers.preprocessing import Preprocessing

        return folder, config, Preprocessing.from_timm(config["pretrained_cfg"], folder / "config.json")
    if "model_type" not in config:
        found = config.get("_class_name") or "no model_type"
        raise CheckpointError(f"{folder} is not an image model of transformers or timm: config.json says {found}.")
    return folder, config, _preprocessor(folder, config)


def _labels(config: Mapping[str, Any], folder: Path) -> Labels:
    names = label_names(config.get("id2label"), f"{folder}/config.json: id2label", CheckpointError)
    if not names:
        raise CheckpointError(f"{folder}/config.json has no id2label, which names what it tells apart.")
    return Labels(names)


def _preprocessor(folder: Path, config: Mapping[str, Any]) -> Preprocessing:
    """Of a transformers model; where there are two files, transformers reads the newer kind."""
    from guidegen.models.classifiers.preprocessing import Preprocessing

    if "pretrained_cfg" in config:
        raise CheckpointError(
            f"{folder} has timm's preprocessing (TimmWrapperImageProcessor), which guidegen does not follow for classifiers."
        )
    whole, path = folder / "processor_config.json", folder / "preprocessor_config.json"
    stated = read_json(whole).get("image_processor") if whole.is_file() else None
    if stated is None:
        if not path.is_file():
            raise CheckpointError(f"{folder} is incomplete: preprocessor_config.json is missing.")
        whole, stated = path, read_json(path)
    return Preprocessing.from_config(stated, config.get("model_type"), whole)
