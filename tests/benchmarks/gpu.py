"""What guidegen does on a GPU: right in half precision, fast, how near to the card's limit, and in what memory.

    python tests/benchmarks/gpu.py [--only precision,speed] [--minutes 9] [--steps 20] [--pairs 3] [--compile]
    python tests/benchmarks/gpu.py --device cpu --small

Sections, in this order:

    speed       images a second (of two or four batches, saved) against the diffusers way, in alternating pairs; a
                sweep against pipeline calls
    overhead    sampling, and drawing with saving, over the bare network calls
    precision   autocast against fp32: predictions and gradients by timestep, images of the bundled checkpoint
    limit       FLOP over time against the rate of a matrix product on this card, and where the time goes
    memory      the largest batch that fits, peak against prediction, recovery from out-of-memory

Networks: the bundled UNet and classifier, and with random weights one of the size of DiT-XL/2 at 256x256
(Peebles & Xie 2022, arXiv 2212.09748, table 4) and one of the size of ADM at 64x64 with its classifier (Dhariwal &
Nichol 2021, arXiv 2105.05233, tables 11 and 14). Each line is printed when it is known; past `--minutes` no new
measurement is begun. `--small` makes all of them tiny, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from drawing import saving
from loop_overhead import bare_calls
from PIL import Image
from sweep_against_loop import Pipeline, take_turns
from table import ratios_of, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from guidegen import BUNDLED, NoisyClassifier, __version__, open_checkpoint, open_classifier, to_uint8
from guidegen.errors import is_out_of_memory
from guidegen.runs.directory import Run
from guidegen.sampling.device import DTYPES
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Sampler, open_sampler
from guidegen.sampling.schedulers import SCHEDULERS, noise_levels
from guidegen.sampling.setup import make_setup, plan_scheduler
from guidegen.sampling.worker import draw
from guidegen.scores.gradient import gradient_of_log_probability
from guidegen.scores.interfaces import autocast
from guidegen.scores.noise import Level, score_shift
from guidegen.spec.cell import Cell
from guidegen.spec.settings import Settings

SECTIONS = ("speed", "overhead", "precision", "limit", "memory")
TIMESTEPS = (0, 1, 5, 20, 50, 100, 200, 350, 500, 650, 800, 900, 950, 999)
W = {"cfg": (3.0, None), "classifier": (2.0, None), "both": (3.0, 1.0), "none": (0.0, None)}

DIT = {
    False: {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32},
    True: {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8},
}
VAE = {False: (128, 256, 512, 512), True: (8, 8)}
ADM = {
    False: {"sample_size": 64, "block_out_channels": (192, 384, 576, 768), "layers_per_block": 3, "attention_head_dim": 64},
    True: {"sample_size": 16, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "attention_head_dim": 16},
}
ADM_CLASSIFIER = {
    False: {"block_out_channels": (128, 256, 384, 512), "layers_per_block": 4, "attention_head_dim": 64},
    True: {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "attention_head_dim": 16},
}


@dataclass
class Bench:
    """The options, the card, and the clock."""

    options: Any
    device: torch.device
    folder: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def small(self) -> bool:
        return bool(self.options.small)

    @property
    def dtype(self) -> str:
        return str(self.options.dtype)

    @property
    def steps(self) -> int:
        return int(self.options.steps)

    def late(self, what: str) -> bool:
        """Whether the time is over, which is said once for each thing that is left out."""
        over = time.monotonic() - self.started > 60 * self.options.minutes
        if over:
            print(f"{what}: not measured, the {self.options.minutes} minutes are over", flush=True)
        return over

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass
class Subject:
    """A checkpoint in a folder, and the modes that it is measured in."""

    name: str
    bench: Bench
    folder: Path
    modes: tuple[str, ...]
    prediction_type: str

    @cached_property
    def checkpoint(self) -> Any:
        return open_checkpoint(self.folder)

    @cached_property
    def classifier(self) -> Any:
        return open_classifier(self.checkpoint.bundled_classifier)

    @property
    def labels(self) -> list[int]:
        return list(self.checkpoint.labels)

    def settings(self, mode: str, dtype: str, steps: int) -> Settings:
        return Settings(mode, self.name, "", "", steps, None, dtype, self.checkpoint.null_label)

    def sampler(self, mode: str, dtype: str, steps: int, scheduler: str | None = "ddim", compiled: bool = False) -> Sampler:
        classifier = self.classifier if mode in ("classifier", "both") else None
        walker = plan_scheduler(self.checkpoint, scheduler, steps, None)
        settings = self.settings(mode, dtype, steps)
        return open_sampler(
            make_setup(Models(self.checkpoint, classifier), settings, walker), self.bench.device, compile_networks=compiled
        )

    def cells(self, mode: str, count: int) -> list[Cell]:
        labels = (self.labels * count)[:count]
        return [Cell(label, seed, W[mode][0], w_classifier=W[mode][1]) for seed, label in enumerate(labels)]


def bundled(bench: Bench) -> Subject:
    return Subject("bundled", bench, BUNDLED, ("cfg", "classifier"), "v_prediction")


def dit(bench: Bench) -> Subject:
    """Random weights; the layers that the paper starts at zero are not zero here, so that every one of them counts."""
    folder = bench.folder / "dit"
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        **DIT[bench.small], in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=1000
    )
    channels = VAE[bench.small]
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1 if bench.small else 2,
        latent_channels=4,
        norm_num_groups=8 if bench.small else 32,
    )
    names = {i: f"class {i}" for i in range(1000)}
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False), id2label=names).save_pretrained(folder)
    return Subject("DiT-XL/2 sized", bench, folder, ("cfg",), "epsilon")


def adm(bench: Bench) -> Subject:
    """Random weights, and a class more than ADM has: the null label that classifier-free guidance needs."""
    folder = bench.folder / "adm"
    torch.manual_seed(0)
    blocks = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    shared = {"down_block_types": blocks, "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet"}
    UNet2DModel(
        **ADM[bench.small],
        **shared,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(blocks)),
        upsample_type="resnet",
        in_channels=3,
        out_channels=6,
        num_class_embeds=1001,
    ).save_pretrained(folder / "unet")
    names = {str(i): f"class {i}" for i in range(1000)}
    NoisyClassifier(
        **ADM_CLASSIFIER[bench.small],
        **shared,
        sample_size=ADM[bench.small]["sample_size"],
        pooling="attention",
        norm_num_groups=32,
        id2label=names,
    ).save_pretrained(folder / "classifier")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDIMPipeline", **parts, "id2label": names}))
    return Subject("ADM-64 sized", bench, folder, ("cfg", "classifier"), "epsilon")


SUBJECTS: dict[str, Callable[[Bench], Subject]] = {"bundled": bundled, "dit": dit, "adm": adm}


# -- the diffusers way ---------------------------------------------------------------------------------------------


Way = Callable[[list[int], list[int], float, int], Sequence[Image.Image]]
"""(labels, seeds, guidance scale, steps) -> images."""


def dit_pipeline(subject: Subject, dtype: torch.dtype) -> Way:
    pipeline = DiTPipeline.from_pretrained(subject.folder, torch_dtype=dtype).to(subject.bench.device)
    pipeline.set_progress_bar_config(disable=True)

    def way(labels: list[int], seeds: list[int], scale: float, steps: int) -> Sequence[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images: Sequence[Image.Image] = pipeline(
            class_labels=labels, guidance_scale=scale, generator=generators, num_inference_steps=steps
        ).images
        return images

    return way


class ClassifierLoop(Pipeline):
    """Classifier guidance as a script does it: torch.autograd around the classifier, weights in half precision.

    The null label makes the UNet unconditional; the logits and their softmax are fp32.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype):
        device, checkpoint = subject.bench.device, subject.checkpoint
        super().__init__(checkpoint.folder, checkpoint.null_label, device, dtype)
        self.classifier = NoisyClassifier.from_pretrained(checkpoint.folder / "classifier", torch_dtype=dtype)
        self.classifier = self.classifier.to(device).eval().requires_grad_(False)
        self.columns, self.prediction_type = subject.classifier.columns(checkpoint.labels), subject.prediction_type

    def __call__(self, labels: list[int], seeds: list[int], guidance_scale: float, steps: int) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size, count = self.unet.config.sample_size, len(labels)
        x = randn_tensor((count, 3, size, size), generator=generators, device=self.device, dtype=self.unet.dtype)
        classes = torch.full((count,), self.null_label, device=self.device)
        targets = torch.tensor([self.columns[label] for label in labels], device=self.device)
        self.scheduler.set_timesteps(steps)
        for t, level in zip(self.scheduler.timesteps, noise_levels(self.scheduler), strict=True):
            with torch.no_grad():
                prediction = self.unet(x, t, class_labels=classes).sample[:, :3]
            leaf = x.detach().requires_grad_()
            log_p = self.classifier(leaf, t.to(self.device).expand(count)).float().log_softmax(-1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, targets[:, None]).sum(), leaf)
            with torch.no_grad():
                guided = prediction + guidance_scale * score_shift(gradient, level, self.prediction_type)
                x = self.scheduler.step(guided, t, x).prev_sample
        return [Image.fromarray(image) for image in to_uint8(x.float()).numpy()]


