"""Opening a checkpoint: what it is, without its weights.

Each kind of checkpoint is a `Checkpoint` class in a module of `guidegen.models.kinds`, which is found by itself. Nothing
here imports torch, and no kind does before its networks are made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from guidegen.arguments import several, whole
from guidegen.errors import CheckpointError, UsageError
from guidegen.models.classifiers.info import AnyClassifier, ClassifierInfo
from guidegen.models.classifiers.opening import open_classifier
from guidegen.models.configs import read_config, read_index, read_modular_index
from guidegen.models.discovery import subclasses_in
from guidegen.models.hub import download_weights, locate
from guidegen.models.labels import Labels
from guidegen.models.noise_schedule import in_sigma, is_flow
from guidegen.models.presets import Preset
from guidegen.models.weight_files import DEFAULT_ACCESS, Access, variants, weights_sha256
from guidegen.python_file import split_python_ref
from guidegen.schema import convert
from guidegen.spec.settings import MODE_NAMES

if TYPE_CHECKING:
    from guidegen.models.networks import LoadOptions, Networks
    from guidegen.scores.interfaces import Weights
    from guidegen.scores.noise import PredictionType
    from guidegen.spec.settings import Settings

__all__ = ["Access", "AnyClassifier", "Checkpoint", "ClassifierInfo", "open_checkpoint", "open_classifier"]

DEFAULT_STEPS = 50
MODES = tuple(MODE_NAMES)


@dataclass(frozen=True)
class Source:
    """What a reference names, read as far as its kind shows.

    Attributes:
        ref: as the person named it: a folder, a hub id, or `file.py:NAME`.
        folder: on disk; the one around a Python file.
        revision: the hub commit; None for a plain folder.
        index: model_index.json; empty where there is none.
        config: config.json of a folder without model_index.json; else empty.
    """

    ref: str
    folder: Path
    revision: str | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ABC):
    """A diffusion checkpoint on disk; each kind of checkpoint is a class of its own.

    A kind answers: is this mine (`matches`), what does it draw (`open`), do its configs make networks that draw
    (`check_networks`), and where are they (`load`). Its noise convention follows from `scheduler_config`, as
    `guidegen.models.noise_schedule` has it. Where alpha is 1 (variance exploding, EDM) the config says sigma_min and
    sigma_max, and the denoiser that is loaded takes x = x_0 + sigma eps (B, C, H, W) as it is and sigma () as its
    timestep, does all preconditioning of its network itself, and predicts x_0: its prediction type is "sample".

    Attributes:
        ref: as the person named it.
        folder: its folder.
        revision: the hub commit; None for a plain folder.
        configs: config.json of each part with weights, by the part's name.
        scheduler_config: the scheduler's config.
        index: model_index.json; empty for a plain model folder.
        labels: what it can draw; empty for an unconditional one and for prompts.
        null_label: the id that means "no label"; None where there is none.
        size: (height, width) of the images.
        steps: the number of steps to take by default.
        missing: what the folder lacks and what stands in for it.
        uncond: what stands in for a null label, `icg`; None for nothing.
        network: the part that is called at each step.
        reads_prompts: whether prompts condition it, not labels.
        channels_last: whether its network runs fastest in that memory layout.
        guided_by_unconditional: whether an unconditional network may guide one with labels, as classifier-free guidance
            with a second network.
        has_layers: whether its network is a model of diffusers, of whose layers some can be left out.
        asked_last: whether a source is only of this kind if it is of no other.
        default_scheduler: class of the scheduler to draw with by default; None for that of its config.
        own_loop: whether it is a pipeline of diffusers that draws in its own loop.
        renormalised: whether that gives guided predictions the length of the conditional ones, which it so needs at any w.
    """

    ref: str
    folder: Path
    revision: str | None
    configs: Mapping[str, Mapping[str, Any]]
    scheduler_config: Mapping[str, Any]
    index: Mapping[str, Any]
    labels: Labels
    null_label: int | None
    size: tuple[int, int]
    steps: int
    missing: list[str] = field(default_factory=list)
    uncond: str | None = None

    network: ClassVar[str]
    reads_prompts: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False
    guided_by_unconditional: ClassVar[bool] = False
    has_layers: ClassVar[bool] = True
    asked_last: ClassVar[bool] = False
    default_scheduler: ClassVar[str | None] = None
    own_loop: ClassVar[bool] = False
    renormalised: ClassVar[bool] = False

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of its kind, for people."""

    @classmethod
    @abstractmethod
    def matches(cls, source: Source) -> bool:
        """Whether a source is of this kind."""

    @classmethod
    @abstractmethod
    def open(cls, source: Source, null_label: int | None, size: tuple[int, int] | None) -> Checkpoint:
        """Reads a source of this kind; the other arguments and the errors are those of `open_checkpoint`."""

    @abstractmethod
    def check_networks(self) -> None:
        """Makes the networks without their weights.

        Raises:
            CheckpointError: a config makes no network, or one that does not draw.
        """

    @abstractmethod
    def load(self, options: LoadOptions) -> Networks:
        """Loads the networks.

        Raises:
            CheckpointError: the weights do not load.
        """

    def with_network(self, ref: str, folder: Path, revision: str | None) -> Checkpoint | None:
        """This checkpoint with the network of a folder that holds nothing else; None where it holds no network like it."""
        return None

    @property
    def name(self) -> str:
        """A short name for files and grids."""
        if self.revision is None:
            return self.folder.resolve().name
        return self.ref.partition("@")[0].rpartition("/")[2]

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the network."""
        return self.configs[self.network]

    @property
    def identity(self) -> tuple[Any, ...]:
        """What images depend on beside the weights."""
        return (self.configs, self.scheduler_config, None)

    @property
    def decoder(self) -> str | None:
        """The part that makes images of latents; None where the network draws images."""
        return None

    @property
    def decoder_config(self) -> Mapping[str, Any]:
        """config.json of the decoder; empty without one."""
        return {} if self.decoder is None else self.configs[self.decoder]

    @property
    def latent(self) -> bool:
        """Whether the network draws latents."""
        return self.decoder is not None

    @property
    def factor(self) -> int:
        """Pixels along an edge of the image for one of the latents."""
        halvings = len(self.decoder_config.get("block_out_channels", ())) - 1
        return 1 << max(0, halvings)

    @property
    def part_folders(self) -> dict[str, Path]:
        """Where the config and the weights of each part are."""
        return {part: part_folder(self.folder, part) if self.index else self.folder for part in self.configs}

    @property
    def classes(self) -> int | None:
        """Classes that the network distinguishes, the null class included; None without labels."""
        classes: int | None = self.config.get("num_class_embeds")
        return classes

    @property
    def class_conditional(self) -> bool:
        """Whether the network takes a label."""
        return self.classes is not None or self.config.get("class_embed_type") is not None

    @property
    def conditional(self) -> bool:
        """Whether the network takes a label or a prompt."""
        return self.reads_prompts or self.class_conditional

    @property
    def published(self) -> dict[str, Preset]:
        """Published settings of it, by their names."""
        where = f"{self.folder}: published"
        return convert(self.index.get("published", {}), dict[str, Preset], where, CheckpointError)

    @property
    def cannot_draw(self) -> str | None:
        """Why it draws no images in any mode, and can only guide another; None where it draws."""
        return None

    @property
    def has_null(self) -> bool:
        """Whether the network can be asked without its label; a prompt may always be empty."""
        return self.reads_prompts or self.null_label is not None or self.uncond is not None

    @property
    def learned_variance(self) -> bool:
        """Whether the network predicts a variance beside the mean."""
        return bool(self.config["out_channels"] == 2 * self.config["in_channels"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network draws: of the latents where there is a decoder."""
        return (self.config["in_channels"], self.size[0] // self.factor, self.size[1] // self.factor)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return (self.decoder_config.get("out_channels", 3) if self.latent else self.config["in_channels"], *self.size)

    @property
    def prediction_type(self) -> PredictionType:
        """What the denoiser predicts."""
        if in_sigma(self.scheduler_config):
            return "sample"
        if is_flow(self.scheduler_config):
            return "flow"
        predicted: PredictionType = self.scheduler_config.get("prediction_type", "epsilon")
        return predicted

    @property
    def recommended(self) -> str | None:
        """Weights and steps that were published for its kind, with the source; None where there are none."""
        return None

    @property
    def convention(self) -> str | None:
        """What w is in the terms of its pipeline; None where guidegen's own loop draws."""
        return None

    def loop_calls(self, weights: Sequence[Weights]) -> tuple[tuple[bool, bool, bool], ...]:
        """Whether a pipeline's own loop predicts with the prompt, without, and by a guiding network, at each step."""
        raise NotImplementedError

    def check_settings(self, settings: Settings, scheduler: str | None) -> None:  # noqa: B027
        """Raises UsageError where its own loop, if it has one, cannot serve settings or the scheduler asked for."""

    def download(self, access: Access = DEFAULT_ACCESS) -> None:
        """Brings its weights into the hub's cache, from the commit that was opened; a plain folder has its own.

        Raises:
            CheckpointError: the hub gives nothing.
            UsageError: it has no weights of the variant asked for.
        """
        download_weights(self.ref, self.revision, self.part_folders.values(), access)
        self.check_variant(access.variant)

    def sha256(self, access: Access = DEFAULT_ACCESS, parts: Collection[str] | None = None) -> str:
        """Identity of its weights, or of those of some parts."""
        folders = [folder for part, folder in self.part_folders.items() if parts is None or part in parts]
        return weights_sha256(folders, access)

    def check_variant(self, variant: str | None) -> None:
        """Raises UsageError where it has no weights of that variant; None is any."""
        found = {name for folder in self.part_folders.values() for name in variants(folder)}
        if variant is not None and variant not in found:
            others = ", ".join(sorted(name for name in found if name)) or "plain ones only"
            raise UsageError(f"--variant {variant}: {self.folder} has no {variant} files (it has {others}).")

    @property
    def bundled_classifier(self) -> str | None:
        """The noise-aware classifier in the same folder, if there is one."""
        folder = self.folder / "classifier"
        return str(folder) if (folder / "config.json").is_file() else None

    @property
    def guiding_folder(self) -> Path | None:
        """The weaker version of the network in the same folder, if there is one: `unet_weak` beside `unet`."""
        folder = self.folder / f"{self.network}_weak"
        return folder if self.index and (folder / "config.json").is_file() else None

    def known(self, classifier: AnyClassifier | None) -> Labels:
        """The labels that are asked for: its own, or the classifier's where it has none."""
        return self.labels if self.class_conditional or classifier is None else classifier.labels

    def refusal(self, mode: str, classifier: bool, needs_null: bool = True) -> str | None:
        """Why this checkpoint cannot serve `mode`, or None if it can.

        Args:
            mode: one of `MODES`.
            classifier: whether there is one.
            needs_null: modes cfg and both: whether some weight of the label's own score is not 1.
        """
        if self.cannot_draw:
            return self.cannot_draw
        if mode == "autoguidance":
            lack = "there is no guiding model beside it. Name one: --guide-model ID|DIR"
            return None if self.guiding_folder else lack + (", or pag, skip or tsg" if self.has_layers else "")
        if mode in ("cfg", "both") and not self.conditional:
            return "the model is unconditional: it takes no label. Use --mode classifier with a classifier"
        if (needs_null or mode == "classifier") and mode != "none" and self.conditional and not self.has_null:
            alone = "is its conditional score" if mode == "cfg" else "adds a classifier to its conditional score"
            return (
                "the model has no null label, so it has no unconditional score to guide from. If it was trained with one, "
                "name it: --null-label ID; --uncond icg takes random labels instead; "
                f"--mode {'cfg' if mode == 'cfg' else 'both'} --w 1 {alone}"
            )
        if mode in ("classifier", "both") and not classifier:
            return "there is no classifier. Name one: --classifier ID|DIR"
        return None


def part_folder(folder: Path, part: str) -> Path:
    """Where a part of a pipeline is: in a folder of its name, or beside model_index.json as in the oldest pipelines."""
    alone = (folder / "config.json").is_file() and not (folder / part).is_dir()
    return folder if alone else folder / part


def open_checkpoint(
    ref: str | Path,
    null_label: int | None = None,
    size: tuple[int, int] | None = None,
    weights: bool = False,
    access: Access = DEFAULT_ACCESS,
) -> Checkpoint:
    """Reads what a checkpoint says of itself.

    Args:
        ref: a `UNet2DModel` folder, a pipeline folder of one of the kinds of `guidegen.models.kinds`, a hub id
            of either, or `path/to/file.py:NAME` of a `guidegen.Model`.
        null_label: overrides the declared null label.
        size: (height, width) of the images; None takes the checkpoint's own.
        weights: also download the weights of a hub id.
        access: how it may be read.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for code of its own.
        UsageError: `null_label` is no class of the model, or `size` is none that it can draw.
    """
    for side in () if size is None else several("size", size, 2, "of height and width"):
        whole("size", side, 1)
    source = _read_source(str(ref), access)
    kind = next(kind for kind in checkpoint_kinds() if kind.matches(source))
    checkpoint = kind.open(source, null_label, size)
    if weights:
        checkpoint.download(access)
    elif not checkpoint.revision:
        checkpoint.check_variant(access.variant)
    return checkpoint


def _read_source(ref: str, access: Access) -> Source:
    if python_ref := split_python_ref(ref):
        return Source(ref, python_ref[0].parent)
    folder, revision = locate(ref, access.offline)
    if (folder / "model_index.json").is_file():
        return Source(ref, folder, revision, index=read_index(folder))
    if (folder / "modular_model_index.json").is_file():
        return Source(ref, folder, revision, index=read_modular_index(folder))
    if (folder / "config.json").is_file():
        return Source(ref, folder, revision, config=read_config(folder / "config.json"))
    raise CheckpointError(f"{folder} is not a checkpoint: neither model_index.json nor config.json is in it.")


@cache
def checkpoint_kinds() -> list[type[Checkpoint]]:
    """The kinds of all modules of `guidegen.models.kinds`, in the order in which a source is held against them."""
    found = subclasses_in("guidegen.models.kinds", Checkpoint)  # type: ignore[type-abstract]
    return sorted(found, key=lambda kind: kind.asked_last)
