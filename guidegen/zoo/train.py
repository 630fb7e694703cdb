"""The recipe of the bundled checkpoint: `python -m guidegen.zoo.train --data DIR --out DIR`.

Trains the noise-aware classifier, the class-conditional UNet and a guiding UNet beside it, and writes
the folder that guidegen opens. Every choice is published:

- v-prediction (Salimans & Ho 2022, arXiv 2202.00512) on the linear schedule of DDPM (2006.11239),
  whose terminal alpha is above zero, so that every diffusers scheduler can walk it;
- noise levels drawn log-normally (Karras et al. 2022, 2206.00364, table 1: P_mean, P_std), which
  spends the budget where the picture is decided; one draw in ten is uniform over the timesteps;
- label dropout 15 % (Ho & Salimans 2022, 2207.12598); horizontal flips; EMA with warm-up;
- the classifier, which would learn so few photographs by heart, sees them shifted by up to an eighth of
  their side (He et al. 2016, 1512.03385, section 4.2);
- constant learning rate, linear to zero over the last quarter;
- the guiding UNet is what autoguidance pushes away from (Karras et al. 2024, 2406.02507): the same data,
  labels, schedule and loss, a fifth of the parameters, a twentieth of the images.

State is saved every few minutes: the same command goes on where it stopped. The data are the
Parquet files that the README of the checkpoint names: columns `image` (bytes) and `label` (int).
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

NULL_LABEL = 1000
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
GUIDING: dict[str, Any] = UNET | {
    "block_out_channels": (16, 48, 96, 96),
    "time_embedding_dim": 128,
    "attention_head_dim": 32,
}
CLASSIFIER: dict[str, Any] = {
    "block_out_channels": (32, 64, 128, 192),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "dropout": 0.2,
}
SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
LOG_SIGMA = (-0.6, 1.3)  # P_mean and P_std of log(sigma/alpha), for images of std 1/2


def load_images(data: Path, split: str, classes: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of `classes` as uint8 (N, 3, size, size) and their labels (N,), decoded once."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from PIL import Image

    images, labels = [], []
    for path in sorted(data.glob(f"{split}*.parquet")):
        table = pq.read_table(path)
        table = table.filter(pc.is_in(table["label"], value_set=pa.array(classes, pa.int32())))
        for raw, label in zip(table["image"], table["label"], strict=True):
            image = Image.open(io.BytesIO(raw.as_py())).convert("RGB").resize((size, size), Image.Resampling.BOX)
            images.append(np.asarray(image))
            labels.append(label.as_py())
    if not images:
        raise FileNotFoundError(f"no {split}*.parquet with labels {classes} in {data}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def alphas_sigmas() -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t (T,) of the training schedule."""
    from diffusers import DDPMScheduler

    cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod
    return cumprod.sqrt(), (1 - cumprod).sqrt()


