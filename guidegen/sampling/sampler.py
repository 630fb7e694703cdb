"""From cells to files: opens the networks, draws batch by batch, writes into the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from guidegen.errors import CheckpointError
from guidegen.models.checkpoint import Access, AnyClassifier, Checkpoint
from guidegen.models.weight_files import DEFAULT_ACCESS
from guidegen.sampling.autoguidance import GuideModel
from guidegen.sampling.cost import plan_guidance
from guidegen.sampling.device import DTYPES
from guidegen.sampling.loop import sample
from guidegen.sampling.networks import Condition, open_gradient, open_networks, target_of
from guidegen.sampling.schedulers import without_clip
from guidegen.scores.fixed_rows import FixedDenoiser, fixed_classifier
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import Classifier, Mixture
from guidegen.scores.methods import METHODS, Method
from guidegen.scores.noise import PREDICTION_TYPES
from guidegen.scores.schedule import GuidanceSchedule
from guidegen.spec.cell import Cell, mode_weights
from guidegen.spec.settings import Settings


@dataclass
class Tally:
    """Network calls that were made, counted while drawing: fewer than those behind the images, which share some."""

    made: int = 0


@dataclass(frozen=True)
class Sampler:
    """Everything that stays the same from batch to batch.

    Attributes:
        condition: the network, and how it is told what to draw.
        decode: from what the network draws to images; None where it draws images.
        classifier: the classifier's gradient; None in modes without one.
        target: a cell's labels as the classifier counts them.
        scheduler: a diffusers scheduler.
        shape: (C, H, W) of what the network draws.
        mode: cfg, classifier, both, none or autoguidance.
        steps: steps of the scheduler.
        eta: DDIM's eta; None for the default.
        device: where the networks are.
        is_cut: whether a prompt has more tokens than the model reads; None where there are no prompts.
        in_fp32: loads the same networks for calls without autocast, once; None where there is no autocast.
        drop_fp32: forgets those networks; whether there were any.
        fixed_rows: rows of each network call, so that bits do not depend on the batch; None for as many as there are.
        clip: bound of the denoised estimate of each prediction, before guidance; None where the scheduler sees to it.
        method: how predictions are combined, its options filled in.
        schedule: how strongly at each step; None for the same at all.
        guiding: the guiding network, told what to draw like `condition`; None without autoguidance.
    """

    condition: Condition
    decode: Callable[[torch.Tensor], torch.Tensor] | None
    classifier: Classifier | None
    target: Callable[[Cell], Mixture]
    scheduler: Any
    shape: tuple[int, int, int]
    mode: str
    steps: int
    eta: float | None
    device: torch.device
    is_cut: Callable[[str], bool] | None = None
    in_fp32: Callable[[], Sampler] | None = None
    fixed_rows: int | None = None
    clip: float | None = None
    method: Method = METHODS["cfg"]
    schedule: GuidanceSchedule | None = None
    guiding: Condition | None = None
    drop_fp32: Callable[[], bool] | None = None

    def draw(
        self, cells: Sequence[Cell], on_step: Callable[[], None] | None = None, tally: Tally | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Images (B, C, H, W) fp32 of the cells, and the network calls behind each."""
        weights = [mode_weights(self.mode, cell) for cell in cells]
        denoiser, labels = self.condition(cells)
        classifier, guiding = self.classifier, self.guiding(cells)[0] if self.guiding else None
        if self.fixed_rows is not None:
            denoiser = FixedDenoiser(denoiser, self.fixed_rows)
            guiding = guiding and FixedDenoiser(guiding, self.fixed_rows)
            classifier = classifier and fixed_classifier(classifier, self.fixed_rows)
        seeds = [cell.seed for cell in cells]
        guide = Guide(
            denoiser,
            labels,
            [w for w, _, _ in weights],
            [w for _, w, _ in weights],
            classifier,
            self.device,
            [self.target(cell) for cell in cells],
            seeds,
            guiding=guiding,
            w_guide=[w for _, _, w in weights],
            steps=len(self.scheduler.timesteps),
            clip=self.clip,
            method=self.method,
            schedule=self.schedule.weights if self.schedule else None,
        )
        drawn = sample(guide, self.scheduler, seeds, self.shape, self.steps, self.eta, self.device, on_step)
        if tally is not None:
            tally.made += guide.made
        return self._decoded(drawn), guide.calls

    @torch.no_grad()
    def _decoded(self, drawn: torch.Tensor) -> torch.Tensor:
        return self.decode(drawn) if self.decode else drawn


