"""Files of a checkpoint: its JSON, and which weight files stand for it. Nothing here reads a weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from guidegen.errors import CheckpointError, UnsafeError
from guidegen.models import hashes
from guidegen.models.configs import ShardIndex, read_json
from guidegen.schema import convert

_STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")
_NAME = rf"({'|'.join(_STEMS)})(\.(?P<first>\w+))?(-(?P<shard>\d+)-of-(?P<shards>\d+))?(\.(?P<last>\w+))?"
_SAFE = re.compile(_NAME + r"\.safetensors")
_PICKLED = re.compile(_NAME + r"\.bin")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Access:
    """How checkpoints may be read.

    Attributes:
        offline: use the hub's cache alone.
        allow_pickle: accept `.bin` weights, read with `weights_only=True`.
        variant: the files to take where there are several, such as `fp16`; None for the plain ones,
            or for the only ones.
    """

    offline: bool = False
    allow_pickle: bool = False
    variant: str | None = None


DEFAULT_ACCESS = Access()


@dataclass(frozen=True)
class Weights:
    """The weight files of one model folder: one file, or all of its shards."""

    files: tuple[Path, ...]
    variant: str | None
    safe: bool


def holds_weights(folder: Path) -> bool:
    """Whether there is any file of weights in a model folder, whole or not."""
    return any(next(folder.glob(kind), None) for kind in ("*.safetensors", "*.index.json", *_PICKLES))


def find_weights(folder: Path, access: Access = DEFAULT_ACCESS) -> Weights:
    """The weight files of one model folder, as diffusers and transformers name them.

    Raises:
        CheckpointError: there are none, some are missing, or a Git LFS pointer stands in for one.
        UnsafeError: there are only pickled ones and `allow_pickle` is off.
    """
    kinds = variants(folder, _SAFE)
    safe = bool(kinds)
    if not safe:
        pickles = sorted(p for kind in _PICKLES for p in folder.glob(kind))
        if pickles and not access.allow_pickle:
            raise UnsafeError(
                f"{folder} has only pickled weights ({pickles[0].name}), which can run code when they are opened. "
                "Convert them to safetensors, or pass --allow-pickle to read them with weights_only=True."
            )
        kinds = variants(folder, _PICKLED)
    if not kinds:
        raise CheckpointError(f"{folder} is incomplete: no diffusion_pytorch_model.safetensors or model.safetensors in it.")
    variant = next((v for v in (access.variant, None) if v in kinds), None)
    if variant not in kinds:
        if len(kinds) > 1:
            raise CheckpointError(f"{folder} has the variants {', '.join(map(str, kinds))}: choose one with --variant.")
        variant = next(iter(kinds))
    files = kinds[variant]
    _check_shards(folder, files)
    for path in files:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; it should be a file of weights.")
        if not path.is_file():
            raise CheckpointError(
                f"{path} is {'no regular file' if path.exists() else 'a link to a file that is not there'}."
            )
        refuse_pointer(path)
    _check_index(folder, files, variant)
    return Weights(tuple(files), variant, safe)


def variants(folder: Path, pattern: re.Pattern[str] = _SAFE) -> dict[str | None, list[Path]]:
    """Variant (None for the plain files) -> its weight files."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            found.setdefault(match["first"] or match["last"], []).append(path)
    return found


def weight_names(variant: str | None, pickled: bool = False) -> list[str]:
    """Patterns of the names that `find_weights` knows, for one variant."""
    dot = f".{variant}" if variant else ""
    shapes = dict.fromkeys((dot, f"{dot}-*-of-*", f"-*-of-*{dot}"))
    endings = ["safetensors", "bin"] if pickled else ["safetensors"]
    return [f"{stem}{shape}.{ending}" for stem in _STEMS for shape in shapes for ending in endings]


def weights_sha256(folders: Iterable[Path], access: Access = DEFAULT_ACCESS) -> str:
    """sha256 over the weight files of a checkpoint's folders, in the order of their names.

    That of safetensors is kept (`guidegen.models.hashes`), so that the same files are read once.
    """
    found = [find_weights(folder, access) for folder in folders]
    files = [path for weights in found for path in weights.files]
    return hashes.sha256_of(files) if all(weights.safe for weights in found) else hashes.read_sha256(files)


def count_numbers(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone.

    Raises:
        CheckpointError: it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}.") from error


def refuse_special(folders: Iterable[Path]) -> None:
    """Refuses folders with pipes, devices or sockets in them, which libraries would wait for.

    Raises:
        CheckpointError: there is one.
    """
    for folder in folders:
        for path in folder.iterdir():
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path} is neither a file nor a folder.")


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError if a Git LFS pointer stands in for the file."""
    with path.open("rb") as file:
        pointer = file.read(64).startswith(b"version https://git-lfs")
    if pointer:
        raise CheckpointError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull` in that repository.")


def _check_shards(folder: Path, files: Iterable[Path]) -> None:
    found, wanted = set(), 0
    for path in files:
        match = _SAFE.fullmatch(path.name) or _PICKLED.fullmatch(path.name)
        if match and match["shards"]:
            found.add(int(match["shard"]))
            wanted = int(match["shards"])
    missing = sorted(set(range(1, wanted + 1)) - found)
    if missing:
        raise CheckpointError(f"{folder} is incomplete: shard {missing[0]} of {wanted} of its weights is missing.")


def _check_index(folder: Path, files: Sequence[Path], variant: str | None) -> None:
    """Refuses weights that an index beside them puts into other files: the libraries follow it."""
    there = {file.name for file in files}
    for path in sorted(folder.glob("*.index*.json")):
        ours = any(path.name.startswith(f"{stem}.") for stem in _STEMS) and files[0].suffix in path.suffixes
        if ours and (variant is None or f".{variant}" in path.suffixes):
            index = convert(read_json(path), ShardIndex, path, CheckpointError)
            if set(index.weight_map.values()) != there:
                raise CheckpointError(f"{path} names other files than there are: {', '.join(sorted(there))[:200]}.")
