"""A sweep over nine weights against the loop that a diffusers user writes: one pipeline call for each weight.

    python tests/benchmarks/sweep_against_loop.py [--pairs 3] [--steps 10] [--labels 4] [--seeds 4] [--model DIR]

Same network, scheduler, seeds and labels; both save PNG files. The loop and the sweeps, in fp32 and with the
fast settings (bf16 autocast), are timed in turn in one process; the medians of the ratios of each turn are
printed, of CPU time too, with the largest difference between the images in levels of 255.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import table
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from drawing import DEVICE, sampler_of, save
from PIL import Image
from table import Row, Took, timed

from guidegen import Checkpoint, open_checkpoint
from guidegen.sampling.device import pick_batch_size
from guidegen.sampling.sampler import Tally
from guidegen.spec.cell import Cell
from guidegen.spec.plan import make_cells
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


def drawn_by(work: Callable[[Path], None]) -> tuple[float, float, dict[str, Any]]:
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
        sampler = sampler_of(checkpoint, options.steps, dtype, scheduler="ddim")
        size = pick_batch_size("auto", device, checkpoint.image_shape)

        def work(folder: Path) -> None:
            tallies[dtype] = Tally()
            save(sampler, cells, size, folder, tallies[dtype])

        return work

    works = {"loop": loop} | {dtype: sweep(dtype) for dtype in dtypes}
    timings = [{name: drawn_by(work) for name, work in works.items()} for _ in range(options.pairs)]
    return Turns(timings, {name: tally.made for name, tally in tallies.items()}, len(cells))


def rows(options: argparse.Namespace) -> Iterator[Row]:
    checkpoint = open_checkpoint(options.model)
    found, calls, images = take_turns(checkpoint, DEVICE, ("fp32", "bf16"), torch.float32, options)
    for name in ("fp32", "bf16"):
        ours, theirs = found[0][name][2], found[0]["loop"][2]
        apart = np.concatenate([np.abs(ours[file] - theirs[file]).ravel() for file in theirs])
        conditions = (
            f"{DEVICE}, {options.labels} labels, {options.seeds} seeds, {options.steps} steps; {calls[name]:,} of "
            f"{2 * images * options.steps:,} network calls; images {apart.mean():.2f}/255 apart, {apart.max()}/255 at most"
        )
        pairs = [(Took(*turn[name][:2]), Took(*turn["loop"][:2])) for turn in found]
        yield timed(f"a sweep of {len(WEIGHTS)} weights, {name}", pairs, "a diffusers loop in fp32", conditions)


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--labels", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--model", default=str(BUNDLED))
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
