"""What a search draws: many seeds at one setting, each setting a shard of one run with a lock of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, ClassVar

from guidegen.cli.drawing import about_run, draw_missing, open_networks
from guidegen.cli.flags import SweepOptions
from guidegen.cli.output import parse_output
from guidegen.cli.resolve import Job, default_name, plan_job
from guidegen.cli.signals import Signals
from guidegen.cli.weights import with_hashes
from guidegen.errors import LockedError, UsageError
from guidegen.runs.directory import Run
from guidegen.runs.schema import Row
from guidegen.spec.cell import fingerprint
from guidegen.spec.command import Command
from guidegen.spec.settings import WEIGHT_HASHES
from guidegen.spec.shard import Shard

if TYPE_CHECKING:
    from guidegen.cli.tune import TuneOptions
    from guidegen.sampling.sampler import Drawers
    from guidegen.tune.space import Setting, Space

_WEIGHTS_OF = {"w": "weights", "w_classifier": "classifier_weights", "w_guide": "guide_weights"}
_SLOTS = 100_000
"""The number of a setting's shard is one of these, by its values; two that share one only wait for each other."""


@dataclass(frozen=True)
class _SettingOptions(SweepOptions):
    """A sweep without a grid."""

    command: ClassVar[str] = "sample"
    with_grid: ClassVar[bool] = False


