"""Who draws into a run: advisory locks that die with their processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guidegen.errors import OutputError, UsageError
from guidegen.spec.shard import Shard

_SECONDS_FOR_RUN_JSON = 60


def _try_lock(path: Path) -> Any:
    """An advisory lock that dies with its process; None where another process holds it.

    Another process that only checks whether it is held lets go at once: hence the second's patience.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.3, poll_interval=0.02)
    except Timeout:
        return None
    return lock


def lock_run(folder: Path, shard: Shard | None = None) -> Any:
    """The lock of a run or of one of its shards.

    Raises:
        UsageError: another process holds it.
    """
    lock = _try_lock(folder / _name(shard))
    if lock is None:
        what = f"shard {shard.index}/{shard.count} of {folder}" if shard else f"{folder}"
        raise UsageError(
            f"Another process is drawing into {what}. Wait for it, or name another -o.\n"
            "Several processes share a run with --shard."
        )
    return lock


def refuse_other_processes(folder: Path, shard: Shard | None) -> None:
    """Processes that cut the same plan in other ways would draw the same images at once."""
    for path in sorted(folder.glob(".lock*")):
        if path.name == _name(shard) or (shard and path.name.endswith(f"-of-{shard.count}")):
            continue
        lock = _try_lock(path)
        if lock is None:
            part = path.name.removeprefix(".lock").removeprefix(".") or "all of it"
            raise UsageError(
                f"Another process is drawing into {folder} ({part}). Wait for it, or name another -o.\n"
                "Processes that share a run have the same N in --shard I/N."
            )
        lock.release()


def clear_locks(folder: Path) -> None:
    """Deletes the locks of shards that no process holds."""
    for path in sorted(folder.glob(".lock.*-of-*")):
        if lock := _try_lock(path):
            path.unlink(missing_ok=True)
            lock.release()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the run directory against all who draw into it.

    Raises:
        UsageError: one of them does.
    """
    lock = lock_run(folder)
    try:
        refuse_other_processes(folder, None)
        yield
    finally:
        lock.release()


@contextmanager
def run_json_lock(folder: Path) -> Iterator[None]:
    """One process at a time may read run.json and write it: a matter of milliseconds."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".run.json.lock")
    try:
        lock.acquire(timeout=_SECONDS_FOR_RUN_JSON)
    except Timeout:
        raise OutputError(f"{folder}/run.json has been held by another process for a minute. Try again.") from None
    try:
        yield
    finally:
        lock.release()


def _name(shard: Shard | None) -> str:
    return f".lock.{shard}" if shard else ".lock"
