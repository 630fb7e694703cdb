"""The main job against the shortest diffusers script for the same picture: whole processes from nothing, in turn.

python tests/benchmarks/cold_start.py [--repeats 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import table
from processes import GUIDEGEN, run
from table import Row, spread, timed, turns

JOB = ["sample", "--mode", "cfg", "--w", "3.0", "--label", "207"]
SCRIPT = """
import json, sys, torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

folder, label = sys.argv[1], int(sys.argv[2])
index = json.load(open(f"{folder}/model_index.json"))
unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
scheduler.set_timesteps(int(sys.argv[4]))
classes = torch.tensor([int(sys.argv[3]), label])
x = torch.randn(1, unet.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    for t in scheduler.timesteps:
        u, c = unet(torch.cat([x, x]), t, class_labels=classes).sample.chunk(2)
        x = scheduler.step(u + 3.0 * (c - u), t, x).prev_sample
image = ((x / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
Image.fromarray(image[0]).save("image.png")
"""


def rows(options: argparse.Namespace) -> Iterator[Row]:
    from guidegen import BUNDLED, open_checkpoint

    checkpoint = open_checkpoint(str(BUNDLED))
    numbers = [str(207), str(checkpoint.null_label), str(checkpoint.steps)]
    theirs = [sys.executable, "-c", SCRIPT, str(Path(BUNDLED).resolve()), *numbers]
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    commands = ([*GUIDEGEN, *JOB], theirs, [*GUIDEGEN, "--help"])
    for command in commands:
        run(command, environment)
    found = turns(options.repeats, *(partial(run, command, environment) for command in commands))
    job = " ".join(("guidegen", *JOB))
    yield timed(job, [each[:2] for each in found], "diffusers script", f"whole processes, {options.threads} threads")
    yield Row("guidegen --help", f"{spread([help.wall for _, _, help in found])} s")


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