class SettingJobs:
    """The jobs of settings.

    Args:
        flags: what does not vary.
        space: what varies.
        named: decides the default name of the run directory, beside the flags.

    Raises:
        UsageError: what cannot be drawn.
        CheckpointError: a checkpoint that cannot be opened.
    """

    def __init__(self, flags: TuneOptions, space: Space, named: Mapping[str, Any]):
        from guidegen.tune.space import WEIGHTS

        self.space, self._flags = space, flags
        self.command = Command("tune", {})
        self._weights = [each.name for each in space.dimensions if each.name in WEIGHTS]
        if given := [name for name in self._weights if getattr(flags, name) is not None]:
            raise UsageError(f"--by {given[0]} stands instead of --{given[0].replace('_', '-')}: give one of them.")
        self.weight: str | None = None
        self._given = {each.name: getattr(flags, each.name) for each in fields(flags) if each.name in _FIELDS}
        self._given |= {"json_rows": False, "out": None if flags.out is None else str(flags.out)}
        output = parse_output(self._given["out"])
        if output.is_file or output.to_stdout:
            raise UsageError(f"-o {flags.out}: a search is kept in a run directory.")
        job = self._plan(self._every_arm(), flags.seed or "0")
        # standard input is read once
        self._given["label"] = [str(label) for label in job.plan.labels if label is not None] or None
        self._given["prompt"] = list(job.plan.prompts or ()) or None
        if flags.w is None and flags.mode != "none" and "w" not in self._weights:
            self.weight = "1.0" if job.conditions.mixed else "3.0"
            job = self._plan(self._every_arm(), flags.seed or "0")
        self.folder: Path = output.named(default_name(job, "tune", named)).path
        self._given["out"] = f"{self.folder}/"
        self.base = with_hashes(job)

    @property
    def conditions(self) -> dict[str, list[str]]:
        """Flag -> its words, in place of standard input."""
        return {name: self._given[name] for name in ("label", "prompt") if self._given[name]}

    @property
    def per_seed(self) -> int:
        """Images of one seed."""
        return len(self.base.plan.labels) * len(self.base.plan.prompts or [""])

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        high, wide = self.base.models.checkpoint.size
        return high, wide

    @property
    def label_names(self) -> dict[int, str]:
        """Label id -> name, of what is drawn."""
        name_of = self.base.conditions.name_of
        return {cell.label: name_of(cell) for cell in self.base.plan.cells().of_one_seed() if cell.label is not None}

    @property
    def subjects(self) -> set[Any] | None:
        """Labels, or else prompts, that are drawn; None where there are none."""
        cells = self.base.plan.cells().of_one_seed()
        return {cell.prompt if cell.label is None else cell.label for cell in cells} - {None} or None

    @property
    def identity(self) -> dict[str, Any]:
        """What the images depend on beside the setting and the settings of the run."""
        conditions = {flag: ",".join(words) for flag, words in self.conditions.items()}
        apart = {"seeds per label": True} if self._flags.seeds_per_label else {}
        return {**conditions, **apart, "seed": self._flags.seed, "w": self.weight or self._flags.w}

    def begin(self, overwrite: bool) -> None:
        """Writes run.json, if it is not there.

        Args:
            overwrite: after all is deleted that was made in the directory.

        Raises:
            UsageError: the directory holds something else.
            LockedError: another process draws into what is to be deleted.
        """
        about = about_run(self.base, self.command)
        if overwrite:
            with Run(self.folder, self.base.settings, about, overwrite):
                return
        with Run(self.folder, self.base.settings, about, shard=Shard(_SLOTS - 1, _SLOTS), wait=lambda _: sleep(0.05)):
            pass

    @contextmanager
    def drawing(
        self, setting: Setting, before: int, seeds: int, signals: Signals
    ) -> Iterator[Callable[[], Sequence[Row]] | None]:
        """Holds a setting; gives what draws its images and returns their rows, None where another process holds it.

        Args:
            setting: which.
            before: seeds that an earlier plan of the run has.
            seeds: of each label.
            signals: that end the drawing.
        """
        job = self._job(setting, seeds)
        plan = replace(job.plan, seeds=job.plan.seeds[before:])
        about = about_run(job, self.command)
        try:
            run = Run(self.folder, job.settings, about, False, plan, job.shard, job.variants)
        except LockedError:
            yield None
            return
        with run:
            yield lambda: draw_missing(job, run, signals, lambda _: self._networks)

    @cached_property
    def _networks(self) -> Drawers:
        return open_networks(self.base)

    def _job(self, setting: Setting, seeds: int) -> Job:
        first = int(self._flags.seed or 0)
        shard = Shard(int(fingerprint(setting), 16) % (_SLOTS - 1), _SLOTS)
        if self._of_base is not None:
            job = self._of_base(setting, range(first, first + seeds))
            return replace(job, shard=shard, cells=job.plan.cells())
        words = {each.name: str(value) for each, value in zip(self.space.dimensions, setting, strict=True)}
        job = self._plan(words, f"{first}-{first + seeds - 1}")
        hashes = {name: getattr(self.base.settings, name) for name in WEIGHT_HASHES}
        return replace(job.with_hashes(hashes), settings=self.base.settings, shard=shard, models=self.base.models)

    @cached_property
    def _of_base(self) -> Callable[[Setting, range], Job] | None:
        """From a setting and seeds to a job with a setup of the base; None where numbers other than weights vary."""
        dimensions = self.space.dimensions
        if any(each.numeric and each.name not in self._weights for each in dimensions):
            return None
        others = [each for each in dimensions if not each.numeric and each.name not in self._weights]
        variants = dict(zip(itertools.product(*(each.values for each in others)), self.base.setups, strict=True))

        def job(setting: Setting, seeds: range) -> Job:
            value = dict(zip((each.name for each in dimensions), setting, strict=True))
            variant = variants[tuple(value[each.name] for each in others)]
            weights: dict[str, Any] = {_WEIGHTS_OF[name]: (float(value[name]),) for name in self._weights}
            by = tuple((axis, (one,)) for axis, one in variant)
            plan = replace(self.base.plan, seeds=seeds, by=by, **weights)
            return replace(self.base, plan=plan, setups={variant: self.base.setups[variant]})

        return job

    def _plan(self, words: Mapping[str, str], seeds: str) -> Job:
        """The job of an axis's words."""
        given = self._given | {name: words[name] for name in self._weights}
        if "w" not in self._weights:
            given["w"] = self.weight or self._flags.w
        by = [f"{name}={text}" for name, text in words.items() if name not in self._weights]
        return plan_job(_SettingOptions(**given | {"by": by or None, "seed": None, "seeds": seeds}))

    def _every_arm(self) -> dict[str, str]:
        """All values of the lists, and one of each range."""
        return {
            each.name: str(each.value(0.5)) if each.numeric else ",".join(map(str, each.values))
            for each in self.space.dimensions
        }


_FIELDS = {each.name for each in fields(SweepOptions)}
