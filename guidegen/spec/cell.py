"""One image to draw, which is the key of everything on disk."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from guidegen.spec.composition import label_parts, prompt_parts

_LONGEST_VALUE = 48  # of an axis, in the name of a folder


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
        prompt_index: its index among the prompts of the run, which names its folder.
        w_guide: weight of autoguidance, beside `w`; None where there is no such weight.
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
    def condition(self) -> str:
        """Its prompt and label, as they name a folder."""
        prompt = "" if self.prompt_index is None else f"prompt{self.prompt_index:04d}"
        label = "" if self.label is None else f"label{self.label:04d}"
        if self.mixture is not None:
            label = "label" + "_".join(f"{part:04d}x{weight}" for part, weight in self.label_parts)
        return "_".join(filter(None, (prompt, label))) or "nolabel"

    @property
    def folder(self) -> str:
        """Where its images of all seeds stand in the run directory."""
        return "/".join(filter(None, ("images", variant_folder(self.variant), self.weights, self.condition)))

    @property
    def file(self) -> str:
        """Where the image stands in the run directory."""
        return f"{self.folder}/{self.seed:06d}.png"

    def at(self, w: float, w_classifier: float | None, w_guide: float | None) -> Cell:
        """The same at other weights."""
        return Cell(
            self.label, self.seed, w, w_classifier, self.prompt, self.prompt_index, w_guide, self.mixture, self.variant
        )

    def fields(self) -> dict[str, Any]:
        """Its fields by their names."""
        return {name: getattr(self, name) for name in self.__slots__}

    def as_json(self) -> dict[str, Any]:
        """Its fields; the variant is left out where there is none."""
        return {name: value for name, value in self.fields().items() if name != "variant" or value}


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


def mode_weights(mode: str, cell: Cell) -> tuple[float, float, float]:
    """Weights of a cell: of the label's own score, of the classifier's gradient, of autoguidance."""
    if mode == "autoguidance":
        return 1.0, 0.0, cell.w
    w_guide = 1.0 if cell.w_guide is None else cell.w_guide
    if mode == "classifier":
        return 0.0, cell.w, w_guide
    return cell.w, cell.w_classifier or 0.0, w_guide


def digest(*parts: Any) -> str:
    """sha256 of anything that JSON can hold, as 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(*parts: Any) -> str:
    """Eight hex digits that name a plan: the same flags give the same ones."""
    return digest(*parts)[:8]


def random_index(seed: int, count: int) -> int:
    """A number below `count`, uniform over seeds and a function of the seed alone: the label of `--labels-random`."""
    return int.from_bytes(hashlib.sha256(f"label {seed}".encode()).digest()) % count
