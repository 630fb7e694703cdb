"""What the flags of sample and sweep ask for, each checked by itself."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from guidegen.cli import console
from guidegen.cli.flags import SampleOptions, SweepOptions
from guidegen.cli.output import Output
from guidegen.errors import UsageError, quoted
from guidegen.models.checkpoint import AnyClassifier
from guidegen.spec import limits
from guidegen.spec.parse import LARGEST_SEED, Seeds, check_noise, parse_seeds, parse_weight, parse_weights, whole
from guidegen.spec.shard import Shard, parse_shard


def asked_gradient(flags: SampleOptions, classifier: AnyClassifier | None) -> str | None:
    """Which derivative of the denoised estimate is taken; None on noisy input."""
    if classifier is not None and any(part.input == "denoised" for part, _ in classifier.parts):
        return flags.classifier_gradient or "exact"
    if flags.classifier_gradient is not None:
        reads = "this one reads" if classifier is None or len(classifier.parts) == 1 else "these read"
        raise UsageError(f"--classifier-gradient is for classifiers of denoised images; {reads} x_t itself.")
    return None


def asked_guidance(flags: SampleOptions) -> dict[str, Any]:
    """The method and its options, as they were given.

    Raises:
        UsageError: no option, or a mode that guides nothing.
    """
    if flags.mode == "none" and (flags.interval or flags.w_schedule):
        raise UsageError("--interval and --w-schedule are for guided modes; --mode none guides nothing.")
    if flags.mode in ("none", "autoguidance") and flags.guidance not in (None, "cfg"):
        raise UsageError(
            f"--guidance {flags.guidance} combines predictions with and without the label, and mode {flags.mode} takes one "
            "of them. For a method and a guiding model: --mode cfg --guide-model ID|DIR --w-guide NUMBER."
        )
    words = [word.partition("=") for word in flags.guidance_opt or ()]
    if bad := [word for word, (_, equals, _) in zip(flags.guidance_opt or (), words, strict=True) if not equals]:
        raise UsageError(f"--guidance-opt takes KEY=VALUE, such as eta=0.5; found {bad[0]!r}.")
    return {"guidance": flags.guidance, "guidance_options": {key.strip(): value.strip() for key, _, value in words}}


def asked_scheduler_options(flags: SampleOptions) -> dict[str, Any]:
    """The options of the scheduler as settings keep them: sorted, the spacing of the timesteps apart, as its flag gives it.

    Raises:
        UsageError: no option, or one that is given twice.
    """
    from guidegen.sampling.scheduler_options import SPACING, split_options

    options = split_options(flags.scheduler_opt or ())
    if SPACING in options and flags.timestep_spacing is not None:
        raise UsageError(f"--scheduler-opt {SPACING} is --timestep-spacing: give one of them.")
    spacing = options.pop(SPACING, flags.timestep_spacing)
    return {SPACING: spacing, "scheduler_opt": sorted(f"{key}={text}" for key, text in options.items()) or None}


def asked_weights(flags: SampleOptions, mixed: bool) -> list[float]:
    """The weights asked for; those that a mixture gives its parts count as they are where `--w` is not given."""
    if isinstance(flags, SweepOptions):
        return parse_weights("0,1,2,4,8" if flags.w is None else flags.w)
    return [parse_weight(flags.w or ("1.0" if mixed else "3.0"))]


def _numbers(flags: SampleOptions, text: str, flag: str) -> list[float]:
    """The list that a sweep takes, or the one number of a sample."""
    return parse_weights(text, flag) if isinstance(flags, SweepOptions) else [parse_weight(text, flag)]


def asked_classifier_weights(flags: SampleOptions) -> list[float] | list[None]:
    text = flags.w_classifier
    if flags.mode != "both":
        if text is not None:
            raise UsageError(f"--w-classifier is for --mode both; in mode {flags.mode} the weight is --w.")
        return [None]
    return _numbers(flags, "1" if text is None else text, "--w-classifier")


def asked_guide_weights(flags: SampleOptions) -> list[float] | list[None]:
    text = flags.w_guide
    if flags.mode == "autoguidance":
        if text is not None:
            raise UsageError("--w-guide goes on top of the other modes; in mode autoguidance the weight is --w.")
        return [None]
    if text is None and flags.guide_model is None:
        return [None]
    if flags.mode == "none":
        raise UsageError(
            "--guide-model and --w-guide guide, and --mode none draws the network as it is. For "
            "autoguidance alone: --mode autoguidance, with the weight --w."
        )
    weights = _numbers(flags, "2" if text is None else text, "--w-guide")
    if weights == [1.0]:
        raise UsageError("--w-guide 1 is the model without autoguidance: leave both out, or give another weight.")
    return weights


def asked_shard(flags: SampleOptions, output: Output) -> Shard | None:
    if flags.shard is None:
        return None
    if output.is_file or output.to_stdout:
        raise UsageError("--shard draws into a run directory; `guidegen merge` makes files of it when all is there.")
    if flags.overwrite:
        raise UsageError("--overwrite would delete what other shards drew: remove the directory, or name another -o.")
    return parse_shard(flags.shard, os.environ)


def with_seed(flags: SampleOptions) -> SampleOptions:
    """The same with a number for `--seed random`, one that is drawn and printed; images keep the number.

    Raises:
        UsageError: with `--shard`, whose processes would each draw another one.
    """
    if flags.seed != "random":
        return flags
    if flags.shard is not None:
        raise UsageError("--seed random would draw another seed in each shard: give all of them one number.")
    seed = int.from_bytes(os.urandom(4), "big")
    if flags.seeds_per_label:
        seed %= max(1, limits.SEEDS_OF_A_LABEL - (flags.num or 1) + 1)
    if not flags.quiet:
        console.note(f"note: --seed {seed}")
    return replace(flags, seed=str(seed))


def asked_seeds(flags: SampleOptions) -> Seeds:
    if flags.labels_random is not None and (flags.num is not None or flags.seeds is not None or flags.prompt):
        raise UsageError("--labels-random N stands instead of --num, --seeds and prompts: give one or the other.")
    if flags.labels_random is not None and flags.labels_random < 1:
        raise UsageError(f"--labels-random must be at least 1, found {flags.labels_random}.")
    if flags.seeds is not None:
        if flags.num is not None or flags.seed is not None:
            raise UsageError("--seeds stands instead of --num and --seed: give one or the other.")
        return check_noise(parse_seeds(flags.seeds))
    num = flags.labels_random or (1 if flags.num is None else flags.num)
    first = 0 if flags.seed is None else whole(flags.seed.strip())
    if num < 1:
        raise UsageError(f"--num must be at least 1, found {num}.")
    if first is None or first > LARGEST_SEED:
        raise UsageError(f"--seed must be from 0 to 2^63-1, or random, found {quoted(flags.seed or '')}.")
    if first + num - 1 > LARGEST_SEED:
        raise UsageError(f"--num {quoted(str(num))}: from --seed {first} on there are {LARGEST_SEED + 1 - first} seeds.")
    return check_noise(Seeds([range(first, first + num)]))


def check_numbers(flags: SampleOptions) -> None:
    if flags.steps is not None and flags.steps < 1:
        raise UsageError(f"--steps must be at least 1, found {flags.steps}.")
    if flags.batch_size != "auto" and not (flags.batch_size.isdecimal() and int(flags.batch_size)):
        raise UsageError(f"--batch-size takes auto or a whole number from 1, found {flags.batch_size!r}.")
    if flags.eta is not None and not 0 <= flags.eta <= 1:
        raise UsageError(f"--eta is from 0 to 1, found {flags.eta}.")
    if flags.mode == "none" and flags.w is not None:
        raise UsageError("--w is for guided modes; --mode none draws the network as it is.")
