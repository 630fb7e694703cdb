"""Networks in memory, and what draws batches of cells with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from guidegen.models.networks import Condition, LoadOptions
from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.sampling.device import DTYPES
from guidegen.sampling.loop import sample
from guidegen.sampling.models import Models
from guidegen.sampling.networks import open_gradient, open_networks, target_of
from guidegen.sampling.schedulers import without_clip
from guidegen.sampling.setup import Setup
from guidegen.scores.fixed_rows import FixedDenoiser, fixed_classifier
from guidegen.scores.guided import Guide
from guidegen.scores.independent import disturbed_times, independent_labels
from guidegen.scores.interfaces import Classifier, Mixture
from guidegen.scores.noise import Level, to_x0
from guidegen.spec.cell import Cell, mode_weights
from guidegen.spec.settings import Settings


@dataclass
class Tally:
    """Network calls that were made, counted while drawing: fewer than those behind the images, which share some."""

    made: int = 0


@dataclass(frozen=True, kw_only=True)
class Drawer(ABC):
    """Draws batches of one setup with networks in memory.

    Attributes:
        setup: scheduler, method, schedule and settings.
        scheduler: that of the setup, or a copy that does not clip.
        device: where the networks are.
        fixed_rows: rows of each network call, so that bits do not depend on the batch; None for as many as there are.
        in_fp32: loads the same networks for calls without autocast, once; None where there is no autocast.
        drop_fp32: forgets those networks; whether there were any.
        on_estimates: called at each step with the cells, its index, and the denoised estimates (B, C, H, W) as images.
    """

    setup: Setup
    scheduler: Any
    device: torch.device
    fixed_rows: int | None = None
    in_fp32: Callable[[], Drawer] | None = None
    drop_fp32: Callable[[], bool] | None = None
    on_estimates: Callable[[Sequence[Cell], int, torch.Tensor], None] | None = None

    @abstractmethod
    def draw(
        self, cells: Sequence[Cell], on_step: Callable[[], None] | None = None, tally: Tally | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Images (B, C, H, W) fp32 of the cells, and the network calls behind each."""


