"""EDM and EDM2 of NVlabs: networks against the papers, pickles that run nothing, conversion, latents, presets."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import edm_reference as reference
import pytest
import torch
from conftest import call
from edm_reference import Persistent, dump, module
from torch import Tensor

from guidegen.models.convert.nvlabs import Nvlabs, Options
from guidegen.models.convert.nvlabs_layout import Design, design
from guidegen.models.edm2_unet import Edm2UNet, mp_cat, mp_silu, mp_sum
from guidegen.models.edm_unet import DhariwalUNet, SongUNet
from guidegen.models.persistent import Record
from guidegen.models.presets import PRESETS, presets_of

SIZE = 8
FOURIER = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet, "Edm2UNet": Edm2UNet}


def made_of(class_name: str, **arguments: Any) -> Design:
    record = Record(class_name)
    record.state = {"_init_args": (), "_init_kwargs": arguments}
    return design(record)


def raw_tensors(made: Design, seed: int) -> dict[str, Tensor]:
    """Random tensors as a file has them, by the names of our network, which are its names."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in NETWORKS[made.network](**made.config).state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        spread = (
            1.0
            if made.network == "Edm2UNet" or "freqs" in name
            else 0.3
            if len(shape) == 1
            else 0.5 * shape[1:].numel() ** -0.5
        )
        found[name] = spread * torch.randn(shape) + (1.0 if ".norm" in name and name.endswith("weight") else 0.0)
        if made.network == "Edm2UNet" and name.endswith("emb_linear.weight"):
            found[name.replace("emb_linear.weight", "emb_gain")] = torch.tensor(0.5)
    return found | ({"out_gain": torch.tensor(0.8)} if made.network == "Edm2UNet" else {})


def snapshot(path: Path, class_name: str, seed: int = 0, encoder: Any = None, half: bool = False, **arguments: Any) -> Any:
    """A pickle of a network with random weights; gives the tensors and what it was made with."""
    arguments = {"img_resolution": SIZE, "img_channels": 3, "model_channels": 64, "num_blocks": 1} | arguments
    made = made_of(class_name, **arguments)
    raw = raw_tensors(made, seed)
    if half:
        raw = {name: value.half() for name, value in raw.items()}
    prefix = "unet" if class_name == "Precond" else "model"
    inner = {f"{prefix}.{name}": value for name, value in raw.items()}
    if prefix == "unet":
        inner |= {"logvar_linear.weight": torch.ones(1, 8), "logvar_fourier.freqs": torch.ones(8)}
    else:
        inner["model.map_augment.weight"] = torch.ones(64, 9)
        inner[f"model.enc.{SIZE // 2}x{SIZE // 2}_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2) / 4
    dump(path, {"ema": module(class_name, inner, **arguments), "encoder": encoder, "dataset_kwargs": {}})
    return {name: value.float() for name, value in raw.items()}, made


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm++": ("EDMPrecond", {"model_type": "SongUNet", "channel_mult": [1, 2], "attn_resolutions": [4], "label_dim": 3}),
    "ncsn++": ("VEPrecond", {"model_type": "SongUNet", "channel_mult": [1, 2], "attn_resolutions": [8], **FOURIER}),
    "vp": ("VPPrecond", {"channel_mult": [1, 2]}),
    "adm": ("EDMPrecond", {"channel_mult": [1, 2], "attn_resolutions": [8], "label_dim": 3, "label_dropout": 0.1}),
    "iddpm": ("iDDPMPrecond", {"channel_mult": [1, 2], "label_dim": 3}),
    "edm2": ("Precond", {"channel_mult": [1, 2], "attn_resolutions": [4], "label_dim": 3, "use_fp16": True}),
}


