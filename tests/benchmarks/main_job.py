"""The main job and its parts: where `guidegen sample --mode cfg --w 3.0 --label 207` spends its time.

Whole processes from nothing, in each of which the functions that make up the parts are timed.

python tests/benchmarks/main_job.py [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import table
from processes import run
from table import Row, paired

JOB = "sample --mode cfg --w 3.0 --label 207"
PARTS = ("imports", "loading", "sampling", "writing")


def timed() -> dict[str, float]:
    """Runs the job in this process; seconds of each part. To be called in a fresh interpreter."""
    spent = dict.fromkeys(PARTS, 0.0)

    def clock(owner: Any, name: str, part: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args: Any, **given: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **given)
            finally:
                spent[part] += time.perf_counter() - start

        setattr(owner, name, wrapped)

    start = time.perf_counter()
    from diffusers import DDIMScheduler, UNet2DModel  # noqa: F401

    from guidegen.cli import app, drawing
    from guidegen.models import loading  # noqa: F401
    from guidegen.runs import directory as run
    from guidegen.sampling import sampler

    spent["imports"] = time.perf_counter() - start
    clock(drawing, "with_hashes", "loading")  # looks for them and hashes them
    clock(sampler.Samplers, "__init__", "loading")
    clock(sampler.Sampler, "draw", "sampling")
    clock(run.Run, "write", "writing")
    app(JOB.split(), standalone_mode=False)
    return spent


def rows(options: argparse.Namespace) -> Iterator[Row]:
    here = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import main_job"
    child = [sys.executable, "-c", f"{here}; main_job.keep(main_job.timed(), sys.argv[1])"]
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    wholes, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "parts.json"
        for _ in range(options.repeats):
            wholes.append(run([*child, str(kept)], environment).wall)
            parts.append(json.loads(kept.read_text()))
            parts[-1]["interpreter and rest"] = wholes[-1] - sum(parts[-1].values())
    for part in parts[0]:
        pairs = [(found[part], whole) for found, whole in zip(parts, wholes, strict=True)]
        yield paired(f"the main job: {part}", pairs, "all of it", f"{options.threads} threads")


def keep(found: dict[str, float], path: str) -> None:
    """For the process that asked."""
    Path(path).write_text(json.dumps(found))


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
