"""The networks of a checkpoint and its classifiers, loaded and told what to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from guidegen.models.checkpoint import Access, AnyClassifier, Checkpoint, ClassifierInfo
from guidegen.models.labels import Labels
from guidegen.sampling.autoguidance import GuideModel
from guidegen.sampling.device import DTYPES
from guidegen.scores.interfaces import NULL, Classifier, Denoiser, Mixture
from guidegen.scores.noise import PredictionType
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings

Condition = Callable[[Sequence[Cell]], tuple[Denoiser, list[Mixture]]]
"""From the cells of a batch to the denoiser that draws them and the labels it knows them by."""


class Networks(NamedTuple):
    """A checkpoint's networks: those of `Sampler`, and a denoiser that is asked for nothing but the null condition.

    `guiding` is a guiding network that reads labels and prompts as the network does.
    """

    condition: Condition
    null_denoiser: Denoiser
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_cut: Callable[[str], bool] | None = None
    guiding: Condition | None = None


def open_networks(
    checkpoint: Checkpoint,
    kind: PredictionType,
    negative_prompt: str | None,
    device: torch.device,
    access: Access,
    compile_networks: bool,
    autocast: torch.dtype | None,
    guide: GuideModel | None = None,
    decodes: bool = True,
) -> Networks:
    """Loads the networks, for autocast to that dtype."""
    from guidegen.models.custom_networks import CustomDenoiser
    from guidegen.models.denoisers import DiTDenoiser, TextDenoiser, UNetDenoiser, latent_decoder
    from guidegen.models.loading import load_part

    if checkpoint.custom is not None:
        custom = CustomDenoiser(checkpoint, checkpoint.custom, kind, device)
        return Networks(partial(_by_label, custom), custom, custom.decode)
    network = _network(checkpoint, device, access, autocast)
    guiding = _guiding_network(guide, network, device, access, autocast)
    compiled: Any = torch.compile(network) if compile_networks else network
    guiding_compiled: Any = torch.compile(guiding) if compile_networks and guiding is not None else guiding
    latent = checkpoint.latent and decodes
    decode = latent_decoder(load_part(checkpoint, "vae", device, access)) if latent else None
    if checkpoint.reads_prompts:
        from guidegen.models.text import PromptEncoder

        encoder = PromptEncoder(checkpoint, network, negative_prompt, device, access)

        def by_prompt(net: Any, cells: Sequence[Cell]) -> tuple[Denoiser, list[Mixture]]:
            texts = list(dict.fromkeys(text for cell in cells for text, _ in cell.prompt_parts if text is not None))
            place: dict[str | None, int] = {None: NULL} | {text: i for i, text in enumerate(texts)}
            labels = [tuple((place[text], weight) for text, weight in cell.prompt_parts) for cell in cells]
            return TextDenoiser(net, kind, encoder(texts), autocast), labels

        null_denoiser = TextDenoiser(compiled, kind, encoder([]), autocast)
        guiding_condition = partial(by_prompt, guiding_compiled) if guiding_compiled is not None else None
        return Networks(partial(by_prompt, compiled), null_denoiser, decode, encoder.is_cut, guiding_condition)
    cls = DiTDenoiser if checkpoint.kind.network == "transformer" else UNetDenoiser
    denoiser = cls(compiled, kind, checkpoint.null_label, autocast)
    null = guide.checkpoint.null_label if guide and guide.checkpoint else checkpoint.null_label
    guiding_condition = None if guiding_compiled is None else partial(_by_label, cls(guiding_compiled, kind, null, autocast))
    return Networks(partial(_by_label, denoiser), denoiser, decode, guiding=guiding_condition)


def _network(checkpoint: Checkpoint, device: torch.device, access: Access, weights: torch.dtype | None) -> Any:
    from guidegen.models.loading import load_network

    network: Any = load_network(checkpoint, device, access, weights)
    if checkpoint.kind.network == "unet" and device.type in ("cpu", "cuda"):
        return network.to(memory_format=torch.channels_last)  # what convolutions run fastest in
    return network


def _guiding_network(
    guide: GuideModel | None, network: Any, device: torch.device, access: Access, weights: torch.dtype | None
) -> Any:
    """The network of a guide that shares all else with the model; None where there is no such guide."""
    if guide is None or not guide.shares:
        return None
    if guide.weakening is not None:
        from guidegen.models.weaken import weakened

        return weakened(network, guide.weakening, guide.layers)
    return _network(guide.checkpoint, device, access, weights) if guide.checkpoint else None


def check_networks(checkpoint: Checkpoint, classifier: AnyClassifier | None, guide: GuideModel | None) -> None:
    """Refuses, before any weights are read, configs that make no network, and layers that it does not have.

    Raises:
        CheckpointError: a config makes no network.
        UsageError: it has none of the layers that `--guide-model` names.
    """
    from guidegen.models.loading import check_configs, empty_network
    from guidegen.models.weaken import pick_layers

    check_configs(checkpoint, [part for part, _ in classifier.parts] if classifier else ())
    if guide is not None and guide.checkpoint is not None:
        check_configs(guide.checkpoint)
    if guide is not None and guide.weakening is not None:
        pick_layers(empty_network(checkpoint), guide.weakening, guide.layers)


def _by_label(denoiser: Denoiser, cells: Sequence[Cell]) -> tuple[Denoiser, list[Mixture]]:
    return denoiser, [_label_ids(cell) for cell in cells]


def _label_ids(cell: Cell) -> Mixture:
    return tuple((NULL if label is None else int(label), weight) for label, weight in cell.label_parts)


def target_of(classifier: AnyClassifier | None, checkpoint: Checkpoint, settings: Settings) -> Callable[[Cell], Mixture]:
    """From a cell to its labels as the classifier counts them; several count as `SummedScore` does."""
    if classifier is None:
        return _label_ids
    known = checkpoint.known(classifier)
    count, targets = len(classifier.parts), [(_target(part, known, settings), own) for part, own in classifier.parts]
    return lambda cell: tuple(
        (label * count + i, own * weight) for i, (target, own) in enumerate(targets) for label, weight in target(cell)
    )


def _target(classifier: ClassifierInfo, known: Labels, settings: Settings) -> Callable[[Cell], Mixture]:
    """From a cell to its labels as one classifier counts them: a zero-shot one counts texts."""
    if not classifier.zero_shot:
        return _label_ids
    place: dict[Any, int] = {text: i for i, text in enumerate(settings.classifier_texts or ())}
    place |= classifier.columns(known)  # label ids are no texts
    return lambda cell: tuple((place["" if part is None else part], weight) for part, weight in cell.targets)


def _columns(classifier: ClassifierInfo, known: Labels, settings: Settings) -> dict[int, int]:
    if classifier.zero_shot:
        return {i: i for i in range(len(settings.classifier_texts or ()))}
    return classifier.columns(known)


def open_gradient(
    classifier: AnyClassifier,
    checkpoint: Checkpoint,
    settings: Settings,
    device: torch.device,
    access: Access,
    compile_networks: bool,
    networks: Networks,
) -> Classifier:
    """Loads the classifiers: their gradient at what the networks draw."""
    from guidegen.scores.gradient import SummedScore

    known = checkpoint.known(classifier)
    parts = [part for part, _ in classifier.parts]
    scores = [_open_score(part, known, settings, device, access, compile_networks, networks) for part in parts]
    return scores[0] if len(scores) == 1 else SummedScore(scores)


def _open_score(
    classifier: ClassifierInfo,
    known: Labels,
    settings: Settings,
    device: torch.device,
    access: Access,
    compile_networks: bool,
    networks: Networks,
) -> Classifier:
    """`open_gradient` of one classifier."""
    from guidegen.models.classifiers.opening import load_classifier
    from guidegen.scores.gradient import DenoisedScore, DetachedScore, NoisyScore

    autocast = DTYPES[settings.dtype]
    network: Any = load_classifier(classifier, device, access, settings.classifier_texts or (), autocast)
    if compile_networks:
        network = torch.compile(network)
    columns = _columns(classifier, known, settings)
    if classifier.input == "noisy":
        return NoisyScore(network, columns, autocast)
    decode, denoiser = networks.decode, networks.null_denoiser
    logits = network if decode is None else (lambda x0: network(decode(x0)))
    if settings.classifier_gradient == "detached":
        return DetachedScore(logits, columns, denoiser.prediction_type, autocast)
    return DenoisedScore(logits, columns, denoiser, autocast)
