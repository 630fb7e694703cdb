"""From cells to files: draws batch by batch what fits into memory, and writes into the run."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from guidegen.errors import GuidegenError, first_line, is_out_of_memory
from guidegen.runs.directory import Run
from guidegen.runs.schema import Row
from guidegen.sampling.equal_images import EqualImages
from guidegen.sampling.loop import to_uint8
from guidegen.sampling.sampler import Drawer, Tally
from guidegen.spec.cell import Cell


def draw(
    sampler: Drawer,
    cells: Sequence[Cell],
    run: Run,
    name_of: Callable[[Cell], str],
    batch_size: int,
    on_step: Callable[[int], None] | None = None,
    between: Callable[[], None] | None = None,
    tally: Tally | None = None,
    equal: EqualImages | None = None,
) -> Generator[tuple[Cell, Row], None, None]:
    """Draws and saves the cells, yielding each with its row once its image is on disk.

    Images are saved while the next batch is drawn. A batch that is out of memory is halved, and so are all
    after it; the calls of a single image are split in the end. A non-finite image is drawn again in fp32
    where it was not and memory allows, and else becomes a row, never a file. Cells that are the same image are
    drawn once and saved together, also those of other variants. Whatever ends the drawing, the rows of all that
    was saved come before it. Who leaves it half-way closes it (`contextlib.closing`) before the run.

    Args:
        sampler: the networks.
        cells: what to draw.
        run: where it goes.
        name_of: the name of a cell's label.
        batch_size: cells at once.
        on_step: called with the number of cells of the batch after each step.
        between: called between batches; what it raises ends the drawing with all before it saved.
        tally: counts the network calls.
        equal: which cells are the same image, of all that is drawn into the run; None: of these cells.
    """
    tally = tally or Tally()
    batches = _Batches(sampler, batch_size, on_step, tally)
    equal = equal or EqualImages(cells, {cell.variant: sampler.setup for cell in cells})
    first = equal.first(cells)
    start = 0
    with _Writer(run, name_of) as writer:
        try:
            while start < len(first):
                if between:
                    between()
                batch = first[start : start + batches.size]
                same = [equal.group(cell) for cell in batch]
                finished = batches.draw(batch, [len(group) for group in same])
                if finished is None:
                    continue
                start += len(batch)
                writer.put([_Job(group, *one) for group, one in zip(same, finished, strict=True)])
                yield from writer.written()
                writer.raise_error()
        except GeneratorExit:  # nobody takes rows any more
            raise
        except BaseException:
            writer.stop()
            yield from writer.written()
            raise
        writer.stop()
        yield from writer.written()
        writer.raise_error()


class _Finished(NamedTuple):
    """An image (H, W, C) uint8, None where it is not finite; its network calls; its dtype if not the run's."""

    pixels: Any
    calls: int
    dtype: str | None = None


