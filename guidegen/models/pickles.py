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
from typing import Any

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
        if wants := refused_name(str(error)) or _imported(path):
            raise UnsafeError(
                f"{path} holds more than tensors ({wants[:80]}), and opening that can run code. "
                "Save it again as a plain state dict: torch.save(model.state_dict(), FILE)."
            ) from error
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is damaged, cut short, or not of torch.save. Download it again."
        ) from error


def refused_name(message: str) -> str | None:
    """What torch refuses to import, by its message; None where it says something else."""
    found = _REFUSED.search(message)
    return next((name for name in found.groups() if name), None) if found else None


def _imported(path: Path) -> str | None:
    """A name that its pickle would import and no plain tensors need; torch refuses new protocols before it says so."""
    data = b""
    if zipfile.is_zipfile(path):
        with suppress(Exception), zipfile.ZipFile(path) as archive:
            inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(inner) as file:
                data = file.read(_LARGEST)
    else:
        with path.open("rb") as file:
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
