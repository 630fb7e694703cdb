"""Hostile inputs by the hundred: `python tests/fuzz.py --count 2000 --seed 1`; exit 1 if any broke the contract.

Each case is one command in a process of its own over a small world of good files, one of which is
spoilt, or with flags from a list of odd ones. The oracle is the command line's contract: an exit code of
its table other than 1, no traceback, no "Unexpected", at most a few lines of error without control
characters, JSON lines where JSON was asked for, an answer within 60 seconds and 3 GiB more than the
imports take, and nothing changed outside the run. `--only N` runs case N alone and shows all of it.

Each case is forked from this process, see `forked`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import Outcome, import_everything, run

SECONDS = 60
BYTES = 3 << 30
CODES = {0, 2, 3, 4, 5, 74, 75, 130, 143}
LINES_OF_ERROR = 60


@dataclass
class Case:
    """One command.

    Attributes:
        args: of guidegen.
        told: what was spoilt.
        stdin: bytes of standard input.
    """

    args: list[str]
    told: str = ""
    stdin: bytes = b""


# ---------------------------------------------------------------- what is odd

TEXTS = [
    "",
    " ",
    "\0",
    "\x1b[31mred",
    "../../outside/canary",
    "/etc/passwd",
    "a\nb",
    "１",
    "NaN",
    "-",
    "@",
    "🦊" * 9,
    "\u202e",
    "%s{}",
    "x" * 5000,
]
NUMBERS: list[Any] = [0, -1, 1, True, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.0, 1e308, 1e-320]
OTHERS: list[Any] = [None, [], {}, [[]], [1, "a"], {"a": 1}, [None] * 1000, {"$ref": "#"}]
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "[" * 5000 + "]" * 5000, "9" * 5000, '"\\ud800"', "tru", "'single'"]
WORDS = {"<empty>": "", "<digits>": "1" * 5000, "<long>": "x" * 300, "<commas>": "," * 1000}
ODD_FLAGS = {
    "--w": "<empty> | nan | inf | -inf | 1e400 | 0,1,2 | 0:1:0 | 0:1e9:1e-9 | 3:1:1 | 1_0 | -- | １ | 0x1 | <digits> | ,",
    "--label": (
        "<empty> | all | 207 | goldfish | 99999 | -1 | 0-999999999 | 5-1 | @/dev/zero | @. | @missing | @labels.txt | "
        "- | 207:1,281:-1 | 207:nan | 207:1e400,281:1 | \x1b[31m | <digits> | 207,207 | @fifo | a:b:c | 207:0,281:0 "
    ),
    "--num": "0 | -1 | 1 | 1000000000 | 99999999999999999999 | 1.5 | <empty> | １",
    "--seed": "-1 | 0 | 18446744073709551616 | 9223372036854775807 | x | <empty>",
    "--seeds": "<empty> | 0-999999999 | 5-1 | 0,0,0 | 9223372036854775808 | a-b | 0-1,0-1 | <commas> | <digits>",
    "--mode": "cfg | classifier | both | none | auto | autoguidance | <empty> | CFG | \x1b",
    "--steps": "0 | -1 | 1 | 2 | 1001 | 1000000000 | 1.5",
    "--scheduler": (
        "ddim | ddpm | dpm++ | unipc | euler | heun | <empty> | os.system | DDIMScheduler | VQDiffusionScheduler | "
        "KDPM2DiscreteScheduler | PNDMScheduler | LMSDiscreteScheduler | FlowMatchEulerDiscreteScheduler | "
        "SchedulerMixin | __class__ | DPMSolverSDEScheduler "
    ),
    "--eta": "0 | 1 | -1 | nan | 2 | inf | 0.5",
    "--guidance": (
        "cfg | apg | cfg++ | rescale | <empty> | frequency | nope | odd.py:f | odd.py:missing | missing.py:f | __main__:x "
    ),
    "--guidance-opt": "eta=0 | eta=nan | = | <empty> | nope=1 | eta | eta=1e400 | phi=2 | space=elsewhere | momentum=1e30",
    "--interval": "0.3:5 | <empty> | : | 5:0.3 | nan:1 | 0%:100% | 10%:5 | 0:inf | 50%:51% | -1:1 | 1e999:2",
    "--w-schedule": (
        "v | linear | <empty> | nope | beta:0,0 | beta:2,2 | inverse- | beta:1e308,1e308 | clamp-linear:x | inverse-cosine "
    ),
    "--w-guide": "1 | 0 | 2 | nan | <empty>",
    "--w-classifier": "1 | 0 | nan | -3 | <empty>",
    "--guide-model": "bundled | pag | skip | skip:nope | <empty> | ckpt | /dev/null | pag:mid_block | odd.py:M",
    "--classifier": (
        "ckpt/classifier | <empty> | missing | ckpt:0 | ckpt/classifier:nan | ckpt/classifier:2 | odd.py:C | /dev/zero "
    ),
    "--classifier-input": "noisy | denoised | x",
    "--classifier-gradient": "exact | detached | detached | <empty>",
    "--null-label": "5 | -1 | 99999999999 | x",
    "--size": "8 | 0 | 8x8 | 1000000000 | 7 | x | <empty> | 16x8x4 | -8 | １６",
    "--dtype": "auto | fp32 | bf16 | fp16 | fp8",
    "--device": "cpu | cuda | cuda:99 | meta | <empty> | cpu:7 | xpu",
    "--batch-size": "auto | 1 | 0 | -1 | 3 | 1000000000 | x | <empty>",
    "--shard": "0/2 | 2/2 | auto | -1/2 | 0/0 | <empty> | 1/99999999999 | a/b",
    "--by": (
        "steps=1,2 | guidance=cfg,apg | eta=0,1 | nope=1 | steps= | = | steps=1:1000000000:1 | apg.eta=0,1 | "
        "guidance=cfg@1,apg@2 | w=1 "
    ),
    "--columns": "w | seed | <empty> | nope | label,seed | w,w",
    "--rows": "label | <empty> | nope",
    "--negative-prompt": "x | <empty>",
    "--prompt": "a fox | <empty> | - | @labels.txt | a AND b:0.5",
    "--variant": "fp16 | <empty> | ../x",
    "-o": (
        "out | x.png | x.jpg | x.npz | x.webp | x.gif | - | <empty> | run | ckpt | labels.txt | /dev/null | /dev/full "
        "| /proc/x | no/such/dir | <long> | out\x1b[31m "
    ),
    "-m": "ckpt | <empty> | missing | owner/name | labels.txt | . | odd.py:M | odd.py:f | /dev/zero | a/b@c | ckpt/unet",
}
"""Flag -> values, between bars; words of `WORDS` stand for what would not show."""
BARE_FLAGS = [
    "--dry-run",
    "--json",
    "--quiet",
    "--overwrite",
    "--deterministic",
    "--offline",
    "--verbose",
    "--report",
    "--preview",
]
ODD_PYTHON = [
    "M = 3\nC = None\ndef f(u, c, w, step): return u",
    "raise SystemExit(0)",
    "import sys; sys.exit('gone')",
    "def f(:",
    "raise KeyboardInterrupt",
    "def f(): f()\nf()",
    "def f(u, c, w, step): return None",
    "def f(u, c, w, step): raise RuntimeError('\\x1b[31m')",
    "def f(u, c, w, step): return u[0]",
    "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
    "def f(u, c, w, step): return c",
    "import guidegen\nM = guidegen.Model(load=lambda d: 1/0, shape=(3, 8, 8), scheduler={'_class_name': 'DDIMScheduler'})",
    "import guidegen\nM = guidegen.Model(load=lambda d: exit(0), shape=(3, 8, 8), scheduler={})",
    "import guidegen\nM = guidegen.Model(load=None, shape=(0, -8), scheduler=None, labels=[1], steps='x')",
]


def spoil_json(rng: random.Random, text: str) -> str:
    """JSON with one place of it replaced, dropped or broken."""
    data = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(data)
    if not places:
        return rng.choice(LITERALS)
    node, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del node[key]
        return json.dumps(data)
    mark = "\ue000odd\ue000"
    node[key] = mark
    odd = rng.choice(LITERALS) if how < 0.4 else json.dumps(rng.choice([*TEXTS, *NUMBERS, *OTHERS]))
    return json.dumps(data, ensure_ascii=False).replace(json.dumps(mark, ensure_ascii=False), odd, 1)


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut short, a byte changed, something in the midst, or nothing left."""
    at = rng.randrange(len(data) + 1)
    return rng.choice(
        [
            data[:at],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data[:at] + rng.randbytes(40) + data[at:],
            data[:at] + b"\0" + data[at:],
            b"\xef\xbb\xbf" + data,
            b"",
            data + data,
            b"\xff" * 64,
            (2**62).to_bytes(8, "little") + data[8:],
        ]
    )


