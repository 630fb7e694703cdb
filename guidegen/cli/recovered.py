"""From what a file says of how it was drawn to the options of `sample` or `sweep` that draw it again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from guidegen.cli.flags import Input
from guidegen.errors import UnsafeError, UsageError, quoted
from guidegen.models.autoguidance import WEAKENINGS
from guidegen.python_file import split_python_ref
from guidegen.runs.carried import Carried
from guidegen.spec.axes import axis_of
from guidegen.spec.cell import Cell
from guidegen.spec.options import plain_options
from guidegen.spec.parse import format_seeds
from guidegen.spec.plan import Plan
from guidegen.spec.settings import FILE_SHA256, Settings

Options = dict[str, Any]
"""Values of options by the names of their fields, as `SampleOptions` and `SweepOptions` take them."""

_ONLY_IN = {
    "classifier": ("classifier", "both"),
    "classifier_input": ("classifier", "both"),
    "classifier_gradient": ("classifier", "both"),
    "w_classifier": ("both",),
    "w_guide": ("cfg", "classifier", "both"),
    "guide_model": ("cfg", "classifier", "both", "autoguidance"),
    "guidance": ("cfg", "classifier", "both"),
    "guidance_opt": ("cfg", "classifier", "both"),
    "w": ("cfg", "classifier", "both", "autoguidance"),
    "interval": ("cfg", "classifier", "both", "autoguidance"),
    "w_schedule": ("cfg", "classifier", "both", "autoguidance"),
}
"""The modes that take an option, where not all do."""
_GO_WITH = {
    "model": ("null_label", "variant", "size"),
    "classifier": ("classifier_input", "classifier_gradient"),
    "fast": ("dtype",),
    "scheduler": ("eta", "timestep_spacing", "scheduler_opt"),
    "guidance": ("guidance_opt",),
    "seeds": ("seed", "num"),
    "seed": ("seeds",),
    "num": ("seeds",),
}
"""The options that lose their meaning where another one is given anew."""


def options_of(carried: Carried, plan: Plan | None) -> Options:
    """The options that draw what a file was drawn with.

    Args:
        carried: what it says.
        plan: which of its plans; None for its one cell.

    Raises:
        UsageError: a prompt that options cannot hold.
    """
    settings = carried.settings
    what = _of_plan(plan) if plan else _of_cell(carried.cells[0])
    found = {**_of_settings(settings), **_networks(carried), **what}
    gone = {axis for axis, _ in plan.by} if plan else set()  # they are in --by
    gone |= {"w"} if settings.mode == "none" else set()
    return {name: value for name, value in found.items() if value is not None and name not in gone}


def changed(found: Mapping[str, Any], given: Mapping[str, Any]) -> Options:
    """Options with those that are given instead, without what these leave no meaning to."""
    axes = [word.partition("=") for word in given.get("by") or ()]
    names = {"guidance_opt" if "." in axis else axis.strip().replace("-", "_") for axis, _, _ in axes}
    names |= {"w"} if any("@" in values for _, _, values in axes) else set()
    gone = names.union(*(_GO_WITH.get(name, ()) for name in given))
    mode = given.get("mode", found.get("mode", "cfg"))
    gone |= {name for name, modes in _ONLY_IN.items() if mode not in modes}
    return {name: value for name, value in found.items() if name not in gone} | dict(given)


def refuse_python(found: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuses Python files that a picture names and the command line does not: pictures come from anywhere.

    Raises:
        UnsafeError: such a file.
    """
    by = [word.partition("=")[2].split(",") for word in found.get("by", ())]
    named = {
        "model": [found.get("model")],
        "classifier": found.get("classifier", []),
        "guide-model": [found.get("guide_model")],
        "guidance": [found.get("guidance"), *(value.partition("@")[0] for values in by for value in values)],
    }
    for flag, refs in named.items():
        for ref in refs if flag.replace("-", "_") not in given else ():
            if ref and (".py:" in ref or split_python_ref(ref)):
                raise UnsafeError(
                    f"It was drawn with the Python file {quoted(ref)}. To run that file, give --{flag} yourself."
                )


def _of_settings(settings: Settings) -> Options:
    options = settings.guidance_options or {}
    method = [f"{name}={value}" for name, value in options.items() if name != FILE_SHA256]
    return {
        "mode": settings.mode,
        "scheduler": settings.scheduler or None,
        "steps": settings.steps,
        "eta": settings.eta,
        "dtype": settings.dtype,
        "guidance": settings.guidance,
        "guidance_opt": method or None,
        "classifier_gradient": settings.classifier_gradient,
        **plain_options(settings),
    }


def _networks(carried: Carried) -> Options:
    """What names the networks; of files that do not, what their settings say."""
    settings, source = carried.settings, carried.source
    if source is None:
        guide = settings.guide_model if settings.guide_model and settings.guide_model.startswith(WEAKENINGS) else None
        size = None if settings.size is None else "{1}x{0}".format(*settings.size)
        return {"null_label": settings.null_label, "size": size, "guide_model": guide}
    known = settings.classifier_input if settings.classifier_input in tuple(Input) else None
    return {"classifier_input": known, **source.as_json()}


def _of_cell(cell: Cell) -> Options:
    label = cell.mixture or cell.label
    return {
        "w": repr(cell.w),
        "w_classifier": None if cell.w_classifier is None else repr(cell.w_classifier),
        "w_guide": None if cell.w_guide is None else repr(cell.w_guide),
        "label": None if label is None else [str(label)],
        "prompt": None if cell.prompt is None else _prompts([cell.prompt]),
        "seed": str(cell.seed),
    }


def _of_plan(plan: Plan) -> Options:
    return {
        "w": None if plan.own_weights else _numbers(plan.weights),
        "w_classifier": _numbers(plan.classifier_weights),
        "w_guide": _numbers(plan.guide_weights),
        "label": label_words(plan.labels),
        "prompt": None if plan.prompts is None else _prompts(plan.prompts),
        **(
            {"seed": str(plan.seeds[0]), "labels_random": len(plan.seeds)}
            if plan.labels_random
            else {"seeds": format_seeds(plan.seeds)}
        ),
        "seeds_per_label": plan.seeds_per_label or None,
        "by": [*_by(plan)] or None,
        "columns": ",".join(plan.columns) or None,
        "rows": ",".join(plan.rows) or None,
    }


def _by(plan: Plan) -> Iterator[str]:
    own_axis, own = plan.own_weights or ("", ())
    for axis, values in plan.by:
        texts = [*map(str, values)]
        if axis == own_axis:
            texts = [f"{value}@{w!r}" for value, w in zip(values, own, strict=True)]
        name = axis if "." in axis else axis_of(axis).flag or axis
        yield f"{name}={','.join(texts)}"


def _numbers(weights: Iterable[float | None]) -> str | None:
    return ",".join(repr(w) for w in weights if w is not None) or None


def label_words(labels: Sequence[int | str | None]) -> list[str] | None:
    """What `--label` takes for these labels; None for none."""
    ids = [label for label in labels if isinstance(label, int)]
    if len(ids) == len(labels):
        return [format_seeds(ids)]  # ranges of labels are written as those of seeds
    return [str(label) for label in labels if label is not None] or None


def _prompts(prompts: Sequence[str]) -> list[str]:
    """They are given back as they are; `-` and @FILE would be read as files."""
    for prompt in prompts:
        if prompt == "-" or prompt.startswith("@"):
            raise UsageError(f"The prompt {quoted(prompt)} would be read as a file by --prompt: give --prompt another one.")
    return list(prompts)
