"""What images are drawn with, resolved once and before any weights are read: which of them are equal, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

from guidegen.errors import UsageError
from guidegen.models.checkpoint import AnyClassifier, Checkpoint
from guidegen.python_file import python_sha256, split_python_ref
from guidegen.sampling.loop import try_out
from guidegen.sampling.models import Models
from guidegen.sampling.scheduler_options import SPACING, parse_options, split_options
from guidegen.sampling.schedulers import levels_after, make_scheduler, noise_levels, takes_eta
from guidegen.scores.calls import calls_per_step, cost_with, needs_of
from guidegen.scores.interfaces import FREE, Cost, Mixture, Weights
from guidegen.scores.methods import Method, find_method
from guidegen.scores.schedule import GuidanceSchedule, make_schedule
from guidegen.spec.cell import Cell, digest, mode_weights
from guidegen.spec.settings import FILE_SHA256, Settings

_ANY: Mixture = ((0, 1.0),)


@dataclass(frozen=True, eq=False)
class Setup:
    """What the images of one variant of a run are drawn with.

    Attributes:
        models: the networks.
        settings: all that the images depend on beside the cell.
        scheduler: a diffusers scheduler with its timesteps set.
        method: how predictions are combined, its options filled in.
        schedule: how strongly guidance acts at each step.
    """

    models: Models
    settings: Settings
    scheduler: Any
    method: Method
    schedule: GuidanceSchedule

    def image_key(self, cell: Cell) -> Hashable:
        """What decides the image of a cell: within a run, cells of equal keys are one image.

        It is the seed, the weights of each step, the settings but those that only decide these weights, and what
        some step reads: the method where two predictions are combined, the label or prompt where it is asked for.
        """
        sampled, reads_labels, reads_targets = self._sampled(self._asked(cell))
        return (
            cell.seed,
            sampled,
            self._labels(cell) if reads_labels or self.models.checkpoint.renormalised else None,
            self._targets(cell) if reads_targets else None,
        )

    def calls(self, cell: Cell) -> int:
        """Network calls behind the image of a cell (NFE), of the denoiser and of the classifiers."""
        if self.models.checkpoint.own_loop:
            return sum(map(sum, self.loop_calls(cell)))
        targets = self._targets(cell)
        numbered = [_numbered(parts, len(targets), i) for i, parts in enumerate(targets)]
        return self._calls(
            self._asked(cell), _numbered(self._labels(cell)), tuple(part for parts in numbered for part in parts)
        )

    def loop_calls(self, cell: Cell) -> tuple[tuple[int, ...], ...]:
        """Of a checkpoint that draws in its own loop: calls of each step, of each kind of `Checkpoint.loop_calls` and for
        a gradient."""
        steps, gradient = self._steps(self._asked(cell)), self._gradient_cost.calls
        found = zip(self.models.checkpoint.loop_calls(steps), steps, strict=True)
        return tuple((*map(int, calls), gradient if each.w_classifier else 0) for calls, each in found)

    def cost(self, groups: Iterable[tuple[Cell, int]]) -> int:
        """Network calls behind cells, of which a sweep shares some.

        Args:
            groups: one of the cells that differ in nothing but the seed, and how many these are.
        """
        return sum(count * self.calls(cell) for cell, count in groups)

    def plain_cost(self, count: int) -> int:
        """Network calls of a loop over `count` cells that skips none and shares none."""
        mode = self.settings.mode
        w = 2.0 if mode in ("cfg", "both") else float(mode == "autoguidance")
        weights = Weights(w, 2.0 * (mode in ("classifier", "both")), 2.0 if self.models.guide else 1.0)
        gradient = self._gradient_cost
        calls = calls_per_step(weights, gradient, targets=tuple((i, 1.0) for i in range(1 + len(gradient.others))))
        return calls * count * len(self.scheduler.timesteps)

    def _asked(self, cell: Cell) -> Weights:
        return Weights(*mode_weights(self.settings.mode, cell))

    def _labels(self, cell: Cell) -> tuple[tuple[Any, float], ...]:
        """What the network is asked for."""
        return cell.prompt_parts if self.models.checkpoint.reads_prompts else cell.label_parts

    def _targets(self, cell: Cell) -> tuple[tuple[tuple[Any, float], ...], ...]:
        """What each of the classifiers is asked for."""
        parts = self.models.classifier.parts if self.models.classifier else ()
        return tuple(cell.targets if part.zero_shot else cell.label_parts for part, _ in parts)

    def _steps(self, asked: Weights) -> list[Weights]:
        return [self.schedule.weights(index, asked) for index in range(len(self.scheduler.timesteps))]

    @cached_property
    def _gradient_cost(self) -> Cost:
        return _gradient_cost(self.models.classifier, self.settings)

    @cached_property
    def _cost(self) -> Cost:
        return cost_with(self.method, self._gradient_cost)

    @cached_property
    def _calls(self) -> Callable[[Weights, Mixture, Mixture], int]:
        @cache
        def calls(asked: Weights, labels: Mixture, targets: Mixture) -> int:
            return sum(calls_per_step(weights, self._cost, labels, targets) for weights in self._steps(asked))

        return calls

    @cached_property
    def _sampled(self) -> Callable[[Weights], tuple[str, bool, bool]]:
        """From the weights of a cell to a hash of what all its seeds and labels share, and which labels are read."""
        settings = self.settings

        @cache
        def sampled(asked: Weights) -> tuple[str, bool, bool]:
            steps = self._steps(asked)
            needs = [needs_of(weights, _ANY, _ANY, self._cost.needs_null) for weights in steps]
            # every method makes of w = 1 the conditional prediction, which is here u and the gradient
            combines = any(
                need.null and (need.conditional or need.gradients) and weights[:2] != (0, 1)
                for need, weights in zip(needs, steps, strict=True)
            )
            method = (settings.guidance, settings.guidance_options) if combines else None
            others = asdict(replace(settings, guidance=None, guidance_options=None, interval=None, w_schedule=None))
            reads_labels = any(_ANY in (need.conditional, need.guiding) for need in needs)
            return digest(others, method, steps), reads_labels, any(need.gradients for need in needs)

        return sampled


def plan_scheduler(
    checkpoint: Checkpoint,
    name: str | None,
    steps: int,
    eta: float | None,
    spacing: str | None = None,
    options: Sequence[str] | None = None,
) -> Any:
    """The scheduler with its timesteps set, before any weights are read.

    Raises:
        UsageError: no such scheduler, one that does not fit the checkpoint, or that does not take these steps, eta,
            spacing of the timesteps or options.
    """
    config, name = checkpoint.scheduler_config, name or checkpoint.default_scheduler
    scheduler = make_scheduler(config, name)
    texts = split_options(options or ()) | ({} if spacing is None else {SPACING: spacing})
    if texts:
        values = parse_options(scheduler, texts, checkpoint.prediction_type == "flow")
        scheduler = make_scheduler(config, name, values)
    if eta is not None and not takes_eta(scheduler):
        raise UsageError(f"--eta is for ddim; {type(scheduler).__name__} has none.")
    try_out(scheduler, steps, eta)
    return scheduler


def plan_setup(models: Models, settings: Settings, scheduler: str | None) -> Setup:
    """`make_setup` with the scheduler of that name, or the checkpoint's, which the settings then name.

    Raises:
        UsageError: as `plan_scheduler` and `make_setup` do.
    """
    models.checkpoint.check_settings(settings, scheduler)
    planned = plan_scheduler(
        models.checkpoint, scheduler, settings.steps, settings.eta, settings.timestep_spacing, settings.scheduler_opt
    )
    return make_setup(models, replace(settings, scheduler=type(planned).__name__), planned)


def make_setup(models: Models, settings: Settings, scheduler: Any) -> Setup:
    """Finds the method of settings, and how strongly it acts at each step of the scheduler.

    Args:
        models: the networks.
        settings: the options of a method may be texts, as they were given; those of the setup are its values.
        scheduler: with its timesteps set.

    Raises:
        UsageError: no such method, option, interval or schedule, or a method that is not exact with this scheduler.
    """
    given = dict(settings.guidance_options or {})
    ref, file = settings.guidance or "cfg", given.pop(FILE_SHA256, None)
    method, options = find_method(ref, {name: str(value) for name, value in given.items()})
    chosen: dict[str, Any] = {"guidance": None, "guidance_options": None}
    if method.name != "cfg":
        is_file = {FILE_SHA256: python_sha256(ref)} if split_python_ref(ref) else {}
        if file is not None and is_file != {FILE_SHA256: file}:
            raise UsageError(f"--guidance {ref}: the file was changed while it was in use.")
        chosen = {"guidance": method.name, "guidance_options": {**options, **is_file} or None}
    after = levels_after(scheduler) if method.gain is not None and not settings.eta else None
    if method.gain is not None and after is None:
        found = f"--eta {settings.eta:g}" if settings.eta else type(scheduler).__name__
        raise UsageError(
            f"--guidance {method.name}: renoises with the unguided prediction, which is exact only for "
            f"--scheduler ddim with --eta 0 and --scheduler euler; this is {found}."
        )
    if method.gain is not None and models.checkpoint.conditional and not models.checkpoint.has_null:
        raise UsageError(
            f"--guidance {method.name}: reads the unconditional prediction at every weight, and the model has no null "
            "label. --uncond icg takes random labels instead."
        )
    schedule = make_schedule(noise_levels(scheduler), settings.interval, settings.w_schedule, method, after)
    bound = replace(method, combine=partial(method.combine, **options)) if options else method
    return Setup(models, replace(settings, **chosen), scheduler, bound, schedule)


def _numbered(parts: Sequence[tuple[Any, float]], count: int = 1, first: int = 0) -> Mixture:
    """The parts of a mixture by numbers, as one of `count` classifiers has them: names do not change the cost."""
    return tuple((i * count + first, weight) for i, (_, weight) in enumerate(parts))


def _gradient_cost(classifier: AnyClassifier | None, settings: Settings) -> Cost:
    from guidegen.scores.gradient import DenoisedScore, DetachedScore, NoisyScore, summed_cost

    if classifier is None:
        return FREE
    denoised = DetachedScore if settings.classifier_gradient == "detached" else DenoisedScore
    return summed_cost([denoised.cost if part.input == "denoised" else NoisyScore.cost for part, _ in classifier.parts])
