"""Where and in which precision to draw."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from guidegen.errors import UsageError, first_line, quoted

_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
"""Variables of launchers: which of the processes on this machine this is."""
DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; each process of torchrun, MPI or srun gets a CUDA device of its own.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            rank = next(filter(None, map(os.environ.get, _LOCAL_RANKS)), "")
            return torch.device(f"cuda:{int(rank) % torch.cuda.device_count()}" if rank.isdecimal() else "cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    choose = "choose auto, cuda, cuda:1, mps or cpu"
    if not re.fullmatch(r"(cuda|mps|cpu)(:[0-9]{1,3})?", name):
        raise UsageError(f"--device {quoted(name)}: no such device; {choose}.")
    try:
        device = torch.device(name)
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise UsageError(f"--device {name}: this machine has no MPS device; {choose}.")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not usable here ({first_line(error)}); {choose}.") from error
    return device


def pick_dtype(name: str, device: torch.device, fast: bool = False, on_cuda: str = "fp16") -> str:
    """`auto` is `on_cuda` there and fp32 elsewhere; with `fast`, bf16 on a CPU that multiplies in it."""
    if name != "auto":
        return name
    if device.type == "cpu" and fast and multiplies_bf16():
        return "bf16"
    return on_cuda if device.type == "cuda" else "fp32"


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for products in bf16, as far as Linux says."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def pick_batch_size(name: str, device: torch.device, shape: tuple[int, int, int]) -> int:
    """`auto` is 64 on CUDA and 16 elsewhere for what is up to 64x64, fewer for what is larger.

    It is where drawing starts: a batch that is out of memory is halved until it fits.
    """
    if name != "auto":
        return int(name)
    most = 64 if device.type == "cuda" else 16
    return max(1, min(most, most * 64 * 64 // (shape[1] * shape[2])))
