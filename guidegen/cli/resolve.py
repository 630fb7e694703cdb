"""Flags become a job: all that is known of `sample` and `sweep` before any weights are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.cli import console
from guidegen.cli.asked import (
    asked_classifier_weights,
    asked_gradient,
    asked_guidance,
    asked_guide_weights,
    asked_scheduler_options,
    asked_seeds,
    asked_shard,
    asked_weights,
    check_numbers,
)
from guidegen.cli.axes import By, Variants, parse_axes, parse_by, vary
from guidegen.cli.conditions import Conditions, ask_conditions
from guidegen.cli.flags import Dtype, SampleOptions, SweepOptions
from guidegen.cli.models import open_models
from guidegen.cli.output import Output, parse_output
from guidegen.cli.own_loop import check_own_loop
from guidegen.cli.source import source_of
from guidegen.cli.stepwise import check_stepwise
from guidegen.errors import UsageError
from guidegen.report import grid
from guidegen.runs.ours import refuse_foreign
from guidegen.sampling.models import Models
from guidegen.spec.cell import Variant, digest, fingerprint
from guidegen.spec.composition import single_labels
from guidegen.spec.options import plain_options
from guidegen.spec.parse import Seeds, parse_weights
from guidegen.spec.plan import Cells, Plan, make_cells
from guidegen.spec.settings import Settings
from guidegen.spec.shard import Shard
from guidegen.zoo import BUNDLED

if TYPE_CHECKING:
    import torch

    from guidegen.sampling.setup import Setup


@dataclass(frozen=True)
class Job:
    """All that is known before any weights are read.

    Attributes:
        flags: as given.
        models: what will be drawn with.
        conditions: labels and prompts.
        plan: what the run is to hold.
        shard: which part of it this process draws; None for all.
        cells: what this process draws.
        setups: what each variant of the plan is drawn with.
        settings: all but the hashes of the weights; what all variants have in common.
        device: where to draw.
        output: where it goes.
        pages: the grid of a sweep, where this process draws it.
    """

    flags: SampleOptions
    models: Models
    conditions: Conditions
    plan: Plan
    shard: Shard | None
    cells: Cells
    setups: dict[Variant, Setup]
    settings: Settings
    device: torch.device
    output: Output
    pages: grid.Layout | None = None

    def with_hashes(self, hashes: Mapping[str, Any]) -> Job:
        """The same with the hashes of its weights, by the names of `WEIGHT_HASHES`, in the settings of all variants."""
        setups = {
            variant: replace(setup, settings=replace(setup.settings, **hashes)) for variant, setup in self.setups.items()
        }
        return replace(self, settings=replace(self.settings, **hashes), setups=setups)

    @property
    def variants(self) -> dict[Variant, Settings]:
        """The settings of each variant of the plan."""
        return {variant: setup.settings for variant, setup in self.setups.items()}

    @property
    def grid_files(self) -> list[Path]:
        """The pages of the grid that this process draws."""
        if self.pages is None or self.output.folder is None:
            return []
        if self.output.is_file:
            return [self.output.path] * self.output.one_image
        return [self.output.folder / name for name in grid.page_names(len(self.pages.pages))]

    @property
    def title(self) -> str:
        """The line at the top of the grid."""
        return grid.title_of(asdict(self.settings), [axis for axis, _ in self.plan.by])

    @property
    def origin(self) -> dict[str, Any]:
        """What files keep of the networks: the options that name them, and what w is where a pipeline's own loop draws."""
        convention = self.models.checkpoint.convention
        return {"source": source_of(self.flags, self.models).as_json()} | ({"convention": convention} if convention else {})

    def by_variant(self, cells: Cells) -> Iterator[tuple[Setup, Cells]]:
        """The cells of each variant that has any, with its setup."""
        for variant, some in cells.by_variant():
            yield self.setups[variant], some

    @property
    def metadata(self) -> dict[str, Any]:
        """What a file of the whole plan carries: a picture names its cells, the others the lists they come from."""
        about: dict[str, Any] = {"settings": asdict(self.settings), **self.origin}
        if self.output.is_file and self.output.one_image:
            grid_of = {"plan": self.plan.as_json()} if self.plan.grid else {}
            scale = {"scale": self.flags.scale} if self.flags.scale else {}
            return about | grid_of | {"cells": [cell.as_json() for cell in self.cells], **scale}
        return about | {"plan": self.plan.as_json()}


