"""The networks of a checkpoint and its classifiers, loaded, with the conditions that they draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from guidegen.models.autoguidance import GuideModel
from guidegen.models.checkpoint import AnyClassifier, Checkpoint, ClassifierInfo
from guidegen.models.labels import Labels
from guidegen.models.networks import LoadOptions, Networks, label_ids
from guidegen.scores.interfaces import Classifier, Mixture
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings


def open_networks(checkpoint: Checkpoint, guide: GuideModel | None, options: LoadOptions) -> Networks:
    """Loads the networks of a checkpoint and of what guides it."""
    networks = checkpoint.load(options)
    return networks if guide is None else replace(networks, guiding=guide.load(checkpoint, networks, options))


def check_networks(checkpoint: Checkpoint, classifier: AnyClassifier | None, guide: GuideModel | None) -> None:
    """Refuses, before any weights are read, configs that make no network, and layers that it does not have.

    Raises:
        CheckpointError: a config makes no network.
        UsageError: it has none of the layers that `--guide-model` names.
    """
    checkpoint.check_networks()
    for part, _ in classifier.parts if classifier else ():
        part.check_network()
    if guide is not None:
        guide.check_network(checkpoint)


def target_of(classifier: AnyClassifier | None, checkpoint: Checkpoint, settings: Settings) -> Callable[[Cell], Mixture]:
    """From a cell to its labels as the classifier counts them; several count as `SummedScore` does."""
    if classifier is None:
        return label_ids
    known = checkpoint.known(classifier)
    count, targets = len(classifier.parts), [(_target(part, known, settings), own) for part, own in classifier.parts]
    return lambda cell: tuple(
        (label * count + i, own * weight) for i, (target, own) in enumerate(targets) for label, weight in target(cell)
    )


def _target(classifier: ClassifierInfo, known: Labels, settings: Settings) -> Callable[[Cell], Mixture]:
    """From a cell to its labels as one classifier counts them: a zero-shot one counts texts."""
    if not classifier.zero_shot:
        return label_ids
    index: dict[Any, int] = {text: i for i, text in enumerate(settings.classifier_texts or ())}
    index |= classifier.columns(known)  # label ids are no texts
    return lambda cell: tuple((index["" if part is None else part], weight) for part, weight in cell.targets)


def open_logits(
    classifier: ClassifierInfo, known: Labels, settings: Settings, options: LoadOptions
) -> tuple[Any, dict[int, int]]:
    """Loads a classifier: what `load_classifier` returns, and the column of each label that `target_of` names."""
    from guidegen.models.classifiers.opening import load_classifier

    texts = settings.classifier_texts or ()
    columns = {i: i for i in range(len(texts))} if classifier.zero_shot else classifier.columns(known)
    return load_classifier(classifier, options.device, options.access, texts, options.autocast), columns


def open_gradient(
    classifier: AnyClassifier,
    checkpoint: Checkpoint,
    settings: Settings,
    options: LoadOptions,
    networks: Networks,
) -> Classifier:
    """Loads the classifiers: their gradient at what the networks draw."""
    from guidegen.scores.gradient import SummedScore

    known = checkpoint.known(classifier)
    parts = [part for part, _ in classifier.parts]
    scores = [_open_score(part, known, settings, options, networks) for part in parts]
    return scores[0] if len(scores) == 1 else SummedScore(scores)


def _open_score(
    classifier: ClassifierInfo,
    known: Labels,
    settings: Settings,
    options: LoadOptions,
    networks: Networks,
) -> Classifier:
    """`open_gradient` of one classifier."""
    from guidegen.scores.gradient import DenoisedScore, DetachedScore, NoisyScore

    loaded, columns = open_logits(classifier, known, settings, options)
    network = options.compiled(loaded)
    if classifier.input == "noisy":
        return NoisyScore(network, columns, options.autocast)
    decode, denoiser = networks.decode, networks.null_denoiser
    logits = network if decode is None else (lambda x0: network(decode(x0)))
    if settings.classifier_gradient == "detached":
        return DetachedScore(logits, columns, denoiser.prediction_type, options.autocast)
    return DenoisedScore(logits, columns, denoiser, options.autocast)
