"""EDM's and EDM2's networks as functions of their tensors, written from the papers, and pickles as NVlabs writes them.

Karras et al. 2022 (arXiv 2206.00364, tables 1, 6 and 7), 2024 (2312.02696, config G); Song et al. 2021 (2011.13456),
Dhariwal & Nichol 2021 (2105.05233).
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tensors = Mapping[str, Tensor]


def blocks(w: Tensors, part: str) -> list[str]:
    """Names of the blocks of enc or dec, in the order of the tensors."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in w if name.startswith(f"{part}.")))


def attend(qkv: Tensor, heads: int, normal: bool = False) -> Tensor:
    b, c, h, width = qkv.shape
    parts = qkv.reshape(b, heads, c // heads // 3, 3, h * width)
    if normal:
        parts = parts / (1e-4 + parts.square().mean(dim=2, keepdim=True).sqrt())
    q, k, v = parts.unbind(3)
    weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(dim=3)
    return (v @ weights.transpose(2, 3)).reshape(b, c // 3, h, width)


def filtered(x: Tensor, how: str, taps: tuple[int, ...], padded: bool = True) -> Tensor:
    """Resampling by hand: zeros between pixels and the filter, or the filter and every second pixel."""
    pad = (len(taps) - 1) // 2
    row = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel = row.outer(row)[None, None].expand(x.shape[1], 1, -1, -1)
    if how == "down":
        return F.conv2d(x, kernel, padding=pad * padded, groups=x.shape[1])[..., ::2, ::2]
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
    wide[..., ::2, ::2] = x
    return F.conv2d(F.pad(wide, [len(taps) - 1 - pad] * 4), 4 * kernel, groups=x.shape[1])


# --- EDM2


def edm2(w: Tensors, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
    """F of EDM2 with the usual balances, from the weights as they are stored."""

    def normal(v: Tensor, dims: Any) -> Tensor:
        return v / (1e-4 + v.square().mean(dim=dims, keepdim=True).sqrt())

    def layer(name: str, y: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = normal(w[name], tuple(range(1, w[name].ndim))) * gain / math.sqrt(w[name][0].numel())
        return y @ weight.T if weight.ndim == 2 else F.conv2d(y, weight, padding=weight.shape[-1] // 2)

    def added(a: Tensor, b: Tensor, t: float) -> Tensor:
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    def silu(y: Tensor) -> Tensor:
        return y * y.sigmoid() / 0.596

    def block(p: str, y: Tensor, e: Tensor) -> Tensor:
        if "down" in p or "up" in p:
            y = filtered(y, "down" if "down" in p else "up", (1, 1))
        skip = f"{p}.conv_skip.weight"
        if p.startswith("enc"):
            y = normal(layer(skip, y) if skip in w else y, 1)
        z = layer(f"{p}.conv_res0.weight", silu(y))
        z = silu(z * (layer(f"{p}.emb_linear.weight", e, w[f"{p}.emb_gain"]) + 1)[:, :, None, None])
        z = layer(f"{p}.conv_res1.weight", z)
        y = added(layer(skip, y) if skip in w and p.startswith("dec") else y, z, 0.3)
        if f"{p}.attn_qkv.weight" in w:
            z = attend(layer(f"{p}.attn_qkv.weight", y), y.shape[1] // 64, normal=True)
            y = added(y, layer(f"{p}.attn_proj.weight", z), 0.3)
        return y.clamp(-256, 256)

    fourier = math.sqrt(2) * (noise[:, None] * w["emb_fourier.freqs"] + w["emb_fourier.phases"]).cos()
    e = layer("emb_noise.weight", fourier)
    if labels is not None:
        e = added(e, layer("emb_label.weight", labels * math.sqrt(labels.shape[1])), 0.5)
    e, x = silu(e), torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    skips = []
    for p in blocks(w, "enc"):
        x = layer(f"{p}.weight", x) if "conv" in p else block(p, x, e)
        skips.append(x)
    for p in blocks(w, "dec"):
        if "block" in p:
            other = skips.pop()
            n, m = x.shape[1], other.shape[1]
            x = math.sqrt((n + m) / 2) * torch.cat([x / math.sqrt(n), other / math.sqrt(m)], dim=1)
        x = block(p, x, e)
    return layer("out_conv.weight", x, w["out_gain"])


# --- EDM


def edm(w: Tensors, x: Tensor, noise: Tensor, labels: Tensor | None, song: bool, taps: tuple[int, ...] = (1, 1)) -> Tensor:
    """F of DDPM++ and NCSN++ (`song`), or of ADM."""

    def linear(name: str, y: Tensor) -> Tensor:
        return F.linear(y, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def conv(name: str, y: Tensor) -> Tensor:
        return F.conv2d(y, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def norm(name: str, y: Tensor) -> Tensor:
        groups = min(32, y.shape[1] // 4)
        return F.group_norm(y, groups, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6 if song else 1e-5)

    def block(p: str, y: Tensor, e: Tensor) -> Tensor:
        how = next((how for how in ("down", "up") if how in p), None)
        scale = math.sqrt(0.5) if song else 1.0

        def moved(v: Tensor) -> Tensor:
            return filtered(v, how, taps) if how else v

        z = conv(f"{p}.conv0", moved(F.silu(norm(f"{p}.norm0", y))))
        affine = linear(f"{p}.affine", e)[:, :, None, None]
        if song:
            z = norm(f"{p}.norm1", z + affine)
        else:
            z = norm(f"{p}.norm1", z) * (1 + affine.chunk(2, 1)[0]) + affine.chunk(2, 1)[1]
        z = conv(f"{p}.conv1", F.silu(z))
        y = scale * (z + (conv(f"{p}.skip", moved(y)) if f"{p}.skip.weight" in w else moved(y)))
        if f"{p}.qkv.weight" in w:
            heads = 1 if song else y.shape[1] // 64
            y = scale * (y + conv(f"{p}.proj", attend(conv(f"{p}.qkv", norm(f"{p}.norm2", y)), heads)))
        return y

    half = w["map_layer0.weight"].shape[1] // 2
    if "map_noise.freqs" in w:
        angles = 2 * math.pi * noise[:, None] * w["map_noise.freqs"]
    else:
        angles = noise[:, None] * 10000.0 ** (-torch.arange(half) / (half - 1 if song else half))
    e = torch.cat([angles.sin(), angles.cos()] if song else [angles.cos(), angles.sin()], dim=1)
    if song:
        e = e if labels is None else e + linear("map_label", labels * math.sqrt(labels.shape[1]))
        e = F.silu(linear("map_layer1", F.silu(linear("map_layer0", e))))
    else:
        e = linear("map_layer1", F.silu(linear("map_layer0", e)))
        e = F.silu(e if labels is None else e + linear("map_label", labels))
    skips, aux = [], x
    for p in blocks(w, "enc"):
        if "aux" in p:
            pad = (len(taps) - 1) // 2
            down = F.conv2d(aux, w[f"{p}.weight"], w[f"{p}.bias"], padding=1 + pad)
            x = skips[-1] = aux = (x + filtered(down, "down", taps, padded=False)) / math.sqrt(2)
        else:
            x = conv(p, x) if "conv" in p else block(p, x, e)
            skips.append(x)
    for p in (p for p in blocks(w, "dec") if "aux" not in p):
        x = block(p, torch.cat([x, skips.pop()], dim=1) if "block" in p else x, e)
    last = next((p for p in blocks(w, "dec") if "aux_norm" in p), "out_norm")
    return conv(last.replace("norm", "conv"), F.silu(norm(last, x)))


# --- pickles


class Persistent:
    """An object that pickles as one of `torch_utils.persistence`; reading it by that module would run `source`."""

    def __init__(self, class_name: str, state: Mapping[str, Any], source: str = "raise SystemExit('ran')"):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": dict(state)}

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def module(class_name: str, tensors: Tensors, **arguments: Any) -> Persistent:
    """A network of those tensors, nested by their names."""
    children = dict.fromkeys(name.split(".")[0] for name in tensors if "." in name)
    state = {
        "_parameters": {name: nn.Parameter(value) for name, value in tensors.items() if "." not in name},
        "_buffers": {},
        "_modules": {
            child: module("Part", {n.partition(".")[2]: v for n, v in tensors.items() if n.startswith(f"{child}.")})
            for child in children
        },
        "_init_args": (),
        "_init_kwargs": arguments,
    }
    return Persistent(class_name, state)


def dump(path: Path, data: Any, protocol: int = 4) -> Path:
    """Pickles with a module in the place of NVlabs'."""
    fake = ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise SystemExit('ran')", fake.__dict__)
    fake._reconstruct_persistent_obj.__module__ = fake.__name__
    outer = ModuleType("torch_utils")
    outer.persistence = fake  # type: ignore[attr-defined]
    sys.modules |= {"torch_utils": outer, fake.__name__: fake}
    try:
        path.write_bytes(pickle.dumps(data, protocol))
    finally:
        del sys.modules["torch_utils"], sys.modules[fake.__name__]
    return path
