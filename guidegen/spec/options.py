"""Options that are settings as they are: a field is a flag of `sample` and `sweep` and what runs keep of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Annotated, Any

import typer

WHAT, HOW = "What to draw", "How to draw it"
"""Panels of the help."""


class Uncond(StrEnum):
    icg = "icg"


class Spacing(StrEnum):
    leading = "leading"
    linspace = "linspace"
    trailing = "trailing"


@dataclass(frozen=True, kw_only=True)
class PlainOptions:
    """Options whose value decides what an image looks like, and is stored unchanged; None where they are not given."""

    negative_prompt: Annotated[
        str | None,
        typer.Option(
            "--negative-prompt",
            metavar="TEXT",
            help="Text of the unconditional prediction, instead of the empty prompt.",
            rich_help_panel=WHAT,
        ),
    ] = None
    uncond: Annotated[
        Uncond | None,
        typer.Option(
            "--uncond",
            metavar="NAME",
            help="What stands in for the unconditional prediction of a model without a null label: icg, the prediction for "
            "a random label at each step (independent condition guidance, Sadat et al. 2024, arXiv 2407.02687).",
            rich_help_panel=HOW,
        ),
    ] = None
    interval: Annotated[
        str | None,
        typer.Option(
            "--interval",
            metavar="LOW:HIGH",
            help="Guide only at noise levels LOW < sigma/alpha <= HIGH (0.3:5), or in a part of the steps (10%:60%).",
            rich_help_panel=HOW,
        ),
    ] = None
    w_schedule: Annotated[
        str | None,
        typer.Option(
            "--w-schedule",
            metavar="NAME",
            help="Schedule of the weight over the steps: constant, linear, cosine, beta:A,B ... Its mean stays --w.",
            rich_help_panel=HOW,
        ),
    ] = None
    timestep_spacing: Annotated[
        Spacing | None,
        typer.Option(
            "--timestep-spacing",
            metavar="NAME",
            help="Which training timesteps are sampled at: leading, linspace or trailing (Lin et al. 2023, arXiv "
            "2305.08891, table 2). Default: the checkpoint's.",
            rich_help_panel=HOW,
        ),
    ] = None
    scheduler_opt: Annotated[
        list[str] | None,
        typer.Option(
            "--scheduler-opt",
            metavar="KEY=VALUE",
            help="An option of the scheduler's class in diffusers, such as use_karras_sigmas=true. Repeats.",
            rich_help_panel=HOW,
        ),
    ] = None


def plain_options(given: PlainOptions) -> dict[str, Any]:
    """The values of these options, by name."""
    return {field.name: getattr(given, field.name) for field in fields(PlainOptions)}
