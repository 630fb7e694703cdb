"""Pickles of NVlabs (`torch_utils.persistence` of EDM and EDM2): tensors and constructor arguments, and nothing is run.

Such a pickle holds the source text of its classes, which their own reader executes. This one puts a record in the place of
every object, knows the few functions that tensors and arrays are rebuilt with by its own versions of them, and refuses all
other names.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from guidegen.errors import CheckpointError, UnsafeError, first_line
from guidegen.models.inert import Inert, InertUnpickler, Known, hashable
from guidegen.models.pickles import imported_name

if TYPE_CHECKING:
    from torch import Tensor

_MARK = b"_reconstruct_persistent_obj"
_HEAD = 1 << 20
"""Bytes in which a pickle of NVlabs names its first object."""
_DTYPES = {"f2": "float16", "f4": "float32", "f8": "float64", "i4": "int32", "i8": "int64", "u1": "uint8", "b1": "bool"}
_STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_MAGIC = 0x1950A86A20F9469CFC6C
"""What the first pickle of a storage holds."""
_DEEPEST, _LONGEST = 32, 256
"""Modules inside of modules, and letters of a name."""


class Record(Inert):
    """An object of a pickle, of which only its class's name and attributes are known.

    Attributes:
        name: of its class.
        state: its attributes.
    """

    def __init__(self, name: str):
        self.name = name
        self.state: Mapping[Any, Any] = {}

    def set_state(self, state: Any) -> None:
        """Takes its attributes."""
        if not isinstance(state, Mapping):
            raise pickle.UnpicklingError(f"sets the state of a {type(self).__name__}")
        self.state = state

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that it was made with.

        Raises:
            CheckpointError: it does not say, or they are positional.
        """
        positional, named = self.state.get("_init_args"), self.state.get("_init_kwargs")
        if positional or not isinstance(named, Mapping) or not all(isinstance(key, str) for key in named):
            raise CheckpointError(f"its {self.name[:80]} does not say by name what it was made with.")
        return dict(named)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as `state_dict` names them.

        Raises:
            CheckpointError: it is no module.
        """
        found: dict[str, Tensor] = {}
        _collect(self, "", found, set(), 0)
        return found


class _Dict(dict, Inert):  # type: ignore[type-arg]
    """An OrderedDict or EasyDict."""

    def set_state(self, state: Any) -> None:
        pass  # an empty __dict__


class _Dtype(str, Inert):
    """A dtype of numpy by its code, such as f4."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        if state[1] == ">":
            raise pickle.UnpicklingError("numbers in big-endian order")


