"""Runs the README from top to bottom in a new environment: `python tests/run_readme.py [--installed]`.

The first install command runs as it stands, in a clone of the repository; then every command line, in one folder, in the
order of the page. Checkpoints that the README names by a hub id or as DIR are small ones, made here, counts above nine
images are one image, and the budget of a search is 400. Prints a line a command: exit code, seconds, the command.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^ {4}(\$ )?(guidegen .*)$", re.MULTILINE)


def readme_commands() -> list[str]:
    """The command lines of the README that start with guidegen, without the remarks beside them."""
    return [re.split(r"\s{3,}", line)[0] for _, line in COMMAND.findall(README)]


def transcript() -> list[tuple[str, list[str]]]:
    """The commands that are shown with `$` before them, and the lines below each."""
    shown = re.findall(r"^ {4}\$ (guidegen .*)\n((?: {4}(?!\$).*\n)*)", README, re.MULTILINE)
    return [(command, [line[4:] for line in below.splitlines()]) for command, below in shown]


def make_stand_ins(folder: Path) -> dict[str, Path]:
    """Small checkpoints and files for what the README names but a machine need not have."""
    from conftest import NAMES, save_pipeline, tiny_unet
    from diffusers import DDIMScheduler
    from pipelines import clip, stable_diffusion

    unet = save_pipeline(folder / "unet", tiny_unet(num_class_embeds=6), DDIMScheduler(clip_sample=False), id2label=NAMES)
    return {
        "owner/name@revision": unet,
        "owner/stable-diffusion": stable_diffusion(folder / "sd"),
        "owner/clip": clip(folder / "clip"),
        "other/clip": folder / "clip",
        "-m DIR": folder / "sd",
        "inspect DIR": unet,
        "-c DIR": ROOT / "guidegen" / "zoo" / "imagenet20-32" / "classifier",
    }


def stood_in(line: str, stand_ins: dict[str, Path], run: Path, reference: Path) -> str | None:
    """The command line with paths for names; None for one that needs what only its reader has."""
    if re.match(r"guidegen (convert|submit)|.*(--shard auto|-m edm2|--protocol)", line):
        return None
    for name, path in (stand_ins | {"RUN": run, "photographs.parquet": reference}).items():
        *before, _ = name.split()
        line = re.sub(rf"(?<![\w/]){re.escape(name)}(?![\w/])", " ".join([*before, str(path)]), line)
    line = re.sub(r"--label all (--by .*) --budget \d+", r"--label 145,207 \1 --budget 400 --steps 4", line)
    return re.sub(r"(-n|--num) [1-9]\d+", r"\1 1", line)


def install(folder: Path, torch: str | None) -> Path:
    """The environment that the first command of the README makes in a clone; returns its bin."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    if torch:
        first = f"python3 -m venv .venv && .venv/bin/pip install --quiet {torch}"
        subprocess.run(["bash", "-c", first], cwd=folder / "clone", check=True)
    (command,) = re.findall(r"^ {4}(python3 -m venv .*207)$", README, re.MULTILINE)
    subprocess.run(["bash", "-c", f"set -e; {command}"], cwd=folder / "clone", check=True)
    extras = f"{folder}/clone/.venv/bin/python -m pip install --quiet '{folder}/clone[evaluate,preview,tune]'"
    subprocess.run(["bash", "-c", extras], check=True)
    return folder / "clone" / ".venv" / "bin"


def shell(line: str, folder: Path, path: str) -> tuple[int, float]:
    start = time.perf_counter()
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    if done.returncode and "error:" not in done.stderr:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--installed", action="store_true", help="use the guidegen of this Python")
    parser.add_argument("--torch", help="what to install first, such as a build without CUDA: torch==2.13.0")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="readme-"))
    programs = Path(sys.executable).parent if given.installed else install(folder, given.torch)
    stubs = folder / "stubs"
    stubs.mkdir()
    for name in ("display", "jq"):
        if not shutil.which(name):
            (stubs / name).write_text("#!/bin/sh\ncat > /dev/null\n")
            (stubs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}:{stubs}"
    stand_ins = make_stand_ins(folder)
    run, reference = folder / "measured", folder / "photographs.npz"
    for line in (
        f"guidegen sweep --label 145,207 -w 0,1,3 -n 4 --steps 4 -o {run}",
        f"guidegen sample --label 145,207 -w 2 -n 6 --steps 4 --seed 90 -o {reference}",
    ):
        assert shell(line, folder, path)[0] == 0, line
    wrong = 0
    for written in readme_commands():
        line = stood_in(written, stand_ins, run, reference)
        if line is None:
            print(f"  -          {written}")
            continue
        code, seconds = shell(line.replace("--open", ""), folder, path)
        wrong += code != (2 if "--label king" in written and "king penguin" not in written else 0)
        print(f"{code:3} {seconds:6.1f} s  {written}", flush=True)
        if "--shard 0/4" in line:  # the other machines of the page
            wrong += any(shell(line.replace("0/4", f"{shard}/4"), folder, path)[0] for shard in (1, 2, 3))
    shutil.rmtree(folder)
    return wrong


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main())
