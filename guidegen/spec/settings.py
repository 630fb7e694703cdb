"""Everything besides the cell that decides what a sample looks like, and what tells runs apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guidegen.spec.names import MODE_NAMES, named

VARIED = ("guidance", "interval", "w_schedule", "scheduler", "steps", "eta")
"""The settings that `--by` varies; options of a method are METHOD.OPTION."""


NEUTRAL = {"guidance": "cfg", "interval": "none", "w_schedule": "constant"}
"""What those of them that are None are called."""


FILE_SHA256 = "file_sha256"
"""The option under which the settings keep what a method of one's own was."""


@dataclass(frozen=True)
class Settings:
    """Everything besides the cell that decides what a sample looks like.

    Attributes:
        mode: cfg, classifier, both, none or autoguidance.
        model: name of the checkpoint.
        model_sha256: of its weights.
        scheduler: diffusers class name.
        steps: steps of the scheduler.
        eta: DDIM's eta; None for the scheduler's default.
        dtype: fp32, fp16 or bf16 autocast.
        null_label: the id for "no label".
        size: (height, width) of the images.
        negative_prompt: what the null condition says; None for the empty prompt.
        classifier: name of the classifier; None in modes without one.
        classifier_input: noisy or denoised.
        classifier_sha256: of its weights.
        classifier_gradient: exact or detached on denoised input; None elsewhere.
        classifier_texts: what a zero-shot classifier tells apart; None elsewhere.
        config_sha256: of the configs of all parts: networks, scheduler, preprocessing.
        guidance: name of the method, or path/to/file.py:Name; None for plain guidance.
        guidance_options: its options that were given, and the sha256 of a file of one's own as `file_sha256`.
        interval: where guidance is on, as `--interval` takes it; None everywhere.
        w_schedule: how the weight goes over the steps; None for a constant one.
        guide_model: name of the guiding model of autoguidance, or `pag` or `skip`, with layers or not; None without.
        guide_model_sha256: of its weights; None where they are the model's.
    """

    mode: str
    model: str
    model_sha256: str
    scheduler: str
    steps: int
    eta: float | None
    dtype: str
    null_label: int | None
    size: Sequence[int] | None = None
    negative_prompt: str | None = None
    classifier: str | None = None
    classifier_input: str | None = None
    classifier_sha256: str | None = None
    classifier_gradient: str | None = None
    classifier_texts: Sequence[str] | None = None
    config_sha256: str | None = None
    guidance: str | None = None
    guidance_options: Mapping[str, Any] | None = None
    interval: str | None = None
    w_schedule: str | None = None
    guide_model: str | None = None
    guide_model_sha256: str | None = None


def axis_value(axis: str, settings: Mapping[str, Any]) -> Any:
    """Where settings stand along an axis of `--by`; None where they say nothing of it."""
    method, _, option = axis.rpartition(".")
    if axis in VARIED or not method:
        value = settings.get(axis)
        return NEUTRAL.get(axis) if value is None else value
    mine = (settings.get("guidance") or NEUTRAL["guidance"]) == method
    return (settings.get("guidance_options") or {}).get(option) if mine else None


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells runs apart: the axes along which their settings do not stand at one place."""
    options = [
        f"{some.get('guidance') or NEUTRAL['guidance']}.{option}"
        for some in settings
        for option in some.get("guidance_options") or {}
        if option != FILE_SHA256  # the hash of one's own, whose name is told
    ]
    axes = dict.fromkeys(("mode", "model", *VARIED, "guide_model", *options))
    apart = [axis for axis in axes if len({axis_value(axis, some) for some in settings}) > 1]
    classifiers = {some.get("classifier") for some in settings} - {None}  # a mode without one says so itself
    return [*apart, *(["classifier"] if len(classifiers) > 1 else [])]


def run_names(settings: Sequence[Mapping[str, Any]], folders: Sequence[str], told: Collection[str] = ()) -> list[str]:
    """What tells runs apart: the mode and other settings, else their folders too.

    Args:
        settings: of each run.
        folders: the name of each run's directory.
        told: axes that are told elsewhere.
    """
    apart = [axis for axis in differences(settings) if axis not in told]
    names = [_run_name(some, apart) for some in settings]
    return [f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)]


def _run_name(settings: Mapping[str, Any], apart: Sequence[str]) -> str:
    """The mode if it is one of these axes or they say nothing, and the values along the others."""
    values = [(axis, axis_value(axis, settings)) for axis in apart if axis != "mode"]
    words = [named(axis, value) for axis, value in values if value is not None and value != NEUTRAL.get(axis)]
    if "mode" in apart or not words:
        words.insert(0, MODE_NAMES.get(settings["mode"], settings["mode"]))
    return ", ".join(words)
