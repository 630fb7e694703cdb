"""DiT, Stable Diffusion and SDXL folders on the command line: prompts, sizes, files, and what is wrong with broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from PIL import Image

from guidegen.errors import CheckpointError, GuidegenError, UnsafeError, UsageError
from guidegen.models.checkpoint import Access, open_checkpoint
from guidegen.models.loading import load_part
from guidegen.models.weight_files import find_weights

Command = Callable[..., Any]
KINDS = ["dit", "stable_diffusion", "stable_diffusion_xl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("pipelines")
    return {kind: getattr(pipelines, kind)(home / kind) for kind in KINDS}


@pytest.fixture
def copies(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(folders[kind], tmp_path / kind)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]


def test_prompts_on_the_command_line(folders: dict[str, Path], guidegen: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("snow\n\nan old house, # by the sea\n")
    model = folders["stable_diffusion"]
    flags = ["sample", "-m", model, "--steps", 2, "-o", "run", "-n", 2, "--negative-prompt", "dull"]
    done = guidegen(*flags, "--prompt", "a red fox", "-p", "@prompts.txt", "-p", "-", input="fog\n")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["prompt"] for row in rows[::2]] == ["a red fox", "snow", "an old house, # by the sea", "fog"]
    assert {row["label"] for row in rows} == {None}
    assert rows[2]["file"] == "images/w3.0/prompt0001/000000.png"
    text = Image.open(tmp_path / "run" / rows[0]["file"]).text  # type: ignore[attr-defined]
    assert text["parameters"].startswith("a red fox\nNegative prompt: dull\nSteps: 2, ")
    assert json.loads(text["guidegen"])["cell"]["prompt"] == "a red fox"

    more = guidegen(*flags, *(f"--prompt={p}" for p in ["a red fox", "snow", "an old house, # by the sea", "fog", "b"]))
    assert more.returncode == 0, more.stderr
    assert len(rows_of(tmp_path / "run")) == 10
    other = guidegen(*flags, "--prompt", "a blue fox")
    assert other.returncode == 2
    assert "'a red fox' there, 'a blue fox' now" in other.stderr


def test_a_prompt_that_is_too_long_is_told(folders: dict[str, Path], guidegen: Command) -> None:
    done = guidegen("sample", "-m", folders["stable_diffusion_xl"], "--steps", 1, "--prompt", "a very long tale of a fox")
    assert done.returncode == 0
    assert done.stderr.count("more tokens than the model reads") == 1


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("stable_diffusion", ["--label", 3], "takes text, not labels: give --prompt"),
        ("stable_diffusion", [], "needs, in mode cfg, --prompt"),
        ("stable_diffusion", ["--prompt", "a", "--size", "17"], "multiples of 4"),
        ("stable_diffusion", ["--prompt", "a", "--size", "big"], "WIDTHxHEIGHT"),
        ("stable_diffusion", ["--prompt", "a", "--variant", "bf16"], "no bf16 files"),
        ("stable_diffusion", ["--prompt", "@none.txt"], "cannot be read"),
        ("stable_diffusion", ["--prompt", "a", "--null-label", 3], "has no classes"),
        ("stable_diffusion", ["--mode", "none", "--prompt", "a", "--negative-prompt", "b"], "draws a prompt without it"),
        ("dit", ["--prompt", "a"], "reads text"),
        ("dit", ["--label", 0, "--negative-prompt", "a"], "reads text"),
        ("dit", ["--label", 0, "--size", 32], "the size it was trained at, 16x16"),
        ("dit", ["--label", 5], "is not a label"),
    ],
)
def test_usage(folders: dict[str, Path], guidegen: Command, tmp_path: Path, kind: str, flags: list[Any], words: str) -> None:
    done = guidegen("sample", "-m", folders[kind], "--steps", 1, *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "guidegen-runs").exists()


def test_classifier_and_prompt_together(
    folders: dict[str, Path], classifier_folder: Path, guidegen: Command, tmp_path: Path
) -> None:
    """A classifier of clean images reads what the VAE decodes; the prompt goes to the network."""
    model = folders["stable_diffusion"]
    flags = ["-m", model, "-c", classifier_folder, "--steps", 2, "--label", "tabby,lion"]
    noisy = guidegen("sample", *flags, "--mode", "both", "--prompt", "snow")
    assert noisy.returncode == 2
    assert "reads 3 channels, and the model draws 4 (latents)" in noisy.stderr
    flags += ["--classifier-input", "denoised"]
    done = guidegen("sample", *flags, "--mode", "both", "--prompt", "snow", "-o", "run", "--w-classifier", 30)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["file"] for row in rows] == [f"images/w3.0_c30.0/prompt0000_label000{i}/000000.png" for i in (1, 4)]
    assert rows[0]["nfe"] == 3 * 4  # PNDM takes its first step of two in halves; null, prompt, and two a gradient
    tabby, lion = (Image.open(tmp_path / "run" / row["file"]).tobytes() for row in rows)
    assert tabby != lion
    detached = guidegen("sample", *flags, "--mode", "classifier", "--classifier-gradient", "detached", "-o", "detached")
    assert detached.returncode == 0, detached.stderr
    assert rows_of(tmp_path / "detached")[0]["nfe"] == 3 * 2
    unused = guidegen("sample", *flags, "--mode", "classifier", "--prompt", "snow")
    assert unused.returncode == 2
    assert "--mode both uses the prompt too" in unused.stderr


def test_dit_labels_and_none(folders: dict[str, Path], guidegen: Command) -> None:
    assert guidegen("labels", "-m", folders["dit"]).stdout.splitlines()[1] == "207\tgolden retriever"
    done = guidegen("sample", "-m", folders["dit"], "--mode", "none", "--steps", 1)
    assert done.returncode == 0
    assert done.stdout.strip().endswith("images/w0.0/nolabel/000000.png")
    assert guidegen("labels", "-m", folders["stable_diffusion"]).returncode == 2


@pytest.mark.parametrize("kind", KINDS)
def test_inspect(folders: dict[str, Path], guidegen: Command, kind: str) -> None:
    facts = json.loads(guidegen("inspect", folders[kind], "--json").stdout)
    checkpoint = open_checkpoint(folders[kind])
    network = load_part(checkpoint, checkpoint.network, "cpu")
    saved = sum(tensor.numel() for tensor in network.state_dict().values())
    assert facts["parameters"] == saved
    assert facts["resolution"] == "16x16, 3 channels"
    assert facts["latents"] == "8x8, 4 channels"
    assert facts["learned variance"] == (kind == "dit")
    assert facts["condition"] == ("label" if kind == "dit" else "prompt")
    assert facts["modes"] == ["cfg", "none"]
    assert "vae" in facts["other parts"]
    assert facts["null label"] == (1000 if kind == "dit" else "the empty or negative prompt")


def test_variants_and_shards(copies: Callable[[str], Path], guidegen: Command) -> None:
    folder = copies("stable_diffusion")
    checkpoint = open_checkpoint(folder)
    unet: Any = load_part(checkpoint, "unet", "cpu")
    plain = unet.state_dict()
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    assert find_weights(folder / "unet").variant is None
    half = load_part(checkpoint, "unet", "cpu", Access(variant="fp16"))
    assert all(torch.equal(w.half().float(), half.state_dict()[k]) for k, w in plain.items())
    assert next(half.parameters()).dtype == torch.float32
    flags = ["sample", "-m", folder, "--prompt", "a", "--steps", 1]
    assert guidegen(*flags, "--variant", "fp16").returncode == 0  # the other parts have plain files only

    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    unet.float().save_pretrained(folder / "unet", max_shard_size="100KB")
    shards = find_weights(folder / "unet").files
    assert len(shards) > 1
    sharded = load_part(checkpoint, "unet", "cpu")
    assert all(torch.equal(w.half().float(), sharded.state_dict()[k]) for k, w in plain.items())
    shards[1].unlink()
    done = guidegen(*flags)
    assert done.returncode == 4
    assert "shard 2 of" in done.stderr

    for path in (folder / "unet").glob("*.safetensors*"):
        path.unlink()
    unet.save_pretrained(folder / "unet", variant="fp16")
    unet.save_pretrained(folder / "unet", variant="ema")
    with pytest.raises(CheckpointError, match="ema, fp16"):
        find_weights(folder / "unet")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Break = Callable[[Path], object]
BROKEN: list[tuple[str, Break, type[GuidegenError], str]] = [
    ("dit", lambda f: shutil.rmtree(f / "vae"), CheckpointError, "names a vae, but vae/config.json is missing"),
    ("dit", lambda f: edit(f / "model_index.json", vae=[None, None]), CheckpointError, "has a vae"),
    ("dit", lambda f: edit(f / "transformer" / "config.json", num_layers=3), CheckpointError, "do not fit"),
    ("dit", lambda f: edit(f / "transformer" / "config.json", attention_head_dim=4), CheckpointError, "do not"),
    ("dit", lambda f: edit(f / "model_index.json", _class_name="OtherPipeline"), CheckpointError, "with transformer, vae"),
    ("dit", lambda f: edit(f / "model_index.json", _class_name=["mine", "Mine"]), UnsafeError, "of its own"),
    ("dit", lambda f: edit(f / "model_index.json", vae=["mine", "Vae"]), UnsafeError, "'mine'"),
    ("stable_diffusion", lambda f: edit(f / "vae" / "config.json", auto_map={}), UnsafeError, "auto_map"),
    ("stable_diffusion", lambda f: edit(f / "unet" / "config.json", in_channels=9), CheckpointError, "inpainting"),
    ("stable_diffusion", lambda f: edit(f / "unet" / "config.json", time_cond_proj_dim=8), CheckpointError, "distilled"),
    ("stable_diffusion", lambda f: edit(f / "unet" / "config.json", _class_name="Own"), CheckpointError, "says Own"),
    ("stable_diffusion", lambda f: shutil.rmtree(f / "tokenizer"), CheckpointError, "tokenizer has no tokenizer.json"),
    (
        "stable_diffusion",
        lambda f: (f / "text_encoder" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        CheckpointError,
        "LFS pointer",
    ),
    ("stable_diffusion_xl", lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(), CheckpointError, "incomplete"),
    ("stable_diffusion_xl", lambda f: (f / "vae" / "config.json").write_text("{"), CheckpointError, "as JSON"),
]


def load_all(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for part in checkpoint.part_folders:
        load_part(checkpoint, part, "cpu")


@pytest.mark.parametrize(("kind", "damage", "error", "words"), BROKEN)
def test_broken_folders(
    copies: Callable[[str], Path], kind: str, damage: Break, error: type[GuidegenError], words: str
) -> None:
    folder = copies(kind)
    damage(folder)
    with pytest.raises(error, match=words) as caught:
        load_all(folder)
    assert str(caught.value).count("\n") <= 1


def test_broken_folders_on_the_command_line(copies: Callable[[str], Path], guidegen: Command, tmp_path: Path) -> None:
    folder = copies("dit")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    done = guidegen("sample", "-m", folder, "--label", 0)
    assert done.returncode == 4
    assert "cut short" in done.stderr
    edit(folder / "transformer" / "config.json", auto_map={"AutoModel": "mine.Model"})
    done = guidegen("sample", "-m", folder, "--label", 0)
    assert done.returncode == 5
    assert not (tmp_path / "guidegen-runs").exists()


def test_size_is_width_by_height(folders: dict[str, Path], guidegen: Command, tmp_path: Path) -> None:
    flags = ["sample", "-m", folders["stable_diffusion_xl"], "--steps", 1, "--prompt", "a", "--size", "24x16"]
    done = guidegen(*flags, "-o", "x.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "x.png").size == (24, 16)
    dry = json.loads(guidegen(*flags, "--dry-run", "--json").stdout)
    assert dry["bytes"] == 24 * 16 * 3
    with pytest.raises(UsageError, match="multiples of 4"):
        open_checkpoint(folders["stable_diffusion_xl"], size=(24, 18))