def diffusers_way(subject: Subject, mode: str, dtype: torch.dtype) -> tuple[str, Way]:
    """Weights, latents and scheduler in `dtype`, as `torch_dtype` makes them."""
    if subject.name.startswith("DiT"):
        return "DiTPipeline", dit_pipeline(subject, dtype)
    if mode == "classifier":
        return "torch.autograd loop", ClassifierLoop(subject, dtype)
    return "UNet2DModel loop", Pipeline(subject.folder, subject.checkpoint.null_label, subject.bench.device, dtype)


def saved(way: Way, cells: list[Cell], batch: int, steps: int, where: Path) -> Callable[[], None]:
    """The diffusers way, a call for each batch, with its images saved as PNG, which the tool's are too."""

    def work() -> None:
        folder = tempfile.mkdtemp(dir=where)
        for start in range(0, len(cells), batch):
            some = cells[start : start + batch]
            images = way([cell.label or 0 for cell in some], [cell.seed for cell in some], some[0].w, steps)
            for cell, image in zip(some, images, strict=True):
                image.save(f"{folder}/{cell.seed:06}.png")

    return work


# -- speed ---------------------------------------------------------------------------------------------------------


def in_pairs(ours: Callable[[], None], theirs: Callable[[], None], pairs: int) -> list[tuple[float, float]]:
    """Seconds of both, in turn, after one of each to warm up."""
    ours(), theirs()
    return [(seconds(ours), seconds(theirs)) for _ in range(pairs)]


