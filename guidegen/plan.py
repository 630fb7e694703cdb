"""The list of images to draw: a pure function of the flags."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from guidegen.errors import UsageError
from guidegen.mixture import label_parts, main_label, prompt_parts
from guidegen.naming import MODE_NAMES, named

_T = TypeVar("_T")
_MAX_LIST = 1_000_000
_SEED_RANGE = re.compile(r"(\d+)-(\d+)")
_SHARD = re.compile(r"(\d+)/(\d+)")
_LONGEST_VALUE = 48  # of an axis, in the name of a folder
VARIED = ("guidance", "interval", "w_schedule", "scheduler", "steps", "eta")
"""The settings that `--by` varies; options of a method are METHOD.OPTION."""
NEUTRAL = {"guidance": "cfg", "interval": "none", "w_schedule": "constant"}
"""What those of them that are None are called."""
FILE_SHA256 = "file_sha256"
"""The option under which the settings keep what a method of one's own was."""
Variant = tuple[tuple[str, Any], ...]
"""(axis, value) of each axis of `--by`, in their order: what sets some cells of a run apart from others."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One image to draw; the key of everything on disk.

    Attributes:
        label: class id; None where no label is given.
        seed: of the sample's own generator.
        w: guidance weight, 0 unconditional, 1 conditional.
        w_classifier: weight of the classifier's gradient in mode `both`; None elsewhere.
        prompt: the text; None where none is given.
        prompt_index: its place among the prompts of the run, which names its folder.
        w_guide: weight of the model against a weaker one, beside `w`; None where there is no such weight.
        mixture: several labels with a weight each, as `format_labels` writes them; `label` is then the main one.
        variant: its values along the axes of `--by`; they set it apart from the run's settings.
    """

    label: int | None
    seed: int
    w: float
    w_classifier: float | None = None
    prompt: str | None = None
    prompt_index: int | None = None
    w_guide: float | None = None
    mixture: str | None = None
    variant: Variant = ()

    @property
    def label_parts(self) -> tuple[tuple[int | None, float], ...]:
        """Its labels with their weights; None for no label."""
        return label_parts(self.mixture) if self.mixture else ((self.label, 1.0),)

    @property
    def prompt_parts(self) -> tuple[tuple[str | None, float], ...]:
        """Its prompts with their weights; None for no prompt."""
        return ((None, 1.0),) if self.prompt is None else prompt_parts(self.prompt)

    @property
    def targets(self) -> tuple[tuple[int | str | None, float], ...]:
        """What a classifier that reads text is asked for: prompts, or else labels, with their weights."""
        return self.label_parts if self.prompt is None else self.prompt_parts

    @property
    def weights(self) -> str:
        """Its weight or weights, as they name a folder."""
        others = (("c", self.w_classifier), ("g", self.w_guide))
        return f"w{self.w}" + "".join(f"_{letter}{w}" for letter, w in others if w is not None)

    @property
    def file(self) -> str:
        """Where the image stands in the run directory."""
        prompt = "" if self.prompt_index is None else f"prompt{self.prompt_index:04d}"
        label = "" if self.label is None else f"label{self.label:04d}"
        if self.mixture is not None:
            label = "label" + "_".join(f"{part:04d}x{weight}" for part, weight in self.label_parts)
        condition = "_".join(filter(None, (prompt, label))) or "nolabel"
        folders = filter(None, ("images", variant_folder(self.variant), self.weights, condition))
        return f"{'/'.join(folders)}/{self.seed:06d}.png"

    def as_json(self) -> dict[str, Any]:
        """Its fields; the variant is left out where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "variant" or value}


def variant_folder(variant: Variant) -> str:
    """`guidance=apg,steps=10`: safe in the name of a file everywhere, and different for different variants."""
    return ",".join(f"{_file_safe(axis)}={_file_safe(value)}" for axis, value in variant)


def _file_safe(value: Any) -> str:
    """Text without what file names do not take: `:` becomes `~`, the rest, `~` too, %XX; long ones end in a hash."""
    text = str(value)
    safe = re.sub(r"[^A-Za-z0-9_.+-]", lambda match: "~" if match[0] == ":" else _percent(match[0]), text)
    return safe if len(safe) <= _LONGEST_VALUE else f"{safe[-_LONGEST_VALUE:]}-{fingerprint(text)}"


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


@dataclass(frozen=True)
class Settings:
    """Everything besides the cell that decides what a sample looks like.

    Attributes:
        mode: cfg, classifier, both, none or auto.
        model: name of the checkpoint.
        model_sha256: of its weights.
        scheduler: diffusers class name.
        steps: steps of the scheduler.
        eta: DDIM's eta; None for the scheduler's default.
        dtype: fp32, fp16 or bf16 autocast.
        null_label: the id for "no label".
        size: (height, width) of the images.
        negative_prompt: what the null condition says; None for the empty prompt.
        classifier: name of the classifier; None in modes without one.
        classifier_input: noisy or denoised.
        classifier_sha256: of its weights.
        classifier_gradient: exact or cheap on denoised input; None elsewhere.
        classifier_texts: what a zero-shot classifier tells apart; None elsewhere.
        config_sha256: of the configs of all parts: networks, scheduler, preprocessing.
        guidance: name of the method, or path/to/file.py:Name; None for plain guidance.
        guidance_options: its options that were given, and the sha256 of a file of one's own as `file_sha256`.
        interval: where guidance is on, as `--interval` takes it; None everywhere.
        w_schedule: how the weight goes over the steps; None for a constant one.
        guide_model: name of the weaker model of autoguidance, or `pag` or `skip`, with layers or not; None without.
        guide_model_sha256: of its weights; None where they are the model's.
    """

    mode: str
    model: str
    model_sha256: str
    scheduler: str
    steps: int
    eta: float | None
    dtype: str
    null_label: int | None
    size: Sequence[int] | None = None
    negative_prompt: str | None = None
    classifier: str | None = None
    classifier_input: str | None = None
    classifier_sha256: str | None = None
    classifier_gradient: str | None = None
    classifier_texts: Sequence[str] | None = None
    config_sha256: str | None = None
    guidance: str | None = None
    guidance_options: Mapping[str, Any] | None = None
    interval: str | None = None
    w_schedule: str | None = None
    guide_model: str | None = None
    guide_model_sha256: str | None = None


def axis_value(axis: str, settings: Mapping[str, Any]) -> Any:
    """Where settings stand along an axis of `--by`; None where they say nothing of it."""
    method, _, option = axis.rpartition(".")
    if axis in VARIED or not method:
        value = settings.get(axis)
        return NEUTRAL.get(axis) if value is None else value
    mine = (settings.get("guidance") or NEUTRAL["guidance"]) == method
    return (settings.get("guidance_options") or {}).get(option) if mine else None


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells runs apart: the axes along which their settings do not stand at one place."""
    options = [
        f"{some.get('guidance') or NEUTRAL['guidance']}.{option}"
        for some in settings
        for option in some.get("guidance_options") or {}
        if option != FILE_SHA256  # the hash of one's own, whose name is told
    ]
    axes = dict.fromkeys(("mode", "model", *VARIED, "guide_model", *options))
    apart = [axis for axis in axes if len({axis_value(axis, some) for some in settings}) > 1]
    judges = {some.get("classifier") for some in settings} - {None}  # a mode without one says so itself
    return [*apart, *(["classifier"] if len(judges) > 1 else [])]


