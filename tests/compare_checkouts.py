"""Draws the same from two checkouts on one machine and says where they differ: `python tests/compare_checkouts.py OLD NEW`.

Every mode x method x scheduler in fp32 with --deterministic, and a list of commands for the rest: exit codes, rows,
pixels, run.json, file names, `--dry-run --json`, and the flags of each command. Last bits differ between
processors, so no result is kept; words that were renamed on purpose are in `RENAMED`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RENAMED = {"auto": "autoguidance", "cheap": "detached"}
"""Values, old to new."""
_OWN = ("guidegen", "command", "versions", "options")  # of run.json: they differ by intent
_FLAG = re.compile(r"--[a-z][a-z-]*")
_SMALL = (
    "--label",
    "0,1",
    "-n",
    "2",
    "--w",
    "0,1,3",
    "--steps",
    "3",
    "--dtype",
    "fp32",
    "--deterministic",
    "--batch-size",
    "4",
)


def commands(methods: list[str], schedulers: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments) of all that is compared; the new words."""
    modes = {
        "cfg": [],
        "classifier": [],
        "both": ["--w-classifier", "0.5,2"],
        "none": [],
        "autoguidance": ["--guide-model", "pag"],
    }
    for mode, more in modes.items():
        small = [word for word in _SMALL if mode != "none" or word not in ("--w", "0,1,3")]
        for scheduler in schedulers:
            for method in methods if mode in ("cfg", "classifier", "both") else ["cfg"]:
                yield (
                    f"{mode} {method} {scheduler}",
                    ["sweep", "-m", "ckpt", "--mode", mode, "--guidance", method, "--scheduler", scheduler, *more, *small],
                )
    others = {
        "eta": ["--scheduler", "ddim", "--eta", "0.5"],
        "interval": ["--interval", "0.3:5"],
        "interval in steps": ["--interval", "0%:60%", "--guidance", "apg"],
        "schedule": ["--w-schedule", "cosine", "--guidance", "rescale"],
        "guiding model": ["--guide-model", "pag", "--w-guide", "0.5,2"],
        "skip": ["--guide-model", "skip"],
        "bundled": ["--mode", "autoguidance", "--guide-model", "ckpt/unet"],
        "mixture": ["--label", "0:2,1:-0.5"],
        "denoised": ["--mode", "classifier", "--classifier-input", "denoised"],
        "detached": ["--mode", "classifier", "--classifier-input", "denoised", "--classifier-gradient", "detached"],
        "two classifiers": ["--mode", "classifier", "-c", "ckpt/classifier", "-c", "other:0.5"],
        "by method": ["--by", "guidance=cfg,apg", "--by", "steps=2,3"],
        "by option": ["--guidance", "apg", "--by", "apg.eta=0,1", "--rows", "seed"],
        "by weights": ["--by", "guidance=cfg@3,apg@5"],
        "shard": ["--shard", "1/2"],
        "size": ["--size", "16"],
        "options": ["--guidance", "apg", "--guidance-opt", "eta=0.5", "--guidance-opt", "momentum=0"],
    }
    for name, more in others.items():
        small = list(_SMALL)
        if name == "by weights":
            del small[4:6]
        if any(word.startswith("steps=") for word in more):
            del small[small.index("--steps") : small.index("--steps") + 2]
        if "--label" in more:
            del small[:2]
        yield name, ["sweep", "-m", "ckpt", *small, *more]
    yield "one picture", ["sample", "--mode", "cfg", "--w", "3.0", "--label", "207", "--steps", "2"]
    yield "flow", ["sweep", "-m", "flow", *_SMALL]
    yield "dit", ["sweep", "-m", "dit", "--label", "0,207", *_SMALL[2:]]
    for family in ("text", "text-xl"):
        yield family, ["sweep", "-m", family, "--prompt", "a b", "--prompt", "c", *_SMALL[2:]]


def make_world(world: Path) -> None:
    """Checkpoints of several kinds, by the helpers of the suite."""
    from conftest import NAMES, save_pipeline, tiny_classifier, tiny_unet
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    from pipelines import dit, stable_diffusion, stable_diffusion_xl

    index = {"id2label": NAMES, "null_label": 5}
    scheduler = DDIMScheduler(clip_sample=False)
    save_pipeline(world / "ckpt", tiny_unet(num_class_embeds=6), scheduler, tiny_classifier(), **index)
    save_pipeline(world / "flow", tiny_unet(num_class_embeds=6), FlowMatchEulerDiscreteScheduler(), **index)
    tiny_classifier(seed=3).save_pretrained(world / "other")
    dit(world / "dit")
    stable_diffusion(world / "text")
    stable_diffusion_xl(world / "text-xl")


