"""The weights of a job: whole, and hashed, before any network is made of them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from guidegen.cli.resolve import Job
from guidegen.errors import quoted
from guidegen.models.classifiers.info import SEPARATOR


def with_hashes(job: Job) -> Job:
    """Downloads the weights if they are on the hub, checks that they are whole, and hashes them."""
    if job.settings.model_sha256:
        return job
    (checkpoint, classifier, guide), access = job.models, job.flags.access
    classifiers = [part for part, _ in classifier.parts] if classifier else []
    parts: list[Any] = [checkpoint, *classifiers, *([guide] if guide else [])]
    for part in parts:
        part.download(access)
    check_whole(job)
    hashes: dict[str, Any] = {
        "model_sha256": checkpoint.sha256(access),
        "classifier_sha256": SEPARATOR.join(each.sha256(access) for each in classifiers) or None,
        "guide_model_sha256": guide.sha256(access) if guide else None,
    }
    return job.with_hashes(hashes)


def check_whole(job: Job, absent: Collection[Path] = ()) -> None:
    """Raises CheckpointError or UnsafeError for weights that are not there, not whole, or pickles nobody asked for.

    Args:
        job: whose weights.
        absent: folders that may have none.
    """
    from guidegen.models.pretrained import check_weights

    for folder in _folders(job):
        if folder not in absent:
            check_weights(folder, job.flags.access)


def without_weights(job: Job) -> list[Path]:
    """The folders that hold no file of weights."""
    from guidegen.models.weight_files import holds_weights

    return [folder for folder in _folders(job) if not holds_weights(folder)]


def find_nonfinite(job: Job) -> str | None:
    """The first tensor of the weights that holds NaN or infinity, and its file; None where there is none."""
    from safetensors import safe_open

    from guidegen.models.weight_files import find_weights

    for path in (path for folder in _folders(job) for path in find_weights(folder, job.flags.access).files):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        return f"{path} holds NaN or infinity, in {quoted(key)}: the weights are damaged"
    return None


def _folders(job: Job) -> list[Path]:
    """Where the weights of all parts are."""
    checkpoint, classifier, guide = job.models
    of_classifiers = [folder for part, _ in (classifier.parts if classifier else ()) for folder in part.folders]
    return [*checkpoint.part_folders.values(), *(guide.folders if guide else ()), *of_classifiers]


def are_local(job: Job) -> bool:
    """Whether no part comes from the hub, of which the weights may not be here yet."""
    checkpoint, classifier, guide = job.models
    parts: list[Any] = [checkpoint, *(part for part, _ in (classifier.parts if classifier else ()))]
    return all(part.revision is None for part in parts) and not (guide and guide.checkpoint and guide.checkpoint.revision)