@dataclass(frozen=True, kw_only=True)
class Sampler(Drawer):
    """Draws in the loop of guidegen.

    Attributes:
        condition: from cells to the network and the labels that it is asked for.
        decode: from what the network draws to images; None where it draws images.
        classifier: the classifier's gradient; None in modes without one.
        target: a cell's labels as the classifier counts them.
        guiding: the same of the guiding network; None without autoguidance.
        clip: bound of the denoised estimate of each prediction, before guidance; None where the scheduler sees to it.
    """

    condition: Condition
    decode: Callable[[torch.Tensor], torch.Tensor] | None
    classifier: Classifier | None
    target: Callable[[Cell], Mixture]
    guiding: Condition | None = None
    clip: float | None = None

    def draw(
        self, cells: Sequence[Cell], on_step: Callable[[], None] | None = None, tally: Tally | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        settings = self.setup.settings
        guide, seeds = self._guide(cells), [cell.seed for cell in cells]
        shape = self.setup.models.checkpoint.shape
        observed = guide if self.on_estimates is None else partial(self._observed, guide, cells)
        drawn = sample(observed, self.scheduler, seeds, shape, settings.steps, settings.eta, self.device, on_step)
        if tally is not None:
            tally.made += guide.made
        return self._decoded(drawn), guide.calls

    def _observed(
        self, guide: Guide, cells: Sequence[Cell], x_t: torch.Tensor, t: torch.Tensor, level: Level, index: int
    ) -> torch.Tensor:
        prediction = guide(x_t, t, level, index)
        if self.on_estimates is not None:
            x0 = to_x0(prediction, x_t, level, self.setup.models.checkpoint.prediction_type)
            self.on_estimates(cells, index, self._decoded(x0))
        return prediction

    def _guide(self, cells: Sequence[Cell]) -> Guide:
        denoiser, labels = self.condition(cells)
        classifier, guiding = self.classifier, self.guiding(cells)[0] if self.guiding else None
        if self.fixed_rows is not None:
            denoiser = FixedDenoiser(denoiser, self.fixed_rows)
            guiding = guiding and FixedDenoiser(guiding, self.fixed_rows)
            classifier = classifier and fixed_classifier(classifier, self.fixed_rows)
        w, w_classifier, w_guide = zip(*(mode_weights(self.setup.settings.mode, cell) for cell in cells), strict=True)
        return Guide(
            denoiser,
            labels,
            w,
            w_classifier,
            classifier,
            self.device,
            [self.target(cell) for cell in cells],
            [cell.seed for cell in cells],
            guiding=guiding,
            w_guide=w_guide,
            steps=len(self.scheduler.timesteps),
            clip=self.clip,
            method=self.setup.method,
            schedule=self.setup.schedule.weights,
            **self._stand_ins([cell.seed for cell in cells]),
        )

    def _stand_ins(self, seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        """What stands in for a null label and for the guiding network's timesteps, of samples with those seeds."""
        (checkpoint, _, guide), steps = self.setup.models, len(self.scheduler.timesteps)
        drawn = {}
        if checkpoint.uncond is not None:
            drawn["stand_ins"] = independent_labels(seeds, list(checkpoint.labels), steps)
        if guide is not None and guide.spread is not None:
            drawn["disturbance"] = disturbed_times(seeds, guide.spread, steps)
        return drawn

    @torch.no_grad()
    def _decoded(self, drawn: torch.Tensor) -> torch.Tensor:
        return self.decode(drawn) if self.decode else drawn


class Drawers(ABC):
    """Networks in memory; from a setup that needs these to what draws it.

    Attributes:
        is_cut: whether a prompt has more tokens than the model reads; None where there are no prompts, or nobody knows.
    """

    is_cut: Callable[[str], bool] | None = None
    _settings: Settings

    @abstractmethod
    def __call__(self, setup: Setup) -> Drawer:
        """What draws a setup."""

    @abstractmethod
    def _loaded(self, settings: Settings) -> Drawers:
        """The same networks once more, for other settings."""

    def _exact(self, setup: Setup) -> dict[str, Any]:
        """`in_fp32` and `drop_fp32` of what draws a setup; nothing without autocast."""
        if DTYPES[self._settings.dtype] is None:
            return {}
        return {"in_fp32": lambda: self._in_fp32(setup), "drop_fp32": self._drop_fp32}

    @cached_property
    def _in_fp32(self) -> Drawers:
        return self._loaded(replace(self._settings, dtype="fp32"))

    def _drop_fp32(self) -> bool:
        return self.__dict__.pop("_in_fp32", None) is not None


class Samplers(Drawers):
    """The networks of some models, loaded; from a setup that needs these to its sampler.

    Args:
        models: what to load.
        settings: of any of the setups: dtype, negative prompt and what the classifier reads are those of all.
        device: where to.
        access: how the weights may be read.
        compile_networks: whether torch compiles them.
        fixed_rows: as `Sampler` has it.

    Raises:
        CheckpointError: the weights do not load.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        device: torch.device,
        access: Access = DEFAULT_ACCESS,
        compile_networks: bool = False,
        fixed_rows: int | None = None,
    ):
        checkpoint, classifier, guide = self._models = models
        self._settings, self._device, self._access = settings, device, access
        self._compile, self._fixed_rows = compile_networks, fixed_rows
        options = LoadOptions(device, access, DTYPES[settings.dtype], compile_networks, settings.negative_prompt)
        self._networks = open_networks(checkpoint, guide, options)
        self._gradient = None
        if classifier is not None:
            self._gradient = open_gradient(classifier, checkpoint, settings, options, self._networks)
        self.is_cut = self._networks.is_cut

    def __call__(self, setup: Setup) -> Sampler:
        """The sampler of a setup."""
        scheduler, clip = setup.scheduler, None
        if self._gradient is not None:
            scheduler, clip = without_clip(scheduler)
            scheduler.set_timesteps(setup.settings.steps)
        return Sampler(
            setup=setup,
            condition=self._networks.condition,
            decode=self._networks.decode,
            classifier=self._gradient,
            target=target_of(self._models.classifier, self._models.checkpoint, setup.settings),
            scheduler=scheduler,
            device=self._device,
            guiding=self._networks.guiding,
            clip=clip,
            fixed_rows=self._fixed_rows,
            **self._exact(setup),
        )

    def _loaded(self, settings: Settings) -> Samplers:
        return Samplers(self._models, settings, self._device, self._access, self._compile, self._fixed_rows)


def open_sampler(
    setup: Setup,
    device: torch.device,
    access: Access = DEFAULT_ACCESS,
    compile_networks: bool = False,
    fixed_rows: int | None = None,
) -> Sampler:
    """Loads the networks of one setup. Raises CheckpointError where they do not load."""
    return Samplers(setup.models, setup.settings, device, access, compile_networks, fixed_rows)(setup)
