"""`--dry-run`: what a command would draw, what that takes, and what it would be refused for."""

from __future__ import annotations

from typing import Any

from guidegen.cli import console
from guidegen.cli.lines import print_line
from guidegen.cli.ls import UNITS
from guidegen.cli.output import already_there
from guidegen.cli.resolve import Job
from guidegen.cli.weights import are_local, check_whole, with_hashes, without_weights
from guidegen.runs.directory import finished_before
from guidegen.spec.axes import describe
from guidegen.spec.cell import Cell


def _there(job: Job) -> tuple[int, int]:
    """How many of the images are there already, and the network calls behind them; refuses what drawing refuses."""
    output, flags = job.output, job.flags
    if are_local(job):
        absent = without_weights(job)
        if absent and not flags.quiet:
            console.note(f"note: there are no weights in {absent[0]}, without which nothing is drawn")
        if output.path.exists() and not flags.overwrite:
            job = with_hashes(job)
        else:
            check_whole(job, absent)
    if output.is_file and already_there(output, job.metadata, flags.overwrite):
        return len(job.cells), sum(setup.cost(some.groups()) for setup, some in job.by_variant(job.cells))
    if output.folder is None:
        return 0, 0
    there = finished_before(output.folder, job.settings, job.plan, job.variants, flags.overwrite, job.shard, flags.wait)
    return len(there), sum(_calls(job, cell) for cell in there)


def _calls(job: Job, cell: Cell) -> int:
    return job.setups[cell.variant].calls(cell)


def _seconds(job: Job, calls: int, images: int) -> dict[str, Any]:
    """How long so many calls take, as far as it was measured on this machine."""
    from guidegen.sampling.device import pick_batch_size
    from guidegen.sampling.timings import known_seconds

    size = pick_batch_size(job.flags.batch_size, job.device, job.models.checkpoint.image_shape)
    known = known_seconds(job.settings, job.device, job.flags.compile_networks, min(size, max(1, images)))
    each, batch = known or (None, None)
    return {"seconds_a_call": each, "seconds_left": None if each is None else each * calls, "measured_batch": batch}


def print_costs(job: Job) -> None:
    """`--dry-run`: cells, network calls, time, bytes and pixels, on standard output."""
    channels, height, width = job.models.checkpoint.image_shape
    sizes = [job.pages.size(i) for i in range(len(job.pages.pages))] if job.pages else []
    count = len(job.cells)
    costs = [(some, setup.cost(some.groups())) for setup, some in job.by_variant(job.cells)]
    nfe = sum(cost for _, cost in costs)
    there, spent = _there(job)
    variants = [{**dict(some[0].variant), "cells": len(some), "nfe": cost} for some, cost in costs if some[0].variant]
    totals = {
        "cells": count,
        "nfe": nfe,
        "bytes": count * channels * height * width,
        "grid_pixels": sum(w * h for w, h in sizes),
        "grid_pages": len(sizes),
        "there": there,
        "nfe_left": nfe - spent,
        **_seconds(job, nfe - spent, count - there),
        "out": str(job.output.path),
    } | ({"variants": variants} if variants else {})
    if job.flags.json_rows:
        print_line("plan", job.output.path, job.output.folder, totals)
        return
    console.result(f"{count:,} images of {width}x{height}, {totals['bytes']:,} bytes of pixels before compression")
    console.result(f"{nfe:,} network calls (NFE), {nfe / max(1, count):g} an image on average")
    if there:
        console.result(f"{there:,} of them are there already; {count - there:,} are left, {totals['nfe_left']:,} calls")
    console.result(_time_in_words(totals))
    for some, calls in costs if variants else ():
        what = describe(*zip(*some[0].variant, strict=True))
        console.result(f"  {what}: {len(some):,} images, {calls:,} calls, {calls / len(some):g} an image")
    if sizes:
        console.result(f"grid of {totals['grid_pixels']:,} pixels: {', '.join(f'{w}x{h}' for w, h in sizes)}")
    console.result(f"into {job.output.path}")


def _time_in_words(totals: dict[str, Any]) -> str:
    seconds = totals["seconds_left"]
    if seconds is None:
        return "time: not known, as nothing like it was drawn on this machine before"
    unit, length = next((each for each in UNITS if seconds >= 2 * each[1]), UNITS[-1])
    batches = f"as measured here in batches of {totals['measured_batch']:,}"
    return f"time: about {seconds / length:,.3g} {unit}s, {totals['seconds_a_call']:.2g} s a call {batches}"