def spoil_file(rng: random.Random, path: Path) -> str:
    """Spoils a file in place; says how."""
    how = rng.random()
    if how < 0.65 and path.suffix in (".json", ".jsonl") and path.is_file():
        lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
        which = rng.randrange(max(1, len(lines) - 1))
        with contextlib.suppress(ValueError):
            lines[which] = spoil_json(rng, lines[which])
        path.write_text("\n".join(lines), errors="surrogatepass")
        return "JSON"
    if how < 0.85:
        path.write_bytes(spoil_bytes(rng, path.read_bytes()))
        return "bytes"
    path.unlink()
    kind = rng.choice(["gone", "directory", "fifo", "dangling", "zero", "loop", "outside", "unreadable"])
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "unreadable":
            path.write_bytes(b"")
            path.chmod(0)
        case "dangling" | "zero" | "loop" | "outside":
            path.symlink_to(
                {"dangling": "nothing", "zero": "/dev/zero", "loop": path.name, "outside": "/etc/hostname"}[kind]
            )
    return kind


# ---------------------------------------------------------------- the world

LABELS = "0\n1\n"


def make_world(folder: Path) -> None:
    """Good files: a checkpoint with a classifier, a run with metrics, real images, a list of labels."""
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import NAMES, save_pipeline, tiny_classifier, tiny_unet
    from diffusers import DDIMScheduler

    world = folder / "world"
    world.mkdir()
    (folder / "outside").mkdir()
    (folder / "outside" / "canary").write_text("here")
    index = {"id2label": NAMES, "null_label": 5, "default_steps": 2}
    scheduler = DDIMScheduler(clip_sample=False)
    save_pipeline(world / "ckpt", tiny_unet(num_class_embeds=6), scheduler, tiny_classifier(), **index)
    (world / "labels.txt").write_text(LABELS)
    (world / "odd.py").write_text(ODD_PYTHON[0])
    commands = [
        ["sweep", "-m", "ckpt", "--w", "0,1,3", "--label", "0-1", "-n", "4", "-o", "run"],
        ["sample", "-m", "ckpt", "--label", "0-1", "-n", "8", "-o", "real"],
        [
            "evaluate",
            "run",
            "--reference",
            "real",
            "--features",
            "ckpt/classifier",
            "--judge",
            "ckpt/classifier",
            "--no-curves",
        ],
        ["sample", "-m", "ckpt", "--label", "0-1", "-n", "8", "-o", "real.npz"],
    ]
    for args in commands:
        done = run(args, world)
        assert done.code == 0, done.stderr


