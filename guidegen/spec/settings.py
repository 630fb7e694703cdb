"""Everything besides the cell that decides what a sample looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guidegen.spec.options import PlainOptions

MODE_NAMES = {
    "cfg": "classifier-free guidance",
    "classifier": "classifier guidance",
    "both": "classifier-free and classifier guidance",
    "none": "no guidance",
    "autoguidance": "autoguidance",
}
WEIGHT_HASHES = ("model_sha256", "classifier_sha256", "guide_model_sha256")
"""The settings that are not known before weights are read."""
FILE_SHA256 = "file_sha256"
"""The option under which the settings keep the hash of the file of a custom method."""


@dataclass(frozen=True)
class Settings(PlainOptions):
    """Everything besides the cell that decides what a sample looks like: `PlainOptions`, and what follows from the rest.

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
        classifier: name of the classifier; None in modes without one.
        classifier_input: noisy or denoised.
        classifier_sha256: of its weights.
        classifier_gradient: exact or detached on denoised input; None elsewhere.
        classifier_texts: what a zero-shot classifier distinguishes; None elsewhere.
        config_sha256: of the configs of all parts: networks, scheduler, preprocessing.
        guidance: name of the method, or path/to/file.py:Name; None for plain guidance.
        guidance_options: its options that were given, and the sha256 of the file of a custom method as `file_sha256`.
        guide_model: name of the guiding model of autoguidance, or `pag`, `skip` or `tsg`, with what follows or not; None.
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
    classifier: str | None = None
    classifier_input: str | None = None
    classifier_sha256: str | None = None
    classifier_gradient: str | None = None
    classifier_texts: Sequence[str] | None = None
    config_sha256: str | None = None
    guidance: str | None = None
    guidance_options: Mapping[str, Any] | None = None
    guide_model: str | None = None
    guide_model_sha256: str | None = None
