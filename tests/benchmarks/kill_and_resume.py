"""A run that is killed at random moments and gone on with, against an undisturbed one.

    python tests/benchmarks/kill_and_resume.py [--kills 20] [--images 40] [--steps 30] [--limit] [--model DIR]

Each attempt is a process of its own that SIGKILL ends at a random moment, so that the attempts together take about
as long as the whole run. After each kill every row is checked against its image, and in the end every file against
the undisturbed run. With `--limit` the attempts are ended by a limit of file size instead, which stands for a disk
that is full.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import table
from table import Row

from guidegen.zoo import BUNDLED


def digests(folder: Path) -> dict[str, str]:
    """file -> sha256 of what is on disk."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("images/**/*.png"))
    }


def check(folder: Path) -> tuple[int, int]:
    """Whole rows, each of which has its image with its hash, and torn rows: one at the end is what a kill can leave."""
    manifest = folder / "manifest.jsonl"
    data = manifest.read_bytes() if manifest.exists() else b""
    whole, _, torn = data.rpartition(b"\n")
    rows = [json.loads(line) for line in whole.splitlines()]
    for row in rows:
        there = hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest()
        assert there == row["sha256"], f"{row['file']} is torn"
    assert len({row["file"] for row in rows}) == len(rows), "an image has two rows"
    return len(rows), bool(torn)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    chance = random.Random(options.seed)
    command = [sys.executable, "-m", "guidegen", "sample", "-m", options.model, "--label", "all"]
    command += ["--steps", str(options.steps), "--deterministic", "--batch-size", "2"]
    command += ["-n", str(options.images), "-q", "-o"]

    def small_files() -> None:
        if options.limit:
            size = chance.randrange(2_000, 20_000)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    with tempfile.TemporaryDirectory() as where:
        one = [word if word != str(options.images) else "1" for word in command]
        times = []
        for words in ([*one, f"{where}/one"], [*command, f"{where}/whole"]):
            start = time.perf_counter()
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        start_up, whole = times
        run, codes, torn = Path(where) / "run", [], 0
        for _ in range(options.kills):
            process = subprocess.Popen(
                [*command, str(run)], preexec_fn=small_files, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                drawing = 2 * (whole - start_up) / options.kills
                process.wait(None if options.limit else chance.uniform(0.5 * start_up, start_up + drawing))
            except subprocess.TimeoutExpired:
                process.kill()
            codes.append(process.wait())
            found, tail = check(run)
            torn += tail
        done = subprocess.run([*command, str(run)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found, tail = check(run)
        expected = digests(Path(where) / "whole")
        assert digests(run) == expected, "an image differs from the undisturbed run"
        assert (found, tail) == (len(expected), False)
        assert not [name for _, _, names in os.walk(run) for name in names if name.endswith(".part")]
    ends = f"{codes.count(-9)} ended by SIGKILL, {codes.count(74)} by a full disk, {codes.count(0)} at their end"
    yield Row(
        "images after kills and resumes",
        f"{found} as undisturbed",
        f"undisturbed: {len(expected)}",
        f"{found / len(expected):.2f}",
        "",
        f"{options.kills} attempts, {ends}; {torn} torn last rows dropped",
    )


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=15, help="of each label")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(BUNDLED))
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
