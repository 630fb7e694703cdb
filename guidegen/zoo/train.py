"""The recipe of the bundled checkpoint: `python -m guidegen.zoo.train --data DIR --out DIR`.

Trains the noise-aware classifier and the class-conditional UNet, and writes the folder that guidegen opens. With
`--latent --size 64 --classes all`, an autoencoder first, and the others on its latents. Every choice is published:

- v-prediction (Salimans & Ho 2022, arXiv 2202.00512) on the linear schedule of DDPM (2006.11239),
  whose terminal alpha is above zero, so that every diffusers scheduler can walk it;
- latents divided by their standard deviation (Rombach et al. 2022, 2112.10752, appendix G);
- noise levels drawn log-normally (Karras et al. 2022, 2206.00364, table 1: P_mean, P_std), which
  spends the budget where the picture is decided; one draw in ten is uniform over the timesteps;
- label dropout 15 % (Ho & Salimans 2022, 2207.12598); horizontal flips; EMA with warm-up;
- the classifier, which would learn so few photographs by heart, sees them shifted by up to an eighth of
  their side (He et al. 2016, 1512.03385, section 4.2), and learns to tell them from what the model
  draws (Kim et al. 2022, 2211.17091), in rounds, the next of images that it guided itself; the weights
  of the rounds are averaged (Izmailov et al. 2018, 1803.05407); at last its gradient is matched to what
  the label adds to the UNet's scores (Chao et al. 2022, 2203.14206);
- constant learning rate, linear to zero over the last quarter.

State is saved every few minutes: the same command goes on where it stopped. The data are the
Parquet files that the README of the checkpoint names: columns `image` (bytes) and `label` (int).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from guidegen.zoo.autoencoder import PART, encode, open_autoencoder, train_autoencoder
from guidegen.zoo.batches import NULL_LABEL, SCHEDULE, Batches, drawn_by, load_images
from guidegen.zoo.classifier import REPEATS, Training, train_classifier
from guidegen.zoo.guiding import ROUNDS, train_to_guide
from guidegen.zoo.loop import train

CLASSES = "1,105,107,145,207,281,291,294,301,323,387,437,779,817,945,950,963,970,973,978"
UNET: dict[str, Any] = {
    "block_out_channels": (32, 96, 192, 256),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "time_embedding_dim": 256,
    "attention_head_dim": 64,
    "norm_num_groups": 16,
    "num_class_embeds": NULL_LABEL + 1,
}
LATENT_UNET: dict[str, Any] = UNET | {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (192, 192, 192),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
IMAGES = {
    "autoencoder": 1_000_000,
    "unet": 1_200_000,
    "pretraining": 6_000_000,
    "classifier": 500_000,
    "drawn": 8_000,
    "negatives": 700_000,
    "scores": 170_000,
}
DEFAULT_IMAGES = ",".join(f"{name}={count}" for name, count in IMAGES.items())


def unet_loss(batches: Batches, dropout: float) -> Callable[[nn.Module, int], Tensor]:
    """Mean squared error of v = alpha eps - sigma x0, labels dropped to the null label."""

    def loss(model: nn.Module, step: int) -> Tensor:
        x_t, t, x0, eps, labels = batches(step)
        drop = torch.rand(len(labels), **drawn_by(torch.Generator(labels.device).manual_seed(step))) < dropout
        labels = torch.where(drop, NULL_LABEL, labels)
        alpha, sigma = (s[t][:, None, None, None] for s in (batches.alpha, batches.sigma))
        return nn.functional.mse_loss(model(x_t, t, class_labels=labels).sample.float(), alpha * eps - sigma * x0)

    return loss


def pool(labels: Tensor) -> Tensor:
    """Indices (N,) of photographs, those of the labels of the recipe several times over, the others once."""
    ours = torch.isin(labels, torch.tensor([int(label) for label in CLASSES.split(",")], device=labels.device))
    (often,), (once,) = torch.where(ours), torch.where(~ours)
    return torch.cat([once, *[often] * REPEATS])


def make_unet(size: int, latent: bool, start: Path | None = None) -> Any:
    """A UNet of images, or latents, of that height and width: untrained, or with the weights of another."""
    from diffusers import UNet2DModel

    unet = UNet2DModel(sample_size=size, **(LATENT_UNET if latent else UNET))
    if start:
        unet.load_state_dict(UNet2DModel.from_pretrained(start).state_dict())
    return unet


def export(folder: Path, part: str, network: Any, names: dict[str, str], latent: bool = False) -> None:
    """Writes a part of the folder that guidegen opens, weights as fp16 safetensors.

    model_index.json names what pipelines of diffusers read alone, so that they open the folder, too.
    """
    from diffusers import DDIMScheduler

    folder.mkdir(parents=True, exist_ok=True)
    scheduler = DDIMScheduler(
        **SCHEDULE,
        prediction_type="v_prediction",
        clip_sample=not latent,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.save_pretrained(folder / "scheduler")
    deepcopy(network).half().to(memory_format=torch.contiguous_format).save_pretrained(folder / part)
    index = {
        "_class_name": "LDMPipeline" if latent else "DDIMPipeline",
        **({PART: ["diffusers", "AutoencoderKL"]} if latent else {}),
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "id2label": names,
        "null_label": NULL_LABEL,
        "default_steps": 20,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def images_of(text: str) -> dict[str, int]:
    """ "unet=1000,classifier=100" over the defaults.

    Raises:
        typer.BadParameter: anything else.
    """
    given = dict(part.partition("=")[::2] for part in text.split(","))
    if not (given.keys() <= IMAGES.keys() and all(count.isdecimal() for count in given.values())):
        raise typer.BadParameter(f"--images {text}: NAME=N for {', '.join(IMAGES)}, with commas.")
    return IMAGES | {name: int(count) for name, count in given.items()}


def wanted_parts(part: str, latent: bool) -> list[str]:
    """The parts that `--part` names. Raises typer.BadParameter where there is no such part."""
    parts = ["autoencoder", "classifier", "unet"] if latent else ["classifier", "unet"]
    if part not in ("all", *parts):
        raise typer.BadParameter(
            f"--part {part}: {'' if latent else 'with --latent autoencoder, else '}classifier, unet or all."
        )
    return parts if part == "all" else [part]


def main(
    data: Annotated[Path, typer.Option(help="Folder with train*.parquet and labels.json.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint and the training state go.")],
    part: Annotated[str, typer.Option(help="autoencoder (with --latent), classifier, unet or all.")] = "all",
    classes: Annotated[str, typer.Option(help="Label ids, or 'all' for every class of the data.")] = CLASSES,
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 32,
    images: Annotated[
        str,
        typer.Option(
            help="Images that each part sees: the classifier of all labels of the data (pretraining), then of its own "
            f"(classifier), then in {ROUNDS} rounds of those beside what the UNet drew (negatives), so many images (drawn), "
            "then of both, on which it matches the UNet's scores (scores)."
        ),
    ] = DEFAULT_IMAGES,
    start: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of a trained UNet to begin from.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size; the classifier takes two such batches a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of the UNet.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Seed of weights, noise and order.")] = 0,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the network: for GPUs.")] = False,
    latent: Annotated[bool, typer.Option("--latent", help="Draw latents of an autoencoder, which is a part, too.")] = False,
) -> None:
    """Train the bundled checkpoint; run again to go on."""
    seen = images_of(images)
    wanted = wanted_parts(part, latent)
    if wanted == ["classifier"] and seen["negatives"] and not (out / "unet").is_dir():
        raise typer.BadParameter(
            f"--part {part}: {out} has no UNet, which draws for the classifier. Train it first, or draw none with "
            "--images negatives=0."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = json.loads((data / "labels.json").read_text())
    ids = sorted(int(i) for i in (known if classes == "all" else classes.split(",")))
    names = {str(i): known[str(i)] for i in ids}
    out.mkdir(parents=True, exist_ok=True)
    if wanted != ["classifier"]:  # which reads photographs of its own
        photographs, labels = (each.to(device) for each in load_images(data, "train", ids, size))
    if "autoencoder" in wanted:
        made = train_autoencoder(photographs, labels, out, seen["autoencoder"], batch, seed, compile_model)
        export(out, PART, made, names, latent)
    autoencoder = open_autoencoder(out, device) if latent else None
    if "unet" in wanted:
        if latent:
            often = pool(labels)
            photographs, labels = encode(autoencoder, photographs)[often], labels[often]
        torch.manual_seed(seed)
        unet = make_unet(photographs.shape[-1], latent, start)
        loss = unet_loss(Batches(photographs, labels, batch, seed, device), dropout=0.15)
        steps = seen["unet"] // batch
        train(unet.to(device), loss, out / "unet.state", steps, batch, learning_rate, 0.01, compile_model)
        export(out, "unet", unet, names, latent)
    if "classifier" in wanted:
        training = Training(data, out, ids, size, batch, seed, compile_model, autoencoder)
        trained = train_classifier(training, names, (seen["pretraining"], seen["classifier"]))
        export(out, "classifier", trained, names, latent)
        if seen["negatives"]:
            train_to_guide(training, trained, seen, lambda network: export(out, "classifier", network, names, latent))


if __name__ == "__main__":
    typer.run(main)