def plan_job(flags: SampleOptions) -> Job:
    """Checks the flags against the checkpoint and plans the cells, the grid and the output.

    Raises:
        UsageError: something that cannot be served; nothing was written.
        CheckpointError: a checkpoint that cannot be opened.
    """
    classifier_weights, guide_weights, seeds = (
        asked_classifier_weights(flags),
        asked_guide_weights(flags),
        asked_seeds(flags),
    )
    check_numbers(flags)
    axes = parse_by(flags.by or []) if isinstance(flags, SweepOptions) else []
    output = parse_output(flags.out)
    if output.to_stdout and flags.json_rows:
        raise UsageError("-o - and --json both write to standard output: name a file or a directory with -o.")
    if output.to_stdout and sys.stdout.isatty():
        raise UsageError("-o - writes PNG bytes, and standard output is a terminal: redirect it to a file or a pipe.")
    own_weights = list(dict.fromkeys(w for by in axes for w in by.weights or ()))
    needs_null = any(w != 1 for w in own_weights or parse_weights("0" if flags.w is None else flags.w))
    models = open_models(flags, needs_null)
    conditions = ask_conditions(flags, models)
    weights = _weights(flags, own_weights, conditions)
    _check_guide(flags, models, conditions, weights)
    from guidegen.sampling.device import pick_device  # torch, from here on
    from guidegen.sampling.networks import check_networks

    check_networks(*models)
    device = pick_device(flags.device)
    check_own_loop(flags, models, conditions, device)
    flags = _resolve_fast(flags, device)
    variants = _variants(flags, axes, models, conditions, device)
    plan = _plan(flags, conditions, seeds, (weights, classifier_weights, guide_weights), variants)
    shard = asked_shard(flags, output)
    if plan.grid:
        grid.check_count(plan.samples * plan.each)
    cells = plan.cells(shard)
    if flags.stepwise is not None:
        check_stepwise(flags.stepwise, len(cells))
    if not plan.grid and len(cells) > 1 and output.one_image:
        raise UsageError(
            f"-o {flags.out} holds one image, and this is {len(cells):,}: use a directory, .npz, or sweep for a grid."
        )
    if flags.scale and not (plan.grid or output.one_image):
        raise UsageError("--scale enlarges one image or a grid; images in a run or an .npz stay as they are. Give -o x.png.")
    job = Job(flags, models, conditions, plan, shard, cells, variants.setups, variants.settings, device, output)
    pages = _pages(job) if plan.grid else None
    if flags.dtype == "fp16" and device.type == "cpu" and not flags.quiet:
        console.note(
            "note: fp16 on a CPU is slower than bf16, about a thousand times where the CPU has no fp16 arithmetic of its "
            "own. --dtype bf16 is as fast as fp32 or faster."
        )
    job = replace(job, pages=None if shard else pages, output=output.named(default_name(job, flags.command)))
    if not output.is_file:
        for page in job.grid_files:
            refuse_foreign(page, flags.force)
    return job


def _resolve_fast(flags: SampleOptions, device: torch.device) -> SampleOptions:
    """The flags with what `--fast` means on the device instead of it.

    Raises:
        UsageError: they say the precision themselves.
    """
    from guidegen.sampling.device import pick_dtype

    if not flags.fast:
        return flags
    if flags.dtype != "auto":
        raise UsageError(f"--fast chooses the precision, and --dtype {flags.dtype} does too: give one of them.")
    dtype = Dtype(pick_dtype("auto", device, fast=True))
    if not flags.quiet:
        console.note(f"note: --fast is --dtype {dtype} here")
    return replace(flags, fast=False, dtype=dtype)


def _check_guide(flags: SampleOptions, models: Models, conditions: Conditions, weights: list[float]) -> None:
    """Refuses labels that the guiding model does not know as the model does."""
    if models.guide is not None:
        unguided = flags.mode != "autoguidance" and 0 in weights
        needs_null = conditions.mixed or flags.mode == "classifier" or unguided
        models.guide.check_labels(single_labels(conditions.labels), models.checkpoint, needs_null)


def _weights(flags: SampleOptions, own_weights: list[float], conditions: Conditions) -> list[float]:
    asked = own_weights or asked_weights(flags, conditions.mixed)
    if flags.mode == "none":
        return [0.0 if conditions.labels == [None] and conditions.prompts is None else 1.0]
    return asked


