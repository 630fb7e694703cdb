"""Opening a checkpoint: what it is, without its weights.

Nothing here imports torch. `guidegen.checkpoints.loading` reads the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guidegen.checkpoints.hub import locate
from guidegen.checkpoints.labels import Labels
from guidegen.errors import CheckpointError, UnsafeError, UsageError

DEFAULT_STEPS = 50
MODES = ("cfg", "classifier", "both", "none")
_PARTS = {"UNet2DModel": "diffusers"}  # what may stand as `unet` in a pipeline folder


@dataclass(frozen=True)
class ClassifierInfo:
    """A classifier on disk.

    Attributes:
        ref: as the person named it.
        folder: where config.json and the weights are.
        revision: the hub commit; None for a plain folder.
        config: its config.json.
        labels: what it tells apart, in the order of its columns.
        input: noisy (a `NoisyClassifier`, reads x_t and t) or denoised (reads clean images).
        preprocessor: preprocessor_config.json of a transformers classifier; None for a `NoisyClassifier`.
    """

    ref: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    labels: Labels
    input: str
    preprocessor: Mapping[str, Any] | None

    @property
    def gradient_calls(self) -> int:
        """Network calls of one gradient: through the denoised estimate, the denoiser is called again."""
        return 2 if self.input == "denoised" else 1

    def columns(self, labels: Labels) -> dict[int, int]:
        """Label id of the UNet -> column of the logits: by name where both have names, else by id."""
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
        ids = list(self.config["id2label"])
        return any(int(ids[column]) != label for label, column in self.columns(labels).items())


@dataclass(frozen=True)
class Checkpoint:
    """A diffusion checkpoint on disk.

    Attributes:
        ref: as the person named it.
        folder: its folder.
        unet_folder: where the UNet's config and weights are.
        revision: the hub commit; None for a plain folder.
        config: the UNet's config.json.
        scheduler_config: the scheduler's config.
        labels: what it can draw; empty for an unconditional one.
        null_label: the id that means "no label"; None where there is none.
        steps: the number of steps to take unless told.
        missing: what the folder lacks and what stands in for it.
    """

    ref: str
    folder: Path
    unet_folder: Path
    revision: str | None
    config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    labels: Labels
    null_label: int | None
    steps: int
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """A short name for files and grids."""
        if self.revision is None:
            return self.folder.resolve().name
        return self.ref.partition("@")[0].rpartition("/")[2]

    @property
    def class_conditional(self) -> bool:
        return self.config.get("num_class_embeds") is not None or self.config.get("class_embed_type") is not None

    @property
    def learned_variance(self) -> bool:
        return bool(self.config["out_channels"] == 2 * self.config["in_channels"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network draws."""
        return (self.config["in_channels"], *_size(self.config, self.unet_folder))

    @property
    def prediction_type(self) -> str:
        """epsilon, sample, v_prediction or flow."""
        return "flow" if is_flow(self.scheduler_config) else self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def bundled_classifier(self) -> str | None:
        """The noise-aware classifier in the same folder, if there is one."""
        folder = self.folder / "classifier"
        return str(folder) if (folder / "config.json").is_file() else None

    def refusal(self, mode: str, classifier: bool) -> str | None:
        """Why this checkpoint cannot serve `mode`, or None if it can."""
        if mode in ("cfg", "both") and not self.class_conditional:
            return "the model is unconditional: it takes no label. Use --mode classifier with a classifier"
        if mode in ("cfg", "both", "classifier") and self.class_conditional and self.null_label is None:
            return (
                "the model has no null label, so it has no unconditional score to guide from. "
                "If it was trained with one, name it: --null-label ID"
            )
        if mode in ("classifier", "both") and not classifier:
            return "there is no classifier. Name one: --classifier ID|DIR"
        return None


