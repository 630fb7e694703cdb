"""The `parameters` text of the AUTOMATIC1111 web interface, as far as it means options of `sample`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from guidegen.errors import UsageError, quoted
from guidegen.spec.parse import LARGEST_SEED, parse_weight, whole

_LONGEST = 1 << 20  # letters
_FIELD = re.compile(r'\s*([\w ()+-]{1,80}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_WEIGHTED = re.compile(r"<\w+:|[(\[]")
_NEGATIVE = "Negative prompt:"
_SAMPLERS = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "plms": "PNDMScheduler",
    "unipc": "unipc",
    "euler": "euler",
    "euler a": "EulerAncestralDiscreteScheduler",
    "heun": "heun",
    "lms": "LMSDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2 a": "KDPM2AncestralDiscreteScheduler",
    "dpm++ 2m": "dpm++",
}
_SCHEDULES = {
    "karras": ["use_karras_sigmas=true"],
    "exponential": ["use_exponential_sigmas=true"],
    "automatic": None,
    "uniform": None,
}
"""The names of its samplers, in small letters, and the schedulers that walk alike."""


def options_of_parameters(text: str, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The options of `sample` that a text means, and what of it means none.

    Args:
        text: the prompt, perhaps `Negative prompt: ...`, and a last line `Steps: 20, Sampler: Euler, ...`.
        path: names it in messages.

    Raises:
        UsageError: it is no such text.
    """
    *prompts, last = text[:_LONGEST].strip().splitlines() or [""]
    fields = {name.strip(): value.strip().strip('"') for name, value in _FIELD.findall(last)}
    if "Steps" not in fields:
        raise UsageError(f"{path} does not say how it was drawn: its text has no line of Steps, Sampler and so on.")
    prompt, _, negative = "\n".join(prompts).partition(_NEGATIVE)
    if prompt.strip() == "-" or prompt.strip().startswith("@"):
        raise UsageError(f"{path}: the prompt {quoted(prompt.strip())} would be read as a file by --prompt.")
    options: dict[str, Any] = {"prompt": [prompt.strip()], "negative_prompt": negative.strip() or None}
    unread = ["the weights of words in the prompts"] if _WEIGHTED.search(prompt + negative) else []
    for name, value in fields.items():
        read = _option(name, value)
        if read is None:
            unread.append(f"{name}: {value[:80]}")
        else:
            options |= read
    return {name: value for name, value in options.items() if value is not None}, unread


def _option(name: str, value: str) -> dict[str, Any] | None:
    """The options of one field; None where it means none."""
    number = whole(value)
    if name == "Steps" and number:
        return {"steps": number}
    if name == "Seed" and number is not None and number <= LARGEST_SEED:
        return {"seed": value}
    if name == "Size" and re.fullmatch(r"\d{1,5}x\d{1,5}", value, re.ASCII):
        return {"size": value}
    if name == "CFG scale":
        try:
            return {"w": repr(parse_weight(value))}
        except UsageError:
            return None
    if name == "Schedule type" and value.casefold() in _SCHEDULES:
        return {"scheduler_opt": _SCHEDULES[value.casefold()]}
    if name == "Sampler":
        sampler, _, schedule = value.casefold().partition(" karras")
        if sampler in _SAMPLERS and not schedule:
            karras = {"scheduler_opt": _SCHEDULES["karras"]} if sampler != value.casefold() else {}
            return {"scheduler": _SAMPLERS[sampler], **karras}
    return None