def open_sampler(
    checkpoint: Checkpoint,
    classifier: AnyClassifier | None,
    scheduler: Any,
    settings: Settings,
    device: torch.device,
    access: Access = DEFAULT_ACCESS,
    compile_networks: bool = False,
    fixed_rows: int | None = None,
    guide: GuideModel | None = None,
) -> Sampler:
    """Loads the weights. Raises CheckpointError where they do not load."""
    samplers = open_samplers(checkpoint, classifier, settings, device, access, compile_networks, fixed_rows, guide)
    return samplers(settings, scheduler)


def open_samplers(
    checkpoint: Checkpoint,
    classifier: AnyClassifier | None,
    settings: Settings,
    device: torch.device,
    access: Access = DEFAULT_ACCESS,
    compile_networks: bool = False,
    fixed_rows: int | None = None,
    guide: GuideModel | None = None,
) -> Callable[[Settings, Any], Sampler]:
    """Loads the weights once; from settings that need the same networks, and a scheduler, to their sampler.

    Raises:
        CheckpointError: the weights do not load.
    """
    kind = next((kind for kind in PREDICTION_TYPES if kind == checkpoint.prediction_type), None)
    if kind is None:
        raise CheckpointError(f"{checkpoint.ref}: unknown prediction type {checkpoint.prediction_type!r}.")
    autocast = DTYPES[settings.dtype]
    opened = partial(
        open_networks,
        kind=kind,
        negative_prompt=settings.negative_prompt,
        device=device,
        access=access,
        compile_networks=compile_networks,
        autocast=autocast,
    )
    networks = opened(checkpoint, guide=guide)
    guiding = networks.guiding
    if guide is not None and guide.checkpoint is not None and not guide.shares:
        guiding = opened(guide.checkpoint, decodes=False).condition
    score = None
    if classifier is not None:
        score = open_gradient(classifier, checkpoint, settings, device, access, compile_networks, networks)

    @cache
    def samplers_in_fp32() -> Callable[[Settings, Any], Sampler]:
        exact = replace(settings, dtype="fp32")
        return open_samplers(checkpoint, classifier, exact, device, access, compile_networks, fixed_rows, guide)

    def drop_fp32() -> bool:
        loaded = samplers_in_fp32.cache_info().currsize > 0
        samplers_in_fp32.cache_clear()
        return loaded

    def sampler_for(settings: Settings, scheduler: Any) -> Sampler:
        def in_fp32() -> Sampler:
            return samplers_in_fp32()(replace(settings, dtype="fp32"), scheduler)

        method, schedule = plan_guidance(settings, scheduler)
        walker, clip = scheduler, None
        if classifier is not None:
            walker, clip = without_clip(scheduler)
            walker.set_timesteps(settings.steps)
        return Sampler(
            networks.condition,
            networks.decode,
            score,
            target_of(classifier, checkpoint, settings),
            walker,
            checkpoint.shape,
            settings.mode,
            settings.steps,
            settings.eta,
            device,
            networks.is_cut,
            in_fp32=None if autocast is None else in_fp32,
            drop_fp32=None if autocast is None else drop_fp32,
            fixed_rows=fixed_rows,
            clip=clip,
            method=method,
            schedule=schedule,
            guiding=guiding,
        )

    return sampler_for