def is_flow(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config belongs to a flow-matching model."""
    return (
        str(scheduler_config.get("_class_name", "")).startswith("FlowMatch")
        or scheduler_config.get("prediction_type") == "flow_prediction"
        or bool(scheduler_config.get("use_flow_sigmas"))
    )


def open_checkpoint(
    ref: str | Path,
    null_label: int | None = None,
    weights: bool = False,
    offline: bool = False,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Reads what a checkpoint says of itself.

    Args:
        ref: a `UNet2DModel` folder, a DDPM/DDIM pipeline folder, or a hub id of either.
        null_label: overrides the declared null label.
        weights: also download the weights of a hub id.
        offline: use the hub's cache alone.
        allow_pickle: accept `.bin` weights.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for code of its own.
        UsageError: `null_label` is no class of the model.
    """
    ref = str(ref)
    folder, revision = locate(ref, weights, offline, allow_pickle)
    index: dict[str, Any] = {}
    missing = []
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        _check_parts(index, folder)
        unet_folder = folder / "unet"
        if not (unet_folder / "config.json").is_file():
            raise CheckpointError(f"{folder} is incomplete: model_index.json names a unet, but unet/config.json is missing.")
    elif (folder / "config.json").is_file():
        unet_folder = folder
    else:
        raise CheckpointError(f"{folder} is not a checkpoint: neither model_index.json nor config.json is in it.")
    config = _read_json(unet_folder / "config.json")
    if config.get("_class_name") != "UNet2DModel" or "auto_map" in config:
        _refuse_class(config, unet_folder)
    config = {"in_channels": 3, "out_channels": 3} | config
    _size(config, unet_folder)
    if config["in_channels"] not in (1, 3):
        raise CheckpointError(f"{unet_folder} draws {config['in_channels']} channels; guidegen opens models of 1 or 3.")
    scheduler_config = _scheduler_config(folder)
    if scheduler_config is None:
        scheduler_config = {"_class_name": "DDPMScheduler"}
        missing.append("scheduler_config.json (DDPM's linear schedule and epsilon prediction are assumed)")
    said = config | index
    labels, null = _labels(said, config, unet_folder, null_label)
    steps = said.get("default_steps", DEFAULT_STEPS)
    if not isinstance(steps, int) or steps < 1:
        raise CheckpointError(f"{folder}: default_steps should be a whole number from 1, found {steps!r}.")
    return Checkpoint(ref, folder, unet_folder, revision, config, scheduler_config, labels, null, steps, missing)


def open_classifier(
    ref: str | Path,
    input: str | None = None,
    weights: bool = False,
    offline: bool = False,
    allow_pickle: bool = False,
) -> ClassifierInfo:
    """Reads what a classifier says of itself.

    Args:
        ref: folder or hub id of a `NoisyClassifier` or of a transformers image classifier.
        input: noisy or denoised; None takes what the classifier was made for.
        weights: also download the weights of a hub id.
        offline: use the hub's cache alone.
        allow_pickle: accept `.bin` weights.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for code of its own.
        UsageError: it cannot read noisy images.
    """
    ref = str(ref)
    folder, revision = locate(ref, weights, offline, allow_pickle)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a classifier: config.json is missing.")
    config = _read_json(folder / "config.json")
    noise_aware = config.get("_class_name") == "NoisyClassifier"
    architectures = ", ".join(config.get("architectures") or [])
    if not noise_aware and "ForImageClassification" not in architectures:
        found = config.get("_class_name") or architectures or "no class"
        raise CheckpointError(
            f"{folder} is not a classifier: config.json says {found}, where NoisyClassifier or "
            "a transformers ...ForImageClassification is needed."
        )
    _refuse_remote_code(config, folder)
    if input == "noisy" and not noise_aware:
        raise UsageError(f"--classifier-input noisy: {architectures} takes no timestep, so it reads denoised images only.")
    try:
        labels = Labels({int(label): name for label, name in config["id2label"].items()})
    except (KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json has no usable id2label.") from error
    preprocessor = None if noise_aware else _preprocessor(folder)
    return ClassifierInfo(
        ref, folder, revision, config, labels, input or ("noisy" if noise_aware else "denoised"), preprocessor
    )


def open_backbone(
    ref: str | Path, weights: bool = False, offline: bool = False, allow_pickle: bool = False
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Folder, config and preprocessing of any image model: a `NoisyClassifier` has no preprocessing of its own.

    Args:
        ref: folder or hub id of a `NoisyClassifier`, or of an image model of transformers or timm.
        weights: also download the weights of a hub id.
        offline: use the hub's cache alone.
        allow_pickle: accept `.bin` weights.

    Raises:
        CheckpointError: missing, incomplete, unreachable or of an unknown kind.
        UnsafeError: it asks for code of its own.
    """
    folder, _ = locate(str(ref), weights, offline, allow_pickle)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not an image model: config.json is missing.")
    config = _read_json(folder / "config.json")
    _refuse_remote_code(config, folder)
    if config.get("_class_name") == "NoisyClassifier":
        return folder, config, {}
    if "pretrained_cfg" in config:
        return folder, config, _timm_preprocessor(config["pretrained_cfg"])
    if "model_type" not in config:
        found = config.get("_class_name") or "no model_type"
        raise CheckpointError(f"{folder} is not an image model of transformers or timm: config.json says {found}.")
    return folder, config, _preprocessor(folder)


def _timm_preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm's words for a preprocessing, in transformers' words: resize the shorter edge, then crop the centre."""
    _, height, width = config["input_size"]
    filters = {"nearest": 0, "bilinear": 2, "bicubic": 3}
    return {
        "size": {"shortest_edge": int(min(height, width) / config.get("crop_pct", 0.875))},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "resample": filters.get(config.get("interpolation", "bilinear"), 3),
        "image_mean": config["mean"],
        "image_std": config["std"],
    }


def _preprocessor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is incomplete: preprocessor_config.json is missing.")
    return _read_json(path)


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files of one model folder.

    Raises:
        CheckpointError: there are none, or a Git LFS pointer stands in for one.
        UnsafeError: there are only pickled ones and `allow_pickle` is off.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(kind))
    if not files and pickles and not allow_pickle:
        raise UnsafeError(
            f"{folder} has only pickled weights ({pickles[0].name}), which can run code when they are opened. "
            "Convert them to safetensors, or pass --allow-pickle to read them with weights_only=True."
        )
    files = files or [p for p in pickles if p.suffix == ".bin"]
    if not files:
        raise CheckpointError(f"{folder} is incomplete: no diffusion_pytorch_model.safetensors in it.")
    for path in files:
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull` in that repository.")
    return files


def weights_sha256(folder: Path, allow_pickle: bool = False) -> str:
    """sha256 over the model folder's weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(folder, allow_pickle):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(data).__name__}.")
    return data


def _check_parts(index: Mapping[str, Any], folder: Path) -> None:
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise UnsafeError(f"{folder}/model_index.json names a pipeline of its own ({kind}); guidegen runs no remote code.")
    for part, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] not in (None, "diffusers", "transformers"):
            raise UnsafeError(f"{folder}: the part {part!r} comes from {entry[0]!r}; guidegen runs no remote code.")
    known = ("unet", "scheduler")
    extra = [p for p, entry in index.items() if isinstance(entry, list) and p not in known and any(entry)]
    if extra:
        raise CheckpointError(
            f"{folder} is a {kind} with {', '.join(extra)}; guidegen opens pipelines of a UNet2DModel and a scheduler."
        )
    unet = index.get("unet")
    if not isinstance(unet, list) or len(unet) != 2 or unet[1] not in _PARTS:
        found = unet[-1] if isinstance(unet, list) and unet else "none"
        raise CheckpointError(f"{folder} is a {kind} with unet {found}; guidegen opens pipelines with a UNet2DModel.")


def _refuse_remote_code(config: Mapping[str, Any], folder: Path) -> None:
    if "auto_map" in config:
        raise UnsafeError(f"{folder}/config.json asks for code of its own (auto_map); guidegen runs no remote code.")


def _refuse_class(config: Mapping[str, Any], folder: Path) -> None:
    _refuse_remote_code(config, folder)
    found = config.get("_class_name") or ", ".join(config.get("architectures") or []) or "no _class_name"
    raise CheckpointError(f"{folder}/config.json says {found}; guidegen opens UNet2DModel checkpoints.")


def _size(config: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    size = config.get("sample_size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise CheckpointError(f"{folder}/config.json has no usable sample_size (found {size!r}).")


def _scheduler_config(folder: Path) -> dict[str, Any] | None:
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            return _read_json(path)
    if (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is incomplete: scheduler/scheduler_config.json is missing.")
    return None


def _labels(
    said: Mapping[str, Any], config: Mapping[str, Any], folder: Path, asked: int | None
) -> tuple[Labels, int | None]:
    """Labels and null label; the one place that decides which id means "no label".

    Asked for, else declared as `null_label`, else the last class where the list of names is
    exactly one shorter than the classes (as DiT's is).
    """
    count = config.get("num_class_embeds")
    if count is None:
        if asked is not None:
            raise UsageError(f"--null-label {asked}: the model is unconditional, it has no classes.")
        return Labels({}), None
    try:
        names = {int(label): str(name) for label, name in (said.get("id2label") or {}).items()}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: id2label should map ids to names.") from error
    declared = said.get("null_label")
    null = asked if asked is not None else declared
    if null is None and names and len(names) == count - 1 and count - 1 not in names:
        null = count - 1
    if null is not None and not isinstance(null, int):
        raise CheckpointError(f"{folder}: null_label should be a whole number, found {null!r}.")
    if null is not None and not 0 <= null < count:
        message = f"null label {null} is not a class of the model, which has {count} (0 to {count - 1})."
        raise (
            UsageError(f"--{message.replace(' ', '-', 1)}") if asked is not None else CheckpointError(f"{folder}: {message}")
        )
    names = {i: name for i, name in (names or dict.fromkeys(range(count), "")).items() if i != null}
    if not all(0 <= i < count for i in names):
        raise CheckpointError(f"{folder}: id2label names ids past the model's {count} classes.")
    return Labels(names), null
