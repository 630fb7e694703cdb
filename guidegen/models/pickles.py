"""Pickled weights: tensors alone, and nothing in them is run."""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from guidegen.errors import CheckpointError, UnsafeError

_REFUSED = re.compile(r"GLOBAL (\S+)|(TorchScript)|but got <class '(\S+)'>|instantiate (\S+)")
_HARMLESS = re.compile(r"torch\b|collections (OrderedDict|Counter)|numpy\b")
_LARGEST = 64 << 20
"""Bytes of a pickle that are looked at: tensors are beside it."""


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote: tensors, and the containers that they are in, on the CPU.

    Raises:
        CheckpointError: damaged.
        UnsafeError: it is more than that, so that opening it would run code.
    """
    import torch

    # training scripts keep their arguments beside the weights; a namespace is a record of them
    arguments = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with warnings.catch_warnings(), arguments:
            warnings.simplefilter("ignore")  # of what is refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        found = _REFUSED.search(str(error))
        if wants := next((name for name in found.groups() if name), None) if found else _imported(path):
            raise UnsafeError(
                f"{path} holds more than tensors ({wants[:80]}), and opening that can run code. "
                "Save it again as a plain state dict: torch.save(model.state_dict(), FILE)."
            ) from error
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is damaged, cut short, or not of torch.save. Download it again."
        ) from error


def _imported(path: Path) -> str | None:
    """A name that its pickle would import and no plain tensors need; torch refuses new protocols before it says so."""
    with path.open("rb") as file:
        return imported_name(file)


def imported_name(file: IO[bytes]) -> str | None:
    """`_imported` of an open file."""
    data = b""
    if zipfile.is_zipfile(file):
        with suppress(Exception), zipfile.ZipFile(file) as archive:
            inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(inner) as pickled:
                data = pickled.read(_LARGEST)
    else:
        file.seek(0)
        data = file.read(_LARGEST)
    texts: list[str] = []
    with suppress(Exception):  # where it is damaged, that is where it ends
        for operation, argument, _ in pickletools.genops(BytesIO(data)):
            if isinstance(argument, str) and "UNICODE" in operation.name:
                texts.append(argument)
            name = {"GLOBAL": argument, "INST": argument, "STACK_GLOBAL": " ".join(texts[-2:])}.get(operation.name)
            if name is not None and not _HARMLESS.match(str(name)):
                return str(name).replace(" ", ".")
    return None
