"""Commands in forks of a process that has imported everything, so that a command costs what it does and not its imports."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command did; `code` is negative where a signal ended it."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def import_everything() -> None:
    """Imports what commands import, offline and with one thread: no thread may run in a process that forks."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    import diffusers  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401
    import transformers  # noqa: F401

    with contextlib.suppress(ImportError):  # another checkout may have it elsewhere
        pass

    torch.set_num_threads(1)


def run(args: list[str], cwd: Path, stdin: bytes = b"", seconds: float = 600, more_bytes: int = 8 << 30) -> Outcome:
    """`guidegen ARGS` in `cwd`, killed after so many seconds; it may map `more_bytes` beyond what is mapped now."""
    with tempfile.TemporaryFile() as into, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        into.write(stdin)
        into.seek(0)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate((into, out, err)):
                os.dup2(file.fileno(), number)
            _command(args, cwd, more_bytes)
        status = None
        while status is None and time.monotonic() - began < seconds:
            done, status_now = os.waitpid(pid, os.WNOHANG)
            if done:
                status = status_now
            else:
                time.sleep(0.005)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        took = time.monotonic() - began
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Outcome(os.waitstatus_to_exitcode(status), texts[0], texts[1], took)


def _command(args: list[str], cwd: Path, more_bytes: int) -> None:
    """Becomes the command; never returns."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(cwd)
    sys.argv = ["guidegen", *args]
    code: Any = 1
    try:
        from guidegen.cli import main

        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
