"""How many threads a process takes: affinity, quotas of cgroups, and what the user has set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guidegen.cli import threads
from guidegen.errors import UsageError


def write(files: dict[str, str], root: Path) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000\n"}, 1),
        ("0::/../host/docker\n", {"cpu.max": "400000 100000\n"}, 4),
        (
            "12:cpuset:/\n4:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("4:cpuacct,cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ("1:cpu:/\n0::/\n", {"unified/cpu.max": "100000 100000\n"}, 1),
        ("1:memory:/a\n", {"memory/a/cpu.cfs_quota_us": "100000\n"}, 64),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 64),
        ("0::/\n", {"cpu.max": "0 0\n"}, 64),
        ("nonsense", {}, 64),
        ("", {}, 64),
    ],
)
def test_the_lowest_quota_of_the_cgroups_counts(
    own: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable", lambda: 64)
    write({"own": own} | {f"root/{name}": text for name, text in files.items()}, tmp_path)
    assert threads.allowed(tmp_path / "root", tmp_path / "own") == expected


def prepared(monkeypatch: pytest.MonkeyPatch, usable: int, allowed: int, **given: str) -> dict[str, str]:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    monkeypatch.setattr(threads, "usable", lambda: usable)
    monkeypatch.setattr(threads, "allowed", lambda: allowed)
    monkeypatch.setattr(os, "environ", dict(before))
    threads.prepare()
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    passive = {"OMP_WAIT_POLICY": "passive"}
    assert prepared(monkeypatch, 64, 2) == passive | {"OMP_NUM_THREADS": "2"}
    assert prepared(monkeypatch, 2, 2) == passive
    assert prepared(monkeypatch, 64, 2, OMP_NUM_THREADS="8") == passive
    assert prepared(monkeypatch, 2, 2, OMP_WAIT_POLICY="active") == {}
    assert prepared(monkeypatch, 2, 2, GOMP_SPINCOUNT="1000") == {}


def test_more_threads_than_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable", lambda: 2)
    with pytest.raises(UsageError, match="may use 2 processors"):
        threads.use(3)


_AFFINITY = """
import os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import guidegen
before = dict(os.environ)
from guidegen.cli import main, threads
assert dict(os.environ) == before
print(threads.usable(), threads.allowed())
sys.argv = ["guidegen", "labels", "207"]
try:
    main()
except SystemExit:
    pass
print(os.environ["OMP_WAIT_POLICY"], os.environ.get("OMP_NUM_THREADS"))
"""


def test_a_process_takes_no_more_than_its_affinity_and_a_library_changes_nothing() -> None:
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", _AFFINITY], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("1 1", "passive None"), done.stderr
