"""The arguments of `Guidance`: one value for all samples or one for each, and errors that name them and not flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from guidegen.arguments import finite, instance, several
from guidegen.errors import GuidegenError
from guidegen.models.classifiers.noisy import NoisyClassifier
from guidegen.python_file import split_python_ref
from guidegen.scores.methods import Method, find_method

_FLAGS = {
    "--guidance-opt": "options",
    "--guidance": "method",
    "--w-schedule": "w_schedule",
    "--interval": "interval",
    "--steps": "num_inference_steps",
    "--timestep-spacing": "timestep_spacing",
    "--scheduler": "scheduler",
}
"""The arguments of `Guidance` and of pipelines by the flags that messages name."""


class Each:
    """One value for all samples, or one for each."""

    def __init__(self, name: str, given: Any, read: Callable[[str, Any], Any] = finite):
        self.name, self.single = name, not hasattr(given, "__iter__") or isinstance(given, str)
        self.single |= getattr(given, "ndim", 1) == 0
        self.values = [read(name, each) for each in ([given] if self.single else several(name, given, of="sample"))]

    @property
    def config(self) -> Any:
        return self.values[0] if self.single else self.values

    def over(self, count: int) -> list[Any]:
        return self.values * count if self.single else self.values

    def others(self, neutral: float) -> bool:
        return any(value != neutral for value in self.values)


def count_of(lists: Sequence[Each]) -> int | None:
    """How many samples the lists are of, which agree; None where there is none."""
    counts = {each.name: len(each.values) for each in lists if not each.single}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"One value for each sample is as many for all arguments; found {found}.")
    return next(iter(counts.values()), None)


def check_network(name: str, network: Any, weight: str, given: Any, acts: bool) -> None:
    """Refuses a network without weights, and weights without it."""
    if network is None and acts:
        raise ValueError(f"{weight} is given, and there is no {name}: give that too, which a saved guider does not hold.")
    if network is None:
        return
    if given is None:
        raise ValueError(f"{name} has no effect without {weight}: give a weight.")
    loads = "guidegen.load_classifier(guidegen.open_classifier(...), device, texts=[...])"
    words = f"a network, as {loads} gives it" if name == "classifier" else "a network of the class of the pipeline's"
    instance(name, network, torch.nn.Module, words)
    if isinstance(network, NoisyClassifier):
        raise TypeError("classifier reads x_t, where a pipeline's is a latent: give one of images.")


def without_flags(text: str) -> str:
    """A message of the command line with the names of arguments in place of flags."""
    for flag, name in _FLAGS.items():
        text = text.replace(flag, name)
    return text


def argument(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of the command line; its errors name the arguments of `Guidance` and not flags."""
    try:
        return function(*args)
    except GuidegenError as error:
        raise ValueError(without_flags(str(error))) from None


def method_of(name: str, options: Mapping[str, Any]) -> Method:
    instance("method", name, str)
    instance("options", options, Mapping, "a dict")
    if split_python_ref(name):  # a guider_config.json may come from anybody
        raise ValueError(f"method {name}: a file would be run. Give one of the methods that `guidegen guidances` lists.")
    method, values = argument(find_method, name, {key: str(value) for key, value in options.items()})
    bound: Method = replace(method, combine=partial(method.combine, **values)) if values else method
    return bound