def record(world: Path, only: str) -> dict[str, Any]:
    """What the guidegen of this process makes of the commands with that word in their names: name -> what is compared."""
    from forked import import_everything, run

    import_everything()
    found: dict[str, Any] = {}
    top = run(["--help"], world).stdout
    for command in re.findall(r"^\W*([a-z]+) ", top, re.MULTILINE):
        text = run([command, "--help-all"], world)
        text = text if text.code == 0 else run([command, "--help"], world)
        if text.code == 0:
            found[f"flags of {command}"] = sorted({*_FLAG.findall(text.stdout)})
    probe = ["sample", "-m", "ckpt", "--label", "0", "--mode", "autoguidance", "--guide-model", "pag", "--dry-run"]
    new_words = run(probe, world).code == 0
    old = {new: old for old, new in RENAMED.items()}
    for number, (name, args) in enumerate(commands(*_names())):
        if only not in name:
            continue
        words = args if new_words else [old.get(word, word) for word in args]
        plan = run([*words, "--dry-run", "--json"], world)
        out = f"out{number}"
        done = run([*words, "-o", out, "--json", "-q"], world)
        found[name] = {
            "plan": _plan(plan.stdout) if plan.code == 0 else f"exit {plan.code}",
            "code": done.code,
            "error": done.stderr.strip().splitlines()[-1:] if done.code else [],
            "rows": _rows(done.stdout) if done.code == 0 else [],
            "files": _files(world / out) if done.code == 0 else [],
        }
    return found


def _names() -> tuple[list[str], list[str]]:
    """Methods and schedulers of this checkout, wherever they are."""
    tables = {}
    for name, places in {
        "METHODS": ("scores.methods",),
        "SCHEDULERS": ("sampling.schedulers", "schedulers", "sampling"),
    }.items():
        for place in places:
            with contextlib.suppress(ImportError, AttributeError):
                tables.setdefault(name, list(getattr(importlib.import_module(f"guidegen.{place}"), name)))
    return tables["METHODS"], tables["SCHEDULERS"]


def _rows(text: str) -> list[Any]:
    """The rows by their files, as the order in which images are finished may differ; what they gained is left out."""
    rows = [_renamed(json.loads(line)) for line in text.splitlines()]
    kept = [{key: value for key, value in row.items() if key not in ("type", "run")} for row in rows if "file" in row]
    return sorted(kept, key=lambda row: str(row["file"]))


def _plan(text: str) -> Any:
    plan = json.loads(text)
    return {key: value for key, value in plan.items() if key != "out"}  # the default name is a hash of all words


def _renamed(value: Any) -> Any:
    """With the new words; without hashes of files, which carry words, and without the folders of the two worlds."""
    if isinstance(value, dict):
        return {key: _renamed(each) for key, each in value.items() if key not in ("sha256", "path")}
    if isinstance(value, list):
        return [_renamed(each) for each in value]
    return RENAMED.get(value, value) if isinstance(value, str) else value


def _files(folder: Path) -> dict[str, Any]:
    """Each file of a run: pixels of pictures but for the grid, whose title has words; what run.json says."""
    from PIL import Image

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "run.json":
            about = json.loads(path.read_text())
            found[name] = _renamed({key: value for key, value in about.items() if key not in _OWN})
        elif path.suffix == ".png":
            with Image.open(path) as image:
                pixels = hashlib.sha256(image.tobytes()).hexdigest()
                found[name] = image.size if path.name.startswith("grid") else (image.size, image.mode, pixels)
        elif path.is_file() and not path.name.startswith("."):
            found[name] = None
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{at} / {key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{at} [{i}]")
    elif old != new:
        yield f"{at.strip(' /')}: {json.dumps(old)[:200]} -> {json.dumps(new)[:200]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path, metavar="OLD NEW")
    parser.add_argument("--only", default="", metavar="WORD", help="commands with this word in their names")
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.record:  # in a process of its own, whose PYTHONPATH names the checkout
        world, into = given.checkouts
        into.write_text(json.dumps(record(world, given.only)))
        return 0
    found = []
    with tempfile.TemporaryDirectory(prefix="guidegen-compare-") as name:
        for number, checkout in enumerate(given.checkouts):
            world = Path(name) / str(number) / "world"
            world.mkdir(parents=True)
            if number == 0:
                sys.path.insert(0, str(given.checkouts[1].resolve()))  # whose tests make the world
                make_world(world)
            else:
                for path in (Path(name) / "0" / "world").iterdir():
                    if not re.fullmatch(r"out\d+|guidegen-runs", path.name):
                        subprocess.run(["cp", "-a", str(path), str(world)], check=True)
            into = Path(name) / f"{number}.json"
            environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
            command = [sys.executable, __file__, "--record", "--only", given.only, str(world), str(into)]
            subprocess.run(command, check=True, env=environment)
            found.append(json.loads(into.read_text()))
    lines = list(differences(*found))
    refused = {name: each["error"] for name, each in found[1].items() if isinstance(each, dict) and each["code"]}
    print("\n".join([*lines, *(f"not drawn: {name}: {error}" for name, error in refused.items())]))
    drawn = sum(isinstance(each, dict) and each["code"] == 0 for each in found[1].values())
    print(f"{len(found[1])} compared, of which {drawn} drawn; {len(lines)} differences")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