@dataclass
class _Batches:
    """Draws batches of what fits into memory, and counts."""

    sampler: Drawer
    size: int
    on_step: Callable[[int], None] | None
    tally: Tally
    split: bool = False
    no_room: bool = False

    def draw(self, cells: Sequence[Cell], counts: Sequence[int]) -> list[_Finished] | None:
        """The images of a batch, each of which stands for so many cells; None if it has to be tried again, as a smaller one.

        Raises:
            GuidegenError: not even a single image fits into memory.
        """
        step = partial(self.on_step, sum(counts)) if self.on_step else None
        drawn = self._try(self.sampler, cells, self.split, step)
        if isinstance(drawn, str):
            self._shrink(len(cells), drawn)
            return None
        made = [_Finished(pixels, calls) for pixels, calls in drawn]
        if any(one.pixels is None for one in made) and (exact := self._exact()) is not None:
            self._again(exact, cells, made)
        return made

    def _exact(self) -> Drawer | None:
        """The networks in fp32; None where there are none, or no room for them beside those that draw."""
        if self.sampler.in_fp32 is None or self.no_room:
            return None
        try:
            return self.sampler.in_fp32()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self.no_room = True  # known without reading all the weights for each batch
        _free_memory(self.sampler.device)
        return None

    def _again(self, sampler: Drawer, cells: Sequence[Cell], made: list[_Finished]) -> None:
        """Draws what is not finite once more, in fp32; an image that does not fit so stays as it is."""
        bad = [i for i, one in enumerate(made) if one.pixels is None]
        size, split = len(bad), False
        while bad:
            some = bad[:size]
            drawn = self._try(sampler, [cells[i] for i in some], split)
            if not isinstance(drawn, str):
                for i, (pixels, calls) in zip(some, drawn, strict=True):
                    made[i] = _Finished(pixels, made[i].calls + calls, "fp32")
            elif len(some) > 1:
                size = len(some) // 2
                continue
            elif sampler.fixed_rows is None and not split:
                split = True
                continue
            bad = bad[size:]

    def _try(
        self, sampler: Drawer, cells: Sequence[Cell], split: bool, step: Callable[[], None] | None = None
    ) -> list[tuple[Any, int]] | str:
        """Pixels (None where not finite) and network calls of each cell; the message of the device where memory is short."""
        try:
            return self._pixels(replace(sampler, fixed_rows=1) if split else sampler, cells, step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        _free_memory(sampler.device)  # not before the block is left: the traceback holds the tensors of the batch
        return message

    def _pixels(self, sampler: Drawer, cells: Sequence[Cell], step: Callable[[], None] | None) -> list[tuple[Any, int]]:
        images, calls = sampler.draw(cells, step, self.tally)
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pixels = to_uint8(images).numpy()
        return [(image if good else None, n) for image, good, n in zip(pixels, finite, calls, strict=True)]

    def _shrink(self, cells: int, message: str) -> None:
        """Half the batch, or, of a single image, one network row at a time; an error where that is all."""
        sampler = self.sampler
        if sampler.in_fp32 and sampler.drop_fp32 and sampler.drop_fp32():  # room that nothing draws in now
            _free_memory(sampler.device)
        elif sampler.fixed_rows is not None and sampler.fixed_rows > 1:
            raise GuidegenError(
                f"{sampler.fixed_rows} rows do not fit into the memory of {sampler.device}: with --deterministic, "
                f"give a smaller --batch-size. ({message})"
            )
        elif cells > 1:
            self.size = min(self.size, cells // 2)
        elif sampler.fixed_rows is None and not self.split:
            self.split = True
        else:
            raise GuidegenError(f"Not even one image at a time fits into the memory of {sampler.device}. ({message})")


def _free_memory(device: torch.device) -> None:
    """Gives back to the device what no tensor holds any more."""
    gc.collect()  # tensors in cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class _Job(NamedTuple):
    cells: list[Cell]
    pixels: Any
    calls: int
    dtype: str | None


class _Writer:
    """Saves images in a thread of its own, in order, two batches behind the drawing at most.

    What goes wrong there is raised here, when the next batch is handed over or all is. Leaving the block
    waits for what was handed over, also when the drawing ended in an error or a signal.
    """

    def __init__(self, run: Run, name_of: Callable[[Cell], str]):
        self._run, self._name_of = run, name_of
        self._jobs: queue.Queue[list[_Job] | None] = queue.Queue(maxsize=1)
        self._rows: queue.SimpleQueue[tuple[Cell, Row]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="guidegen-writer", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def put(self, jobs: list[_Job]) -> None:
        """Hands over a batch, waiting while two are on their way."""
        self.raise_error()
        self._jobs.put(jobs)

    def written(self) -> Iterator[tuple[Cell, Row]]:
        """The rows that were written since the last call."""
        while not self._rows.empty():
            yield self._rows.get()

    def stop(self) -> None:
        """Waits until all that was handed over is written, or has failed."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def raise_error(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (jobs := self._jobs.get()) is not None:
            try:
                for job in jobs if self._error is None else ():
                    for cell in job.cells:
                        row = self._run.write(cell, job.pixels, self._name_of(cell), job.calls, job.dtype)
                        self._rows.put((cell, row))
            except BaseException as error:
                self._error = error
