"""`--seed random`: drawn once, printed, and kept as the number that it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import call


def test_it_is_printed_and_kept(with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ("sample", "-m", with_null, "--label", 1, "--steps", 2)
    seeds = []
    for name in ("a", "b"):
        result = call(*args, "--seed", "random", "--num", 2, "-o", name)
        (seed,) = re.findall(r"note: --seed (\d+)", result.stderr)
        about = json.loads(Path(name, "run.json").read_text())
        first = int(seed)
        assert (about["options"]["seed"], about["plans"][0]["seeds"]) == (seed, f"{first}-{first + 1}")
        seeds.append(seed)
    assert seeds[0] != seeds[1]
    call(*args, "--seed", seeds[0], "--num", 2, "-o", "a")


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", "Random", "9" * 30])
def test_what_is_no_seed_is_refused(with_null: Path, seed: str) -> None:
    assert "or random" in str(call("sample", "-m", with_null, "--label", 1, f"--seed={seed}", code=2).exception)


def test_shards_would_not_agree(with_null: Path) -> None:
    args = ("sample", "-m", with_null, "--label", 1, "--seed", "random", "--shard", "0/2")
    assert "each shard" in str(call(*args, code=2).exception)