def is_persistent(path: Path) -> bool:
    """Whether a file begins as a pickle of NVlabs; False where there is none."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK in file.read(_HEAD)


def read_persistent(path: Path) -> dict[str, Any]:
    """The mapping that a network snapshot of EDM or EDM2 is, with a `Record` for each object.

    Raises:
        CheckpointError: damaged, cut short, or another pickle.
        UnsafeError: it names something else to call, so that opening it would run code.
    """
    try:
        with path.open("rb") as file:
            data = _Reader(file).load()
    except OSError:
        raise
    except UnsafeError as error:
        raise UnsafeError(f"{path} {error}") from None
    except Exception as error:  # whatever a damaged file makes of the machine that reads it
        what = f"{type(error).__name__}: {first_line(error)[:120]}"
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged, cut short, or no pickle of EDM or EDM2 ({what}). "
            "Download it again."
        ) from error
    if not isinstance(data, Mapping) or not isinstance(data.get("ema"), Record):
        raise CheckpointError(f"{path} is no network of EDM or EDM2: their pickles are a mapping with the network as 'ema'.")
    return dict(data)


class _Reader(InertUnpickler):
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(InertUnpickler.dispatch)
    del dispatch[pickle.DICT[0]]  # of protocol 0, which no such pickle is

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _KNOWN:
            return _KNOWN[full]
        if module == "torch" and name in _STORAGES.values():
            return _Dtype(name)
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return Known(lambda *_: Record(name))
        raise UnsafeError(f"asks for {full[:100]!r}, which no network of EDM or EDM2 needs, and opening it can run code.")


def _persistent(meta: Any) -> Record:
    if not isinstance(meta, Mapping) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise pickle.UnpicklingError("no persistent object")
    record = Record(meta["class_name"])
    if meta.get("state") is not None:
        record.set_state(meta["state"])
    return record


# --- tensors


class _StorageReader(_Reader):
    """Of the pickles in what `torch.save` made of a storage in its first format."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Dtype(_STORAGES[name])
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _storage(data: bytes) -> Tensor:
    """The numbers (N,) of a storage that `torch.save` wrote."""
    import torch

    file = io.BytesIO(data)
    if not data.startswith(pickle.PROTO) or _StorageReader(file).load() != _MAGIC:
        if name := imported_name(file):
            raise UnsafeError(f"has more than numbers in a tensor ({name[:80]}), and opening it can run code.")
        raise pickle.UnpicklingError("no storage of torch")
    _version, _system, (_, code, _, _, count, *_), _keys = (_StorageReader(file).load() for _ in range(4))
    if not isinstance(code, _Dtype) or int.from_bytes(file.read(8), "little") != count:
        raise pickle.UnpicklingError("a storage of other numbers than it says")
    dtype = getattr(torch, code)
    numbers = bytearray(file.read(count * dtype.itemsize))
    if len(numbers) != count * dtype.itemsize:
        raise pickle.UnpicklingError("a storage that is cut short")
    return torch.frombuffer(numbers, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not all(isinstance(each, int) for each in (*size, *stride, offset)) or math.prod(size) > storage.numel():
        raise pickle.UnpicklingError("a tensor with more numbers than its storage")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


# --- numpy


class _Array(Inert):
    """An array of numpy, flat, as its pickle fills it in."""

    def __init__(self, *_: Any):
        self.values: list[float] = []

    def set_state(self, state: Any) -> None:
        _, _, dtype, _, data = state
        self.values = _numbers(dtype, data)


def _dtype(code: Any, *_: Any) -> _Dtype:
    if not isinstance(code, str):  # str() of lists of lists can take for ever
        raise pickle.UnpicklingError("a dtype that is no text")
    return _Dtype(code)


def _numbers(dtype: Any, data: bytes) -> list[float]:
    import numpy as np

    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array without a dtype")
    numbers: list[float] = np.frombuffer(data, _DTYPES[dtype]).tolist()
    return numbers


def _scalar(dtype: Any, data: bytes) -> float:
    (number,) = _numbers(dtype, data)
    return number


def _known() -> dict[str, Any]:
    functions: dict[str, Callable[..., Any]] = {
        "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
        "dnnlib.util.EasyDict": lambda: _Dict(),
        "collections.OrderedDict": lambda: _Dict(),
        "builtins.set": lambda items: set(map(hashable, items)),
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.storage._load_from_bytes": _storage,
        "torch.device": _dtype,
        "numpy.dtype": _dtype,
        "numpy.ndarray": _Array,
    }
    for core in ("core", "_core"):
        functions[f"numpy.{core}.multiarray._reconstruct"] = _Array
        functions[f"numpy.{core}.multiarray.scalar"] = _scalar
    return {name: Known(function) for name, function in functions.items()}


_KNOWN = _known()


def _collect(module: Record, prefix: str, found: dict[str, Tensor], seen: set[int], depth: int) -> None:
    from torch import Tensor

    if id(module) in seen or depth > _DEEPEST:
        raise CheckpointError("its modules are inside of each other, or one is in two places.")
    seen.add(id(module))
    dropped = module.state.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, tensor in _items(module, group):
            if isinstance(tensor, Tensor) and (group == "_parameters" or name not in dropped):
                found[f"{prefix}{name}"] = tensor
    for name, child in _items(module, "_modules"):
        if isinstance(child, Record):
            _collect(child, f"{prefix}{name}.", found, seen, depth + 1)


def _items(module: Record, group: str) -> list[tuple[Any, Any]]:
    items = module.state.get(group)
    if not isinstance(items, Mapping) or not all(isinstance(name, str) and len(name) < _LONGEST for name in items):
        raise CheckpointError(f"its {module.name[:80]} is no network.")
    return list(items.items())
