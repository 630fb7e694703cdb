"""All benchmarks that run on any machine, one after the other, in one table.

python -m tests.benchmarks [--quick] [--only NAME ...] [--clone DIR] [--reference FILE]

Each script runs in a process of its own, its threads asleep at barriers as those of the commands are. `adm_sampler`
needs --clone, a folder with github.com/openai/guided-diffusion, and `tune_against_grid` --reference, images to compare
with; without, they are left out. gpu.py has tables of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import table

SCRIPTS = {
    "cold_start": ("--repeats 9", "--repeats 3"),
    "crowd": ("--repeats 5", "--repeats 2"),
    "quota": ("--repeats 5", "--repeats 2"),
    "sweep_against_loop": ("--pairs 5", "--pairs 2 --labels 2 --seeds 2"),
    "loop_overhead": ("--pairs 7", "--pairs 3 --batch 4"),
    "scaling": ("--pairs 3", "--pairs 2 --steps 2"),
    "writer": ("--repeats 5", "--repeats 3"),
    "memory": ("", "--images 100,400"),
    "compiled": ("", "--batch 4 --dtype fp32"),
    "adm_sampler": ("--pairs 5", "--pairs 3 --steps 5"),
    "kill_and_resume": ("", "--kills 5 --images 5"),
    "tune_known_optimum": ("", "--runs 5"),
    "tune_against_grid": ("", "--num 5 --budget 600"),
}
"""Of each script its arguments, and those of --quick."""


def rows_of(name: str, words: list[str]) -> int:
    """Prints the rows of a script as it prints them; its exit code."""
    folder = Path(__file__).parent
    paths = os.pathsep.join(filter(None, (str(folder.parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, str(folder / f"{name}.py"), *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("|") and line.strip() not in map(str, table.HEAD):
                print(line, end="", flush=True)
    return process.returncode


def main() -> None:
    parser = table.parser(__doc__)
    parser.prog = "python -m tests.benchmarks"
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--clone", help="a folder with guided-diffusion")
    parser.add_argument("--reference", help="what `guidegen tune --reference` takes")
    options = parser.parse_args()
    given = {
        "adm_sampler": options.clone and [options.clone],
        "tune_against_grid": options.reference and ["--reference", options.reference],
    }
    names = options.only or [name for name in SCRIPTS if given.get(name, True)]
    if missing := [name for name in names if not given.get(name, True)]:
        parser.error(f"{missing[0]} needs {'--clone' if missing[0] == 'adm_sampler' else '--reference'}")
    table.show(())
    failed = [name for name in names if rows_of(name, (given.get(name) or []) + SCRIPTS[name][options.quick].split())]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