def case_of(rng: random.Random, world: Path) -> Case:
    """One case, its files spoilt in `world`."""
    return rng.choice([flags, flags, a_run, a_run, a_checkpoint, a_checkpoint, inputs, custom])(rng, world)


def flags(rng: random.Random, world: Path) -> Case:
    command = rng.choice(["sample", "sweep"])
    args = [command, "-m", "ckpt", "--label", "0"] if rng.random() < 0.8 else [command]
    for name in rng.sample(sorted(ODD_FLAGS), rng.randint(1, 4)):
        value = rng.choice(ODD_FLAGS[name].split("|")).strip()
        args += [name, WORDS.get(value, value)]
    if {"1000000000", "0-999999999"} & {*args}:
        args += ["--dry-run"]
    if "--steps" not in args:
        args += ["--steps", "2"]
    args += rng.sample(BARE_FLAGS, rng.randint(0, 2))
    return Case(args, stdin=rng.choice([b"", b"0\n1\n", b"\0\xff\x1b", b"0" * 100_000, b"\n" * 1000]))


AFTER = [
    ["verify", "run"],
    ["verify", "run", "--json"],
    ["merge", "run", "--npz"],
    ["merge", "run", "--tar", "--json"],
    ["grid", "run"],
    ["grid", "run", "--columns", "seed", "--metric", "frechet_distance"],
    ["report", "run", "-o", "report.html"],
    ["evaluate", "run", "--reference", "real", "--features", "ckpt/classifier", "--judge", "ckpt/classifier", "--no-curves"],
    ["sweep", "-m", "ckpt", "--w", "0,1,3", "--label", "0-1", "-n", "4", "-o", "run", "--json"],
    ["sweep", "-m", "ckpt", "--w", "0,1,3", "--label", "0-1", "-n", "4", "-o", "run", "--overwrite"],
    ["sweep", "-m", "ckpt", "--w", "0,1,3", "--label", "0-1", "-n", "4", "-o", "run", "--shard", "0/2"],
]


