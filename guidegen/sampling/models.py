"""The networks that take part in a run."""

from __future__ import annotations

from typing import NamedTuple

from guidegen.models.autoguidance import GuideModel
from guidegen.models.checkpoint import AnyClassifier, Checkpoint


class Models(NamedTuple):
    """The networks of a run, opened without their weights; None where there is none."""

    checkpoint: Checkpoint
    classifier: AnyClassifier | None = None
    guide: GuideModel | None = None
