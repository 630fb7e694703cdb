"""`guidegen again`: an image or a run is drawn again from what it says of itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, save_pipeline, tiny_unet
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pipelines import clip, stable_diffusion

from guidegen.runs.png import png_text

FAST = ("--steps", 3, "-q", "--batch-size", 1)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GUIDEGEN_MODEL", raising=False)


def pixels(path: Path | str) -> Any:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def image_of(result: Any) -> str:
    return str(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "args",
    [
        ("--label", 1, "--w", 3, "--seed", 5),
        ("--label", 1, "--mode", "classifier", "--w", 2.5),
        ("--label", 1, "--mode", "both", "--w-classifier", 0.5),
        ("--label", "1:2.0,3:-1.0"),
        ("--label", 1, "--mode", "none"),
        ("--label", 1, "--guidance", "apg", "--guidance-opt", "eta=0.5", "--interval", "10%:90%", "--scheduler", "euler"),
        ("--label", 1, "--eta", 0.5, "--scheduler", "ddim", "--timestep-spacing", "trailing", "--null-label", 4),
        ("--label", 1, "--mode", "cfg", "--guide-model", "skip:mid_block", "--w-guide", 1.5),
    ],
)
@pytest.mark.parametrize("out", ["run", "x.png", "x.webp", "x.jpg", "x.npz"])
def test_the_same_image_comes_back(with_null: Path, args: tuple[object, ...], out: str) -> None:
    first = call("sample", "-m", with_null, *args, *FAST, "-o", "run")
    if out != "run":
        call("sample", "-m", with_null, *args, *FAST, "-o", out)
    source = out if out != "run" else image_of(first)
    call("again", source, "-q", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels(image_of(first)))


def test_a_prompt_comes_back_and_any_flag_changes_it(tmp_path: Path) -> None:
    model = stable_diffusion(tmp_path / "sd")
    args = ("-m", model, "--prompt", "a red\nfox", "--negative-prompt", "a cat", *FAST)
    call("sample", *args, "--w", 3, "-o", "x.png")
    call("again", "x.png", "-q", "-o", "y.png")
    assert np.array_equal(pixels("x.png"), pixels("y.png"))
    call("sample", *args, "--w", 5, "--seed", 7, "-o", "other.png")
    call("again", "x.png", "--w", 5, "--seed", 7, "-q", "-o", "z.png")
    assert np.array_equal(pixels("other.png"), pixels("z.png"))
    assert not np.array_equal(pixels("x.png"), pixels("z.png"))


def test_a_classifier_of_prompts_comes_back(with_null: Path, tmp_path: Path) -> None:
    args = ("-m", with_null, "-c", f"{clip(tmp_path / 'clip')}:2", "--mode", "classifier", "--prompt", "fox", *FAST)
    call("sample", *args, "-o", "x.png")
    call("again", "x.png", "-q", "--strict", "-o", "y.png")
    assert np.array_equal(pixels("x.png"), pixels("y.png"))


def test_a_cell_of_a_sweep_and_the_sweep(with_null: Path) -> None:
    by = ("--by", "guidance=cfg@2,apg@3", "--by", "steps=3,4")
    call("sweep", "-m", with_null, "--label", "0,3", *by, *FAST[2:], "-o", "run")
    cell = Path("run/images/guidance=apg,steps=4/w3.0/label0003/000000.png")
    call("again", cell, "-q", "-o", "cell.png")
    assert np.array_equal(pixels(cell), pixels("cell.png"))
    for source in ("run", "run/run.json", "run/grid.png"):
        call("again", source, "-q", "-o", f"{source.replace('/', '-')}-again")
        assert np.array_equal(pixels("run/grid.png"), pixels(f"{source.replace('/', '-')}-again/grid.png"))
    call("sweep", "-m", with_null, "--label", "0,3", *by, *FAST[2:], "-o", "grid.jpg")
    assert "guidance=cfg@2.0,apg@3.0" in call("again", "grid.jpg", "--show").stdout
    call("grid", "run", "--scale", 2, "-o", "run/large.png")
    assert "--by steps=3,4" in call("again", "run/large.png", "--show").stdout


def test_a_list_of_weights_makes_a_sweep_of_an_image(with_null: Path) -> None:
    call("sample", "-m", with_null, "--label", 1, "--num", 2, *FAST, "-o", "run")
    call("again", "run/images/w3.0/label0001/000001.png", "--w", "1,2", "--by", "guidance=cfg,apg", "-q", "-o", "swept")
    about = json.loads(Path("swept/run.json").read_text())
    assert about["command"] == "sweep"
    assert about["plans"][0]["seeds"] == "1"
    shown = call("again", "run", "--show", "--num", 3, "--mode", "none").stdout
    assert "--num 3" in shown
    assert "--w" not in shown
    assert "--seeds" not in shown


def test_it_shows_the_command_that_draws_it(with_null: Path) -> None:
    call("sample", "-m", with_null, "--label", "lion", "--w", 2, *FAST, "-o", "x.png")
    shown = call("again", "x.png", "--show", "--seed", 4, "-o", "it's.png").stdout
    assert shown.startswith(f"guidegen sample --w 2.0 --label 4 --seed 4 --model {with_null}")
    assert shown.strip().endswith("--out 'it'\"'\"'s.png'")
    assert not Path("guidegen-runs").exists()


def test_a_run_of_several_commands_is_shown_and_not_drawn(with_null: Path) -> None:
    for label in (1, 2):
        call("sample", "-m", with_null, "--label", label, *FAST, "-o", "run")
    assert len(call("again", "run", "--show").stdout.splitlines()) == 2
    assert "2 commands" in str(call("again", "run", code=2).exception)


def test_an_image_that_does_not_name_its_checkpoint_needs_its_run_or_a_flag(with_null: Path) -> None:
    call("sample", "-m", with_null, "--label", 1, *FAST, "-o", "run")
    path = Path("run/images/w3.0/label0001/000000.png")
    with Image.open(path) as image:
        text = json.loads(image.text["guidegen"])  # type: ignore[attr-defined]
        assert text["source"] == {"model": str(with_null)}
        image.save(path, pnginfo=png_text({name: value for name, value in text.items() if name != "source"}))
    call("again", path, "-q", "-o", "again.png")
    assert np.array_equal(pixels(path), pixels("again.png"))
    shutil.copy(path, "alone.png")
    assert "give --model" in str(call("again", "alone.png", code=2).exception)
    call("again", "alone.png", "-q", "-m", with_null, "-o", "named.png")
    assert np.array_equal(pixels(path), pixels("named.png"))


def test_another_checkpoint_is_noted_or_refused(with_null: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    other = save_pipeline(tmp_path / "other", tiny_unet(1, num_class_embeds=6), DDIMScheduler(clip_sample=False))
    call("sample", "-m", with_null, "--label", 1, "--null-label", 5, *FAST, "-o", "x.png")
    result = call("again", "x.png", "-m", other, "--null-label", 5, "-o", "y.png")
    assert "the model has other weights" in result.stderr
    refused = call("again", "x.png", "-m", other, "--null-label", 5, "--strict", "-o", "z.png", code=4)
    assert "the model has other weights" in str(refused.exception)
    assert "other weights" not in call("again", "x.png", "-o", "same.png").stderr


def test_the_environment_does_not_change_the_checkpoint(with_null: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("sample", "-m", with_null, "--label", 1, *FAST, "-o", "x.png")
    call("sample", "--label", 207, "--steps", 2, "-q", "-o", "bundled.png")
    assert "--model" not in call("again", "bundled.png", "--show").stdout
    monkeypatch.setenv("GUIDEGEN_MODEL", "somewhere/else")
    assert f"--model {with_null} " in call("again", "x.png", "--show").stdout
    assert "somewhere" not in call("again", "bundled.png", "--show").stdout


def carrying(path: str, **changes: Any) -> str:
    """A copy of an image that carries something else."""
    with Image.open(path) as image:
        text = json.loads(image.text["guidegen"])  # type: ignore[attr-defined]
        image.save("hostile.png", pnginfo=png_text(text | changes))
    return "hostile.png"


def test_no_picture_runs_a_file_or_reads_one(with_null: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')")
    call("sample", "-m", with_null, "--label", 1, *FAST, "-o", "run")
    path = "run/images/w3.0/label0001/000000.png"
    with Image.open(path) as image:
        text = json.loads(image.text["guidegen"])  # type: ignore[attr-defined]
    evil = f"{tmp_path}/evil.py:X"
    for changes in (
        {"source": {"model": evil}},
        {"source": {"classifier": [f"{evil}:2"]}, "settings": text["settings"] | {"mode": "classifier"}},
        {"source": {"guide_model": evil}},
        {"settings": text["settings"] | {"guidance": evil}},
    ):
        assert "To run that file" in str(call("again", carrying(path, **changes), code=5).exception)
    for prompt in ("@/etc/passwd", "-"):
        changed = carrying(path, cell=text["cell"] | {"prompt": prompt})
        assert "read as a file" in str(call("again", changed, code=2).exception)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": None},
        {"settings": {}},
        {"cell": None},
        {"cell": {"seed": -1, "w": 3}},
        {"cell": {"seed": 1, "w": 1e999}},
        {"cell": {"seed": 1, "w": 3.0, "mixture": "x"}},
        {"cells": [{"seed": 1, "w": 1.0}] * 3},
        {"plan": {"seeds": "x"}},
        {"source": {"model": ["x"]}},
        {"source": 5},
    ],
)
def test_what_is_not_valid_is_refused(with_null: Path, changes: dict[str, Any]) -> None:
    call("sample", "-m", with_null, "--label", 1, *FAST, "-o", "x.png")
    with Image.open("x.png") as image:
        text = json.loads(image.text["guidegen"])  # type: ignore[attr-defined]
        text["cell"] = text.pop("cells")[0]
        info = PngInfo()
        info.add_itxt("guidegen", json.dumps(text | changes).replace("Infinity", "1e999"))
        image.save("hostile.png", pnginfo=info)
    call("again", "hostile.png", code=2)


def test_files_that_say_nothing_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save("plain.png")
    Path("torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Path("torn.npz").write_bytes(b"PK")
    for name in ("plain.png", "torn.png", "torn.npz"):
        assert "does not say how it was drawn" in str(call("again", name, code=2).exception)
    assert "no such file" in str(call("again", "none.png", code=2).exception)
    call("again", tmp_path, code=2)


PARAMETERS = (
    "a red fox, (snow:1.2)\nsecond line\nNegative prompt: blurry\n"
    "Steps: 4, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 12, Size: 16x16, "
    'Model hash: 123, Model: fox, Hashes: "a, b", Foo: 1'
)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_text_of_the_web_interface_is_read(tmp_path: Path, suffix: str) -> None:
    image, path = Image.new("RGB", (2, 2)), f"theirs.{suffix}"
    if suffix == "png":
        info = PngInfo()
        info.add_text("parameters", PARAMETERS)
        image.save(path, pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
        image.save(path, exif=exif)
    assert "give --model" in str(call("again", path, code=2).exception)
    model = stable_diffusion(tmp_path / "sd")
    result = call("again", path, "-m", model, "--show")
    assert result.stdout.startswith("guidegen sample --w 6.5 --prompt 'a red fox, (snow:1.2)\nsecond line' --seed 12")
    for words in ("--negative-prompt blurry", "--steps 4", "--scheduler dpm++", "use_karras_sigmas=true", "--size 16x16"):
        assert words in result.stdout
    for unread in ("weights of words", "Model: fox", "Hashes: a, b", "Foo: 1"):
        assert unread in result.stderr
    call("again", path, "-m", model, "-q", "-o", "ours.png")
    assert pixels("ours.png").shape == (16, 16, 3)
