"""Means and covariances of features as files: those of other tools, and files that other tools read."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from guidegen.errors import UsageError
from guidegen.evaluate import arrays
from guidegen.evaluate.moments import Moments
from guidegen.evaluate.plain_pickle import read_plain_pickle
from guidegen.models.hashes import sha256_of
from guidegen.runs.files import atomically, write_atomically
from guidegen.schema import LARGEST_TEXT, decode

NPZ_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
PKL_NAMES = {"pool": "fid", "dinov2": "fd_dinov2"}
_WIDTHS = {"pool": 2048, "spatial": 2023, "dinov2": 1024}
_WIDEST = 1 << 13


@dataclass(frozen=True)
class Statistics:
    """What a file of statistics holds.

    Attributes:
        path: the file.
        kind: npz or pkl.
        moments: by layer: pool and spatial of Inception, dinov2.
        has_images: whether there are images (`arr_0`) or saved features beside them.
        identity: of the file, 64 hex digits.
        networks: name -> sha256 of the weights and preprocessing; of files of `write_statistics`, others do not say.
    """

    path: Path
    kind: str
    moments: Mapping[str, Moments]
    has_images: bool
    identity: str
    networks: Mapping[str, tuple[str | None, str]]


@dataclass(frozen=True)
class _About:
    """What `write_statistics` writes beside the statistics."""

    networks: dict[str, tuple[str | None, str]]


def _networks(text: Any, path: Path) -> Mapping[str, tuple[str | None, str]]:
    return decode(str(text).encode(), _About, path, UsageError).networks


def read_statistics(path: Path) -> Statistics | None:
    """The statistics of a file; None for a folder, for any other kind of file, and for an .npz without `mu`.

    An .npz has `mu` (D,) and `sigma` (D, D), as of pytorch-fid, clean-fid, torch-fidelity and EDM, and of guided-diffusion's
    suite `mu_s` and `sigma_s` too. A .pkl is EDM2's: {"num_images", "fid": {"mu", "sigma"}, "fd_dinov2": {...}}.

    Raises:
        UsageError: damaged, or not of the shapes of these networks.
        UnsafeError: it is a pickle of more than arrays.
    """
    if path.is_dir() or path.suffix not in (".npz", ".pkl"):
        return None
    if path.suffix == ".pkl":
        return _read_pkl(path)
    with arrays.opened(path, f"--reference {path}", UsageError) as archive:
        names = arrays.names(archive)
        if not {"mu", "sigma"} <= {*names}:
            return None
        moments = {
            layer: _moments(path, layer, arrays.read(archive, mean), arrays.read(archive, covariance), None)
            for layer, (mean, covariance) in NPZ_NAMES.items()
            if mean in names and covariance in names
        }
        ours = _networks(arrays.read(archive, "guidegen", LARGEST_TEXT), path) if "guidegen" in names else {}
    return Statistics(path, "npz", moments, bool({"arr_0", "pool"} & {*names}), sha256_of([path]), ours)


def _read_pkl(path: Path) -> Statistics:
    held = read_plain_pickle(path)
    count = held.get("num_images") if isinstance(held, dict) else None
    count = count if isinstance(count, int) and count > 1 else None
    parts = {layer: held.get(name) for layer, name in PKL_NAMES.items()} if isinstance(held, dict) else {}
    moments = {
        layer: _moments(path, layer, part.get("mu"), part.get("sigma"), count)
        for layer, part in parts.items()
        if isinstance(part, dict)
    }
    if not moments:
        raise UsageError(f"--reference {path} has neither fid nor fd_dinov2, which references of EDM2 have.")
    ours = _networks(held["guidegen"], path) if "guidegen" in held else {}
    return Statistics(path, "pkl", moments, False, sha256_of([path]), ours)


def _moments(path: Path, layer: str, mean: Any, covariance: Any, count: int | None) -> Moments:
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    wide = mean.shape[0] if mean.ndim == 1 else 0
    what = f"--reference {path}: its statistics of {layer}"
    if not 0 < wide <= _WIDEST or covariance.shape != (wide, wide) or {mean.dtype.kind, covariance.dtype.kind} - set("fiu"):
        raise UsageError(f"{what} should be mu (D,) and sigma (D, D), found {mean.shape} and {covariance.shape}.")
    if wide != _WIDTHS[layer]:
        raise UsageError(f"{what} are of {wide} features, and the network of published numbers has {_WIDTHS[layer]}.")
    mean, covariance = torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UsageError(f"{what} are not finite.")
    scale = covariance.diagonal().abs().max()
    if (covariance.diagonal() < 0).any() or (covariance - covariance.T).abs().max() > 1e-4 * scale:
        raise UsageError(f"{what}: sigma is no covariance, it is not symmetric or has negative variances.")
    return Moments(mean, (covariance + covariance.T) / 2, count)


def write_statistics(
    path: Path,
    moments: Mapping[str, Moments],
    about: Mapping[str, Any],
    features: NDArray[np.float32] | None = None,
    images: Iterable[NDArray[np.uint8]] = (),
) -> None:
    """Statistics in the form that the tools of their kind read: .pkl as EDM2 does, .npz as the others.

    Args:
        path: of the file.
        moments: by layer.
        about: of their making: `networks` as in `Statistics`, and anything else.
        features: (M, D) of Inception, for precision and recall; None leaves them out.
        images: that these are of, M of them, which others' tools want (`arr_0`).
    """
    if path.suffix == ".pkl":
        held: dict[str, Any] = {
            "num_images": max(one.count or 0 for one in moments.values()),
            "guidegen": json.dumps(about),
        }
        for layer, name in PKL_NAMES.items():
            if layer in moments:
                one = moments[layer]
                held[name] = {"mu": one.mean.numpy(), "sigma": one.covariance.numpy()}
        write_atomically(path, pickle.dumps(held, protocol=4))
        return
    given: dict[str, Any] = {}
    for layer, (mean, covariance) in NPZ_NAMES.items():
        if layer in moments:
            given |= {mean: moments[layer].mean.numpy(), covariance: moments[layer].covariance.numpy()}
    with atomically(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, guidegen=np.array(json.dumps(about)), **given)
        if features is not None:
            with zipfile.ZipFile(temporary, "a") as archive:
                _add(archive, "pool", len(features), features)
                _add(archive, "arr_0", len(features), images)


def _add(archive: zipfile.ZipFile, name: str, count: int, rows: Iterable[NDArray[Any]]) -> None:
    """An array of `count` rows, one in memory at a time."""
    rest = iter(rows)
    first = next(rest)
    header = {"descr": npy.dtype_to_descr(first.dtype), "fortran_order": False, "shape": (count, *first.shape)}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        npy.write_array_header_1_0(file, header)
        for row in chain([first], rest):
            file.write(row.tobytes())