def speed(bench: Bench, subjects: Sequence[Subject]) -> None:
    heading(
        f"speed: {bench.steps} steps of ddim, both in {bench.dtype}, images saved, medians of {bench.options.pairs} pairs",
        "network          mode        way                    batch   images/s   theirs   times as fast (min-max)",
    )
    for subject in subjects:
        for mode in subject.modes:
            with on_memory(f"{subject.name} {mode}"):
                speed_of(subject, mode)
    sweeps(bench)


def speed_of(subject: Subject, mode: str) -> None:
    bench = subject.bench
    kind, way = diffusers_way(subject, mode, DTYPES[bench.dtype] or torch.float32)
    samplers = {"guidegen": subject.sampler(mode, bench.dtype, bench.steps)}
    if bench.options.compile:
        samplers["--compile"] = subject.sampler(mode, bench.dtype, bench.steps, compiled=True)
    for batch in bench.options.batches:
        rounds = 1 if bench.small else 4 if batch < 64 else 2
        cells = subject.cells(mode, rounds * batch)
        for name, sampler in samplers.items():
            if bench.late(f"{subject.name} {mode}, batch {batch}"):
                return
            bench.free()
            with on_memory(f"{subject.name} {mode}, batch {batch}"):
                work = saving(sampler, cells, batch, bench.folder)
                theirs = saved(way, cells, batch, bench.steps, bench.folder)
                pairs = in_pairs(work, theirs, bench.options.pairs)
                rates = [len(cells) / statistics.median(column) for column in zip(*pairs, strict=True)]
                median, least, most = ratios_of([(b, a) for a, b in pairs])
                label = kind if name == "guidegen" else f"{kind}, {name}"
                print(
                    f"{subject.name:<16} {mode:<11} {label:<22} {batch:5} {rates[0]:10.2f} {rates[1]:8.2f}   "
                    f"{median:.2f} ({least:.2f}-{most:.2f})",
                    flush=True,
                )