def a_run(rng: random.Random, world: Path) -> Case:
    files = sorted(path for path in (world / "run").rglob("*") if path.is_file() and not path.name.startswith("."))
    told = rng.choice([path for path in files if path.suffix in (".json", ".jsonl")] * 3 + files)
    return Case(list(rng.choice(AFTER)), f"{told.relative_to(world)}: {spoil_file(rng, told)}")


def a_checkpoint(rng: random.Random, world: Path) -> Case:
    files = sorted(path for path in (world / "ckpt").rglob("*") if path.is_file())
    told = rng.choice([path for path in files if path.suffix == ".json"] * 3 + files)
    args = rng.choice(
        [
            ["inspect", "ckpt"],
            ["inspect", "ckpt", "--json"],
            ["labels", "-m", "ckpt"],
            ["sample", "-m", "ckpt", "--label", "0", "-o", "out", "--dry-run"],
            ["sample", "-m", "ckpt", "--label", "0", "-o", "out", "--json"],
            ["sample", "-m", "ckpt", "--mode", "classifier", "--label", "0", "-o", "x.png"],
            ["sample", "-m", "ckpt", "--mode", "classifier", "--classifier-input", "denoised", "--label", "0", "-o", "out"],
            ["sample", "-m", "ckpt", "--label", "0", "--guide-model", "ckpt/unet", "-o", "out"],
        ]
    )
    return Case(args, f"{told.relative_to(world)}: {spoil_file(rng, told)}")


def inputs(rng: random.Random, world: Path) -> Case:
    measure = [
        "evaluate",
        "run",
        "--features",
        "ckpt/classifier",
        "--judge",
        "ckpt/classifier",
        "--no-curves",
        "--reference",
    ]
    photographs = sorted((world / "real" / "images").rglob("*.png"))
    told, args = rng.choice(
        [
            (world / "labels.txt", ["sample", "-m", "ckpt", "--label", "@labels.txt", "-o", "out"]),
            (world / "real.npz", [*measure, "real.npz"]),
            (rng.choice(photographs), [*measure, "real/images", "--reference-labels", "all"]),
            (world / "real.npz", ["sample", "-m", "ckpt", "--label", "0-1", "-n", "8", "-o", "real.npz"]),
        ]
    )
    return Case(args, f"{told.relative_to(world)}: {spoil_file(rng, told)}")


def custom(rng: random.Random, world: Path) -> Case:
    (world / "odd.py").write_text(rng.choice(ODD_PYTHON))
    args = rng.choice(
        [
            ["sample", "-m", "odd.py:M", "-o", "out"],
            ["sample", "-m", "ckpt", "--label", "0", "--guidance", "odd.py:f", "-o", "out", "--json"],
            ["sample", "-m", "ckpt", "--label", "0", "--mode", "classifier", "-c", "odd.py:C", "-o", "out"],
            ["sweep", "-m", "ckpt", "--label", "0", "--by", "guidance=cfg,odd.py:f", "-o", "out"],
        ]
    )
    return Case(args, (world / "odd.py").read_text())


