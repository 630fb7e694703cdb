"""SiT and REPA: the network against the paper, conversion, and the ODE sampler."""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, EDGE, LABELS = 48, 3, 2, 8, 4


def state_of(
    seed: int = 0, learned: bool = True, qk_norm: bool = False, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A state dict by the names and shapes of SiT's code (patches of 2x2, 4 channels)."""
    d = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (EDGE // 2) ** 2, d),
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "x_embedder.proj.bias": (d,),
        "y_embedder.embedding_table.weight": (LABELS + 1, d),
        "final_layer.linear.weight": (16 * (1 + learned), d),
        "final_layer.linear.bias": (16 * (1 + learned),),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    linears = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    for i in range(DEPTH):
        block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        block["adaLN_modulation.1"] = (6 * d, d)
        linears |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        if qk_norm:
            shapes |= {f"blocks.{i}.attn.{n}_norm.{p}": (d // HEADS,) for n in "qk" for p in ("weight", "bias")}
    shapes |= {f"{n}.weight": s for n, s in linears.items()} | {f"{n}.bias": s[:1] for n, s in linears.items()}
    torch.manual_seed(seed)
    return {name: 0.15 * torch.randn(shape) for name, shape in shapes.items()} | (more or {})


def velocity(w: dict[str, Tensor], x: Tensor, t: float, y: Tensor) -> Tensor:
    """The network of the paper (DiT's of 2212.09748, with times from 0 to 1), of images (B, 4, H, W)."""

    def linear(name: str, v: Tensor) -> Tensor:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(v: Tensor, eps: float = 1e-6) -> Tensor:
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, correction=0) + eps).sqrt()

    patches = x.reshape(len(x), 4, EDGE // 2, 2, EDGE // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(x), -1, 16)
    h = patches @ w["x_embedder.proj.weight"].reshape(WIDTH, 16).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t * 10000.0 ** (-torch.arange(128) / 128)
    times = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()])[None])))
    c = F.silu(times + w["y_embedder.embedding_table.weight"][y])
    for i in range(DEPTH):
        p = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = linear(f"{p}.adaLN_modulation.1", c)[:, None].chunk(6, dim=-1)
        q, k, v = linear(f"{p}.attn.qkv", norm(h) * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if f"{p}.attn.q_norm.weight" in w:
            q, k = (
                norm(a, 1e-5) * w[f"{p}.attn.{n}_norm.weight"] + w[f"{p}.attn.{n}_norm.bias"]
                for n, a in (("q", q), ("k", k))
            )
        a = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        h = h + gate * linear(f"{p}.attn.proj", a.transpose(1, 2).flatten(2))
        h = h + gate2 * linear(
            f"{p}.mlp.fc2", F.gelu(linear(f"{p}.mlp.fc1", norm(h) * (1 + scale2) + shift2), approximate="tanh")
        )
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = out.reshape(len(x), EDGE // 2, EDGE // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, EDGE, EDGE)
    return out[:, :4]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=2 * EDGE, **blocks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sit")
    torch.save(state_of(), folder / "SiT-S-2.pt")
    call("convert", folder / "SiT-S-2.pt", folder / "sit", "--heads", HEADS, "--vae", vae)
    return folder / "sit"


@pytest.mark.parametrize(("learned", "qk_norm", "repa"), [(True, False, False), (False, False, True), (False, True, True)])
def test_the_network_is_that_of_the_paper(learned: bool, qk_norm: bool, repa: bool, tmp_path: Path) -> None:
    from guidegen.models.convert.sit import Options, SiT

    path = tmp_path / ("repa.pt" if repa else "sit.pt")
    state = state_of(learned=learned, qk_norm=qk_norm)
    torch.save({"ema": state, "args": argparse.Namespace(prediction="v")}, path)
    assert SiT.matches(path)
    network = SiT.convert(path, Options(heads=HEADS)).network
    x, y = torch.randn(2, 4, EDGE, EDGE), torch.tensor([1, LABELS])
    for noise in (1.0, 0.6, 0.01):
        wanted = velocity(state, x, noise, y) if repa else -velocity(state, x, 1 - noise, y)
        found = network(x, torch.full((2,), 1000 * noise), y)[0]
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_guided_images_are_those_of_the_ode(converted: Path, vae: Path, tmp_path: Path) -> None:
    """Euler steps from noise at time 0 to data at time 1, as the paper's fixed-step ODE sampler."""
    from diffusers import AutoencoderKL

    facts = json.loads(call("inspect", converted, "--json").stdout)
    assert (facts["kind"], facts["prediction type"], facts["null label"]) == (
        "SiT, class-conditional with a null label",
        "flow",
        4,
    )
    steps, w = 40, 1.5
    given = ("--label", 2, "--w", w, "--num", 2, "--steps", steps, "--dtype", "fp32", "-o", tmp_path / "r", "-q")
    call("sample", "-m", converted, *given)
    state, seeds = state_of(), [0, 1]
    x = torch.cat([torch.randn(1, 4, EDGE, EDGE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    times = torch.linspace(0, 1, steps).tolist()
    labels, null = torch.tensor([2, 2]), torch.tensor([LABELS, LABELS])
    for now, after in pairwise(times):
        u, c = velocity(state, x, now, null), velocity(state, x, now, labels)
        x = x + (after - now) * (u + w * (c - u))
    with torch.no_grad():
        decoded = AutoencoderKL.from_pretrained(vae).decode(x / 0.18215).sample
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert pixels.std() > 5
    for seed, image in enumerate(pixels):
        found = np.asarray(Image.open(next((tmp_path / "r").rglob(f"{seed:06d}.png"))), dtype=float)
        assert abs(found - image).max() <= 1


def test_files_are_recognised_by_content(tmp_path: Path, vae: Path) -> None:
    from safetensors.torch import save_file

    save_file(state_of(), tmp_path / "sit.safetensors")
    call("convert", tmp_path / "sit.safetensors", tmp_path / "a", "--heads", HEADS)
    assert "--vae" in str(call("sample", "-m", tmp_path / "a", "--label", 1, code=2).exception)
    torch.save(state_of(), tmp_path / "model.pth")
    shown = str(call("convert", tmp_path / "model.pth", tmp_path / "b", "--heads", HEADS, code=2).exception)
    assert "--network sit or repa" in shown
    assert "--heads" in str(call("convert", tmp_path / "model.pth", tmp_path / "b", "--network", "sit", code=2).exception)
    call("convert", tmp_path / "model.pth", tmp_path / "b", "--heads", HEADS, "--network", "repa")
    aligned = state_of(learned=False, more={"projectors.0.0.weight": torch.ones(2, WIDTH)})
    torch.save(aligned, tmp_path / "last.pt")
    call("convert", tmp_path / "last.pt", tmp_path / "c", "--heads", HEADS)
    assert "flow" in str(call("inspect", tmp_path / "c" / "transformer", code=4).exception)
    assert json.loads(call("inspect", tmp_path / "c", "--json").stdout)["published"] == {}  # of REPA's XL alone
    torch.save(state_of(), tmp_path / "SiT-XL-2-256x256.pt")
    call("convert", tmp_path / "SiT-XL-2-256x256.pt", tmp_path / "d", "--heads", HEADS)
    published = json.loads(call("inspect", tmp_path / "d", "--json").stdout)["published"]
    assert "w 1.5, 250 steps: FID 2.06" in published["SiT-XL/2"]
    assert json.loads((tmp_path / "c/transformer/config.json").read_text())["data_time"] == 0


def test_other_state_dicts_are_no_sit(tmp_path: Path) -> None:
    lacking = {name: value for name, value in state_of().items() if "mlp.fc2" not in name}
    for state, code, why in (
        (state_of(more={"blocks.0.mlp.w12.weight": torch.ones(2)}), 4, "LightningDiT"),
        (state_of(more={"extra.weight": torch.ones(2)}), 4, "extra.weight"),
        (lacking, 4, "mlp.fc2"),
        ({"ema": state_of(), "args": argparse.Namespace(path_type="GVP")}, 4, "path_type"),
    ):
        torch.save(state, tmp_path / "sit.pt")
        assert why in str(call("convert", tmp_path / "sit.pt", tmp_path / "out", "--heads", HEADS, code=code).exception)
    whole = (tmp_path / "sit.pt").read_bytes()
    (tmp_path / "sit.pt").write_bytes(whole[: len(whole) // 2])
    call("convert", tmp_path / "sit.pt", tmp_path / "out", code=4)


def test_published_network_is_of_its_size() -> None:
    from guidegen.models.sit import SiTTransformer2DModel

    with torch.device("meta"):
        network = SiTTransformer2DModel()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(675, abs=1)