def draw_timesteps(batch: int, log_sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (B,): log-normal noise levels, one in ten uniform."""
    mean, std = LOG_SIGMA
    levels = torch.randn(batch, generator=generator) * std + mean
    steps = torch.searchsorted(log_sigma, levels).clamp(0, len(log_sigma) - 1)
    uniform = torch.randint(0, len(log_sigma), (batch,), generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < 0.1, uniform, steps)


def memory_format(device: str) -> torch.memory_format:
    """Channels-last feeds tensor cores; oneDNN was 1.3 times faster without it on an AMD EPYC, as fast on an Intel Xeon."""
    return torch.channels_last if device == "cuda" else torch.contiguous_format


def shifted(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Images (B, C, S, S) moved by whole pixels, `down` and `right` (B, 1); what comes in is their reflection."""
    size = images.shape[-1]
    rows, columns = ((torch.arange(size, device=images.device) - move).abs() for move in (down, right))
    rows, columns = (size - 1 - (size - 1 - index).abs() for index in (rows, columns))
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (B, C, H, W), each mirrored or not."""
    flip = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def random_shift(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Images (B, C, S, S), each `shifted` by up to `most` pixels down or up and to either side."""
    offsets = torch.randint(-most, most + 1, (2, len(images), 1), generator=generator).to(images.device)
    return shifted(images, *offsets)


class Batches:
    """Endless shuffled batches, a pure function of (seed, step): a resumed run draws the same ones.

    `shift` is the most pixels of a `random_shift`; 0 for none.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch: int, seed: int, device: str, shift: int = 0):
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch, self.seed, self.device, self.shift = batch, seed, device, shift
        self.alpha, self.sigma = alphas_sigmas()
        self.log_sigma = (self.sigma / self.alpha).log()

    def __call__(self, step: int) -> tuple[torch.Tensor, ...]:
        """x_t, t, x_0, eps, labels of one step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        index = torch.randint(0, len(self.labels), (self.batch,), generator=generator).to(self.device)
        x0 = random_flip(self.images[index].float() / 127.5 - 1, generator)
        t = draw_timesteps(self.batch, self.log_sigma, generator)
        eps = torch.randn(x0.shape, generator=generator).to(self.device)
        if self.shift:
            x0 = random_shift(x0, self.shift, generator)
        alpha, sigma = (s[t].to(self.device)[:, None, None, None] for s in (self.alpha, self.sigma))
        x_t = (alpha * x0 + sigma * eps).contiguous(memory_format=memory_format(self.device))
        return x_t, t.to(self.device), x0, eps, self.labels[index]


def unet_loss(batches: Batches, dropout: float) -> Callable[[nn.Module, int], torch.Tensor]:
    """Mean squared error of v = alpha eps - sigma x0, labels dropped to the null label."""

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        x_t, t, x0, eps, labels = batches(step)
        drop = torch.rand(len(labels), generator=torch.Generator().manual_seed(step)) < dropout
        labels = torch.where(drop.to(labels.device), NULL_LABEL, labels)
        alpha, sigma = (s[t.cpu()].to(x0.device)[:, None, None, None] for s in (batches.alpha, batches.sigma))
        return nn.functional.mse_loss(model(x_t, t, class_labels=labels).sample.float(), alpha * eps - sigma * x0)

    return loss


def classifier_loss(batches: Batches, classes: list[int], smoothing: float) -> Callable[[nn.Module, int], torch.Tensor]:
    """Cross-entropy on noised images, columns in the order of `classes`."""
    column = torch.full((NULL_LABEL,), -1, dtype=torch.long)
    column[torch.tensor(classes)] = torch.arange(len(classes))

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        x_t, t, _, _, labels = batches(step)
        torch.manual_seed(batches.seed * 1_000_003 + step)  # dropout, too, is the same after a restart
        target = column.to(labels.device)[labels]
        return nn.functional.cross_entropy(model(x_t, t).float(), target, label_smoothing=smoothing)

    return loss


@torch.no_grad()
def fit_logit_scales(network: Any, batches: Batches, classes: list[int], levels: int = 11) -> list[float]:
    """The scale of the logits with the smallest cross-entropy at each noise level.

    Near the end of the schedule there is next to nothing to know, and a classifier that does not say
    so has gradients of noise, which guidance multiplies by sigma/alpha. At most 1: these are the
    photographs that it was trained on, on which it is overconfident where there is little noise.
    """
    columns = torch.tensor([classes.index(label) for label in batches.labels.tolist()])
    draw = torch.Generator().manual_seed(batches.seed)
    chosen = torch.randperm(len(columns), generator=draw)[:2000]
    x0, target = batches.images[chosen].cpu().float() / 127.5 - 1, columns[chosen]
    grid, scales = torch.linspace(0, 1, 41), []
    for t in torch.linspace(0, 999, levels).round().long():
        x_t = batches.alpha[t] * x0 + batches.sigma[t] * torch.randn(x0.shape, generator=draw)
        logits = torch.cat([network(part.to(batches.device), t.to(batches.device)).float().cpu() for part in x_t.split(250)])
        losses = torch.stack([nn.functional.cross_entropy(scale * logits, target) for scale in grid])
        scales.append(round(grid[losses.argmin()].item(), 3))
    return scales


def learning_rate(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    """Linear warm-up, constant, linear to zero over the last quarter."""
    return peak * min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (0.25 * steps)))


