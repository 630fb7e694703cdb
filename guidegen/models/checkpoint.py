"""Opening a checkpoint: what it is, without its weights.

Nothing here imports torch. `guidegen.models.loading` reads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guidegen.arguments import several, whole
from guidegen.errors import CheckpointError, UsageError
from guidegen.models.classifiers.info import AnyClassifier, ClassifierInfo
from guidegen.models.classifiers.opening import open_classifier
from guidegen.models.configs import check_scheduler, read_config, read_index
from guidegen.models.hub import download_weights, locate
from guidegen.models.kinds.kind import (
    ADM,
    CUSTOM,
    KINDS,
    PIXEL,
    Kind,
    check_network,
    check_size,
    check_tokenizers,
    class_count,
    is_dit,
    kind_of,
    native_size,
    part_config,
    vae_factor,
)
from guidegen.models.labels import Labels
from guidegen.models.noise_schedule import is_flow, scheduler_config_in
from guidegen.models.python_ref import Model, label_names
from guidegen.models.weight_files import DEFAULT_ACCESS, Access, refuse_special, variants, weights_sha256
from guidegen.python_file import python_sha256, read_python_ref, split_python_ref

__all__ = ["Access", "AnyClassifier", "Checkpoint", "ClassifierInfo", "open_checkpoint", "open_classifier"]

DEFAULT_STEPS = 50
MODES = ("cfg", "classifier", "both", "none", "autoguidance")


@dataclass(frozen=True)
class Checkpoint:
    """A diffusion checkpoint on disk.

    Attributes:
        ref: as the person named it.
        kind: its layout.
        folder: its folder.
        revision: the hub commit; None for a plain folder.
        configs: config.json of each part with weights, by the part's name.
        scheduler_config: the scheduler's config.
        index: model_index.json; empty for a plain model folder.
        labels: what it can draw; empty for an unconditional one and for prompts.
        null_label: the id that means "no label"; None where there is none.
        size: (height, width) of the images.
        steps: the number of steps to take unless told.
        missing: what the folder lacks and what stands in for it.
        custom: what a Python file declares (`file.py:NAME`), which has no parts; None for a folder.
    """

    ref: str
    kind: Kind
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
    custom: Model | None = None

    @property
    def name(self) -> str:
        """A short name for files and grids."""
        if self.custom is not None:
            return self.ref.rpartition(":")[2]
        if self.revision is None:
            return self.folder.resolve().name
        return self.ref.partition("@")[0].rpartition("/")[2]

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the network."""
        return self.configs[self.kind.network]

    @property
    def part_folders(self) -> dict[str, Path]:
        """Where the config and the weights of each part are."""
        if self.custom is not None:
            return {}
        return {part: self.folder / part if self.index else self.folder for part in self.configs}

    @property
    def classes(self) -> int | None:
        """Classes that the network tells apart, the null class included; None without labels."""
        return class_count(self.config)

    @property
    def class_conditional(self) -> bool:
        return class_count(self.config) is not None or self.config.get("class_embed_type") is not None

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts condition it, not labels."""
        return self.kind.text

    @property
    def latent(self) -> bool:
        """Whether it draws latents, which a VAE decodes."""
        return self.kind.latent

    @property
    def conditional(self) -> bool:
        """Whether the network takes a label or a prompt."""
        return self.reads_prompts or self.class_conditional

    @property
    def has_null(self) -> bool:
        """Whether the network can be asked without its label; a prompt may always be empty."""
        return self.custom.has_null if self.custom is not None else self.reads_prompts or self.null_label is not None

    @property
    def learned_variance(self) -> bool:
        return bool(self.config["out_channels"] == 2 * self.config["in_channels"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network draws: of the latents where there is a VAE."""
        if self.custom is not None:
            return self.custom.shape
        factor = vae_factor(self.configs["vae"]) if self.kind.latent else 1
        return (self.config["in_channels"], self.size[0] // factor, self.size[1] // factor)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        latent = self.kind.latent or (self.custom is not None and self.custom.image_size is not None)
        channels = self.configs.get("vae", {}).get("out_channels", 3) if latent else self.config["in_channels"]
        return (channels, *self.size)

    @property
    def prediction_type(self) -> str:
        """epsilon, sample, v_prediction or flow."""
        return "flow" if is_flow(self.scheduler_config) else self.scheduler_config.get("prediction_type", "epsilon")

    def download(self, access: Access = DEFAULT_ACCESS) -> None:
        """Brings its weights into the hub's cache, from the commit that was opened; a plain folder has its own.

        Raises:
            CheckpointError: the hub gives nothing.
            UsageError: it has no weights of the variant asked for.
        """
        download_weights(self.ref, self.revision, self.part_folders.values(), access)
        if access.variant is not None and self.custom is None:
            self.check_variant(access.variant)

    def sha256(self, access: Access = DEFAULT_ACCESS) -> str:
        """Identity of its weights; a custom model says its own."""
        if self.custom is not None:
            return str(self.config["sha256"])
        return weights_sha256(self.part_folders.values(), access)

    def check_variant(self, variant: str) -> None:
        """Raises UsageError where it has no weights of that variant."""
        found = {name for folder in self.part_folders.values() for name in variants(folder)}
        if variant not in found:
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
        folder = self.folder / f"{self.kind.network}_weak"
        return folder if self.index and (folder / "config.json").is_file() else None

    def known(self, classifier: AnyClassifier | None) -> Labels:
        """The labels that are asked for: its own, or the classifier's where it has none."""
        return self.labels if self.class_conditional or classifier is None else classifier.labels

    def refusal(self, mode: str, classifier: bool, needs_null: bool = True) -> str | None:
        """Why this checkpoint cannot serve `mode`, or None if it can.

        Args:
            mode: one of `MODES`.
            classifier: whether there is one.
            needs_null: mode both: whether some weight of the label's own score is not 1.
        """
        if mode == "autoguidance":
            lack = "there is no guiding model beside it. Name one: --guide-model ID|DIR"
            return None if self.guiding_folder else lack + ("" if self.custom else ", or pag or skip")
        if mode in ("cfg", "both") and not self.conditional:
            return "the model is unconditional: it takes no label. Use --mode classifier with a classifier"
        needs_null = mode in ("cfg", "classifier") or (mode == "both" and needs_null)
        if needs_null and self.conditional and not self.has_null:
            alone = ". --mode both --w 1 adds a classifier to its conditional score" if mode != "cfg" else ""
            return (
                "the model has no null label, so it has no unconditional score to guide from. "
                f"If it was trained with one, name it: --null-label ID{alone}"
            )
        if mode in ("classifier", "both") and not classifier:
            return "there is no classifier. Name one: --classifier ID|DIR"
        return None


def open_checkpoint(
    ref: str | Path,
    null_label: int | None = None,
    size: tuple[int, int] | None = None,
    weights: bool = False,
    access: Access = DEFAULT_ACCESS,
) -> Checkpoint:
    """Reads what a checkpoint says of itself.

    Args:
        ref: a `UNet2DModel` folder, a pipeline folder of one of `KINDS` or of a `UNet2DModel` and a
            scheduler, a hub id of either, or `path/to/file.py:NAME` of a `guidegen.Model`.
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
    ref = str(ref)
    if split_python_ref(ref):
        return _custom_checkpoint(ref, read_python_ref(ref, Model), null_label, size)
    folder, revision = locate(ref, access.offline)
    index: dict[str, Any] = {}
    missing = []
    if (folder / "model_index.json").is_file():
        index = read_index(folder)
        kind = kind_of(index, folder)
        configs = {part: part_config(folder, part) for part in (kind.network, *kind.others)}
        check_tokenizers(folder, kind)
    elif (folder / "config.json").is_file():
        config = read_config(folder / "config.json")
        kind = ADM if config.get("_class_name") == ADM.network_class else PIXEL
        configs = {kind.network: config}
    else:
        raise CheckpointError(f"{folder} is not a checkpoint: neither model_index.json nor config.json is in it.")
    refuse_special([folder, *(entry for entry in folder.iterdir() if entry.is_dir())])
    check_network(kind, configs[kind.network], folder / kind.network if index else folder)
    configs[kind.network] = {"in_channels": 3, "out_channels": 3} | configs[kind.network]
    scheduler_config = scheduler_config_in(folder)
    if scheduler_config is None:
        scheduler_config = {"_class_name": "DDPMScheduler"}
        missing.append("scheduler_config.json (DDPM's linear schedule and epsilon prediction are assumed)")
    if kind == KINDS["StableDiffusionPipeline"]:  # as diffusers' pipeline corrects outdated configs
        scheduler_config |= {"steps_offset": 1, "clip_sample": False}
    said = configs[kind.network] | index
    labels, null = declared_labels(said, configs[kind.network], folder, null_label)
    steps = said.get("default_steps") or DEFAULT_STEPS
    native = native_size(kind, configs, folder)
    if size is not None:
        check_size(kind, configs, size, native)
    checkpoint = Checkpoint(
        ref, kind, folder, revision, configs, scheduler_config, index, labels, null, size or native, steps, missing
    )
    if weights:
        checkpoint.download(access)
    elif access.variant is not None and not revision:
        checkpoint.check_variant(access.variant)
    return checkpoint


def _custom_checkpoint(ref: str, custom: Model, null_label: int | None, size: tuple[int, int] | None) -> Checkpoint:
    if null_label is not None or size is not None:
        raise UsageError("--null-label and --size: a custom model declares them itself.")
    channels, height, width = custom.shape
    check_scheduler(custom.scheduler, f"{ref}: its scheduler")
    if "_class_name" not in custom.scheduler:
        raise CheckpointError(f"{ref}: its scheduler has no _class_name, such as DDIMScheduler.")
    config = {"in_channels": channels, "out_channels": channels, "num_class_embeds": len(custom.labels) or None}
    identity = {"sha256": python_sha256(ref, custom.version)}
    folder = Path(ref.rpartition(":")[0]).parent
    image_size = custom.image_size or (height, width)
    return Checkpoint(
        ref,
        CUSTOM,
        folder,
        None,
        {"own": config | identity},
        custom.scheduler,
        {},
        Labels(custom.labels),
        None,
        image_size,
        custom.steps,
        custom=custom,
    )


def declared_labels(
    said: Mapping[str, Any], config: Mapping[str, Any], folder: Path, asked: int | None
) -> tuple[Labels, int | None]:
    """Labels and null label; the one place that decides which id means "no label".

    Asked for, else declared as `null_label`, else the last class where the list of names is
    exactly one shorter than the classes; a DiT's is its last.
    """
    count = class_count(config)
    if count is None:
        if asked is not None:
            raise UsageError(f"--null-label {asked}: the model has no classes.")
        return Labels({}), None
    names = label_names(said.get("id2label") or {}, f"{folder}: id2label", CheckpointError)
    declared = said.get("null_label")
    null = asked if asked is not None else declared
    if null is None and (is_dit(config) or (names and len(names) == count - 1 and count - 1 not in names)):
        null = count - 1
    if null is not None and not 0 <= null < count:
        message = f"null label {null} is not a class of the model, which has {count} (0 to {count - 1})."
        raise (
            UsageError(f"--{message.replace(' ', '-', 1)}") if asked is not None else CheckpointError(f"{folder}: {message}")
        )
    names = {i: name for i, name in (names or dict.fromkeys(range(count), "")).items() if i != null}
    if not all(0 <= i < count for i in names):
        raise CheckpointError(f"{folder}: id2label names ids past the model's {count} classes.")
    return Labels(names), null
