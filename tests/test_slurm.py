"""Slurm for real: one node on this machine. Without slurm-wlm and munge, or where they do not start, this skips itself.

One test for all of it, so that one process of the suite starts one cluster, and its jobs run beside each other.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import call

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_min_interval=100000
MpiDefault=none
ReturnToService=2
KillWait=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
"""A job that is requeued waits for `cred_expire` seconds, which are 120 where nothing is said; less than 6 is not taken."""
SCRIPT = """#!/bin/bash
#SBATCH --array=0-1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=array.log
trap 'kill -USR1 $pid; wait $pid; scontrol requeue ${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID' USR1
{command} & pid=$!
wait $pid
"""
"""The one of the README."""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(happened: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of its commands."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    if missing := [name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    config = CONFIG.format(host=host, ports=free_ports(2), user=getpass.getuser(), folder=folder)
    (folder / "slurm.conf").write_text(config)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin", "SLURM_CONF": str(folder / "slurm.conf")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    munge = [f"--{name.replace('_', '-')}={folder / name}" for name in ("pid_file", "log_file", "seed_file")]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={folder / 'key'}", f"--socket={folder / 'munge.socket'}", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    dies_too = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []  # where this process is killed
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.log").open("wb") as log:
                daemons.append(subprocess.Popen([*dies_too, *command], env=environment, stdout=log, stderr=log))
            time.sleep(0.3)
        end = time.monotonic() + 20
        while "idle" not in subprocess.run(["sinfo", "-h"], env=environment, capture_output=True, text=True).stdout:
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in daemons):
                said = [line for name in programs[:3] for line in (folder / f"{name}.log").read_text().splitlines()[-2:]]
                pytest.skip(f"Slurm does not start here: {' | '.join(said)}")
            time.sleep(0.2)
        yield environment
    finally:
        if len(daemons) == len(commands):
            subprocess.run(["scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}"], env=environment)
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def test_arrays_and_submitted_runs(
    with_null: Path, tmp_path: Path, slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, timeout=300, check=True).stdout

    def rows(name: str) -> int:
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.glob(name))

    drawing = ["-m", with_null, "--label", "0-4", "--num", 4, "--steps", 40, "--batch-size", 1, "-q"]
    words = map(str, [sys.executable, "-m", "guidegen", "sample", *drawing, "--shard", "auto", "-o", "run"])
    (tmp_path / "array.sh").write_text(SCRIPT.format(command=" ".join(words)))

    array = run("sbatch", "--parsable", "array.sh").strip()
    until(lambda: rows("run/manifest.0-of-2.jsonl") and rows("run/manifest.1-of-2.jsonl"))
    run("scancel", "--batch", "--signal=USR1", f"{array}_0")
    run("scancel", "--full", "--signal=KILL", f"{array}_1")
    until(lambda: f"{array}_1" not in run("squeue", "-h", "-o", "%i"))
    until(lambda: "Restarts=1" in run("scontrol", "show", "job", f"{array}_0"))
    before = rows("run/manifest*")
    assert 2 <= before < 20, "neither has drawn all of its part"

    # while the requeued task waits: another run as a whole, from one command
    submit = ["submit", "--shards", 2, "--wait", "--json"]
    refused = call(*submit, "--partition", "none", "--", "sample", *drawing, "-o", "other", code=2)
    assert "Slurm did not take the jobs: sbatch: error: " in str(refused.exception)
    assert "nvalid partition name" in str(refused.exception)
    assert not (tmp_path / "other").exists()
    submitted = json.loads(call(*submit, "--", "sweep", *drawing[:4], "--steps", 2, "-w", "1,3", "-o", "swept").stdout)
    assert int(submitted["finish"]) > int(submitted["job"])
    assert (submitted["shards"], submitted["images"]) == (2, 10)
    assert {path.name for path in tmp_path.glob("swept/[!.]*.*")} == {"grid.png", "manifest.jsonl", "run.json"}
    assert "10 of 10 images are there" in "".join(path.read_text() for path in tmp_path.glob("swept/.jobs/*_log.out"))
    call("verify", "swept")

    # the requeued task has gone on with its own part; the one that failed is submitted once more
    until(lambda: not run("squeue", "-h"))
    assert rows("run/manifest.0-of-2.jsonl") == 10
    assert before < rows("run/manifest*") < 20
    run("sbatch", "--wait", "--array=1", "array.sh")
    log = (tmp_path / "array.log").read_text()
    assert "20 of 20" in call("verify", "run").stdout, log
    assert "SIGUSR1" in log
    call("merge", "run")
