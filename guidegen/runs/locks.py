"""Who draws into a run: advisory locks that die with their processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guidegen.errors import LockedError
from guidegen.spec.shard import Shard

Wait = Callable[[str], None]
"""Called with the reason while another process holds a lock: returns when it is to be tried again, or raises."""

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


def lock_run(folder: Path, shard: Shard | None = None, wait: Wait | None = None) -> Any:
    """The lock of a run or of one of its shards, while no process draws the same images.

    Args:
        folder: the run directory; made if it is not there.
        shard: which part of it.
        wait: called with the reason before each new try; None where it is not to be waited for.

    Raises:
        LockedError: another process holds it, and `wait` is None.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _lock_run(folder, shard)
        except LockedError as locked:
            if wait is None:
                raise
            wait(str(locked).splitlines()[0])


def check_unlocked(folder: Path, shard: Shard | None = None) -> None:
    """As `lock_run` without waiting, but holds no lock and makes no file."""
    if (folder / _name(shard)).exists():
        _lock_run(folder, shard).release()
    else:
        _refuse_other_processes(folder, shard)


def _lock_run(folder: Path, shard: Shard | None) -> Any:
    lock = _try_lock(folder / _name(shard))
    if lock is None:
        what = f"shard {shard.index}/{shard.count} of {folder}" if shard else f"{folder}"
        raise LockedError(
            f"Another process is drawing into {what}.\nWait for it with --wait, or name another -o. "
            "Several processes share a run with --shard."
        )
    try:
        _refuse_other_processes(folder, shard)
    except BaseException:
        lock.release()
        raise
    return lock


def _refuse_other_processes(folder: Path, shard: Shard | None) -> None:
    """Processes that cut the same plan in other ways would draw the same images at once."""
    for path in sorted(folder.glob(".lock*")):
        if path.name == _name(shard) or (shard and path.name.endswith(f"-of-{shard.count}")):
            continue
        lock = _try_lock(path)
        if lock is None:
            part = path.name.removeprefix(".lock").removeprefix(".") or "all of it"
            raise LockedError(
                f"Another process is drawing into {folder} ({part}).\nWait for it with --wait, or name another -o. "
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
def alone(folder: Path, wait: Wait | None = None) -> Iterator[None]:
    """Holds the run directory against all who draw into it; as `lock_run`."""
    lock = lock_run(folder, None, wait)
    try:
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
        raise LockedError(f"{folder}/run.json has been held by another process for a minute. Try again.") from None
    try:
        yield
    finally:
        lock.release()


def _name(shard: Shard | None) -> str:
    return f".lock.{shard}" if shard else ".lock"
