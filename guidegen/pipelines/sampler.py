"""What draws batches of cells in a pipeline's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from guidegen.diffusers import Guidance
from guidegen.errors import CheckpointError, GuidegenError, first_line, is_out_of_memory
from guidegen.models.checkpoint import ClassifierInfo
from guidegen.models.kinds.pipeline import TextPipeline
from guidegen.models.loading import load_part
from guidegen.models.networks import LoadOptions
from guidegen.models.weight_files import DEFAULT_ACCESS, Access
from guidegen.pipelines.loading import load_parts, offload_groups
from guidegen.pipelines.modular import ModularLoop
from guidegen.pipelines.ordinary import OrdinaryLoop
from guidegen.sampling.device import DTYPES
from guidegen.sampling.models import Models
from guidegen.sampling.networks import open_logits, target_of
from guidegen.sampling.sampler import Drawer, Drawers, Tally
from guidegen.sampling.setup import Setup
from guidegen.spec.cell import Cell, mode_weights
from guidegen.spec.settings import Settings


@dataclass(frozen=True, kw_only=True)
class PipelineSampler(Drawer):
    """Draws in a pipeline's own loop, cells of one prompt and of the same network calls at once.

    Attributes:
        loop: the pipeline.
        classifier: what the gradient is of, with the column of a cell; None in modes without one.
        guide_model: the guiding network; None without autoguidance.
    """

    loop: ModularLoop | OrdinaryLoop
    classifier: tuple[torch.nn.Module, Callable[[Cell], int]] | None = None
    guide_model: torch.nn.Module | None = None

    def draw(
        self, cells: Sequence[Cell], on_step: Callable[[], None] | None = None, tally: Tally | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        groups: dict[Any, list[int]] = {}
        for i, cell in enumerate(cells):
            groups.setdefault((cell.prompt or "", self.setup.loop_calls(cell)), []).append(i)
        images: dict[int, torch.Tensor] = {}
        steps = _Steps(len(cells), on_step)
        for (prompt, calls), found in groups.items():
            size = self.fixed_rows or len(found)
            for some in (found[i : i + size] for i in range(0, len(found), size)):
                rows = [cells[i] for i in (some + some[-1:] * (size - len(some)))]
                with steps.counted(self.loop.scheduler, len(some)):
                    drawn = self._drawn(prompt, rows, not any(null for _, null, *_ in calls))
                images |= dict(zip(some, drawn, strict=False))
                if tally is not None:
                    tally.made += len(rows) * sum(map(sum, calls))
        return torch.stack([images[i] for i in range(len(cells))]), [self.setup.calls(cell) for cell in cells]

    @torch.no_grad()
    def _drawn(self, prompt: str, cells: Sequence[Cell], conditional: bool) -> torch.Tensor:
        settings, guidance = self.setup.settings, self._guidance(cells)
        generators = [torch.Generator("cpu").manual_seed(cell.seed) for cell in cells]
        height, width = self.setup.models.checkpoint.size
        how = {"height": height, "width": width, "num_inference_steps": settings.steps}
        try:
            images = self.loop(prompt, guidance, generators, conditional, **how)
        except (RuntimeError, ValueError, TypeError) as error:
            if is_out_of_memory(error) or isinstance(error, GuidegenError):
                raise
            raise GuidegenError(f"{self.setup.models.checkpoint.kind}: {first_line(error)}") from error
        if tuple(images.shape[-2:]) != (height, width):
            found = f"{images.shape[-1]}x{images.shape[-2]}"
            raise CheckpointError(f"The pipeline drew {found} where {width}x{height} was asked for.")
        return 2 * images.float() - 1

    def _guidance(self, cells: Sequence[Cell]) -> Any:
        """The `Guidance` of some cells."""
        settings = self.setup.settings
        w, w_classifier, w_guide = zip(*(mode_weights(settings.mode, cell) for cell in cells), strict=True)
        given: dict[str, Any] = {"w": w}
        if self.classifier is not None:
            network, column = self.classifier
            given |= {
                "classifier": network,
                "w_classifier": w_classifier,
                "classifier_labels": [column(cell) for cell in cells],
                "classifier_gradient": settings.classifier_gradient or "exact",
            }
        if self.guide_model is not None:
            given |= {"guide_model": self.guide_model, "w_guide": w_guide}
        guidance = Guidance(
            **given,
            method=settings.guidance or "cfg",
            options=settings.guidance_options,
            interval=settings.interval,
            w_schedule=settings.w_schedule,
        )
        guidance.scheduler = self.loop.scheduler
        return guidance


class PipelineSamplers(Drawers):
    """A pipeline in memory; from a setup of it to its sampler.

    Args:
        models: what to load.
        settings: of any of the setups: dtype and negative prompt are those of all.
        device: where it draws.
        access: how its weights may be read.
        offload: model, to keep on the device only the network that works; group, only its layer; None for all.
        fixed_rows: as `Drawer` has it.

    Raises:
        CheckpointError: the weights do not load.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        device: torch.device,
        access: Access = DEFAULT_ACCESS,
        offload: str | None = None,
        fixed_rows: int | None = None,
    ):
        import diffusers

        self._how = (device, access, offload, fixed_rows)
        checkpoint = models.checkpoint
        assert isinstance(checkpoint, TextPipeline)
        self._models, self._settings = models, settings
        there = device if offload is None else torch.device("cpu")
        dtype = DTYPES[settings.dtype] or torch.float32
        parts = load_parts(checkpoint, there, dtype, access)
        # a block that fails prints its traceback, also where a batch is only tried
        diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
        loop = OrdinaryLoop if checkpoint.family.blocks is None else ModularLoop
        self._loop = loop(checkpoint, parts, settings.negative_prompt, device if offload == "model" else None)
        if offload == "group":
            offload_groups(parts, device)
        self._classifier = self._opened_classifier(LoadOptions(device, access, DTYPES[settings.dtype]))
        self._guide_model = None
        if models.guide is not None:
            assert models.guide.checkpoint is not None
            self._guide_model = load_part(models.guide.checkpoint, checkpoint.network, device, access, dtype=dtype)

    def __call__(self, setup: Setup) -> PipelineSampler:
        """The sampler of a setup."""
        device, _, _, fixed_rows = self._how
        drawn: dict[str, Any] = {"scheduler": setup.scheduler, "device": device, "fixed_rows": fixed_rows}
        drawn |= {"classifier": self._classifier, "guide_model": self._guide_model}
        return PipelineSampler(setup=setup, loop=self._loop, **drawn, **self._exact(setup))

    def _loaded(self, settings: Settings) -> PipelineSamplers:
        return PipelineSamplers(self._models, settings, *self._how)

    def _opened_classifier(self, options: LoadOptions) -> tuple[torch.nn.Module, Callable[[Cell], int]] | None:
        checkpoint, classifier, _ = self._models
        if classifier is None:
            return None
        assert isinstance(classifier, ClassifierInfo)
        network, columns = open_logits(classifier, checkpoint.known(classifier), self._settings, options)
        target = target_of(classifier, checkpoint, self._settings)
        return network, lambda cell: columns[target(cell)[0][0]]


class _Steps:
    """Reports steps of a batch that is drawn in groups: as many as if it were drawn at once.

    Args:
        rows: of the batch.
        on_step: called at each step of the whole batch.
    """

    def __init__(self, rows: int, on_step: Callable[[], None] | None):
        self._rows, self._on_step, self._made = rows, on_step, 0

    @contextmanager
    def counted(self, scheduler: Any, rows: int) -> Iterator[None]:
        """Counts the steps of a scheduler, which `rows` of the batch take."""
        step = scheduler.step

        @wraps(step)  # pipelines look which arguments it takes
        def counting(*args: Any, **kwargs: Any) -> Any:
            taken = step(*args, **kwargs)
            self._made += rows
            while self._made >= self._rows:
                self._made -= self._rows
                if self._on_step:
                    self._on_step()
            return taken

        scheduler.step = counting
        try:
            yield
        finally:
            del scheduler.step
