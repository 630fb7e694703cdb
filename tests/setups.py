"""Samplers as tests ask for them: from what was opened, a scheduler and settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from guidegen.cli.command import command_of
from guidegen.cli.drawing import carry_out
from guidegen.cli.flags import SampleOptions, SweepOptions
from guidegen.cli.resolve import plan_job
from guidegen.sampling.models import Models
from guidegen.sampling.sampler import Sampler
from guidegen.sampling.sampler import open_sampler as _open
from guidegen.sampling.setup import Setup, make_setup


def setup_of(checkpoint: Any, classifier: Any, scheduler: Any, settings: Any, guide: Any = None) -> Setup:
    return make_setup(Models(checkpoint, classifier, guide), settings, scheduler)


def open_sampler(
    checkpoint: Any,
    classifier: Any,
    scheduler: Any,
    settings: Any,
    device: torch.device,
    guide: Any = None,
    **how: Any,
) -> Sampler:
    return _open(setup_of(checkpoint, classifier, scheduler, settings, guide), device, **how)


def options_of(sweep: bool = False, **given: Any) -> SampleOptions:
    """The options of a command line of `sample` or `sweep` on a CPU that prints nothing."""
    cls = SweepOptions if sweep else SampleOptions
    nothing = dict.fromkeys(field.name for field in fields(cls))
    usual = {"mode": "cfg", "dtype": "auto", "device": "cpu", "batch_size": "auto", "quiet": True}
    return cls(**(nothing | usual | given))


def draw_job(options: SampleOptions) -> None:
    """What the command of these options does, in this process."""
    carry_out(plan_job(options), command_of(options.command, options))
