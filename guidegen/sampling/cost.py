"""What a variant draws with, resolved before any weights are read, and what it takes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

from guidegen.errors import UsageError
from guidegen.models.checkpoint import AnyClassifier, Checkpoint
from guidegen.models.classifiers.info import SEPARATOR
from guidegen.python_file import python_sha256
from guidegen.sampling.loop import try_out
from guidegen.sampling.schedulers import levels_after, make_scheduler, noise_levels, takes_eta
from guidegen.scores.calls import calls_per_step, cost_with
from guidegen.scores.interfaces import FREE, Cost, Mixture, Weights
from guidegen.scores.methods import Method, find_method
from guidegen.scores.schedule import GuidanceSchedule, make_schedule
from guidegen.spec.cell import Cell, digest, mode_weights
from guidegen.spec.settings import FILE_SHA256, Settings


def plan_scheduler(checkpoint: Checkpoint, name: str | None, steps: int, eta: float | None) -> Any:
    """The scheduler with its timesteps set, before any weights are read.

    Raises:
        UsageError: no such scheduler, one that does not fit the checkpoint, or that does not take these steps or eta.
    """
    scheduler = make_scheduler(checkpoint.scheduler_config, name)
    if eta is not None and not takes_eta(scheduler):
        raise UsageError(f"--eta is for ddim; {type(scheduler).__name__} has none.")
    try_out(scheduler, steps, eta)
    return scheduler


def plan_guidance(settings: Settings, scheduler: Any) -> tuple[Method, GuidanceSchedule]:
    """The method with its options filled in, and how strongly it acts at each step of the scheduler.

    Raises:
        UsageError: no such method, option, interval or schedule, or a method that is not exact with this scheduler.
    """
    given = {name: str(value) for name, value in (settings.guidance_options or {}).items() if name != FILE_SHA256}
    ref, file = settings.guidance or "cfg", (settings.guidance_options or {}).get(FILE_SHA256)
    method, options = find_method(ref, given)
    if file is not None and file != python_sha256(ref):
        raise UsageError(f"--guidance {ref}: the file was changed while it was in use.")
    after = levels_after(scheduler) if method.gain is not None and not settings.eta else None
    if method.gain is not None and after is None:
        found = f"--eta {settings.eta:g}" if settings.eta else type(scheduler).__name__
        raise UsageError(
            f"--guidance {method.name}: renoises with the unguided prediction, which is exact only for "
            f"--scheduler ddim with --eta 0 and --scheduler euler; this is {found}."
        )
    schedule = make_schedule(noise_levels(scheduler), settings.interval, settings.w_schedule, method, after)
    return replace(method, combine=partial(method.combine, **options)) if options else method, schedule


def what_counts(settings: Settings, scheduler: Any, cell: Cell) -> Hashable:
    """What decides the image of a cell: equal for two settings that draw the same one at its weights."""
    _, schedule = plan_guidance(settings, scheduler)
    weights = Weights(*mode_weights(settings.mode, cell))
    steps = tuple(schedule.weights(index, weights) for index in range(len(scheduler.timesteps)))
    idle = all(step.w in (0, 1) and step.w_classifier == 0 and step.w_guide == 1 for step in steps)
    plain: dict[str, Any] = {"interval": None, "w_schedule": None}  # the steps tell
    plain |= {"guidance": None, "guidance_options": None} if idle else {}
    return digest(asdict(replace(settings, **plain))), steps


def cost(
    groups: Iterable[tuple[Cell, int]],
    settings: Settings,
    scheduler: Any,
    checkpoint: Checkpoint,
    classifier: AnyClassifier | None,
) -> int:
    """Network calls behind cells (NFE), of the denoiser and of the classifiers; a sweep shares some of them.

    Args:
        groups: one of the cells that differ in nothing but the seed, and how many these are.
        settings: of all of them.
        scheduler: with its timesteps set.
        checkpoint: what draws.
        classifier: what guides; None in modes without one.
    """
    method, schedule = plan_guidance(settings, scheduler)
    each = cost_with(method, _cost_of_gradient(settings))

    @cache
    def calls(weights: Weights, labels: Mixture, targets: Mixture) -> int:
        steps = range(len(scheduler.timesteps))
        return sum(calls_per_step(schedule.weights(index, weights), each, labels, targets) for index in steps)

    def numbered(parts: Sequence[tuple[Any, float]], count: int = 1, place: int = 0) -> Mixture:
        return tuple((i * count + place, weight) for i, (_, weight) in enumerate(parts))

    classifiers = [part for part, _ in classifier.parts] if classifier else []

    def asked(cell: Cell) -> tuple[Mixture, Mixture]:
        labels = cell.prompt_parts if checkpoint.reads_prompts else cell.label_parts
        own = [cell.targets if part.zero_shot else cell.label_parts for part in classifiers]
        targets = [target for i, parts in enumerate(own) for target in numbered(parts, len(own), i)]
        return numbered(labels), tuple(targets)

    return sum(count * calls(Weights(*mode_weights(settings.mode, cell)), *asked(cell)) for cell, count in groups)


def plain_cost(count: int, settings: Settings, scheduler: Any) -> int:
    """Network calls of a loop over `count` cells that skips none and shares none."""
    w, w_classifier = settings.mode in ("cfg", "both"), settings.mode in ("classifier", "both")
    weights = Weights(
        2.0 * w or 1.0 * (settings.mode == "autoguidance"), 2.0 * w_classifier, 2.0 if settings.guide_model else 1.0
    )
    cost = _cost_of_gradient(settings)
    calls = calls_per_step(weights, cost, targets=tuple((i, 1.0) for i in range(1 + len(cost.others))))
    return calls * count * len(scheduler.timesteps)


def _cost_of_gradient(settings: Settings) -> Cost:
    from guidegen.scores.gradient import DenoisedScore, DetachedScore, NoisyScore, summed_cost

    if settings.classifier is None:
        return FREE
    denoised = DetachedScore if settings.classifier_gradient == "detached" else DenoisedScore
    inputs = (settings.classifier_input or "noisy").split(SEPARATOR)
    return summed_cost([denoised.cost if each == "denoised" else NoisyScore.cost for each in inputs])
