"""What the bundled classifier learns to guide with, once it knows its labels.

Images that it guides would show what it asks for and no one else sees: it is sure of their label, and its gradient has faded
while they are still noisy. So it learns to tell what the UNet draws from photographs (`negative_class`; Kim et al. 2022,
2211.17091), in rounds, the next of images that it guided itself. It would learn those images by heart, if they were not
shifted, coloured and mixed like photographs, and with them.

Cross-entropy asks for the right probabilities alone, and guidance takes their gradient. At last the classifier is
trained on the gradient, too: it is to be what the label adds to the score of the UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from guidegen.zoo.batches import NULL_LABEL, Batches
from guidegen.zoo.classifier import Training, classifier_loss, columns_by_label, with_negative_class
from guidegen.zoo.cpu import speed_up, unfuse_attention
from guidegen.zoo.drawn import draw_images

ROUNDS = 3  # of drawing with the classifier so far and training it on all that was drawn
DRAWN_AT = (0, 1, 2, 3, 4, 6)
FIRST_DRAWN = 20_000  # seed of the first round; those of the card's table begin at 0 and 1000


def train_to_guide(training: Training, network: Any, seen: dict[str, int], write: Callable[[Any], None]) -> None:
    """Writes the classifier after each round with what the UNet draws, then their mean, then its mean with scores matched.

    Args:
        training: as of `train_classifier`; the UNet is in its folder `out`.
        network: the classifier of the labels, which is written already.
        seen: images to draw in each round ("drawn"), to see in each ("negatives"), and whose scores to match ("scores").
        write: puts a classifier where the next round draws with it.
    """
    networks = [with_negative_class(network).to(training.device)]
    images, labels = list[Tensor](), list[Tensor]()
    for number in range(1, ROUNDS + 1):
        run, first = training.out / f"drawn-{number}", number * FIRST_DRAWN
        drawn = draw_images(training.out, run, training.ids, DRAWN_AT, seen["drawn"], first)
        images.append(training.encoded(drawn[0]))
        labels.append(drawn[1])
        networks.append(train_negatives(training, networks[-1], torch.cat(images), seen["negatives"], number))
        write(networks[-1])
    mean = mean_classifier(training, networks)
    write(mean)
    if seen["scores"]:
        matched = match_scores(training, mean, (torch.cat(images), torch.cat(labels)), seen["scores"])
        write(mean_classifier(training, [mean, matched]))


def negatives_loss(
    training: Training, photographs: tuple[Tensor, Tensor], drawn: Tensor, number: int
) -> Callable[[nn.Module, int], Tensor]:
    """Cross-entropy over the labels' photographs, and what the UNet drew as one label more, of both mixed by CutMix."""
    images, labels = photographs
    classes = [*training.ids, max(training.ids) + 1]
    of_drawn = torch.full((len(drawn),), classes[-1])
    batches = training.batches(torch.cat([images, drawn]), torch.cat([labels, of_drawn]), classes, 0.5, number)
    return classifier_loss(batches, range(len(classes)))


def train_negatives(training: Training, network: Any, drawn: Tensor, images: int, number: int = 1) -> Any:
    """The classifier that tells its labels' photographs from what the UNet drew, too, after so many `images` of both.

    Args:
        training: as of `train_classifier`.
        network: the classifier of the labels, or of an earlier round.
        drawn: images as `Batches` takes them.
        images: to see.
        number: of the round, from 1 on: each has a state and draws of its own.
    """
    network = deepcopy(network) if network.config.negative_class else with_negative_class(network).to(training.device)
    network.calibrate([1.0, 1.0])
    _, photographs = training.split
    loss = negatives_loss(training, photographs, drawn, number)
    training.phase(f"negatives-{number}", network, loss, images, peak=5e-4, fall=0.7)
    training.calibrate(network)
    return network


def mean_classifier(training: Training, networks: Sequence[Any]) -> Any:
    """The classifier of the mean of the weights of several, each of which was trained on from the one before.

    It knows more than any of them (Izmailov et al. 2018, 1803.05407; of a network before and after it learnt something else,
    Wortsman et al. 2022, 2109.01903).
    """
    states, mean = [network.state_dict() for network in networks], deepcopy(networks[-1])
    mean.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    training.calibrate(mean)
    return mean


def score_loss(batches: Batches, unet: Any, ids: list[int]) -> Callable[[nn.Module, int], Tensor]:
    """How far a classifier's gradient is from what the label adds to the score of the UNet.

    Half the square of sigma grad log p(label | x_t) + eps(x_t, label) - eps(x_t), where eps = alpha v + sigma x_t: zero
    where classifier guidance and classifier-free guidance are the same. Chao et al. (2022, 2203.14206) match the score of
    each photograph in place of that of the UNet, which is their mean without their noise. It is the divergence between what
    the two draw, in nats for each unit of log SNR (Kingma et al. 2021, 2107.00630): it has no weight beside cross-entropy.

    Args:
        batches: images and the labels that guide them.
        unet: predicts v.
        ids: labels in the order of the classifier's columns.
    """
    columns = columns_by_label(ids).to(batches.device)

    def loss(model: nn.Module, step: int) -> Tensor:
        x_t, t, _, _, labels = batches(step)
        alpha, sigma = (s[t][:, None, None, None] for s in (batches.alpha, batches.sigma))
        with torch.no_grad():
            both = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
            v, v_null = unet(torch.cat([x_t, x_t]), torch.cat([t, t]), class_labels=both).sample.float().chunk(2)
        x_t.requires_grad_()
        log_p = model(x_t, t).float().log_softmax(1).gather(1, columns[labels][:, None]).sum()
        (gradient,) = torch.autograd.grad(log_p, x_t, create_graph=True)
        return (sigma * gradient + alpha * (v - v_null)).square().sum((1, 2, 3)).mean() / 2

    return loss


def match_scores(training: Training, network: Any, drawn: tuple[Tensor, Tensor], images: int) -> Any:
    """The classifier whose gradient is nearer to what a label adds to the score of the UNet.

    Args:
        training: as of `train_classifier`; half of each batch is matched, half seen as in `train_negatives`.
        network: the classifier of the last round.
        drawn: images as `Batches` takes them, and the labels that guided them.
        images: to match.
    """
    from diffusers import UNet2DModel

    network, (_, photographs) = deepcopy(network), training.split
    unet = UNet2DModel.from_pretrained(training.out / "unet", torch_dtype=torch.float32).requires_grad_(False)
    unet = unet.to(training.device, memory_format=torch.channels_last)
    if training.device == "cpu":
        speed_up(unet)
    unfuse_attention(network)
    half = replace(training, batch=max(1, training.batch // 2), compile_model=False)
    told = negatives_loss(half, photographs, drawn[0], ROUNDS + 1)
    pool, labels = (torch.cat(pair) for pair in zip(photographs, drawn, strict=True))
    batches = Batches(pool, labels, half.batch, training.seed + ROUNDS + 2, training.device, shift=pool.shape[-1] // 8)
    matched = score_loss(batches, unet, training.ids)
    half.phase("scores", network, lambda model, step: told(model, step) + matched(model, step), images, peak=5e-4, fall=0.7)
    training.calibrate(network)
    return network
