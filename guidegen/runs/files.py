"""Files that are whole or not there, under temporary names that belong to a living process, inside the run alone."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path

from guidegen.errors import OutputError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LARGEST_IMAGE = 4 << 30  # a file past it is none of ours, and would take a minute to read


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A disk that is full says for which file."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder to write to; then fsync and rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        temporary, lock = _temporary(path)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # what went wrong before is what counts
                temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(lock)


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """The whole file or nothing, from bytes or from parts of them."""
    with atomically(path) as temporary, temporary.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, and the descriptor that holds its lock until the process closes it or dies."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        lock = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:  # not cleared away between being made and being locked
            return temporary, lock
        os.close(lock)


def unlink_if_abandoned(part: Path) -> None:
    """Deletes a temporary file unless a process may still be writing it.

    Its process holds a lock on it, which counts on other hosts and outlives no process. A process id in
    its name that is in use here counts too, where locks are not to be had: an id that went to another
    process keeps the file until that one ends.
    """
    pid = part.name.split(".")[-2].partition("-")[0]
    if pid.isdecimal() and int(pid) != os.getpid() and _is_alive(int(pid)):
        return
    with suppress(OSError):  # locked, of another user, or gone
        file = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
        finally:
            os.close(file)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # of another user
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def find_temporary(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every temporary file of a run: the file, relative to `folder`, that it is to become, and where it is.

    Raises:
        UsageError: a directory below images/ is a symbolic link, and what is written there would leave the run.
    """
    tops = [top for top in (folder / "images", folder / "features") if not top.is_symlink()]
    for parent, folders, names in chain(islice(os.walk(folder), 1), *map(os.walk, tops)):
        for name in folders if Path(parent) != folder else ():
            refuse_links(folder, Path(parent) / name)
        for name in names:
            if name.startswith(".") and name.endswith(".part") and name.count(".") > 2:
                target = Path(parent) / name[1:].rsplit(".", 2)[0]
                yield str(target.relative_to(folder)), Path(parent) / name


def refuse_links(folder: Path, path: Path) -> None:
    """Raises UsageError if `path` or one of its parents inside `folder` is a symbolic link."""
    for part in (path, *path.parents):
        if part == folder:
            return
        if part.is_symlink():
            raise UsageError(
                f"{part} is a symbolic link, and a run is written inside its directory alone. "
                "Put the directory itself there, or name another -o."
            )


def open_to_append(path: Path) -> int:
    """A descriptor of a file of the run that grows.

    Raises:
        UsageError: something else than a file is there.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a directory, a FIFO
            raise UsageError(f"{path} is not a regular file.") from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UsageError(f"{path} is not a regular file.")
    return file


def append(file: int, line: bytes, path: Path) -> None:
    """Adds a line and syncs it. One that does not fit, as on a full disk, leaves nothing of itself."""
    size = os.fstat(file).st_size
    with naming(path):
        try:
            while line:
                line = line[os.write(file, line) :]
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise


def file_sha256(path: Path) -> str | None:
    """sha256 of a file; None if there is no regular file of a size that an image may have.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST_IMAGE:
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError:  # a null byte in the name
        return None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise OutputError(f"{path} cannot be read: {error.strerror}.") from error
        return None
