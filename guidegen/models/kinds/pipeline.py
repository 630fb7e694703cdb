"""Text-to-image pipelines of diffusers, which draw in their own loop: those of `guidegen.models.families`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Self

from guidegen.errors import CheckpointError, UnsafeError, UsageError
from guidegen.models.checkpoint import Checkpoint, Source, part_folder
from guidegen.models.configs import check_scheduler, read_config, read_json
from guidegen.models.families import Family, family_of
from guidegen.models.hub import download_weights, locate
from guidegen.models.labels import Labels
from guidegen.models.noise_schedule import is_flow
from guidegen.models.python_ref import LARGEST_EDGE
from guidegen.models.weight_files import DEFAULT_ACCESS, Access, refuse_special
from guidegen.python_file import split_python_ref

if TYPE_CHECKING:
    from guidegen.models.networks import LoadOptions
    from guidegen.scores.interfaces import Mixture, Weights
    from guidegen.spec.settings import Settings

_LIBRARIES = ("diffusers", "transformers")
_NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder", "pe", "pe_tokenizer")
"""What pipelines have beside what draws an image from a text as it is: checks, prompts of images, rewritten prompts."""
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "processor", "guider")
_BY_SIZE = ("use_dynamic_shifting", "base_shift", "max_shift", "shift_terminal", "time_shift_type")
"""What a scheduler does to its noise levels when the pipeline tells it the size of the image."""
_CLIPS = ("clip_sample", "thresholding")
"""What a scheduler does to denoised estimates after guidance."""
_ANY: Mixture = ((0, 1.0),)
_ZERO_FIRST = "cfg-zero"
"""The method whose first prediction is zero."""


class Part(NamedTuple):
    """A part of a pipeline: its class, and the folder and the hub commit (None for a plain folder) where it is."""

    name: str
    folder: Path
    ref: str
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class TextPipeline(Checkpoint):
    """A pipeline of one of the families, ordinary or modular.

    Attributes:
        family: its row of the table.
        parts: those that are loaded, by name.
        own_scheduler_config: that of its folder; `scheduler_config` lacks what depends on the size of the image.
    """

    family: Family
    parts: Mapping[str, Part]
    own_scheduler_config: Mapping[str, Any]

    reads_prompts = True
    own_loop: ClassVar[bool] = True
    has_layers = False

    @classmethod
    def matches(cls, source: Source) -> bool:
        return split_python_ref(source.ref) is None and bool(source.index) and family_of(source.index) is not None

    @classmethod
    def open(cls, source: Source, null_label: int | None, size: tuple[int, int] | None) -> Self:
        folder, index = source.folder, source.index
        family = family_of(index)
        if not isinstance(family, Family):
            raise CheckpointError(f"{folder} is a {index['_class_name']}, with which guidegen does not draw: {family}.")
        if null_label is not None:
            raise UsageError(f"--null-label {null_label}: the model has no classes.")
        _check_blocks(folder, index, family)
        parts = dict(_parts_in(source))
        needed = (family.network, "vae", "scheduler", "text_encoder", "tokenizer")
        if lacking := [part for part in needed if part not in parts]:
            raise CheckpointError(f"{folder} is incomplete: a {family.name} has a {lacking[0]}, and its index names none.")
        if absent := [part.folder for part in parts.values() if not part.folder.is_dir()]:
            raise CheckpointError(f"{folder} is incomplete: its index names a part in {absent[0]}, which is no folder.")
        refuse_special([part.folder for part in parts.values()])
        weighted = [family.network, *(part for part in parts if part != family.network and _has_weights(part))]
        configs = {part: _config_of(parts[part], part) for part in weighted}
        if configs[family.network].get("time_cond_proj_dim") is not None:
            raise CheckpointError(
                f"{folder} has guidance distilled into it (time_cond_proj_dim): no score is left to guide."
            )
        scheduler = _scheduler_in(parts["scheduler"])
        checkpoint = cls(
            ref=source.ref,
            folder=folder,
            revision=source.revision,
            configs=configs,
            scheduler_config=_planned(scheduler),
            index=index,
            labels=Labels({}),
            null_label=None,
            size=size or _native_size(folder, configs, family),
            steps=family.steps,
            family=family,
            parts=parts,
            own_scheduler_config=scheduler,
        )
        checkpoint._check_size()
        return checkpoint

    @property
    def kind(self) -> str:
        return f"{self.family.name} pipeline"

    @property
    def network(self) -> str:  # type: ignore[override]
        return self.family.network

    @property
    def renormalised(self) -> bool:  # type: ignore[override]
        return self.family.renormalised

    @property
    def identity(self) -> tuple[Any, ...]:
        own = {key: value for key, value in self.index.items() if isinstance(value, bool | str | int | float)}
        return (self.configs, self.own_scheduler_config, {key: own[key] for key in own if not key.startswith("_diff")})

    @property
    def part_folders(self) -> dict[str, Path]:
        return {name: self.parts[name].folder for name in self.configs}

    @property
    def learned_variance(self) -> bool:
        return False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, *self.size)

    @property
    def recommended(self) -> str | None:
        usual = self.family.usual
        return None if usual is None else f"--w {usual:g}, {self.steps} steps (the defaults of {self.family.pipelines[0]})"

    @property
    def convention(self) -> str | None:
        return self.family.convention

    def with_network(self, ref: str, folder: Path, revision: str | None) -> Self | None:
        inside = folder / self.network  # of a whole pipeline
        where = inside if (inside / "config.json").is_file() else folder
        config = read_config(where / "config.json") if (where / "config.json").is_file() else {}
        cls = self.parts[self.network].name
        if config.get("_class_name") != cls:
            return None
        refuse_special([where])
        noise, beside = self.scheduler_config, folder / "scheduler" / "scheduler_config.json"
        if where == inside and beside.is_file():
            noise = _planned({"_class_name": noise["_class_name"], **read_json(beside)})
        part = Part(cls, where, ref, revision)
        alone: dict[str, Any] = {"configs": {self.network: config}, "parts": {self.network: part}, "scheduler_config": noise}
        return replace(self, ref=ref, folder=folder, revision=revision, **alone)

    def check_networks(self) -> None:
        import diffusers

        from guidegen.models.loading import empty_part
        from guidegen.models.pretrained import quiet_transformers

        quiet_transformers()  # which warns as diffusers imports a pipeline
        empty_part(self, self.network)
        name = self.family.blocks or self.index["_class_name"]
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise CheckpointError(f"{self.folder} needs {name}, which diffusers {diffusers.__version__} does not have.")
        if self.family.blocks:
            taken = {spec.name: spec.type_hint for spec in cls().get_workflow("text2image").expected_components}
        else:
            taken = {name: each.annotation for name, each in inspect.signature(cls.__init__).parameters.items()}
        if extra := sorted(self.configs.keys() - taken.keys()):
            raise CheckpointError(f"{self.folder} is a {self.kind} with {', '.join(extra)}, which it does not draw with.")
        wanted, found = taken[self.network], self.parts[self.network].name
        if isinstance(wanted, type) and found != wanted.__name__:
            raise CheckpointError(f"{self.folder} is a {self.kind} with a {found}; its network is a {wanted.__name__}.")

    def load(self, options: LoadOptions) -> NoReturn:
        raise CheckpointError(f"{self.folder}: a {self.kind} draws in its own loop, and guides no other model.")

    def download(self, access: Access = DEFAULT_ACCESS) -> None:
        sources: dict[tuple[str, str | None], list[Path]] = {}
        for name in self.configs:
            part = self.parts[name]
            sources.setdefault((part.ref, part.revision), []).append(part.folder)
        for (ref, revision), folders in sources.items():
            download_weights(ref, revision, folders, access)
        self.check_variant(access.variant)

    def refusal(self, mode: str, classifier: bool, needs_null: bool = True) -> str | None:
        if mode in ("cfg", "none"):
            return None
        loop = f"a {self.kind} draws in its own loop"
        if self.family.blocks is None:
            return f"{loop}, which takes classifier-free guidance alone (modes cfg and none)"
        if mode == "classifier" and self.renormalised:
            return (
                f"{loop}, which gives guided predictions the length of the conditional one: a classifier adds to both there "
                "(--mode both)"
            )
        return super().refusal(mode, classifier, needs_null)

    def loop_calls(self, weights: Sequence[Weights]) -> tuple[tuple[bool, bool, bool], ...]:
        from guidegen.scores.calls import needs_of

        needs = [needs_of(each, _ANY, _ANY, needs_null=True) for each in weights]
        if self.family.blocks is None and any(need.null for need in needs):  # its argument guides at all steps or at none
            return ((True, True, False),) * len(needs)
        return tuple((bool(need.conditional) or self.renormalised, bool(need.null), bool(need.guiding)) for need in needs)

    def check_settings(self, settings: Settings, scheduler: str | None) -> None:
        own, kind = self.scheduler_config.get("_class_name"), f"a {self.kind} draws in its own loop"
        if scheduler not in (None, own):
            raise UsageError(f"--scheduler {scheduler}: {kind}, with its own {own}.")
        given = {
            "--eta": settings.eta,
            "--timestep-spacing": settings.timestep_spacing,
            "--scheduler-opt": settings.scheduler_opt,
        }
        if flag := next((flag for flag, value in given.items() if value is not None), None):
            raise UsageError(f"{flag}: {kind}, which sets its steps itself.")
        if settings.interval is not None and "%" not in settings.interval:
            raise UsageError(
                f"--interval {settings.interval}: {kind}, which sets its noise levels as it draws. Give a part of the "
                "steps, such as 10%:60%."
            )
        if settings.negative_prompt is not None and not self.family.negative:
            raise UsageError(
                f"--negative-prompt: the pipeline of {self.family.name} takes none; its null condition is empty."
            )
        method = settings.guidance or "cfg"
        if split_python_ref(method):
            raise UsageError(f"--guidance {method}: {kind}, which takes the methods that `guidegen guidances` lists alone.")
        if method == "frequency" and self.family.packed and self.family.blocks is None:
            raise UsageError(f"--guidance {method}: needs pictures, and the network of {self.family.name} draws tokens.")
        if settings.classifier and (clip := next((key for key in _CLIPS if self._scheduler_option(key)), None)):
            raise UsageError(f"--mode {settings.mode}: {kind}, and {clip} of its {own} undoes the gradient of a classifier.")
        zero_steps = (settings.guidance_options or {}).get("zero_init", 1)
        if method == _ZERO_FIRST and self.family.renormalised and str(zero_steps) != "0":
            raise UsageError(
                f"--guidance {method}: its first prediction is zero, and the pipeline of {self.family.name} divides by the "
                "length of predictions. Give --guidance-opt zero_init=0."
            )

    def _scheduler_option(self, name: str) -> Any:
        import diffusers

        cls = getattr(diffusers, self.own_scheduler_config["_class_name"])
        own = inspect.signature(cls.__init__).parameters.get(name)
        return self.own_scheduler_config.get(name, own and own.default)

    def _check_size(self) -> None:
        height, width = self.size
        step = self.family.multiple
        if max(self.size) > LARGEST_EDGE:
            raise UsageError(f"--size {width}x{height}: images have edges of {LARGEST_EDGE} pixels at most.")
        if any(edge < step or edge % step for edge in self.size):
            raise UsageError(f"--size {width}x{height}: both edges should be multiples of {step} for {self.family.name}.")


def _parts_in(source: Source) -> Iterator[tuple[str, Part]]:
    """The parts that an index names; those of a modular one may be in other repositories."""
    folder = source.folder
    for name, entry in source.index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) not in (2, 3) or name in _NOT_LOADED:
            continue
        library, cls, where = entry[0], entry[1], entry[2] if len(entry) == 3 else {}
        if not isinstance(library, str | None) or not isinstance(cls, str | None) or not isinstance(where, dict):
            raise CheckpointError(
                f"{folder}: the index says {str(entry)[:80]} of {name}; a library and a class stand there."
            )
        if library is None or cls is None:
            continue
        if library not in _LIBRARIES:
            raise UnsafeError(f"{folder}: the part {name!r} comes from {library!r}; guidegen runs no remote code.")
        yield name, _part_at(source, cls, name, where)


def _part_at(source: Source, cls: str, name: str, where: Mapping[str, Any]) -> Part:
    subfolder = str(where.get("subfolder") or name)
    if ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise CheckpointError(f"{source.folder}: the index puts {name} into {subfolder!r}, outside of its folder.")
    beside, other = source.folder / subfolder, where.get("pretrained_model_name_or_path")
    if beside.is_dir() or not isinstance(other, str):
        return Part(cls, beside if beside.is_dir() else part_folder(source.folder, name), source.ref, source.revision)
    ref = f"{other}@{where['revision']}" if where.get("revision") else other
    elsewhere, revision = locate(ref)
    return Part(cls, elsewhere / str(where.get("subfolder") or ""), ref, revision)


def _has_weights(part: str) -> bool:
    return not any(word in part for word in _WITHOUT_WEIGHTS)


def _config_of(part: Part, name: str) -> dict[str, Any]:
    path = part.folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the pipeline has a {name}.")
    config = read_config(path)
    found = config.get("_class_name", part.name)
    if found != part.name:
        raise CheckpointError(f"{path} says {str(found)[:80]}, and the index of the pipeline {part.name}.")
    return config


def _scheduler_in(part: Part) -> dict[str, Any]:
    path = part.folder / "scheduler_config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the pipeline has a scheduler.")
    config = {"_class_name": part.name, **read_json(path)}
    if config["_class_name"] != part.name:
        raise CheckpointError(f"{path} says {str(config['_class_name'])[:80]}, and the index of the pipeline {part.name}.")
    check_scheduler(config, path)
    return config


def _planned(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler as far as it is known before the pipeline sets its steps: their number, and what they predict."""
    if is_flow(config) and str(config["_class_name"]).startswith("FlowMatch"):
        return {key: config[key] for key in ("_class_name", "num_train_timesteps") if key in config}
    return {key: value for key, value in config.items() if key not in _BY_SIZE}


def _native_size(folder: Path, configs: Mapping[str, Mapping[str, Any]], family: Family) -> tuple[int, int]:
    if family.edge is not None:
        return family.edge, family.edge
    size = configs[family.network].get("sample_size")
    factor = 1 << (len(configs["vae"].get("block_out_channels") or [0] * 4) - 1)
    if not isinstance(size, int):
        raise CheckpointError(f"{folder}: the config of the network has no usable sample_size (found {size!r}).")
    return size * factor, size * factor


def _check_blocks(folder: Path, index: Mapping[str, Any], family: Family) -> None:
    """Refuses a modular pipeline of other blocks than its family's."""
    found = index.get("_blocks_class_name")
    if found not in (None, family.blocks, "SequentialPipelineBlocks"):
        raise CheckpointError(f"{folder} is a {index['_class_name']} of {found}; guidegen draws with {family.blocks}.")