def denoised(made: Design, raw: dict[str, Tensor], x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    """D(x; sigma) of table 1, by the networks of the papers."""
    c, s = made.config, torch.tensor(sigma)
    kind = c.get("precondition", "edm")
    skip, out, scale = 1.0, -s, 1 / (s**2 + 1).sqrt()
    if kind == "edm":
        skip, out, scale, noise = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt(), s.log() / 4
    elif kind == "ve":
        out, scale, noise = s, torch.tensor(1.0), (s / 2).log()
    elif kind == "vp":
        noise = 999 * ((0.1**2 + 2 * 19.9 * (1 + s**2).log()).sqrt() - 0.1) / 19.9
    else:
        noise = 999 - torch.tensor(iddpm_levels()).sub(s).abs().argmin().float()
    if made.network == "Edm2UNet":
        found = reference.edm2(raw, scale * x, noise.expand(len(x)), labels)
    else:
        taps = tuple(c.get("resample_filter", (1, 1)))
        found = reference.edm(raw, scale * x, noise.expand(len(x)), labels, made.network == "SongUNet", taps)
    return skip * x + out * found[:, :3]


def iddpm_levels() -> list[float]:
    kept = [math.sin(math.pi / 2 * j / 1000 / 1.008) ** 2 for j in range(1001)]
    levels = [0.0]
    for j in range(1000, 0, -1):
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(kept[j - 1] / kept[j], 0.001) - 1))
    return levels[::-1]


@pytest.mark.parametrize("name", CASES)
def test_networks_are_those_of_the_papers(name: str, tmp_path: Path) -> None:
    class_name, arguments = CASES[name]
    raw, made = snapshot(tmp_path / "n.pkl", class_name, **arguments)
    network = Nvlabs.convert(tmp_path / "n.pkl", Options()).network
    x, labels = torch.randn(2, 3, SIZE, SIZE), torch.tensor([2, 0])
    one_hot = torch.eye(3)[labels] if "label_dim" in arguments else None
    for sigma in (60.0, 1.0, 0.05):
        found = network(sigma * x, torch.tensor(sigma), None if one_hot is None else labels)[0]
        wanted = denoised(made, raw, sigma * x, sigma, one_hot)
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
    if network.config.null_label is not None:
        wanted = denoised(made, raw, x, 1.0, torch.zeros(2, 3))
        assert (network(x, torch.tensor(1.0), torch.tensor([3, 3]))[0] - wanted).norm() < 1e-5 * wanted.norm()


def test_edm2_in_half_precision_divides_its_gains_there(tmp_path: Path) -> None:
    raw, made = snapshot(tmp_path / "n.pkl", "Precond", half=True, channel_mult=[1, 2], label_dim=3)
    assert made.config["emb_channels"] == 128
    network = Nvlabs.convert(tmp_path / "n.pkl", Options()).network
    rounded = {k: (v.half() / math.sqrt(128 if "emb" in k else 64 * 9)).float() for k, v in raw.items() if "gain" in k}
    for key, value in rounded.items():
        raw[key] = value * math.sqrt(128 if "emb" in key else 64 * 9)
    x = torch.randn(1, 3, SIZE, SIZE)
    wanted = denoised(made, raw, x, 1.0, torch.eye(3)[[1]])
    assert (network(x, torch.tensor(1.0), torch.tensor([1]))[0] - wanted).norm() < 1e-5 * wanted.norm()


def test_edm2_keeps_magnitudes() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 40, 8, 8), torch.randn(64, 8, 8, 8)
    assert mp_silu(a).square().mean() == pytest.approx(1, rel=0.01)
    assert mp_sum(a, torch.randn_like(a), 0.3).square().mean() == pytest.approx(1, rel=0.01)
    joined = mp_cat(a, b, 0.5)
    assert joined.square().mean() == pytest.approx(1, rel=0.01)
    assert joined[:, :40].square().sum() == pytest.approx(float(joined[:, 40:].square().sum()), rel=0.02)


