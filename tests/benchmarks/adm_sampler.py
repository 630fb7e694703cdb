"""Classifier guidance against guided-diffusion's own sampler: the same two networks, converted, on the same noise.

python tests/benchmarks/adm_sampler.py CLONE [--pairs 5] [--batch 4] [--steps 20] [--width 64] [--dtype fp32] [--profile]

CLONE is a folder with github.com/openai/guided-diffusion. The networks are its 64x64 ones at a smaller width, with
random weights. Its `ddim_sample_loop` with the `cond_fn` of its script and our batch are timed in turn in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import table
import torch
from drawing import batch_of, sampler_of
from table import Row, clock, timed, turns
from torch.nn import functional as F

from guidegen import open_checkpoint, open_classifier
from guidegen.models.convert import adm
from guidegen.sampling.device import DTYPES
from guidegen.sampling.loop import initial_noise

sys.path.insert(0, str(Path(__file__).parents[1]))
from adm_reference import randomise

SIZE, SCALE = 64, 1.0


def theirs(clone: str, width: int, steps: int) -> tuple[Any, Any, Any]:
    """UNet, classifier and diffusion of guided-diffusion."""
    sys.path.insert(0, clone)
    from guided_diffusion import script_util

    options = script_util.model_and_diffusion_defaults() | {
        "image_size": SIZE,
        "num_channels": width,
        "num_res_blocks": 2,
        "num_head_channels": 32,
        "attention_resolutions": "32,16,8",
        "learn_sigma": True,
        "resblock_updown": True,
        "timestep_respacing": f"ddim{steps}",
    }
    unet, diffusion = script_util.create_model_and_diffusion(**options)
    classifier = script_util.create_classifier(
        **script_util.classifier_defaults() | {"image_size": SIZE, "classifier_width": width, "classifier_depth": 2}
    )
    return randomise(unet, seed=1), randomise(classifier, seed=2), diffusion


def converted(network: Any, folder: Path, heads: int, layers: int | None = None) -> Path:
    """The folder that `guidegen convert` makes of a network."""
    path = folder.with_suffix(".pt")
    torch.save(network.state_dict(), path)
    choices = adm.Choices(SIZE, None, heads, "legacy", None if layers else "linear")
    adm.convert(path, choices, layers=layers).save(folder)
    return folder


def works(options: Any, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Our sampler and theirs, each of which returns images (B, 3, H, W)."""
    unet, classifier, diffusion = theirs(options.clone, options.width, options.steps)
    checkpoint = open_checkpoint(str(converted(unet, folder / "unet", 32)))
    guide = open_classifier(str(converted(classifier, folder / "classifier", 64, 2)))
    sampler = sampler_of(checkpoint, options.steps, options.dtype, "classifier", guide, "ddim")
    labels = list(range(options.batch))
    cells = batch_of(labels, options.batch, SCALE)

    def cond_fn(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t), dim=-1)
            return torch.autograd.grad(log_probs[range(len(y)), y].sum(), x_in)[0] * SCALE

    def original() -> torch.Tensor:
        noise, _ = initial_noise(range(options.batch), (3, SIZE, SIZE))
        drawn: torch.Tensor = diffusion.ddim_sample_loop(
            lambda x, t, y: unet(x, t),
            tuple(noise.shape),
            noise=noise,
            model_kwargs={"y": torch.tensor(labels)},
            cond_fn=cond_fn,
            device="cpu",
        )
        return drawn

    return lambda: sampler.draw(cells)[0], original


def rows(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        ours, original = works(options, Path(folder))
        a, b = ours(), original()
        apart = float((a - b).abs().max() / b.abs().max())
        found = turns(options.pairs, partial(clock, ours), partial(clock, original))
        conditions = (
            f"{options.dtype}, batch {options.batch}, {options.steps} steps, width {options.width}; images {apart:.0e} of "
            "their size apart"
        )
        yield timed("classifier guidance, the same ADM networks", found, "guided-diffusion", conditions)
        for work in (ours, original) if options.profile else ():
            with torch.profiler.profile() as profile:
                work()
            found = profile.key_averages()
            print(found.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40), file=sys.stderr)


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("clone")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--profile", action="store_true", help="also print where each of them spends its time")
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
