"""The weights of a job: whole, and hashed, before any network is made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from guidegen.cli.resolve import Job
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
    setups = {variant: replace(setup, settings=replace(setup.settings, **hashes)) for variant, setup in job.setups.items()}
    return replace(job, settings=replace(job.settings, **hashes), setups=setups)


def check_whole(job: Job) -> None:
    """Raises CheckpointError or UnsafeError for weights that are not there, not whole, or pickles nobody asked for."""
    from guidegen.models.pretrained import check_weights

    checkpoint, classifier, guide = job.models
    classifiers = [part.folders for part, _ in classifier.parts] if classifier else []
    for folders in (checkpoint.part_folders.values(), guide.folders if guide else (), *classifiers):
        for folder in folders:
            check_weights(folder, job.flags.access)


def are_local(job: Job) -> bool:
    """Whether no part comes from the hub, of which the weights may not be here yet."""
    checkpoint, classifier, guide = job.models
    parts: list[Any] = [checkpoint, *(part for part, _ in (classifier.parts if classifier else ()))]
    return all(part.revision is None for part in parts) and not (guide and guide.checkpoint and guide.checkpoint.revision)