def _plan(
    flags: SampleOptions,
    conditions: Conditions,
    seeds: Seeds,
    weights: tuple[list[float], list[float] | list[None], list[float] | list[None]],
    variants: Variants,
) -> Plan:
    sweep = flags if isinstance(flags, SweepOptions) else None
    w, w_classifier, w_guide = weights
    return Plan(
        conditions.labels,
        seeds,
        w,
        tuple(w_classifier),
        conditions.prompts,
        sweep is not None and sweep.with_grid,
        tuple(w_guide),
        variants.by,
        variants.own_weights,
        parse_axes(sweep.columns) if sweep else (),
        parse_axes(sweep.rows) if sweep else (),
        flags.seeds_per_label,
        flags.labels_random is not None,
    )


def _pages(job: Job) -> grid.Layout:
    """The grid of the whole plan, which also a shard checks.

    Raises:
        UsageError: it does not fit.
    """
    whole = job.plan.cells() if job.shard else job.cells
    rows = [{**cell.fields(), "label_name": job.conditions.name_of(cell), **dict(cell.variant)} for cell in whole]
    size, plan = job.models.checkpoint.size, job.plan
    pages = grid.layout(rows, size, plan.columns, job.flags.scale, job.title, plan.rows)
    if job.output.one_image:
        job.output.check_grid(len(pages.pages), pages.size(), len(job.cells))
    return pages


def default_name(job: Job, command: str, *more: Any) -> str:
    """The default name of a run directory: the same flags give the same one, whatever other flags there are.

    Args:
        job: what is drawn.
        command: the command that draws it.
        more: whatever else it depends on.
    """
    plan, (checkpoint, classifier, guide) = job.plan, job.models
    drawn = replace(plan, columns=(), rows=()).as_json()  # in another grid they are the same images
    names = list(dict.fromkeys(map(job.conditions.name_of, make_cells(plan.labels, plan.seeds[:1], plan.weights[:1]))))
    opened = [checkpoint.ref, checkpoint.revision, classifier.ref if classifier else None]
    refs = [ref and ref.replace(str(BUNDLED), "bundled") for ref in (*opened, *([guide.ref] if guide else []))]
    asked = [{key: value for key, value in each.items() if value is not None} for each in (asdict(job.settings), drawn)]
    return f"{checkpoint.name}-{command}-{job.flags.mode}-{fingerprint(*asked, *refs, names, *more)}"


def _variants(
    flags: SampleOptions, axes: list[By], models: Models, conditions: Conditions, device: torch.device
) -> Variants:
    from guidegen.sampling.setup import plan_setup

    checkpoint = models.checkpoint
    usual = checkpoint.default_scheduler or checkpoint.scheduler_config.get("_class_name", "DDPMScheduler")
    plain = {"scheduler": usual, "steps": checkpoint.steps}
    config_sha256 = digest(
        *checkpoint.identity,
        models.classifier and models.classifier.config,
        models.classifier and models.classifier.preprocessor,
        *([models.guide.checkpoint.configs] if models.guide and models.guide.checkpoint else []),
    )

    def resolve(varied: SampleOptions) -> Setup:
        check_numbers(varied)
        settings = replace(_settings(varied, models, conditions, device), config_sha256=config_sha256)
        return plan_setup(models, settings, varied.scheduler)

    return vary(flags, axes, resolve, plain)


def _settings(flags: SampleOptions, models: Models, conditions: Conditions, device: torch.device) -> Settings:
    """The settings that the flags mean, but for the hashes and the scheduler."""
    from guidegen.sampling.device import pick_dtype

    checkpoint, classifier, guide = models
    return Settings(
        mode=flags.mode,
        model=checkpoint.name,
        model_sha256="",
        scheduler="",
        steps=flags.steps or checkpoint.steps,
        eta=flags.eta,
        dtype=pick_dtype(flags.dtype, device, on_cuda="bf16" if checkpoint.own_loop else "fp16"),
        null_label=checkpoint.null_label,
        size=list(checkpoint.size),
        classifier=classifier.name if classifier else None,
        classifier_input=classifier.input if classifier else None,
        classifier_gradient=asked_gradient(flags, classifier),
        classifier_texts=conditions.texts,
        **asked_guidance(flags),
        **plain_options(flags) | asked_scheduler_options(flags),
        guide_model=guide.name if guide else None,
    )