def sweeps(bench: Bench) -> None:
    """Nine weights in one sweep, against a pipeline call for each."""
    subject = bundled(bench)
    columns = "steps   images   times as fast (min-max)   calls"
    heading("sweep of nine weights, bundled, against nine pipeline calls", columns)
    for steps in sorted({max(2, bench.steps // 2), bench.steps}):
        if bench.late(f"sweep of {steps} steps"):
            return
        count = 1 if bench.small else 4
        options = argparse.Namespace(pairs=bench.options.pairs, steps=steps, labels=count, seeds=count)
        kind = DTYPES[bench.dtype] or torch.float32
        turns = take_turns(subject.checkpoint, bench.device, (bench.dtype,), kind, options)
        timings = turns.timings[1:] or turns.timings  # the first one warms up
        median, least, most = ratios_of([(turn["loop"][0], turn[bench.dtype][0]) for turn in timings])
        calls = f"{turns.calls[bench.dtype]} of {2 * turns.images * steps}"
        print(f"{steps:5} {turns.images:8}   {median:.2f} ({least:.2f}-{most:.2f}){'':<13} {calls}", flush=True)


def overhead(bench: Bench, subjects: Sequence[Subject]) -> None:
    batch = bench.options.batch
    heading(
        f"overhead: {bench.steps} steps, batch {batch}, over the bare network calls in the same precision (and VAE decode)",
        "network          mode        bare s   of it decoding   sampling over bare (min-max)   4 batches, saved, over bare",
    )
    for subject in subjects:
        for mode in subject.modes:
            if bench.late(f"overhead of {subject.name} {mode}"):
                return
            with on_memory(f"{subject.name} {mode}, batch {batch}"):
                sampler = subject.sampler(mode, bench.dtype, bench.steps)
                cells = subject.cells(mode, batch)
                bare = bare_calls(sampler, batch, [cell.label or 0 for cell in cells])
                sampling = in_pairs(partial(sampled, sampler, cells), bare, bench.options.pairs)
                whole = in_pairs(saving(sampler, subject.cells(mode, 4 * batch), batch, bench.folder), bare, 1)
                median, least, most = ratios_of(sampling)
                print(
                    f"{subject.name:<16} {mode:<11} {statistics.median(b for _, b in sampling):6.3f} "
                    f"{decoding(sampler, batch):16.3f}   "
                    f"{median:.3f} ({least:.3f}-{most:.3f}){'':<13} {whole[0][0] / whole[0][1] / 4:.3f}",
                    flush=True,
                )


@torch.no_grad()
def decoding(sampler: Sampler, batch: int) -> float:
    """Seconds that the latents of a batch take to become images; 0 for a network that draws images."""
    if sampler.decode is None:
        return 0.0
    latents = torch.randn((batch, *sampler.setup.models.checkpoint.shape), device=sampler.device)
    return min(seconds(partial(sampler.decode, latents)) for _ in range(2))


def sampled(sampler: Sampler, cells: list[Cell]) -> None:
    """Drawing without saving: to bytes on the host."""
    to_uint8(sampler.draw(cells)[0])


# -- precision -----------------------------------------------------------------------------------------------------


def precision(bench: Bench, subjects: Sequence[Subject]) -> None:
    for subject in subjects:
        if bench.late(f"precision of {subject.name}"):
            return
        with on_memory(f"precision of {subject.name}"):
            predictions(subject)
            if "classifier" in subject.modes:
                gradients(subject)
    if not bench.late("images"):
        images(bundled(bench))


def noised(subject: Subject, t: int, count: int) -> tuple[Tensor, Tensor, Level]:
    """x_t of images that the fp32 network drew itself, t, and its level."""
    scheduler = plan_scheduler(subject.checkpoint, "ddpm", 1000, None)
    kept = float(scheduler.alphas_cumprod.double()[t])
    level = Level(kept**0.5, (1 - kept) ** 0.5)
    device = subject.bench.device
    noise = torch.randn((count, *subject.checkpoint.shape), generator=torch.Generator().manual_seed(t))
    return level.alpha * clean(subject, count) + level.sigma * noise.to(device), torch.tensor(t, device=device), level


_CLEAN: dict[tuple[str, int], Tensor] = {}


def clean(subject: Subject, count: int) -> Tensor:
    """Images of the bundled checkpoint in fp32; for random weights, Gaussian stand-ins of unit size."""
    key = (subject.name, count)
    if key not in _CLEAN:
        if subject.name == "bundled":
            sampler = subject.sampler("cfg", "fp32", 4 if subject.bench.small else 20)
            _CLEAN[key] = sampler.draw(subject.cells("cfg", count))[0].clamp(-1, 1)
        else:
            shape = (count, *subject.checkpoint.shape)
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(count))
            _CLEAN[key] = drawn.to(subject.bench.device)
    return _CLEAN[key]


def relative(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact one, over all that is finite."""
    good = found.isfinite()
    error = (found - exact)[good].double().square().mean().sqrt()
    return float(error / exact[good].double().square().mean().sqrt())


def predictions(subject: Subject) -> None:
    heading(
        f"precision of predictions: {subject.name}, conditional call, RMS of the difference over RMS in fp32",
        "    t    RMS fp32      fp16      bf16   not finite",
    )
    count = 2 if subject.bench.small else 8
    labels = torch.tensor(subject.labels[:count], device=subject.bench.device)
    denoisers = {name: subject.sampler("cfg", name, 2).condition([])[0] for name in DTYPES}
    for t in TIMESTEPS[:: 4 if subject.bench.small else 1]:
        x_t, when, _ = noised(subject, t, count)
        with torch.no_grad():
            made = {name: denoiser(x_t, when, labels) for name, denoiser in denoisers.items()}
        exact = made.pop("fp32")
        errors = "".join(f"{relative(made[name], exact):10.2e}" for name in ("fp16", "bf16"))
        bad = sum(int((~value.isfinite()).sum()) for value in made.values())
        print(f"{t:5}{float(exact.square().mean().sqrt()):12.4f}{errors}{bad:13}", flush=True)


def gradients(subject: Subject) -> None:
    heading(
        f"precision of classifier gradients: {subject.name}; zeros: elements that are 0 where fp32's is not, in percent",
        "    t    RMS fp32      fp16  zeros  not finite      bf16  zeros  not finite   fp16 unscaled  zeros  not finite",
    )
    count = 2 if subject.bench.small else 8
    labels = torch.tensor(subject.labels[:count], device=subject.bench.device)
    scores: dict[str, Any] = {name: subject.sampler("classifier", name, 2).classifier for name in DTYPES}
    for t in TIMESTEPS[:: 4 if subject.bench.small else 1]:
        x_t, when, level = noised(subject, t, count)
        made = {name: score(x_t, when, labels, level, x_t) for name, score in scores.items()}
        made["plain"] = unscaled(scores["fp16"], subject, x_t, when, labels)
        exact = made.pop("fp32")
        cells = []
        for name in ("fp16", "bf16", "plain"):
            lost = (made[name] == 0) & (exact != 0)
            bad = int((~made[name].isfinite()).sum())
            cells.append(f"{relative(made[name], exact):10.2e}{100 * float(lost.float().mean()):7.2f}{bad:12}")
        print(f"{t:5}{float(exact.square().mean().sqrt()):12.2e}{cells[0]}{cells[1]}      {cells[2]}", flush=True)


def unscaled(score: Any, subject: Subject, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The gradient in fp16 without a scale, for comparison."""
    columns = subject.classifier.columns(subject.checkpoint.labels)

    def logits_of(x: Tensor) -> Tensor:
        with autocast(x, torch.float16):
            logits: Tensor = score.network(x, t.expand(len(x)))
        return logits

    places = torch.tensor([columns[int(label)] for label in labels], device=x_t.device)
    return gradient_of_log_probability(logits_of, x_t, places, scaled=False)


def images(subject: Subject) -> None:
    bench = subject.bench
    steps, count = (2, 1) if bench.small else (bench.steps, 16)
    heading(
        f"precision of images: bundled, {count} images, {steps} steps, PSNR against fp32 in dB",
        "scheduler   mode         fp16 median  least    bf16 median  least",
    )
    for scheduler in SCHEDULERS:
        for mode in ("cfg", "classifier", "both"):
            if bench.late(f"images of {scheduler} {mode}"):
                return
            cells = subject.cells(mode, count)
            drawn = {
                name: to_uint8(subject.sampler(mode, name, steps, scheduler).draw(cells)[0]).double() for name in DTYPES
            }
            columns = []
            for name in ("fp16", "bf16"):
                error = (drawn[name] - drawn["fp32"]).square().flatten(1).mean(1)
                psnr = 10 * (255**2 / error.clamp(min=1e-9)).log10()
                columns.append(f"{float(psnr.median()):14.1f} {float(psnr.min()):6.1f}")
            print(f"{scheduler:<11} {mode:<10} {columns[0]} {columns[1]}", flush=True)


# -- the limit -----------------------------------------------------------------------------------------------------


def matrix_rate(bench: Bench) -> float:
    """FLOP a second of a large square matrix product in the dtype of the network: the best of ten."""
    size = 512 if bench.small else 8192
    kind = DTYPES[bench.dtype] or torch.float32
    a, b = (torch.randn(size, size, device=bench.device, dtype=kind) for _ in range(2))
    times = [seconds(lambda: torch.mm(a, b)) for _ in range(10)]
    return 2.0 * size**3 / min(times[2:])


def flop(work: Callable[[], None]) -> int:
    """FLOP of matrix products and convolutions; attention as two products, which its kernels compute too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "conv"),
    "attention": ("attention",),
    "normalisation": ("norm",),
    "casts, copies": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::contiguous", "aten::index_select"),
}


def spent(work: Callable[[], None], device: torch.device, undisturbed: float) -> dict[str, float]:
    """Shares of the time by kind of operation, and of the time in which the device had nothing to do.

    The profiler slows the host down and not the device, so on CUDA they are shares of the undisturbed seconds.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        whole = seconds(work)
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        took = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if not event.key.startswith("aten::") and "mkldnn" not in event.key:
            continue  # a kernel on the device is counted with the operation that launched it
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
        found[kind] += took / 1e6
    whole = undisturbed if device.type == "cuda" else whole
    found["idle"] = max(0.0, whole - sum(found.values()))
    return {kind: took / whole for kind, took in found.items()}


def limit(bench: Bench, subjects: Sequence[Subject]) -> None:
    heading(
        f"limit: batch {bench.options.batch}, without decoding; matrix rate: of a large {bench.dtype} product, beside it",
        "network          mode        TFLOP   bare s   sampled s   matrix TFLOP/s   bare   sampled (shares of that rate)",
    )
    profiles = []
    for subject in subjects:
        for mode in subject.modes:
            if bench.late(f"limit of {subject.name} {mode}"):
                break
            with on_memory(f"limit of {subject.name} {mode}"):
                steps = min(bench.steps, 4)
                sampler = replace(subject.sampler(mode, bench.dtype, steps), decode=None)
                sampler.scheduler.set_timesteps(steps)
                cells = subject.cells(mode, bench.options.batch)
                one = bare_calls(sampler, 1, [cells[0].label or 0])
                total = flop(one) * len(cells)
                bare = bare_calls(sampler, len(cells), [cell.label or 0 for cell in cells])
                work = partial(sampled_latents, sampler, cells)
                pairs = in_pairs(work, bare, bench.options.pairs)
                ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
                rate = matrix_rate(bench)
                print(
                    f"{subject.name:<16} {mode:<11} {total / 1e12:6.3f} {theirs:8.4f} {ours:11.4f} {rate / 1e12:16.2f} "
                    f"{total / theirs / rate:6.1%} {total / ours / rate:9.1%}",
                    flush=True,
                )
                profiles.append((f"{subject.name:<16} {mode:<11}", spent(work, bench.device, ours)))
    kinds = [*KINDS, "other", "idle"]
    columns = "   ".join(f"{kind:>5}" for kind in kinds)
    heading("where the time of a sampling goes", f"{'network':<16} mode        {columns}")
    for name, found in profiles:
        shares = "   ".join(f"{found[kind]:{max(5, len(kind))}.1%}" for kind in kinds)
        print(f"{name} {shares}", flush=True)


def sampled_latents(sampler: Sampler, cells: list[Cell]) -> None:
    sampler.draw(cells)


# -- memory --------------------------------------------------------------------------------------------------------


def memory(bench: Bench, subjects: Sequence[Subject]) -> None:
    heading(
        "memory: the largest batch (2, 4, 6, 8, 12 ...), its peak, and what a line through the two smallest predicts",
        "network          mode        largest   peak GiB   predicted   drawn in memory for half of it: images, batches",
    )
    for subject in subjects:
        for mode in subject.modes:
            if bench.late(f"memory of {subject.name} {mode}"):
                return
            sampler = capped(subject.sampler(mode, bench.dtype, 2), 6 if bench.device.type == "cpu" else None)
            memory_of(subject, mode, sampler)


class _Capped(Sampler):
    """A device with room for few images, where there is no device whose memory could be filled."""

    room: int

    def draw(self, cells: Sequence[Cell], *others: Any, **named: Any) -> Any:
        if len(cells) > self.room:
            raise torch.OutOfMemoryError("a stand-in for a full device")
        return super().draw(cells, *others, **named)


def capped(sampler: Sampler, room: int | None) -> Sampler:
    if room is None:
        return sampler
    small = _Capped(**{each.name: getattr(sampler, each.name) for each in fields(sampler)})
    object.__setattr__(small, "room", room)
    return small


def peak(sampler: Sampler, cells: list[Cell]) -> float | None:
    """GiB at the peak of drawing a batch, nan off CUDA; None if it does not fit."""
    cuda = sampler.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(sampler.device)
    try:
        sampled(sampler, cells)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return torch.cuda.max_memory_allocated(sampler.device) / 2**30 if cuda else float("nan")


def memory_of(subject: Subject, mode: str, sampler: Sampler) -> None:
    most = subject.bench.options.most
    peaks: dict[int, float] = {}
    size = 2
    while size <= most and (found := peak(sampler, subject.cells(mode, size))) is not None:
        peaks[size] = found
        size *= 2
    between = size // 2 + size // 4
    if len(peaks) > 1 and size <= most and (found := peak(sampler, subject.cells(mode, between))) is not None:
        peaks[between] = found
    if len(peaks) < 2:
        print(f"{subject.name:<16} {mode:<11} {max(peaks, default=0):7}   too few batches fit", flush=True)
        return
    largest, (low, high) = max(peaks), sorted(peaks)[:2]
    predicted = peaks[low] + (peaks[high] - peaks[low]) / (high - low) * (largest - low)
    finished, batches = recovered(subject, mode, sampler, largest, peaks)
    print(
        f"{subject.name:<16} {mode:<11} {largest:5}{'+' if size > most else ' '} {peaks[largest]:11.2f} {predicted:11.2f}   "
        f"{finished} of {largest}, {', '.join(map(str, batches))}",
        flush=True,
    )


def recovered(subject: Subject, mode: str, sampler: Sampler, largest: int, peaks: dict[int, float]) -> tuple[int, list[int]]:
    """Images that are drawn from one batch where half of it fits, and the batches that they were drawn in."""
    bench, settings = subject.bench, subject.settings(mode, subject.bench.dtype, 2)
    half = max(size for size in peaks if size <= largest // 2)
    cuda, batches = sampler.device.type == "cuda", []
    if cuda:
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(sampler.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.1 * peaks[half] * 2**30 / whole))
    else:
        sampler = capped(sampler, half)
    try:
        with Run(Path(tempfile.mkdtemp(dir=bench.folder)), settings, {}) as run:
            rows = list(draw(sampler, subject.cells(mode, largest), run, str, largest, batches.append))
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return sum(row["status"] == "ok" for _, row in rows), list(dict.fromkeys(batches))


# -- the script ----------------------------------------------------------------------------------------------------


def heading(title: str, columns: str) -> None:
    print(f"\n## {title}\n{columns}", flush=True)


@contextmanager
def on_memory(what: str) -> Iterator[None]:
    """A measurement that does not fit is told, and the next one begins."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"{what}: out of memory", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def card(bench: Bench) -> None:
    options, device = bench.options, bench.device
    print(f"guidegen {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.platform()}")
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        print(
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute {about.major}.{about.minor}, "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    else:
        print(f"{device}, {torch.get_num_threads()} threads: nothing below tells anything of a GPU")
    print(f"{options.dtype}, {options.steps} steps, batches {options.batches}, {options.minutes} min at most", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--networks", default=",".join(SUBJECTS), help="of bundled, dit, adm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on CUDA, bf16 elsewhere")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--batches", help="of the section speed, by comma; default 1,8,64,256")
    parser.add_argument("--batch", type=int, help="of the sections overhead and limit; default 64")
    parser.add_argument("--most", type=int, help="largest batch that the section memory tries; default 1024")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too, where it is slow to start")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    small = options.small
    options.dtype = options.dtype or ("fp16" if options.device.startswith("cuda") else "bf16")
    options.steps = options.steps or (2 if small else 20)
    options.pairs = options.pairs or (1 if small else 3)
    options.batches = [int(batch) for batch in (options.batches or ("1,4" if small else "1,8,64,256")).split(",")]
    options.batch = options.batch or (4 if small else 64)
    options.most = options.most or (16 if small else 1024)
    for given, known in ((options.only, SECTIONS), (options.networks, tuple(SUBJECTS))):
        unknown = set(given.split(",")) - set(known)
        if unknown:
            parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    return options


def main() -> None:
    options = arguments()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers renames torch_dtype
    sections: dict[str, Callable[[Bench, Sequence[Subject]], None]] = {
        "speed": speed,
        "overhead": overhead,
        "precision": precision,
        "limit": limit,
        "memory": memory,
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(options, torch.device(options.device), folder)
        card(bench)
        subjects = [SUBJECTS[name](bench) for name in options.networks.split(",")]
        for name in SECTIONS:
            if name in options.only.split(",") and not bench.late(f"section {name}"):
                sections[name](bench, subjects)
                bench.free()


if __name__ == "__main__":
    main()
