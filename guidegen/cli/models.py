"""The networks that flags name, opened without their weights."""

from __future__ import annotations

from dataclasses import replace

from guidegen.cli import options
from guidegen.cli.flags import SampleOptions
from guidegen.errors import UsageError
from guidegen.models.autoguidance import BUNDLED_GUIDE, NAME_ONE, GuideModel, open_guide
from guidegen.models.checkpoint import Checkpoint, ClassifierInfo
from guidegen.sampling.models import Models


def open_models(flags: SampleOptions, needs_null: bool) -> Models:
    """The checkpoint, the classifier and the guiding model, if any.

    Args:
        flags: the command line.
        needs_null: modes cfg and both: whether some weight of the label's own score is not 1.

    Raises:
        UsageError: a mode that cannot be served, or networks that do not fit each other.
        CheckpointError: one that cannot be opened.
    """
    size = options.parse_size(flags.size)
    checkpoint = options.find_checkpoint(flags.model, flags.null_label, size, flags.access)
    if flags.uncond is not None:
        checkpoint = _with_uncond(flags, checkpoint)
    classifier = None
    if flags.mode in ("classifier", "both"):
        classifier = options.find_classifier(flags.classifier, checkpoint, flags.classifier_input, flags.access)
    elif any((flags.classifier, flags.classifier_input, flags.classifier_gradient)):
        raise UsageError(
            "--classifier, --classifier-input and --classifier-gradient are for the modes classifier and both, "
            f"not {flags.mode}."
        )
    needs_null = needs_null or flags.classifier_gradient == "detached"
    reason = checkpoint.refusal(flags.mode, classifier is not None, needs_null)
    if reason and (checkpoint.cannot_draw or not (flags.mode == "autoguidance" and flags.guide_model)):
        raise UsageError(f"--mode {flags.mode} cannot be served: {reason}.")
    for part, _ in classifier.parts if classifier else ():
        if part.input == "noisy":
            _check_noisy(part, checkpoint)
        elif checkpoint.uncond and flags.classifier_gradient != "detached":
            raise UsageError(
                f"--uncond {checkpoint.uncond}: the exact gradient of a classifier of denoised images runs through the "
                "unconditional network, which there is none of. Give --classifier-gradient detached."
            )
    return Models(checkpoint, classifier, _open_guide(flags, checkpoint, size))


def _with_uncond(flags: SampleOptions, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with what stands in for its null label."""
    flag = f"--uncond {flags.uncond}"
    if flags.mode not in ("cfg", "classifier", "both"):
        raise UsageError(f"{flag} is for the modes cfg, classifier and both, not {flags.mode}.")
    if checkpoint.reads_prompts or not checkpoint.class_conditional:
        what = "reads prompts, of which the empty one stands for none" if checkpoint.reads_prompts else "is unconditional"
        raise UsageError(f"{flag}: the model {what}; random labels are for models that take labels.")
    if len(checkpoint.labels) < 2:
        raise UsageError(f"{flag}: the model has {len(checkpoint.labels)} label, and random ones take two at least.")
    return replace(checkpoint, uncond=str(flags.uncond))


def _open_guide(flags: SampleOptions, checkpoint: Checkpoint, size: tuple[int, int] | None) -> GuideModel | None:
    """The guiding model that is named, or the one in the checkpoint's folder; None where none is asked for."""
    if flags.mode != "autoguidance" and flags.guide_model is None and flags.w_guide is None:
        return None
    if flags.guide_model is None and checkpoint.guiding_folder is None:
        raise UsageError(f"--w-guide needs a guiding model, and there is none beside the model. {NAME_ONE}.")
    return open_guide(flags.guide_model or BUNDLED_GUIDE, checkpoint, size, flags.access)


def _check_noisy(classifier: ClassifierInfo, checkpoint: Checkpoint) -> None:
    """A noise-aware classifier reads the very x_t that the network draws."""
    if classifier.channels not in (None, checkpoint.shape[0]):
        raise UsageError(
            f"--classifier {classifier.ref} reads {classifier.channels} channels, and the model draws {checkpoint.shape[0]}"
            f"{' (latents)' if checkpoint.latent else ''}: it was made for another. --classifier-input denoised may do."
        )
