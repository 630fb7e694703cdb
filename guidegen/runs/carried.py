"""What files carry of how they were drawn, read back as checked values: settings, cells, plans and references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from guidegen.errors import UsageError
from guidegen.runs.schema import Count, settings_of
from guidegen.schema import convert
from guidegen.spec import limits
from guidegen.spec.cell import Cell
from guidegen.spec.composition import label_parts, prompt_parts
from guidegen.spec.plan import Plan, read_plan
from guidegen.spec.settings import Settings


@dataclass(frozen=True)
class Source:
    """The options that name the networks, as `sample` takes them: what settings do not say.

    Attributes:
        model: folder, `owner/name@commit` or file.py:NAME; None for the bundled checkpoint.
        classifier: the same of each classifier, `REF:W` where it has a weight.
        classifier_input: as it was given.
        guide_model: the same of the guiding model, `bundled`, or pag, skip or tsg with what follows or not.
        null_label: as it was given.
        variant: of the weight files.
        size: as it was given.
        deterministic: whether the networks were called with `batch_size` rows each time.
        batch_size: given with `deterministic` only.
    """

    model: str | None = None
    classifier: list[str] | None = None
    classifier_input: str | None = None
    guide_model: str | None = None
    null_label: Count | None = None
    variant: str | None = None
    size: str | None = None
    deterministic: bool = False
    batch_size: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Its fields but those that were not given."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


@dataclass(frozen=True)
class Carried:
    """How a file or a run was drawn.

    Attributes:
        settings: of all its images.
        cells: one, where it is one image; empty where there are plans.
        plans: what it is made of, where it is more than an image.
        source: None where it does not name the networks.
    """

    settings: Settings
    cells: Sequence[Cell]
    plans: Sequence[Plan]
    source: Source | None


@dataclass(frozen=True)
class _Cell:
    """A cell as `Cell.as_json` writes it, without its variant: the settings are those of the image."""

    seed: Count
    w: float
    label: Count | None = None
    w_classifier: float | None = None
    prompt: str | None = None
    w_guide: float | None = None
    mixture: str | None = None


@dataclass(frozen=True)
class _File:
    settings: dict[str, Any]
    cell: _Cell | None = None
    cells: list[_Cell] = field(default_factory=list)
    plan: dict[str, Any] | None = None
    plans: Annotated[list[dict[str, Any]], Meta(max_length=limits.LIST)] = field(default_factory=list)
    source: Source | None = None


def check_carried(data: Any, where: object) -> Carried:
    """What run.json or the text of an image says of how it was drawn.

    Args:
        data: decoded JSON.
        where: names it in messages.

    Raises:
        UsageError: it is no such thing, or does not say.
    """
    file = convert(data, _File, where, UsageError)
    plans = [read_plan(plan, where) for plan in ([file.plan] if file.plan else file.plans)]
    cells = [] if plans else [_cell_of(cell, where) for cell in (file.cell, *file.cells) if cell]
    if not plans and len(cells) != 1:
        raise UsageError(f"{where} does not say which images it is made of.")
    return Carried(settings_of(file.settings, where), cells, plans, file.source)


def _cell_of(cell: _Cell, where: object) -> Cell:
    if not all(math.isfinite(w) for w in (cell.w, cell.w_classifier, cell.w_guide) if w is not None):
        raise UsageError(f"{where} is not valid: a weight in it is not finite.")
    label_parts(cell.mixture) if cell.mixture is not None else None
    prompt_parts(cell.prompt) if cell.prompt is not None else None
    return Cell(cell.label, cell.seed, cell.w, cell.w_classifier, cell.prompt, None, cell.w_guide, cell.mixture)