def run_names(settings: Sequence[Mapping[str, Any]], folders: Sequence[str], told: Collection[str] = ()) -> list[str]:
    """What tells runs apart: the mode and other settings, else their folders too.

    Args:
        settings: of each run.
        folders: the name of each run's directory.
        told: axes that are told elsewhere.
    """
    apart = [axis for axis in differences(settings) if axis not in told]
    names = [_run_name(some, apart) for some in settings]
    return [f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)]


def _run_name(settings: Mapping[str, Any], apart: Sequence[str]) -> str:
    """The mode if it is one of these axes or they say nothing, and the values along the others."""
    values = [(axis, axis_value(axis, settings)) for axis in apart if axis != "mode"]
    words = [named(axis, value) for axis, value in values if value is not None and value != NEUTRAL.get(axis)]
    if "mode" in apart or not words:
        words.insert(0, MODE_NAMES.get(settings["mode"], settings["mode"]))
    return ", ".join(words)


def mode_weights(mode: str, cell: Cell) -> tuple[float, float, float]:
    """Weights of a cell: of the label's own score, of the classifier's gradient, of the model against a weaker one."""
    if mode == "auto":
        return 1.0, 0.0, cell.w
    w_guide = 1.0 if cell.w_guide is None else cell.w_guide
    if mode == "classifier":
        return 0.0, cell.w, w_guide
    return cell.w, cell.w_classifier or 0.0, w_guide


