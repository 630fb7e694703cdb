"""Pickles of numbers and numpy arrays, read without running anything that they ask for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from guidegen.errors import UnsafeError, UsageError, first_line
from guidegen.models.inert import Inert, InertUnpickler, Known
from guidegen.schema import read_bytes

_LARGEST = 1 << 30
_MULTIARRAY, _NUMERIC = ("numpy.core.multiarray", "numpy._core.multiarray"), ("numpy.core.numeric", "numpy._core.numeric")


def read_plain_pickle(path: Path) -> Any:
    """What a pickle of containers, numbers, text and numpy arrays of numbers holds.

    Nothing is imported for it: the few names that numpy writes stand for the functions below.

    Raises:
        UnsafeError: it asks for anything else.
        UsageError: it is damaged, or no pickle.
    """
    try:
        return _replaced(_Reader(io.BytesIO(read_bytes(path, UsageError, _LARGEST))).load())
    except (UnsafeError, UsageError, MemoryError):
        raise
    except Exception as error:  # the unpickler raises whatever a damaged file makes it raise
        raise UsageError(f"{path} cannot be read as a pickle of arrays: {first_line(error)}") from None


class _Type(Inert):
    """In place of numpy.dtype: of plain numbers alone."""

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str):  # numpy takes nested lists for one, which can take for ever
            raise ValueError("it has a dtype that is no text")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biuf":
            raise ValueError(f"it has an array of {self.dtype}")

    def set_state(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(Inert):
    """In place of numpy.ndarray: the numbers that the pickle holds, and no more of them than that."""

    array: Any = None

    def set_state(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.array = _array(data, kind, shape, "F" if fortran else "C").array


def _array(data: Any, kind: _Type, shape: Any, order: str = "C") -> _Array:
    found = _Array()
    found.array = np.frombuffer(bytes(data), kind.dtype).reshape(shape, order="F" if order == "F" else "C")
    return found


def _scalar(kind: _Type, data: bytes) -> Any:
    return np.frombuffer(bytes(data), kind.dtype)[0].item()


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encoded,
    **{(module, "_reconstruct"): lambda *_: _Array() for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
    **{(module, "_frombuffer"): _array for module in _NUMERIC},
}


class _Reader(InertUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise UnsafeError(
                f"The reference holds more than arrays ({module}.{name}"[:120] + "), and opening that can run code. "
                "Save mu and sigma as an .npz."
            )
        return Known(_NAMES[module, name])


def _replaced(value: Any, depth: int = 0) -> Any:
    """With arrays for what stands in place of them."""
    if depth > 20:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        return {key: _replaced(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(one, depth + 1) for one in value]
    return value.array if isinstance(value, _Array) else value
