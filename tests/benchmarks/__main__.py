"""All benchmarks that run on any machine, one after the other, each with its table.

python -m tests.benchmarks [--quick] [--clone DIR] [--only NAME ...]

With --clone, a folder with github.com/openai/guided-diffusion, also the comparison with its sampler.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

SCRIPTS = {
    "cold_start": (["--repeats", "9"], ["--repeats", "3"]),
    "crowd": (["--repeats", "5"], ["--repeats", "2"]),
    "sweep_against_loop": (["--pairs", "5"], ["--pairs", "2", "--labels", "2", "--seeds", "2"]),
    "loop_overhead": (["--pairs", "7"], ["--pairs", "3", "--batch", "4"]),
    "start_up": (["--repeats", "5"], ["--repeats", "2"]),
    "scaling": ([], ["--steps", "2"]),
    "writer": ([], []),
    "compiled": ([], ["--batch", "4", "--steps", "2"]),
    "adm_sampler": (["--pairs", "5"], ["--pairs", "2", "--batch", "1", "--steps", "5"]),
}
"""Of each script its arguments, and those of --quick."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--clone", help="a folder with guided-diffusion")
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS))
    options = parser.parse_args()
    folder = Path(__file__).parent
    root = str(folder.parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    load = os.getloadavg()[0]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}"
    )
    failed = []
    for name in options.only:
        if name == "adm_sampler" and not options.clone:
            continue
        given = [options.clone] if name == "adm_sampler" else []
        print(f"\n**{name}.py**\n", flush=True)
        command = [sys.executable, str(folder / f"{name}.py"), *given, *SCRIPTS[name][options.quick]]
        if subprocess.run(command, env=environment).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
