"""What the kinds of checkpoint share that are folders of models of diffusers and transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from guidegen.errors import CheckpointError, UnsafeError, UsageError
from guidegen.models.checkpoint import DEFAULT_STEPS, Checkpoint, Source, checkpoint_kinds, part_folder
from guidegen.models.configs import named_parts, read_config
from guidegen.models.families import FAMILIES
from guidegen.models.labels import Labels
from guidegen.models.noise_schedule import scheduler_config_in
from guidegen.models.python_ref import LARGEST_EDGE, label_names
from guidegen.models.weight_files import refuse_special

if TYPE_CHECKING:
    from torch import Tensor

    from guidegen.models.networks import Condition, LoadOptions, Networks
    from guidegen.scores.interfaces import Denoiser

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Beside `deprecated`, where diffusers has old schedulers, and guidegen for networks."""


class FolderCheckpoint(Checkpoint):
    """A pipeline folder with a network, a scheduler and other parts, or a folder with a network alone.

    Attributes:
        pipeline: the `_class_name` of its model_index.json.
        network_classes: those of the network that it opens.
        default_channels: those of a network whose config names none.
        others: parts with weights beside the network.
        tokenizers: parts that turn a prompt into tokens.
        not_loaded: parts that it may have, and draws without.
        scheduler_class: that of its scheduler, which says what its network gives; None for any that no kind has.
        scheduler_changes: what replaces keys of the scheduler's config.
        default_steps: the number of steps to take where nothing else is declared.
        last_is_null: whether the last class always means "no label".
    """

    pipeline: ClassVar[str | None] = None
    network_classes: ClassVar[tuple[str, ...]]
    default_channels: ClassVar[int] = 3
    others: ClassVar[tuple[str, ...]] = ()
    tokenizers: ClassVar[tuple[str, ...]] = ()
    not_loaded: ClassVar[tuple[str, ...]] = ()
    scheduler_class: ClassVar[str | None] = None
    scheduler_changes: ClassVar[Mapping[str, Any]] = {}
    default_steps: ClassVar[int] = DEFAULT_STEPS
    last_is_null: ClassVar[bool] = False

    @classmethod
    def matches(cls, source: Source) -> bool:
        return bool(source.index) and source.index.get("_class_name") == cls.pipeline

    @classmethod
    def others_among(cls, named: Collection[str]) -> Sequence[str]:
        """The parts with weights beside the network that a pipeline should have, given those that it names."""
        return cls.others

    @classmethod
    def open(cls, source: Source, null_label: int | None, size: tuple[int, int] | None) -> Self:
        folder, index, missing = source.folder, source.index, []
        parts = cls._parts(source) if index else ()
        configs = {part: _part_config(folder, part) for part in parts} or {cls.network: dict(source.config)}
        _check_tokenizers(folder, cls.tokenizers)
        refuse_special([folder, *(entry for entry in folder.iterdir() if entry.is_dir())])
        scheduler_config = scheduler_config_in(folder)
        if scheduler_config is None:
            scheduler_config = {"_class_name": "DDPMScheduler"}
            missing.append("scheduler_config.json (DDPM's linear schedule and epsilon prediction are assumed)")
        declared = {**configs[cls.network], **index}
        checkpoint = cls(
            ref=source.ref,
            folder=folder,
            revision=source.revision,
            configs=cls._with_channels(configs),
            scheduler_config={**scheduler_config, **cls.scheduler_changes},
            index=index,
            labels=Labels({}),
            null_label=None,
            size=(0, 0),
            steps=declared.get("default_steps") or cls.default_steps,
            missing=missing,
        )
        checkpoint.check_config()
        labels, null = checkpoint._declared_labels(declared, null_label)
        native = checkpoint._native_size()
        if size is not None:
            checkpoint.check_size(size, native)
        return replace(checkpoint, labels=labels, null_label=null, size=size or native)

    def with_network(self, ref: str, folder: Path, revision: str | None) -> Self | None:
        path = folder / "config.json"
        if (folder / "model_index.json").is_file() or not path.is_file():
            return None
        config = read_config(path)
        if config.get("_class_name") not in self.network_classes:
            return None
        configs = self._with_channels({**self.configs, self.network: config})
        noise = scheduler_config_in(folder) or self.scheduler_config
        alone = replace(self, ref=ref, folder=folder, revision=revision, index={}, configs=configs, scheduler_config=noise)
        alone.check_config()
        labels, null = self.labels, config.get("null_label", self.null_label)
        if "id2label" in config:
            labels, null = alone._declared_labels(config, null)
        return replace(alone, labels=labels, null_label=null)

    @classmethod
    def _with_channels(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        channels = {"in_channels": cls.default_channels, "out_channels": cls.default_channels}
        return {**configs, cls.network: {**channels, **configs[cls.network]}}

    def check_config(self) -> None:
        """Refuses a network of another class, with inputs that guidegen does not feed, or a scheduler of others.

        Raises:
            CheckpointError: that is what its config says.
        """
        wanted = (self.index[self.network][1],) if self.index else self.network_classes
        name = self.config.get("_class_name")
        if name not in wanted:
            found = str(name or ", ".join(self.config.get("architectures") or []) or "no _class_name")[:80]
            where = self.part_folders[self.network]
            raise CheckpointError(f"{where}/config.json says {found}; guidegen opens {' or '.join(wanted)} there.")
        scheduler = self.scheduler_config.get("_class_name")
        pipelines: dict[Any, str | None] = {
            kind.scheduler_class: kind.pipeline for kind in _folder_kinds() if kind.scheduler_class
        }
        if scheduler != self.scheduler_class and (self.scheduler_class or scheduler in pipelines):
            found = f"{self.folder} is a {self.index.get('_class_name', name)} with a {scheduler}"
            fits = (
                f"it should have a {self.scheduler_class}" if self.scheduler_class else f"a {pipelines[scheduler]} has one"
            )
            raise CheckpointError(f"{found}; {fits}, which says what the network gives.")

    def check_size(self, size: tuple[int, int], native: tuple[int, int]) -> None:
        """Raises UsageError where the network does not draw images of that (height, width)."""
        step = self.factor * 2 ** (len(self.config.get("block_out_channels", (0, 0, 0, 0))) - 1)
        if max(size) > LARGEST_EDGE:
            raise UsageError(f"--size {size[1]}x{size[0]}: images have edges of {LARGEST_EDGE} pixels at most.")
        if any(edge < step or edge % step for edge in size):
            raise UsageError(f"--size {size[1]}x{size[0]}: both edges should be multiples of {step} for this model.")

    def check_networks(self) -> None:
        from guidegen.models.loading import empty_part

        empty_part(self, self.network)
        if self.decoder is not None and self.index:
            empty_part(self, self.decoder)

    def preconditioned(self, denoiser: Denoiser) -> Denoiser:
        """A network behind the preconditioning that the scheduler's config means: its own where alpha is not 1."""
        from guidegen.models.preconditioning import preconditioned

        return preconditioned(denoiser, self.scheduler_config)

    def load_decoder(self, options: LoadOptions) -> Callable[[Tensor], Tensor] | None:
        """From latents to images; None where the network draws images, or they are not asked for."""
        from guidegen.models.denoisers import latent_decoder
        from guidegen.models.loading import load_part

        if self.decoder is None or not options.decodes:
            return None
        return latent_decoder(load_part(self, self.decoder, options.device, options.access))

    @classmethod
    def _parts(cls, source: Source) -> Sequence[str]:
        """The parts with weights, the network first; refuses code of its own and parts that nobody here reads."""
        folder, index = source.folder, source.index
        parts = named_parts(index)
        for part, (library, _) in parts.items():
            known = (*_LIBRARIES, {cls.network: "guidegen", "scheduler": "deprecated"}.get(part))
            if library is not None and library not in known:
                raise UnsafeError(f"{folder}: the part {part!r} comes from {library!r}; guidegen runs no remote code.")
        named = {part: entry[1] for part, entry in parts.items() if any(entry)}
        others = cls.others_among(named)
        needed = (*others, *cls.tokenizers, "scheduler")
        what = f"{folder} is a {index['_class_name']}"
        if extra := sorted(named.keys() - {cls.network, *needed, *cls.not_loaded}):
            raise CheckpointError(f"{what} with {', '.join(extra)}; {_opens()}")
        if named.get(cls.network) not in cls.network_classes:
            raise CheckpointError(f"{what} with {cls.network} {named.get(cls.network, 'none')}; {_opens()}")
        if lacking := [part for part in needed if part not in named]:
            raise CheckpointError(
                f"{folder} is incomplete: a {index['_class_name']} has a {lacking[0]}, and model_index.json names none."
            )
        return cls.network, *others

    def _declared_labels(self, declared: Mapping[str, Any], asked: int | None) -> tuple[Labels, int | None]:
        """Labels and null label; the one place that decides which id means "no label".

        Asked for, else declared as `null_label`, else the last class where it always is the null one, or where the
        list of names is exactly one shorter than the classes.
        """
        count = self.classes
        if count is None:
            if asked is not None:
                raise UsageError(f"--null-label {asked}: the model has no classes.")
            return Labels({}), None
        names = label_names(declared.get("id2label") or {}, f"{self.folder}: id2label", CheckpointError)
        null = declared.get("null_label") if asked is None else asked
        lacks_one = bool(names) and len(names) == count - 1 and count - 1 not in names
        if null is None and (self.last_is_null or lacks_one):
            null = count - 1
        if null is not None and not 0 <= null < count:
            which = f"{null} is not a class of the model, which has {count} (0 to {count - 1})."
            if asked is not None:
                raise UsageError(f"--null-label {which}")
            raise CheckpointError(f"{self.folder}: null label {which}")
        names = {i: name for i, name in (names or dict.fromkeys(range(count), "")).items() if i != null}
        if not all(0 <= i < count for i in names):
            raise CheckpointError(f"{self.folder}: id2label names ids past the model's {count} classes.")
        return Labels(names), null

    def _native_size(self) -> tuple[int, int]:
        """(height, width) of the images that the config names."""
        size = self.config.get("sample_size")
        if not isinstance(size, int | list | tuple):
            raise CheckpointError(f"{self.folder}: the config of the network has no usable sample_size (found {size!r}).")
        height, width = (size, size) if isinstance(size, int) else size
        return int(height) * self.factor, int(width) * self.factor


class LabelCheckpoint(FolderCheckpoint):
    """A folder whose network takes labels, or no condition at all."""

    def load(self, options: LoadOptions) -> Networks:
        from guidegen.models.loading import ready_network
        from guidegen.models.networks import Networks, by_label

        def condition_on(network: Any, null_label: int | None) -> Condition:
            return by_label(self.preconditioned(self.denoiser(options.compiled(network), null_label, options)))

        network = ready_network(self, options)
        condition = condition_on(network, self.null_label)
        return Networks(condition, self.load_decoder(options), None, network, condition_on)

    @abstractmethod
    def denoiser(self, network: Any, null_label: int | None, options: LoadOptions) -> Denoiser:
        """A network of this kind as a denoiser."""


class WithOptionalVae:
    """For kinds whose latents a `vae` decodes that the folder may lack: the network alone can still guide another."""

    configs: Mapping[str, Mapping[str, Any]]
    undecoded: ClassVar[str] = "it draws latents, and nothing here decodes them. Convert it again with --vae ID|DIR"

    @classmethod
    def others_among(cls, named: Collection[str]) -> Sequence[str]:
        return ("vae",) if "vae" in named else ()

    @property
    def decoder(self) -> str | None:
        return "vae" if "vae" in self.configs else None


def _folder_kinds() -> list[type[FolderCheckpoint]]:
    return [kind for kind in checkpoint_kinds() if issubclass(kind, FolderCheckpoint)]


def _opens() -> str:
    pipelines = [kind.pipeline for kind in _folder_kinds() if kind.pipeline]
    pipelines += [name for family in FAMILIES for name in family.pipelines if "Modular" not in name]
    return f"guidegen opens {', '.join(pipelines)}, and pipelines of a UNet2DModel and a scheduler."


def _part_config(folder: Path, part: str) -> dict[str, Any]:
    path = part_folder(folder, part) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is incomplete: model_index.json names a {part}, but {part}/config.json is missing.")
    return read_config(path)


def _check_tokenizers(folder: Path, parts: Sequence[str]) -> None:
    for part in parts:
        if not any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(
                f"{folder} is incomplete: model_index.json names a {part}, but {part} has no tokenizer.json or vocab.json."
            )
