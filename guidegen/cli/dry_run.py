"""`--dry-run`: what a command would draw, and what that takes."""

from __future__ import annotations

from guidegen.cli import console
from guidegen.cli.lines import print_line
from guidegen.cli.resolve import Job
from guidegen.runs.directory import finished_before
from guidegen.spec.axes import describe
from guidegen.spec.cell import Cell


def _there(job: Job) -> list[Cell]:
    """The cells of which the run directory already has the image; refuses a directory of another run."""
    if job.output.is_file or job.output.to_stdout or job.flags.overwrite or job.output.folder is None:
        return []
    return finished_before(job.output.folder, job.settings, job.cells)


def print_costs(job: Job) -> None:
    """`--dry-run`: cells, network calls, bytes and pixels, on standard output."""
    channels, height, width = job.models.checkpoint.image_shape
    sizes = [job.pages.size(i) for i in range(len(job.pages.pages))] if job.pages else []
    count = len(job.cells)
    costs = [(some, setup.cost(some.groups())) for setup, some in job.by_variant(job.cells)]
    nfe = sum(cost for _, cost in costs)
    there = _there(job)
    variants = [{**dict(some[0].variant), "cells": len(some), "nfe": cost} for some, cost in costs if some[0].variant]
    totals = {
        "cells": count,
        "nfe": nfe,
        "bytes": count * channels * height * width,
        "grid_pixels": sum(w * h for w, h in sizes),
        "grid_pages": len(sizes),
        "there": len(there),
        "nfe_left": nfe - sum(job.setups[cell.variant].calls(cell) for cell in there),
        "out": str(job.output.path),
    } | ({"variants": variants} if variants else {})
    if job.flags.json_rows:
        print_line("plan", job.output.path, job.output.folder, totals)
        return
    console.result(f"{count:,} images of {width}x{height}, {totals['bytes']:,} bytes of pixels before compression")
    console.result(f"{nfe:,} network calls (NFE), {nfe / max(1, count):g} an image on average")
    if there:
        left = f"{count - len(there):,} are left, {totals['nfe_left']:,} calls"
        console.result(f"{len(there):,} of them are there already; {left}")
    for some, calls in costs if variants else ():
        what = describe(*zip(*some[0].variant, strict=True))
        console.result(f"  {what}: {len(some):,} images, {calls:,} calls, {calls / len(some):g} an image")
    if sizes:
        console.result(f"grid of {totals['grid_pixels']:,} pixels: {', '.join(f'{w}x{h}' for w, h in sizes)}")
    console.result(f"into {job.output.path}")
