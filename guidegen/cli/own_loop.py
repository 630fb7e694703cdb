"""What flags cannot ask of a text-to-image pipeline that draws in its own loop, and `--offload`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guidegen.cli.conditions import Conditions
from guidegen.cli.flags import SampleOptions
from guidegen.errors import UsageError, first_line
from guidegen.models.autoguidance import GuideModel
from guidegen.models.checkpoint import AnyClassifier, Checkpoint, ClassifierInfo
from guidegen.sampling.models import Models

if TYPE_CHECKING:
    import torch


def offload_of(flags: SampleOptions) -> str | None:
    """What `--offload` says; None for no offload."""
    return None if flags.offload in (None, "none") else str(flags.offload)


def check_own_loop(flags: SampleOptions, models: Models, conditions: Conditions, device: torch.device) -> None:
    """Refuses, before weights are read, what a pipeline's own loop does not do.

    Raises:
        UsageError: it is asked for.
    """
    offload, checkpoint = offload_of(flags), models.checkpoint
    if not checkpoint.own_loop:
        if offload:
            raise UsageError(f"--offload {offload} is for text-to-image pipelines; this is a {checkpoint.kind}.")
        return
    loop = f"a {checkpoint.kind} draws in its own loop"
    try:
        import guidegen.diffusers  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{checkpoint.ref}: {loop}. {first_line(error)}") from error
    if models.classifier is not None:
        _check_classifier(models.classifier, loop, offload)
    if models.guide is not None:
        _check_guide(models.guide, checkpoint, loop, offload)
    if conditions.mixed:
        raise UsageError(f"--prompt with weights: {loop}, which reads one prompt an image.")
    if flags.stepwise is not None:
        raise UsageError(f"--stepwise: {loop}, which does not show its denoised estimates.")
    if flags.compile_networks:
        raise UsageError(f"--compile: {loop}, which guidegen does not compile.")
    if offload and device.type == "cpu":
        raise UsageError(f"--offload {offload} moves networks from the CPU to a GPU, and this draws on the CPU.")
    if offload:
        from guidegen.pipelines.loading import check_offload

        check_offload()


def _check_classifier(classifier: AnyClassifier, loop: str, offload: str | None) -> None:
    """Refuses classifiers that the loop does not take."""
    if not isinstance(classifier, ClassifierInfo):
        raise UsageError(f"--classifier {classifier.ref}: {loop}, which takes one classifier, without a weight of its own.")
    if classifier.input == "noisy":
        raise UsageError(
            f"--classifier {classifier.ref} reads noisy images: {loop}, whose latents are decoded for a classifier. "
            "Name one that reads images, or give --classifier-input denoised."
        )
    if offload:
        raise UsageError(f"--offload {offload}: the gradient of a classifier needs the network and the VAE on the device.")


def _check_guide(guide: GuideModel, checkpoint: Checkpoint, loop: str, offload: str | None) -> None:
    """Refuses guiding models that the loop does not take."""
    if checkpoint.refusal("both", classifier=True):
        raise UsageError(f"--guide-model and --w-guide: {loop}, which takes no guiding model.")
    wanted, found = (each.config.get("_class_name") for each in (checkpoint, guide.checkpoint or checkpoint))
    if found != wanted:
        raise UsageError(f"--guide-model {guide.ref} is a {found}: {loop}, which calls a {wanted}.")
    if offload:
        raise UsageError(f"--offload {offload}: a guiding network is kept on the device.")
