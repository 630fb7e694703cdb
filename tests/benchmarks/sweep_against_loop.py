"""A sweep over nine weights against the loop that a diffusers user writes: one pipeline call for each weight.

    python tests/benchmarks/sweep_against_loop.py [--pairs 3] [--steps 10] [--labels 4] [--seeds 4] [--model DIR]

Same network, scheduler, seeds and labels; both save PNG files. The loop and the sweeps, in fp32 and with the
fast settings (bf16 autocast), are timed in turn in one process; the medians of the ratios of each turn are
printed, of CPU time too, which other processes disturb less, with the largest difference between the images in
levels of 255.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from guidegen import Checkpoint, open_checkpoint
from guidegen.runs.directory import Run
from guidegen.sampling.device import pick_batch_size
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Tally, open_sampler
from guidegen.sampling.setup import make_setup, plan_scheduler
from guidegen.sampling.worker import draw
from guidegen.spec.cell import Cell
from guidegen.spec.plan import make_cells
from guidegen.spec.settings import Settings
from guidegen.zoo import BUNDLED

WEIGHTS = [float(w) for w in range(9)]


class Pipeline:
    """What stands in a diffusers user's script: classifier-free guidance as the pipelines of diffusers do it.

    `dtype` is that of weights, latents and scheduler, as `torch_dtype` makes it in those pipelines.
    """

    def __init__(self, folder: Path, null_label: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self.unet = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device).eval()
        self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.null_label, self.device = null_label, device

    @torch.no_grad()
    def __call__(self, labels: list[int], seeds: list[int], guidance_scale: float, steps: int) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = self.unet.config.sample_size
        shape = (len(labels), self.unet.config.in_channels, size, size)
        x = randn_tensor(shape, generator=generators, device=self.device, dtype=self.unet.dtype)
        classes = torch.tensor([self.null_label] * len(labels) + labels, device=self.device)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([x, x]), t, class_labels=classes).sample[:, : shape[1]]
            unconditional, conditional = noise.chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(guided, t, x).prev_sample
        images = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
        return [Image.fromarray(image) for image in images]


def timed(work: Callable[[Path], None]) -> tuple[float, float, dict[str, Any]]:
    """Seconds, seconds of CPU time, and the pixels of each file."""
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        work(Path(folder))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        paths = sorted(Path(folder).glob("images/**/*.png"))
        return took, cpu, {str(path.relative_to(folder)): np.asarray(Image.open(path)).astype(int) for path in paths}


class Turns(NamedTuple):
    """Of the loop and of the sweep in each dtype: seconds, CPU seconds and pixels; network calls of the sweeps."""

    timings: list[dict[str, tuple[float, float, dict[str, Any]]]]
    calls: dict[str, int]
    images: int


def take_turns(
    checkpoint: Checkpoint,
    device: torch.device,
    dtypes: Sequence[str],
    loop_dtype: torch.dtype,
    options: Any,
) -> Turns:
    """Times the loop and the sweeps in turn; `options` holds pairs, steps, labels and seeds."""
    labels, seeds = list(checkpoint.labels)[: options.labels], list(range(options.seeds))
    cells = make_cells(labels, seeds, WEIGHTS)
    pipeline = Pipeline(checkpoint.folder, checkpoint.null_label or 0, device, loop_dtype)
    tallies: dict[str, Tally] = {}

    def loop(folder: Path) -> None:
        pairs = [(label, seed) for label in labels for seed in seeds]
        for w in WEIGHTS:
            images = pipeline([label for label, _ in pairs], [seed for _, seed in pairs], w, options.steps)
            for (label, seed), image in zip(pairs, images, strict=True):
                path = folder / Cell(label, seed, w).file
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)

    def sweep(dtype: str) -> Callable[[Path], None]:
        scheduler = plan_scheduler(checkpoint, "ddim", options.steps, None)
        settings = Settings("cfg", checkpoint.name, "", "DDIM", options.steps, None, dtype, checkpoint.null_label)
        sampler = open_sampler(make_setup(Models(checkpoint), settings, scheduler), device)
        size = pick_batch_size("auto", device, checkpoint.image_shape)

        def work(folder: Path) -> None:
            tallies[dtype] = Tally()
            with Run(folder, settings, {}) as run:
                for _ in draw(sampler, cells, run, str, size, tally=tallies[dtype]):
                    pass

        return work

    works = {"loop": loop} | {dtype: sweep(dtype) for dtype in dtypes}
    timings = [{name: timed(work) for name, work in works.items()} for _ in range(options.pairs)]
    return Turns(timings, {name: tally.made for name, tally in tallies.items()}, len(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--labels", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--model", default=str(BUNDLED))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(options.model)
    turns, calls, images = take_turns(checkpoint, device, ("fp32", "bf16"), torch.float32, options)
    plain = 2 * images * options.steps
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads: {len(WEIGHTS)} weights, {options.labels} "
        f"labels, {options.seeds} seeds, {options.steps} steps; the loop makes {plain} network calls"
    )
    print("sweep   times as fast: median of turns, min-max   CPU time   sweep s   loop s   calls   largest, mean difference")
    for name in ("fp32", "bf16"):
        ratios = [turn["loop"][0] / turn[name][0] for turn in turns]
        of_cpu = statistics.median(turn["loop"][1] / turn[name][1] for turn in turns)
        seconds = [statistics.median(turn[which][0] for turn in turns) for which in (name, "loop")]
        ours, theirs = turns[0][name][2], turns[0]["loop"][2]
        apart = np.concatenate([np.abs(ours[file] - theirs[file]).ravel() for file in theirs])
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"{name:<7} {spread:<41} {of_cpu:8.2f} {seconds[0]:9.1f} {seconds[1]:8.1f} {calls[name]:7} "
            f"{apart.max():9} {apart.mean():9.3f}"
        )


if __name__ == "__main__":
    main()