def make_cells(
    labels: Sequence[int | str | None],
    seeds: Sequence[int],
    weights: Sequence[float],
    classifier_weights: Sequence[float | None] = (None,),
    prompts: Sequence[str] | None = None,
    guide_weights: Sequence[float | None] = (None,),
) -> list[Cell]:
    """The product, weights innermost: the weights of one (label, seed) share a batch. A label that is text is a mixture."""
    texts: list[tuple[Any, Any]] = [(None, None)] if prompts is None else [(text, i) for i, text in enumerate(prompts)]
    names = [(main_label(label), label) if isinstance(label, str) else (label, None) for label in labels]
    product = itertools.product(texts, names, seeds, weights, classifier_weights, guide_weights)
    return [Cell(label, seed, w, wc, text, i, wg, mixture) for (text, i), (label, mixture), seed, w, wc, wg in product]


@dataclass(frozen=True)
class Plan:
    """What to draw, as the lists whose product the cells are: small however many cells there are.

    Attributes:
        labels: class ids, or mixtures of them; [None] where no label is given.
        seeds: of every label.
        weights: of every sample.
        classifier_weights: of mode `both`; [None] elsewhere.
        prompts: the texts; None where none are given.
        grid: whether a grid of the weights is wanted.
        guide_weights: of the model against a weaker one, beside `weights`; [None] where there are none.
        by: (axis, values) of each axis of `--by`; crossed with each other and all the others.
        own_weights: (axis of `by`, the weight of each of its values) where each has its own instead of `weights`.
        columns: axes across the grid; none means as `guidegen.grid.layout` has it.
        rows: axes down the grid, before those that are not named.
    """

    labels: Sequence[int | str | None]
    seeds: Sequence[int]
    weights: Sequence[float]
    classifier_weights: Sequence[float | None] = (None,)
    prompts: Sequence[str] | None = None
    grid: bool = False
    guide_weights: Sequence[float | None] = (None,)
    by: Sequence[tuple[str, Sequence[Any]]] = ()
    own_weights: tuple[str, Sequence[float]] | None = None
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()

    def variants(self) -> list[Variant]:
        """All combinations of the axes of `by`; the one without any where there are none."""
        axes = [axis for axis, _ in self.by]
        return [tuple(zip(axes, some, strict=True)) for some in itertools.product(*(values for _, values in self.by))]

    def weights_of(self, variant: Variant) -> Sequence[float]:
        """The weights that a variant is drawn at."""
        if self.own_weights is None:
            return self.weights
        axis, weights = self.own_weights
        return [weights[dict(self.by)[axis].index(dict(variant)[axis])]]

    def cells(self, shard: Shard | None = None) -> list[Cell]:
        """All cells, or those of one shard: a pure function of the plan.

        The samples, each a (prompt, label, seed) of one variant with all its weights, are dealt out to
        the shards in turn, so that what the weights of one sample share stays in one process.
        """
        samples = len(self.labels) * len(self.seeds) * (1 if self.prompts is None else len(self.prompts))
        cells: list[Cell] = []
        for i, variant in enumerate(self.variants()):
            weights = self.weights_of(variant)
            some = make_cells(self.labels, self.seeds, weights, self.classifier_weights, self.prompts, self.guide_weights)
            if shard is not None:
                each = len(some) // samples
                some = [cell for j, cell in enumerate(some) if (i * samples + j // each) % shard.count == shard.index]
            cells += [replace(cell, variant=variant) for cell in some] if variant else some
        return cells

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON holds it: seeds as `--seeds` takes them, and what is not asked for left out."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        asked = {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}
        return json.loads(json.dumps(asked | {"seeds": format_seeds(self.seeds)}))  # type: ignore[no-any-return]


def read_plan(data: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.as_json` wrote.

    Raises:
        TypeError, ValueError, KeyError: it is none.
    """
    by = tuple((str(axis), tuple(values)) for axis, values in data.get("by", ()))
    axes = {"by": by, "columns": tuple(data.get("columns", ())), "rows": tuple(data.get("rows", ()))}
    if data.get("own_weights"):
        axis, weights = data["own_weights"]
        axes["own_weights"] = (str(axis), tuple(weights))
    return Plan(**{**data, "seeds": parse_seeds(data["seeds"]), **axes})


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a plan.

    Attributes:
        index: from 0.
        count: how many there are.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """`I/N`, counted from 0, or `auto`: this process's place among those that a launcher started.

    `auto` reads torchrun's RANK and WORLD_SIZE (accelerate sets the same), or else SLURM_PROCID and
    SLURM_NTASKS of srun; in a SLURM job array each task of the array takes its part of that.

    Raises:
        UsageError: neither, or no launcher is to be seen.
    """
    if text == "auto":
        return _launched(environment)
    match = _SHARD.fullmatch(text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard takes auto, or I/N with I from 0 to N-1, such as 0/4; found {text!r}.")
    return Shard(int(match[1]), int(match[2]))


def _launched(environment: Mapping[str, str]) -> Shard:
    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name, "")
        if not text.isdecimal() and (text or default is None):
            raise UsageError(f"--shard auto: {name} is {text!r}, not a whole number; give --shard I/N.")
        return int(text) if text else int(default or 0)

    parts = []
    if environment.get("SLURM_ARRAY_TASK_ID"):
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1) or 1
        parts.append(Shard((number("SLURM_ARRAY_TASK_ID") - first) // step, number("SLURM_ARRAY_TASK_COUNT")))
    if environment.get("RANK") and environment.get("WORLD_SIZE"):
        parts.append(Shard(number("RANK"), number("WORLD_SIZE")))
    elif environment.get("SLURM_PROCID") and environment.get("SLURM_NTASKS"):
        parts.append(Shard(number("SLURM_PROCID"), number("SLURM_NTASKS")))
    if not parts:
        raise UsageError(
            "--shard auto: neither torchrun (RANK, WORLD_SIZE) nor SLURM (SLURM_ARRAY_TASK_ID, SLURM_PROCID) "
            "started this process. Give --shard I/N, such as 0/4."
        )
    shard = Shard(0, 1)
    for part in parts:
        shard = Shard(shard.index * part.count + part.index, shard.count * part.count)
    if not 0 <= shard.index < shard.count:
        raise UsageError(f"--shard auto: shard {shard.index} of {shard.count} is not one; give --shard I/N.")
    return shard


def batches(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def parse_weight(text: str, flag: str = "--w") -> float:
    """One finite number.

    Raises:
        UsageError: it is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{flag} takes a finite number, found {text!r}.")
    return value + 0.0  # -0.0 is 0.0


def parse_weights(text: str, flag: str = "--w") -> list[float]:
    """`0,1,2.5` and `START:STOP:STEP`, both ends included, counted in exact decimals.

    Raises:
        UsageError: not a list of finite numbers, or a range that never ends.
    """
    values: list[float] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if ":" in word:
            values += _range(word, flag)
        else:
            values.append(parse_weight(word, flag))
    if not values:
        raise UsageError(f"{flag} is empty: give numbers such as 0,1,2.5 or START:STOP:STEP.")
    return list(dict.fromkeys(values))


def _range(word: str, flag: str) -> list[float]:
    try:
        start, stop, step = (Decimal(part) for part in word.split(":"))
        count = (stop - start) / step
    except (ValueError, ArithmeticError, InvalidOperation):
        raise UsageError(f"{flag} {word}: a range is START:STOP:STEP with a step that is not zero.") from None
    if not count.is_finite() or not 0 <= count < _MAX_LIST:
        raise UsageError(f"{flag} {word}: the range is empty or endless; check the sign of its step.")
    return [parse_weight(str(start + i * step), flag) for i in range(int(count) + 1)]


def parse_seeds(text: str) -> list[int]:
    """`0-63,100`: seeds and ranges of seeds, both ends included.

    Raises:
        UsageError: anything else.
    """
    seeds: list[int] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = _SEED_RANGE.fullmatch(word)
        first, last = (int(match[1]), int(match[2])) if match else (_seed(word), _seed(word))
        if not 0 <= last - first < 10 * _MAX_LIST:
            raise UsageError(f"--seeds {word}: the range is empty or too long.")
        seeds += range(first, last + 1)
    if not seeds or max(seeds) >= 2**63:
        raise UsageError(f"--seeds {text!r}: give seeds from 0 to 2^63-1, such as 0-63,100.")
    return list(dict.fromkeys(seeds))


def format_seeds(seeds: Sequence[int]) -> str:
    """`0-63,100`: what `parse_seeds` reads as these seeds, in this order."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


def _seed(word: str) -> int:
    if not word.isdecimal():
        raise UsageError(f"--seeds: {word!r} is not a seed. Give whole numbers and ranges, such as 0-63,100.")
    return int(word)


def digest(*parts: Any) -> str:
    """sha256 of anything that JSON can hold, as 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(*parts: Any) -> str:
    """Eight hex digits that name a plan: the same flags give the same ones."""
    return digest(*parts)[:8]