# --- from a file to images


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A conditional network, an unconditional one and a weaker one of EDM2, and what they were made of."""
    folder = tmp_path_factory.mktemp("edm2")
    for name, more in {
        "edm2-img64-s-1073741-0.045": {"channel_mult": [1, 2], "label_dim": 3},
        "uncond": {"channel_mult": [1, 1], "label_dim": 0},
        "weak": {"channel_mult": [1, 1], "label_dim": 3},
    }.items():
        snapshot(folder / f"{name}.pkl", "Precond", seed=len(name), **more)
        call("convert", folder / f"{name}.pkl", folder / name)
    return {"net": folder / "edm2-img64-s-1073741-0.045", "uncond": folder / "uncond", "weak": folder / "weak"}


def heun(networks: tuple[Any, Any], labels: Tensor, w: float, steps: int, seeds: list[int]) -> Tensor:
    """Algorithm 1 of 2206.00364 in fp64 with D = D_0 + w (D_1 - D_0) of autoguidance."""
    noise = torch.cat([torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    sigmas = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)] + [0.0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        model, guide = (n(x.float(), torch.tensor(sigma), labels)[0].double() for n in networks)
        return (x - guide - w * (model - guide)) / sigma

    x = noise.double() * sigmas[0]
    for now, after in pairwise(sigmas):
        first = slope(x, now)
        to = x + (after - now) * first
        x = x + (after - now) * (first + slope(to, after)) / 2 if after else to
    return x


@pytest.mark.parametrize("guide", ["uncond", "weak"])
def test_guided_images_are_those_of_edms_sampler(guide: str, converted: dict[str, Path], tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    steps = ("--steps", 6, "--num", 2, "--label", 1, "--w", 1.7, "--dtype", "fp32")
    call(
        "sample",
        "-m",
        converted["net"],
        "--mode",
        "autoguidance",
        "--guide-model",
        converted[guide],
        *steps,
        "-o",
        tmp_path / "r",
        "-q",
    )
    networks = tuple(Edm2UNet.from_pretrained(converted[name] / "unet").eval() for name in ("net", guide))
    with torch.no_grad():
        wanted = heun(networks, torch.tensor([1, 1]), 1.7, 6, [0, 1])  # type: ignore[arg-type]
    pixels = ((wanted / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert pixels.std() > 20
    for seed, image in enumerate(pixels):
        found = np.asarray(Image.open(next((tmp_path / "r").rglob(f"{seed:06d}.png"))), dtype=float)
        assert abs(found - image).max() <= 1


def test_what_is_published_is_shown(converted: dict[str, Path]) -> None:
    fields = json.loads(call("inspect", converted["net"], "--json").stdout)
    assert fields["kind"] == "EDM2, class-conditional without a null label"
    assert list(fields["published"]) == ["edm2-img64-s-autog-fid"]
    assert (
        "guided by edm2-img64-xs-0134217-0.110.pkl, w 1.7, 32 steps: FID 1.01"
        in fields["published"]["edm2-img64-s-autog-fid"]
    )
    assert fields["default steps"] == 32
    assert "no null label" in str(call("sample", "-m", converted["net"], "--mode", "cfg", "--label", 1, code=2).exception)


def test_a_network_alone_guides_and_draws_nothing_without_its_scheduler(converted: dict[str, Path], tmp_path: Path) -> None:
    guided = ("--mode", "autoguidance", "--guide-model", converted["uncond"] / "unet", "--w", 2, "--dtype", "bf16")
    call("sample", "-m", converted["net"], *guided, "--label", 1, "--steps", 2, "-o", tmp_path / "x.png", "-q")
    assert "scheduler" in str(call("inspect", converted["net"] / "unet", code=4).exception)


def test_label_dropout_makes_zeros_the_null_label(tmp_path: Path) -> None:
    snapshot(tmp_path / "n.pkl", "Precond", channel_mult=[1, 1], label_dim=3)
    call("convert", tmp_path / "n.pkl", tmp_path / "n", "--label-dropout")
    fields = json.loads(call("inspect", tmp_path / "n", "--json").stdout)
    assert (fields["null label"], fields["labels"]) == (3, 3)
    assert "cfg" in fields["modes"]
    call("sample", "-m", tmp_path / "n", "--label", 2, "--w", 2, "--steps", 2, "-o", tmp_path / "x.png", "-q")


def test_latents_are_decoded_by_their_statistics(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    from guidegen.models.checkpoint import open_checkpoint
    from guidegen.models.networks import LoadOptions

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.save_pretrained(tmp_path / "vae")
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    import numpy as np

    scale = np.float32(0.5) / std.numpy()
    state = {"vae_name": "x", "scale": scale, "bias": -mean.numpy() * scale, "batch_size": 8, "_vae": None}
    path = tmp_path / "n.pkl"
    snapshot(
        path, "Precond", img_channels=4, channel_mult=[1, 1], label_dim=3, encoder=Persistent("StabilityVAEEncoder", state)
    )
    call("convert", path, tmp_path / "alone")
    assert "--vae" in str(
        call("sample", "-m", tmp_path / "alone", "--mode", "both", "--w", 1, "--label", 1, code=2).exception
    )
    call("convert", path, tmp_path / "n", "--vae", tmp_path / "vae")
    fields = json.loads(call("inspect", tmp_path / "n", "--json").stdout)
    assert (fields["resolution"], fields["latents"]) == ("16x16, 3 channels", "8x8, 4 channels")
    decode = open_checkpoint(tmp_path / "n").load(LoadOptions(torch.device("cpu"))).decode
    assert decode is not None
    latents = torch.randn(2, 4, SIZE, SIZE)
    with torch.no_grad():
        raw = latents / 0.5 * std[:, None, None] + mean[:, None, None]
        wanted = vae.decode(raw).sample  # in [0, 1]
        assert torch.allclose(decode(latents), 2 * wanted - 1, atol=1e-4)
    guided = ("--mode", "autoguidance", "--guide-model", tmp_path / "alone", "--w", 2, "--label", 1, "--steps", 2)
    call("sample", "-m", tmp_path / "n", *guided, "-o", tmp_path / "x.png", "-q")
    call("convert", path, tmp_path / "other", "--vae", tmp_path / "n" / "unet", code=2)


# --- pickles that are something else


class Runs:
    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved(value: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def storage_of(data: bytes) -> bytes:
    return b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + len(data).to_bytes(4, "little") + data + b"\x85R."


@pytest.mark.parametrize(
    "how", ["reduce", "inst", "obj", "newobj", "nested", "nested zip", "numpy", "persistent", "builtins", "in a list"]
)
def test_a_pickle_that_would_run_code_is_refused(how: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    command = f"touch {mark}"
    runs = Runs(os.system, command)
    data = {
        "reduce": pickle.dumps({"ema": runs}),
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "newobj": b"\x80\x04csubprocess\nPopen\n(S'" + command.encode() + b"'\nt\x81.",
        "nested": storage_of(saved(runs, zipped=False)),
        "nested zip": storage_of(saved(runs, zipped=True)),
        "numpy": b"\x80\x04cnumpy.testing._private.utils\nrunstring\n.",
        "persistent": b"\x80\x04ctorch_utils.persistence\n_src_to_module\n.",
        "builtins": b"\x80\x04cbuiltins\neval\n.",
        "in a list": pickle.dumps([[[runs]]], 2),
    }[how]
    for name in ("x.pkl", "x.pt"):
        (tmp_path / name).write_bytes(data)
    error = call("convert", tmp_path / "x.pkl", tmp_path / "out", code=5).exception
    assert "can run code" in str(error)
    assert str(tmp_path / "x.pkl") in str(error)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def bombs() -> dict[str, bytes]:
    pair: Any = ()
    pairs: Any = []
    for _ in range(150):
        pair, pairs = (pair, pair), [pairs, pairs]
    return {
        "a tuple that takes for ever to hash": b"\x80\x04}(" + pickle.dumps(pair, 3)[2:-1] + b"Nu.",
        "a list of lists": pickle.dumps({"ema": pairs}),
        "a place in the memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "a frame": b"\x80\x04\x95" + b"\xff" * 8,
        "bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little"),
        "a number": b"\x80\x04\x8b\xff\xff\xff\x7f",
        "an extension": b"\x80\x04\x82\x01.",
        "a dtype of lists of lists": b"\x80\x04cnumpy\ndtype\n" + pickle.dumps(pairs, 3)[2:-1] + b"\x85R.",
        "a tuple for a dtype": b"\x80\x04cnumpy.core.multiarray\nscalar\n(" + pickle.dumps(pair, 3)[2:-1] + b"B\0\0\0\0tR.",
        "a storage with a key that takes for ever": storage_of(b"\x80\x02}(" + pickle.dumps(pair, 3)[2:-1] + b"Nu."),
        "nothing": b"",
        "text": b"hello",
        "a mapping": pickle.dumps({"a": 1}),
        "a tensor larger than its storage": pickle.dumps({"ema": torch.ones(2)}, 4).replace(b"K\x02\x85", b"K\x09\x85"),
    }


@pytest.mark.parametrize("what", bombs())
def test_other_pickles_are_no_checkpoints(what: str, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(bombs()[what])
    assert str(tmp_path / "x.pkl") in str(call("convert", tmp_path / "x.pkl", tmp_path / "out", code=4).exception)


def test_truncated_pickles_and_other_networks_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "n.pkl"
    snapshot(path, "Precond", channel_mult=[1, 1], label_dim=3)
    whole = path.read_bytes()
    for length in (20, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        call("convert", path, tmp_path / "out", code=4)
    tensor = torch.ones(4, 4)
    shared = module("Part", {"weight": tensor})
    twice = Persistent(
        "Precond",
        {
            "_parameters": {},
            "_buffers": {},
            "_modules": {"a": shared, "b": shared},
            "_init_args": (),
            "_init_kwargs": {"img_resolution": 8, "img_channels": 3},
        },
    )
    few = {"img_resolution": 8, "img_channels": 3, "label_dim": 0}
    for network, why in (
        (module("Generator", {"weight": tensor}, z_dim=512), "none of EDM or EDM2"),
        (module("Precond", {"unet.weight": tensor}, **few), "tensor"),
        (module("Precond", {"unet.weight": tensor}, **few, model_channels=1 << 40), "not valid"),
        (module("Precond", {"unet.weight": tensor}, **few, num_blocks=10**9), "not valid"),
        (module("Precond", {"unet.weight": tensor}, **few, resample_filter=[1, 3, 3, 1]), "resample_filter"),
        (module("EDMPrecond", {"model.weight": tensor}, **few, decoder_type="skip", model_type="SongUNet"), "decoder_type"),
        (module("EDMPrecond", {"model.weight": tensor}, **few, something=1), "not valid"),
        (twice, "in two places"),
    ):
        dump(path, {"ema": network})
        assert why in str(call("convert", path, tmp_path / "out", code=4).exception)


# --- published files


def published_arguments(file: str) -> tuple[str, dict[str, Any], Any]:
    """Class, arguments and size of the network in a published file, by NVlabs' tables of training settings."""
    words = file.removesuffix(".pkl").split("-")
    if words[0] == "edm2":
        channels = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}[words[2]]
        label_dim = 0 if "uncond" in words else 1000
        latent = words[1] == "img512"
        arguments = {
            "img_resolution": 64,
            "img_channels": 4 if latent else 3,
            "label_dim": label_dim,
            "model_channels": channels,
        }
        return (
            "Precond",
            arguments,
            {128: ("125", "124"), 192: ("280", "279"), 256: "498", 320: "777", 384: "1119", 448: "1523"}[channels],
        )
    size = int(words[2].split("x")[0])
    arguments = {
        "img_resolution": size,
        "img_channels": 3,
        "label_dim": {"cond": 1000 if size == 64 else 10}.get(words[3], 0),
    }
    ours, ve = words[0] == "edm", words[-1] == "ve"
    if words[-1] == "adm":
        return "EDMPrecond" if ours else "iDDPMPrecond", arguments | {"model_type": "DhariwalUNet"}, "296"
    arguments |= {"model_type": "SongUNet", "channel_mult": [2, 2, 2] if ours and size == 32 else [1, 2, 2, 2]}
    arguments |= {"augment_dim": 9} if ours else {}
    arguments |= FOURIER if ve else {}
    return "EDMPrecond" if ours else "VEPrecond" if ve else "VPPrecond", arguments, "5" if size == 32 and ours else "6"


def test_published_networks_are_known_and_of_their_sizes() -> None:
    files = {each for preset in PRESETS for each in (preset.file, preset.guide) if each and each.endswith(".pkl")}
    assert len(files) == 12 + 51
    shapes: dict[str, str] = {}
    for file in sorted(files):
        assert presets_of(file)
        class_name, arguments, millions = published_arguments(file)
        made = made_of(class_name, **arguments)
        key = json.dumps(made.config)
        if key not in shapes:
            with torch.device("meta"):
                network = NETWORKS[made.network](**made.config)
            shapes[key] = f"{sum(p.numel() for p in network.parameters()) / 1e6:.0f}"
        assert shapes[key].startswith(millions), (file, shapes[key])
    assert len(call("presets").stdout.splitlines()) == len(PRESETS)
    assert json.loads(call("presets", "edm2-img512-xxl-autog-dino", "--json").stdout)["figure"] == "FD-DINOv2 24.18"
    call("presets", "nothing like this", code=2)
