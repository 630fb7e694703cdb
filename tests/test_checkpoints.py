"""What a checkpoint says of itself, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet

from guidegen.errors import CheckpointError, GuidegenError, UnsafeError, UsageError
from guidegen.models.checkpoint import Access, open_checkpoint, open_classifier
from guidegen.models.loading import load_network
from guidegen.models.weight_files import find_weights, weights_sha256


def edit(folder: Path, name: str, **changes: Any) -> Path:
    """Changes keys of a JSON file; None removes a key."""
    path = folder / name
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return folder


@pytest.fixture
def copy(with_null: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_null, tmp_path / "copy"))


def test_pipeline_folder(with_null: Path) -> None:
    checkpoint = open_checkpoint(str(with_null))
    assert checkpoint.null_label == 5  # five names, six classes: the last one
    assert checkpoint.labels.name(1) == "tabby"
    assert checkpoint.shape == (3, 8, 8)
    assert checkpoint.prediction_type == "epsilon"
    assert checkpoint.bundled_classifier == str(with_null / "classifier")
    assert [mode for mode in ("cfg", "classifier", "both", "none") if checkpoint.refusal(mode, True)] == []
    assert "--classifier" in (checkpoint.refusal("classifier", False) or "")


def test_plain_unet_folder_without_null_label(without_null: Path) -> None:
    checkpoint = open_checkpoint(str(without_null))
    assert checkpoint.null_label is None
    assert list(checkpoint.labels) == [0, 1, 2, 3, 4]
    assert "null label" in (checkpoint.refusal("cfg", True) or "")
    assert checkpoint.refusal("none", False) is None
    assert "linear schedule" in checkpoint.missing[0]
    named = open_checkpoint(str(without_null), null_label=4)
    assert (named.null_label, list(named.labels)) == (4, [0, 1, 2, 3])
    assert named.refusal("cfg", False) is None
    with pytest.raises(UsageError, match=r"--null-label 5 is not a class"):
        open_checkpoint(str(without_null), null_label=5)


def test_unconditional_pipeline(unconditional: Path) -> None:
    checkpoint = open_checkpoint(str(unconditional))
    assert not checkpoint.class_conditional
    assert "unconditional" in (checkpoint.refusal("cfg", True) or "")
    assert checkpoint.refusal("classifier", True) is None
    with pytest.raises(UsageError, match="no classes"):
        open_checkpoint(str(unconditional), null_label=3)


def test_declared_null_label_and_steps(copy: Path) -> None:
    edit(copy, "model_index.json", null_label=0, default_steps=12)
    checkpoint = open_checkpoint(str(copy))
    assert (checkpoint.null_label, checkpoint.steps) == (0, 12)
    assert 0 not in checkpoint.labels


def test_columns_match_by_name_then_by_id(with_null: Path, copy: Path, without_null: Path) -> None:
    labels = open_checkpoint(str(with_null)).labels
    names = {"10": "lion", "11": "tabby, tabby cat", "12": "zebra"}
    edit(copy / "classifier", "config.json", id2label=names)
    assert open_classifier(str(copy / "classifier")).columns(labels) == {4: 0, 1: 1}
    nameless = open_checkpoint(str(without_null)).labels
    assert open_classifier(str(with_null / "classifier")).columns(nameless) == {i: i for i in range(5)}

    edit(copy / "classifier", "config.json", id2label=dict.fromkeys(sorted(map(str, range(12))), ""))
    assert open_classifier(str(copy / "classifier")).columns(labels) == {i: i for i in labels}


Break = Callable[[Path], object]


def pickle_only(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet = tiny_unet(num_class_embeds=6)
    torch.save(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(text)


def cut(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: list[tuple[Break, type[GuidegenError], str]] = [
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), CheckpointError, "no diffusion_pytorch"),
    (cut, CheckpointError, "cut short"),
    (pointer, CheckpointError, "git lfs pull"),
    (pickle_only, UnsafeError, "--allow-pickle"),
    (lambda f: edit(f / "unet", "config.json", block_out_channels=[8, 32]), CheckpointError, "do not (load|fit)"),
    (lambda f: edit(f / "unet", "config.json", layers_per_block=2), CheckpointError, "do not (load|fit)"),
    (lambda f: edit(f / "unet", "config.json", _class_name="UNet9DModel"), CheckpointError, "UNet9DModel"),
    (lambda f: edit(f / "unet", "config.json", auto_map={"x": "y"}), UnsafeError, "code of its own"),
    (lambda f: edit(f / "unet", "config.json", sample_size=None), CheckpointError, "sample_size"),
    (lambda f: (f / "unet" / "config.json").write_text("{"), CheckpointError, "cannot be read as JSON"),
    (lambda f: (f / "unet" / "config.json").unlink(), CheckpointError, "unet/config.json is missing"),
    (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), CheckpointError, "scheduler"),
    (lambda f: edit(f, "model_index.json", unet=["my_module", "UNet2DModel"]), UnsafeError, "my_module"),
    (lambda f: edit(f, "model_index.json", unet=["diffusers", "Other"]), CheckpointError, "Other"),
    (lambda f: edit(f, "model_index.json", _class_name=["pipeline", "Mine"]), UnsafeError, "remote code"),
    (lambda f: edit(f, "model_index.json", id2label={str(i): "x" for i in range(9)}), CheckpointError, "past the model"),
    (lambda f: edit(f, "model_index.json", null_label=99), CheckpointError, "null label 99"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), BROKEN)
def test_broken_checkpoints_say_what_is_wrong(copy: Path, damage: Break, kind: type[GuidegenError], message: str) -> None:
    damage(copy)
    with pytest.raises(kind, match=message) as caught:
        load_network(open_checkpoint(str(copy)), "cpu")
    assert str(caught.value).count("\n") <= 1


def test_pickled_weights_when_asked(copy: Path, with_null: Path) -> None:
    whole = load_network(open_checkpoint(str(with_null)), "cpu").state_dict()
    pickle_only(copy)
    checkpoint = open_checkpoint(str(copy))
    loaded = load_network(checkpoint, "cpu", Access(allow_pickle=True)).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in whole.items())


def test_code_in_a_pickle_never_runs(copy: Path, tmp_path: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    pickle_only(copy)
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Evil()}))
    for allowed in (False, True):
        with pytest.raises(UnsafeError, match="mkdir" if allowed else "--allow-pickle"):
            load_network(open_checkpoint(str(copy)), "cpu", Access(allow_pickle=allowed))
    assert not (tmp_path / "ran").exists()


def test_sha256_follows_the_weights(copy: Path) -> None:
    before = weights_sha256([copy / "unet"])
    assert len(find_weights(copy / "unet").files) == 1
    tiny_unet(seed=1, num_class_embeds=6).save_pretrained(copy / "unet")
    assert weights_sha256([copy / "unet"]) != before


def test_hub_id_from_the_cache(with_null: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache that huggingface_hub keeps, filled by hand: nothing is downloaded."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(with_null, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    for ref in ("someone/tiny", "someone/tiny@main", f"someone/tiny@{commit}"):
        checkpoint = open_checkpoint(ref, weights=True, access=Access(offline=True))
        assert (checkpoint.revision, checkpoint.name) == (commit, "tiny")
    with pytest.raises(CheckpointError, match="cannot be reached"):
        open_checkpoint("someone/else", access=Access(offline=True))
    with pytest.raises(CheckpointError, match=r"cannot be reached|no revision"):
        open_checkpoint("someone/tiny@v9", access=Access(offline=True))


@pytest.mark.parametrize("ref", ["/nowhere/at/all", "nowhere", "./a/b", "a/b/c"])
def test_no_such_folder(ref: str) -> None:
    with pytest.raises(CheckpointError, match="No checkpoint at"):
        open_checkpoint(ref)


def test_a_pipeline_is_no_classifier(with_null: Path, without_null: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_classifier(str(with_null))
    with pytest.raises(CheckpointError, match="UNet2DModel"):
        open_classifier(str(without_null))
