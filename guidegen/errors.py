"""Errors that are for people. Each carries the exit code of the command-line contract."""


class GuidegenError(Exception):
    """What was wrong, what was found, what to do: one or two lines."""

    code = 1


class UsageError(GuidegenError):
    """A bad flag or label, or a mode that this checkpoint cannot serve; nothing was written."""

    code = 2


class IncompleteError(GuidegenError):
    """Images that are not finite, not there or not what their rows say; the others are."""

    code = 3


class CheckpointError(GuidegenError):
    """A checkpoint that is missing, incomplete, unreachable or of an unknown kind."""

    code = 4


class UnsafeError(GuidegenError):
    """A checkpoint refused because opening it could run somebody's code."""

    code = 5


class OutputError(GuidegenError):
    """A disk or I/O failure; what was finished before it is intact."""

    code = 74


def first_line(error: BaseException) -> str:
    """The message of an error of a library, in one line; its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quoted(text: str, most: int = 80) -> str:
    """Somebody else's text in a message: in quotes, without control characters, and cut where it is long."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


class LockedError(GuidegenError):
    """Another process holds the run: the same command works when that one has ended."""

    code = 75


class StoppedError(GuidegenError):
    """Stopped by a signal, after the finished images are on disk."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.code = 128 + signal_number


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory; only CUDA has a class of error for it, which not all of its libraries use."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _OUT_OF_MEMORY))
    )