# ---------------------------------------------------------------- judging


def faults(case: Case, done: Outcome, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """What of the contract does not hold."""
    error = done.stderr
    if done.seconds >= SECONDS:
        yield f"no answer in {SECONDS} s"
    elif done.code not in CODES:
        yield f"exit code {done.code}"
    yield from (f"{word!r} on standard error" for word in ("Traceback", "Unexpected") if word in error)
    if odd := sorted({char for char in error if not char.isprintable() and char != "\n"}):
        yield f"control characters {odd} on standard error"
    if error.count("\n") > LINES_OF_ERROR:
        yield f"{error.count(chr(10))} lines on standard error"
    if done.code not in (0, 143) and not error.strip():
        yield "nothing on standard error"
    if "--json" in case.args and "-" not in case.args:
        for line in done.stdout.splitlines():
            try:
                json.loads(line, parse_constant=_no_constant)
            except ValueError:
                yield f"no JSON on standard output: {line[:80]!r}"
                break
    if done.code == 2 and done.stdout.strip():
        yield "output beside a refusal"
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not _may_change(name, case.args):
            yield f"{name} has changed"


def _no_constant(word: str) -> None:
    raise ValueError(word)


def _may_change(name: str, args: Sequence[str]) -> bool:
    """Whether the command may write there: the run that it names, and what `-o` names."""
    own = {"run"} if args[0] in ("merge", "grid", "evaluate", "report") else set()
    own |= {args[i + 1].rstrip("/") for i, arg in enumerate(args[:-1]) if arg in ("-o", "--out")} or {"guidegen-runs"}
    roots = {f"world/{each}" for each in own if each}
    return any(name == root or name.startswith((f"{root}/", f"{root}.partial", f"{root}.lock")) for root in roots)


def snapshot(folder: Path) -> dict[str, str]:
    """What is in a folder: a mark of each file's content, of where a link leads, of a kind for the rest."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent) / name
            mark = "link " + os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else "other"
            if mark == "other" and path.is_file():
                mark = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = mark
    return found


def try_case(number: int, seed: int, good: Path, show: bool = False) -> list[str]:
    """Runs case `number` in a world of its own; its faults, each a line."""
    rng = random.Random(f"{seed}/{number}")
    with tempfile.TemporaryDirectory(prefix="guidegen-fuzz-") as name:
        folder = Path(name)
        shutil.copytree(good, folder, dirs_exist_ok=True, symlinks=True)
        case = case_of(rng, folder / "world")
        before = snapshot(folder)
        done = run(case.args, folder / "world", case.stdin, SECONDS, BYTES)
        found = list(faults(case, done, before, snapshot(folder)))
    about = f"case {number}: guidegen {' '.join(word[:60] for word in case.args)!r} ({case.told[:200]!r})"
    if show:
        print(about, f"exit {done.code} after {done.seconds:.1f} s", done.stdout[:3000], done.stderr[:6000], sep="\n---\n")
    last = (done.stderr.strip().splitlines() or [""])[-1][:200]
    return [f"{about}: {fault}; last line {last!r}" for fault in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, with all that it prints")
    given = parser.parse_args()
    import_everything()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="guidegen-fuzz-") as name:
        good = Path(name)
        os.environ |= {"HOME": str(good / "home"), "XDG_CACHE_HOME": str(good / "home" / ".cache")}
        make_world(good)
        numbers = [given.only] if given.only is not None else range(given.first, given.first + given.count)
        failures = 0
        for number in numbers:
            for line in try_case(number, given.seed, good, given.only is not None):
                failures += 1
                print(line.encode("unicode_escape").decode(), flush=True)
    print(f"{len(numbers)} cases, {failures} failures, {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
