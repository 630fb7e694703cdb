"""The main job and its parts: where `guidegen sample --mode cfg --w 3.0 --label 207` spends its time.

The whole command runs from nothing, as a person starts it; the parts come from as many processes more, in which the
functions that make them up are timed.

python tests/benchmarks/main_job.py [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def seconds(command: list[str], threads: int) -> tuple[float, str]:
    """Wall-clock time of a process in an empty folder, and what it wrote to standard output."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        took = time.perf_counter() - start
        if done.returncode or not done.stdout:
            sys.exit(done.stderr)
        return took, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    here = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import main_job"
    child = [sys.executable, "-c", f"{here}; print('\\n' + json.dumps(main_job.timed()))"]
    whole, parts, rests = [], [], []
    for _ in range(options.repeats):
        whole.append(seconds([sys.executable, "-m", "guidegen", *JOB.split()], options.threads)[0])
        took, said = seconds(child, options.threads)
        parts.append(json.loads(said.splitlines()[-1]))
        rests.append(took - sum(parts[-1].values()))
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"guidegen {JOB}, {options.threads} threads, {options.repeats} times; load of the machine {load}")
    print("part                    seconds: median (min-max)")
    lines = {"whole command": whole, **{part: [each[part] for each in parts] for part in PARTS}}
    for name, values in {**lines, "interpreter and rest": rests}.items():
        print(f"{name:<22}  {statistics.median(values):6.2f} ({min(values):.2f}-{max(values):.2f})")


if __name__ == "__main__":
    main()
