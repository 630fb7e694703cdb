"""Checkpoints that are wrong on purpose: each is an error of one or two lines with an exit code of the contract."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from guidegen.cli import app
from guidegen.errors import CheckpointError, GuidegenError, UnsafeError, UsageError
from guidegen.models.checkpoint import Access, open_checkpoint, open_classifier
from guidegen.models.classifiers.opening import load_classifier
from guidegen.models.loading import load_network

INDEX, UNET, SCHEDULER, JUDGE = (
    "model_index.json",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "classifier/config.json",
)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
REMOVED = object()


@pytest.fixture
def copy(with_null: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_null, tmp_path / "copy"))


def use(folder: Path) -> None:
    """Opens, plans and loads it, without and with a classifier."""
    for mode in ("cfg", "classifier"):
        flags = ["sample", "-m", str(folder), "--mode", mode, "--label", "1", "--steps", "2", "--dry-run"]
        result = CliRunner().invoke(app, flags)
        if result.exception is not None:
            raise result.exception
    checkpoint = open_checkpoint(folder)
    checkpoint.check_networks()
    load_network(checkpoint, "cpu")
    load_classifier(open_classifier(folder / "classifier"), "cpu")


def refused(folder: Path, *codes: int) -> GuidegenError:
    """Using it ends in an error with one of these exit codes, 4 unless told, in one or two lines."""
    with pytest.raises(GuidegenError) as found:
        use(folder)
    error = found.value
    assert error.code in (codes or (4,))
    assert str(error).count("\n") <= 1
    assert len(str(error)) < 1000 + 3 * len(str(folder))
    assert str(error).isprintable() or "\n" in str(error)
    return error


def test_what_they_are_made_of_is_fine(copy: Path) -> None:
    use(copy)


VALUES: list[tuple[str, str, list[Any]]] = [
    (UNET, "sample_size", [-1, 0, 10**9, 1e9, "64", [64], [8, 8, 8], [8, -1], True, {}, 2**70]),
    (UNET, "in_channels", [0, -3, 4, 10**12, "3", None, [3], True]),
    (UNET, "out_channels", [0, "3", 10**12, 5]),
    (UNET, "num_class_embeds", [0, -1, 10**12, "6", 6.5, True, [6]]),
    (UNET, "block_out_channels", [[], "abc", ["8", "16"], [8, 0], [8, -16], [10**9, 10**9], [8] * 100, 8, [[8], [16]], [8]]),
    (UNET, "down_block_types", [[], "DownBlock2D", ["NoBlock", "NoBlock"], [None, None], 3, ["DownBlock2D"]]),
    (UNET, "layers_per_block", [0.5, -1, 10**9, "1", [1], True]),
    (UNET, "norm_num_groups", [0, 3, "4"]),
    (UNET, "attention_head_dim", [0, "4", -1]),
    (UNET, "act_fn", ["rm -rf", 7]),
    (UNET, "freq_shift", ["a", [1]]),
    (UNET, "time_embedding_type", ["none", 7]),
    (UNET, "_class_name", [["UNet2DModel"], None, 7, "UNet9DModel", "x" * 10**6, {"a": 1}]),
    (UNET, "null_label", [True, 1.5, -1, "5", [5], 6]),
    (UNET, "default_steps", [True, 0, -1, 1.5, "50", 10**12]),
    (UNET, "auto_map", [{}, None, {"AutoModel": "evil.Model"}]),
    (
        INDEX,
        "unet",
        ["UNet2DModel", ["diffusers"], ["diffusers", 7], [7, "UNet2DModel"], [["a"], "b"], None, [None, None], {}],
    ),
    (INDEX, "unet", [["diffusers", "x" * 10**6], ["evil", "UNet2DModel"]]),
    (INDEX, "vae", [["diffusers", "AutoencoderKL"], ["diffusers", ["x"]]]),
    (INDEX, "scheduler", [None, 7, ["diffusers"], []]),
    (INDEX, "_class_name", [["pipeline", "Mine"], None, 7, {}]),
    (INDEX, "id2label", [["a", "b"], "text", 7, {"x": "a"}, {"0": 1}, {"-1": "a"}, {"1.5": "a"}]),
    (INDEX, "id2label", [{"0": "a" * 10**6}, {"0": None}, {"99": "a"}, {" 1": "a"}, {"01": "a"}, {"9" * 5000: "a"}]),
    (INDEX, "null_label", [True, 1.5, -1, "5", 10**30]),
    (INDEX, "default_steps", [True, 0, [], "x"]),
    (INDEX, "sample_size", [-1, "8", 10**9]),
    (SCHEDULER, "prediction_type", [7, None, "noise", ["epsilon"], True]),
    (SCHEDULER, "num_train_timesteps", [0, -1, 10**12, "1000", 1.5, True]),
    (SCHEDULER, "_class_name", [7, ["DDIMScheduler"], {}]),
    (SCHEDULER, "use_flow_sigmas", ["yes", 7]),
    (JUDGE, "id2label", [[], {}, None, ["a"], {"0": 7}, 7, REMOVED]),
    (JUDGE, "logit_scales", [[1.0], "12", ["a", "b"], [None, 1.0], [-1, 1]]),
    (JUDGE, "block_out_channels", [[], "ab", [8, 10**9], None]),
    (JUDGE, "sample_size", [-1, "8", 10**12]),
    (JUDGE, "pooling", ["max", 7]),
    (JUDGE, "down_block_types", [[], ["No", "No"], 5]),
    (JUDGE, "layers_per_block", [10**9, "1"]),
]
CASES = [(file, key, value) for file, key, values in VALUES for value in values]


@pytest.mark.parametrize(("file", "key", "value"), CASES, ids=[f"{f[:5]}-{k}-{str(v)[:20]}" for f, k, v in CASES])
def test_values_of_another_type_or_size(file: str, key: str, value: Any, copy: Path) -> None:
    path = copy / file
    data = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not REMOVED}))
    refused(copy, 4, 5)


def big(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(100 << 20)


Damage = Callable[[Path], object]
FILES: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: path.write_bytes(b"[]"),
    "null": lambda path: path.write_bytes(b"null"),
    "NaN": lambda path: path.write_bytes(b"NaN"),
    "deep lists": lambda path: path.write_bytes(b"[" * 200_000),
    "deep objects": lambda path: path.write_bytes(b'{"a":' * 200_000),
    "null bytes": lambda path: path.write_bytes(b"\0" * 100),
    "UTF-16": lambda path: path.write_bytes(path.read_text().encode("utf-16")),
    "BOM": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "half a pair": lambda path: path.write_bytes(b'{"_class_name": "\\ud800"}'),
    "long number": lambda path: path.write_bytes(b'{"sample_size": ' + b"9" * 100_000 + b"}"),
    "100 MB": big,
    "FIFO": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "dangling": lambda path: path.symlink_to("nothing"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("file", [INDEX, UNET, SCHEDULER, JUDGE])
@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
def test_files_that_hold_something_else(file: str, damage: Damage, copy: Path) -> None:
    path = copy / file
    if damage in (os.mkfifo, *(FILES[name] for name in ("folder", "dangling", "device", "loop"))):
        path.unlink()
    damage(path)
    refused(copy, *((2, 4) if file == JUDGE else (4,)))  # a folder without a classifier is a mode that cannot be


def test_labels_of_ten_million_are_not_read(copy: Path) -> None:
    labels = ",".join(f'"{i}":"a"' for i in range(2_000_000))
    (copy / INDEX).write_text('{"id2label":{' + labels + "}}")
    assert "more than" in str(refused(copy))


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def rename(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DAMAGED: dict[str, Damage] = {
    **{name: FILES[name] for name in ("empty", "null bytes", "FIFO", "folder", "dangling", "device", "loop")},
    "short": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "header of 2^60": lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
    "header past the end": lambda path: path.write_bytes(struct.pack("<Q", 1000) + b"{}"),
    "no JSON": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe{}"),
    "deep header": lambda path: path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000),
    "overlap": lambda path: path.write_bytes(header(a=ONE, b=ONE)),
    "same name twice": lambda path: path.write_bytes(header(ab=ONE, ba=ONE).replace(b'"ba"', b'"ab"')),
    "offsets back": lambda path: path.write_bytes(header(a=ONE | {"data_offsets": [16, 0]})),
    "shape of another size": lambda path: path.write_bytes(header(a=ONE | {"shape": [1 << 40, 1 << 40]})),
    "fp8": lambda path: rename(path, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()})),
    "int8": lambda path: rename(path, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
    "one missing": lambda path: rename(path, lambda t: t.pop("conv_in.weight")),
    "one too many": lambda path: rename(path, lambda t: t.update({"more.weight": torch.zeros(3)})),
    "another shape": lambda path: rename(path, lambda t: t.update({"conv_in.bias": torch.zeros(9)})),
    "of another network": lambda path: save_file({"x": torch.zeros(3)}, path),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_weights_that_are_none(damage: Damage, copy: Path) -> None:
    path = copy / WEIGHTS
    if damage in (os.mkfifo, *(FILES[name] for name in ("folder", "dangling", "device", "loop"))):
        path.unlink()
    damage(path)
    refused(copy)


def test_a_config_of_a_giant_takes_no_memory(copy: Path) -> None:
    config = json.loads((copy / UNET).read_text()) | {"block_out_channels": [32768, 65536]}
    (copy / UNET).write_text(json.dumps(config))
    assert "it describes" in str(refused(copy))


@pytest.mark.parametrize("names", [["../../../etc/passwd"], ["model-00002-of-00009.safetensors"], [7], "text"])
def test_an_index_that_names_other_files(names: Any, copy: Path) -> None:
    where = {f"layer.{i}": name for i, name in enumerate(names)} if isinstance(names, list) else names
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    refused(copy)


def test_links_inside_a_folder_are_fine(copy: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (copy / WEIGHTS).rename(blob)
    (copy / WEIGHTS).symlink_to(blob)
    load_network(open_checkpoint(copy), "cpu")


class Evil:
    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_runs_code_is_unsafe(protocol: int, zipped: bool, copy: Path, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", copy / "unet" / "diffusion_pytorch_model.bin"
    (copy / WEIGHTS).unlink()
    content = {"conv_in.weight": Evil(os.mkdir, str(ran))}
    if zipped:
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(content, protocol))
    for allowed in (False, True):
        with pytest.raises(UnsafeError, match=r"diffusion_pytorch_model\.bin") as found:
            load_network(open_checkpoint(copy), "cpu", Access(allow_pickle=allowed))
        assert str(found.value).count("\n") <= 1
    (tmp_path / "x.pt").write_bytes(path.read_bytes())
    flags = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "made")]
    result = CliRunner().invoke(app, flags)
    assert isinstance(result.exception, UnsafeError)
    assert not ran.exists()
    assert not (tmp_path / "made").exists()


def test_a_damaged_pickle_is_no_danger(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    path = copy / "unet" / "diffusion_pytorch_model.bin"
    torch.save(tiny_unet(num_class_embeds=6).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match="cut short"):
        load_network(open_checkpoint(copy), "cpu", Access(allow_pickle=True))


@pytest.mark.parametrize("size", ["0", "-8", "1000000000", "9" * 5000, "9", "8x9", "٨", "1e3", "8x", "inf", "", "16392"])
def test_sizes_that_cannot_be(size: str, copy: Path) -> None:
    flags = ["sample", "-m", str(copy), "--label", "1", "--steps", "1", f"--size={size}", "--dry-run"]
    error = CliRunner().invoke(app, flags).exception
    assert isinstance(error, UsageError)
    assert str(error).count("\n") <= 1


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": "b"}', "[1]", "[" * 100_000, "NaN", '{"0": null}'])
def test_labels_for_convert_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(text)
    flags = ["convert", "x.pt", str(tmp_path / "made"), "--labels", str(tmp_path / "labels.json")]
    error = CliRunner().invoke(app, flags).exception
    assert isinstance(error, UsageError)
    assert str(error).count("\n") <= 1


@pytest.mark.parametrize("kind", ["FIFO", "folder", "dangling", "device", "100 MB"])
def test_files_of_labels_that_are_none(kind: str, tmp_path: Path) -> None:
    FILES[kind](tmp_path / "labels.json")
    error = CliRunner().invoke(app, ["convert", "x.pt", "made", "--labels", str(tmp_path / "labels.json")]).exception
    assert isinstance(error, UsageError)