def train(
    model: Any,
    loss_of: Callable[[nn.Module, int], torch.Tensor],
    state_file: Path,
    steps: int,
    batch: int,
    peak: float,
    decay: float,
    compile_model: bool,
    save_seconds: float = 240.0,
) -> nn.Module:
    """Trains for `steps` in bf16 autocast, resuming from `state_file`; returns the EMA weights in `model`."""
    from diffusers.training_utils import EMAModel

    device = next(model.parameters()).device.type
    model = model.to(memory_format=memory_format(device)).train()
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.99), weight_decay=decay, fused=True)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    start, seconds, history = 0, 0.0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start, seconds, history = state["step"], state["seconds"], state["history"]
    network: Any = torch.compile(model) if compile_model else model

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
        temporary = state_file.with_suffix(".part")
        torch.save(state | {"step": step, "seconds": seconds, "history": history}, temporary)
        temporary.replace(state_file)

    saved = clock = time.monotonic()
    running: float | None = None
    for step, show in progress(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(network, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        if step % 50 == 0:
            value = loss.item()
            running = value if running is None else 0.9 * running + 0.1 * value
            show(running)
        now = time.monotonic()
        seconds, clock = seconds + now - clock, now
        if now - saved > save_seconds:
            history.append([step + 1, running])
            save(step + 1)
            saved = time.monotonic()
    history.append([steps, running])
    save(steps)
    typer.echo(f"{steps * batch} images, {seconds / 60:.0f} minutes, loss {running}")
    ema.copy_to(model.parameters())
    return model.eval()


def progress(start: int, stop: int) -> Iterator[tuple[int, Callable[[float], None]]]:
    """Steps start..stop-1, each with a function that shows the loss: a bar, or plain lines off a terminal."""
    from rich.progress import Progress, TextColumn

    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]}")) as bar:
        task = bar.add_task("training", total=stop, completed=start, loss="-")
        began = time.monotonic()

        def show(loss: float) -> None:
            bar.update(task, loss=f"{loss:.4f}")
            if not bar.console.is_terminal and step % 200 == 0:
                left = (time.monotonic() - began) / max(1, step - start) * (stop - step) / 60
                bar.console.print(f"step {step}/{stop}  loss {loss:.4f}  {left:.0f} min left")

        for step in range(start, stop):
            yield step, show
            bar.update(task, completed=step + 1)


def export(folder: Path, part: str, network: Any, names: dict[str, str]) -> None:
    """Writes a part of the folder that guidegen opens, weights as fp16 safetensors.

    model_index.json names the UNet and the scheduler alone, so that pipelines of diffusers open the folder, too.
    """
    from diffusers import DDIMScheduler

    folder.mkdir(parents=True, exist_ok=True)
    scheduler = DDIMScheduler(
        **SCHEDULE, prediction_type="v_prediction", clip_sample=True, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.save_pretrained(folder / "scheduler")
    network.half().to(memory_format=torch.contiguous_format).save_pretrained(folder / part)
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "id2label": names,
        "null_label": NULL_LABEL,
        "default_steps": 20,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main(
    data: Annotated[Path, typer.Option(help="Folder with train*.parquet and labels.json.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint and the training state go.")],
    part: Annotated[str, typer.Option(help="classifier, unet, guiding or all.")] = "all",
    classes: Annotated[str, typer.Option(help="Label ids, or 'all' for every class of the data.")] = CLASSES,
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 32,
    images: Annotated[int, typer.Option(help="Images the UNet sees.")] = 1_200_000,
    guiding_images: Annotated[int, typer.Option(help="Images the guiding UNet sees.")] = 64_000,
    classifier_images: Annotated[int, typer.Option(help="Images the classifier sees.")] = 300_000,
    start: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of a trained UNet to begin from.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of weights, noise and order.")] = 0,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the network: for GPUs.")] = False,
) -> None:
    """Train the bundled checkpoint; run again to go on."""
    if part not in ("all", "classifier", "unet", "guiding"):
        raise typer.BadParameter(f"--part {part}: classifier, unet, guiding or all.")
    from diffusers import UNet2DModel

    from guidegen.models.classifiers.noisy import NoisyClassifier

    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = json.loads((data / "labels.json").read_text())
    ids = sorted(int(i) for i in (known if classes == "all" else classes.split(",")))
    names = {str(i): known[str(i)] for i in ids}
    photographs, labels = (part.to(device) for part in load_images(data, "train", ids, size))  # all Batches share them
    out.mkdir(parents=True, exist_ok=True)
    if part in ("all", "classifier"):
        torch.manual_seed(seed)
        classifier = NoisyClassifier(sample_size=size, id2label=names, **CLASSIFIER).to(device)
        batches = Batches(photographs, labels, batch, seed, device, shift=size // 8)
        loss = classifier_loss(batches, ids, smoothing=0.05)
        steps = classifier_images // batch
        train(classifier, loss, out / "classifier.state", steps, batch, 1e-3, 0.05, compile_model)
        classifier.calibrate(fit_logit_scales(classifier, batches, ids))
        export(out, "classifier", classifier, names)
    for name, config, seen in (("unet", UNET, images), ("guiding", GUIDING, guiding_images)):
        if part in ("all", name):
            torch.manual_seed(seed)
            unet = UNet2DModel(sample_size=size, **config)
            if start and name == "unet":
                unet.load_state_dict(UNet2DModel.from_pretrained(start).state_dict())
            loss = unet_loss(Batches(photographs, labels, batch, seed, device), dropout=0.15)
            train(unet.to(device), loss, out / f"{name}.state", seen // batch, batch, 5e-4, 0.01, compile_model)
            export(out, "unet" if name == "unet" else "unet_weak", unet, names)


if __name__ == "__main__":
    typer.run(main)
