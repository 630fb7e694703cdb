"""The labels and prompts that flags ask for, held against what the networks read."""

from __future__ import annotations

from dataclasses import dataclass

from guidegen.cli import options
from guidegen.cli.flags import SampleOptions
from guidegen.errors import UsageError
from guidegen.models.classifiers.info import label_texts
from guidegen.models.labels import Labels
from guidegen.sampling.models import Models
from guidegen.spec.cell import Cell
from guidegen.spec.composition import has_weights, label_parts, prompt_parts, single_labels


@dataclass(frozen=True)
class Conditions:
    """What is drawn.

    Attributes:
        labels: ids and mixtures of them; [None] where none is needed.
        prompts: None where none is needed.
        known: the labels that there are.
        texts: what a zero-shot classifier distinguishes; None without one.
    """

    labels: list[int | str] | list[None]
    prompts: list[str] | None
    known: Labels
    texts: list[str] | None

    @property
    def mixed(self) -> bool:
        """Whether some of them are labels or prompts with weights."""
        return any(isinstance(label, str) for label in self.labels) or any(map(has_weights, self.prompts or ()))

    def name_of(self, cell: Cell) -> str:
        """The name of a cell's label or labels."""
        if cell.mixture is None:
            return "" if cell.label is None else self.known.name(cell.label)
        return ", ".join(f"{self.known.name(label) or label}:{weight:g}" for label, weight in label_parts(cell.mixture))


def ask_conditions(flags: SampleOptions, models: Models) -> Conditions:
    """What the flags ask for.

    Raises:
        UsageError: labels or prompts that are missing, unknown, or that nothing reads.
    """
    checkpoint, classifier = models.checkpoint, models.classifier
    prompts = _prompts(flags, models)
    known = checkpoint.known(classifier)
    asked = Conditions(_labels(flags, models, known, prompts), prompts, known, _texts(flags, models, known, prompts))
    if flags.negative_prompt is not None and prompts and not asked.mixed and flags.mode in ("none", "autoguidance"):
        raise UsageError(
            f"--negative-prompt is what the null condition says, and --mode {flags.mode} draws a prompt without it."
        )
    # a mixture is asked for against the null condition in mode autoguidance too
    mode = "cfg" if flags.mode == "autoguidance" else flags.mode
    if asked.mixed and (reason := checkpoint.refusal(mode, classifier is not None, needs_null=True)):
        raise UsageError(f"Labels with weights cannot be served: {reason}.")
    return asked


def _prompts(flags: SampleOptions, models: Models) -> list[str] | None:
    """The texts that are asked for; None where none is needed."""
    checkpoint, classifier, _ = models
    zero_shot = classifier is not None and classifier.zero_shot
    model_reads = checkpoint.reads_prompts and flags.mode != "classifier"
    if not (model_reads or zero_shot):
        given = "--prompt" if flags.prompt else "--negative-prompt" if flags.negative_prompt is not None else None
        if given and not checkpoint.reads_prompts:
            raise UsageError(f"{given}: neither the model nor a classifier reads text. Give --label.")
        if flags.prompt:
            raise UsageError("--prompt: in mode classifier the model draws without one; --mode both uses the prompt too.")
        return None
    if flags.prompt:
        return options.read_prompts(flags.prompt)
    has_labels = checkpoint.class_conditional or (classifier is not None and classifier.takes_labels)
    if (model_reads and flags.mode != "none") or (zero_shot and not has_labels):
        instead = "takes text, not labels: give" if flags.label else f"needs, in mode {flags.mode},"
        part = "model" if model_reads else "classifier"
        raise UsageError(f'The {part} {instead} --prompt, such as --prompt "a red fox in snow".')
    return None


def _texts(flags: SampleOptions, models: Models, known: Labels, prompts: list[str] | None) -> list[str] | None:
    """What a zero-shot classifier distinguishes: the prompts and the null text, or the names of all labels."""
    if models.classifier is None or not models.classifier.zero_shot:
        return None
    if prompts is None:
        return label_texts(known)
    parts = [text for prompt in prompts for text, _ in prompt_parts(prompt)]
    return list(dict.fromkeys([*parts, flags.negative_prompt or ""]))


def _labels(flags: SampleOptions, models: Models, known: Labels, prompts: list[str] | None) -> list[int | str] | list[None]:
    """Label ids and mixtures of them that are asked for; [None] where none is needed."""
    checkpoint, classifier, _ = models
    if not flags.label and flags.labels_random is None:
        if not _needs_label(flags.mode, models, prompts):
            return [None]
        first = next(iter(known), 0)
        example = f'"{known.name(first)}"' if len(known) and known.name(first) else first
        raise UsageError(f"--mode {flags.mode} needs --label, such as --label {example}. `guidegen labels` lists them.")
    if not len(known):
        takes = "it takes prompts: --prompt" if checkpoint.reads_prompts else "the model is unconditional, it takes none"
        raise UsageError(f"--label: {takes}.")
    ids = options.resolve_labels(flags.label or ["all"], known)
    for part, _ in classifier.parts if classifier else ():
        knows = part.columns(known) if prompts is None or part.takes_labels else single_labels(ids)
        if missing := [i for i in single_labels(ids) if i not in knows]:
            raise UsageError(f"--label {missing[0]} {known.name(missing[0])}: the classifier {part.ref} does not know it.")
    return ids


def _needs_label(mode: str, models: Models, prompts: list[str] | None) -> bool:
    checkpoint, classifier, _ = models
    if classifier is not None and classifier.takes_labels:
        return True
    if not checkpoint.class_conditional:
        return False
    if mode == "none":
        return not checkpoint.has_null
    return mode != "classifier" or prompts is None
