"""What a wrong command says: one or two lines with the flag or file, what was found and what to do."""

from __future__ import annotations

import io
import shutil
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guidegen import cli

LONG = "9" * 5000


class Left(BaseException):
    """The command line has ended."""


def said(monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str]:
    """The exit code of a command, and what it writes to standard error."""
    codes: list[int] = []

    def leave(code: int, debug: bool) -> None:
        codes.append(code)
        raise Left

    monkeypatch.setattr(cli, "_leave", leave)
    monkeypatch.setattr(cli.console, "guard", lambda: None)
    monkeypatch.setattr(sys, "argv", ["guidegen", *map(str, args)])
    with redirect_stderr(io.StringIO()) as err, pytest.raises((Left, SystemExit)):
        cli.main()
    return codes[0] if codes else 0, err.getvalue().strip()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, with_null: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUIDEGEN_MODEL", str(with_null))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("text.txt").write_text("x")
    Path("folder").mkdir()


WRONG = [
    ("sweep --label 1 -w 0:1e9:1e-3", 2, "--w '0:1e9:1e-3' is 1.0e+12 numbers", "larger step"),
    ("sample --label 1 --size 0", 2, "--size '0'", "as 768x512 or 512"),
    ("sample --label 1 --size axb", 2, "--size 'axb'", "as 768x512 or 512"),
    ("sweep --label 1 --by guidance=", 2, "--by 'guidance='", "such as --by guidance=cfg,apg"),
    ("sweep --label 1 --by =cfg", 2, "--by '=cfg': no axis", "Choose guidance"),
    ("sweep --label 1 --by colour=red", 2, "--by 'colour=red': no axis", "Choose guidance"),
    ("sweep --label 1 --by seed=1", 2, "--by 'seed'", "--seeds"),
    ("sample --label 1 --device tpu", 2, "--device 'tpu'", "choose auto, cuda, cuda:1, mps or cpu"),
    ("sample --label 1 --device cuda:x", 2, "--device 'cuda:x'", "choose auto"),
    (
        "sample --label 1 --num=100000000000000000000",
        2,
        "--num '100000000000000000000'",
        "there are 9223372036854775808 seeds",
    ),
    ("sample --label 1 --num 1.5", 2, "--num: '1.5' is not a whole number", "--help"),
    ("sample --label 1 --num 2 -n ten", 2, "--num: 'ten' is not a whole number", "--help"),
    ("sample --label 1 --eta=much", 2, "--eta: 'much' is not a number", "--help"),
    ("sample --label 1 --scale 0", 2, "--scale: '0' is below 1", "--help"),
    ("merge folder --tar-size -1", 2, "--tar-size: '-1' is below 0", "--help"),
    ("sample --label 1 --mode cfgg", 2, "--mode: 'cfgg' is not one of", "'autoguidance'"),
    ("sample --label 1 --stpes 3", 2, "No such option: --stpes", "--steps"),
    ("sample --label 1 more words", 2, "Extra argument", "--help"),
    ("smaple --label 1", 2, "No such command 'smaple'", "'sample'"),
    ("sample --label 1 -m nofile.py:X", 4, "No Python file at nofile.py", "file.py:NAME"),
    ("sample --label 1 -m nofile.py:smile:", 4, "'nofile.py:smile:'", "owner/name"),
    ("sample --label @nofile", 2, "--label @FILE: nofile cannot be read", "No such file"),
    ("sample --prompt @folder --label 1 -c folder --mode both", 4, "folder", "config.json"),
    ("sample --label 1 --guidance-opt eta=1", 2, "--guidance-opt eta=1: cfg", "no options"),
    ("sample --label 1 --guidance nope", 2, "--guidance nope", "guidegen guidances"),
    ("sample --label 1 --interval 5", 2, "--interval 5", "such as 0.3:5"),
    ("sample --label 1 --shard 2/2", 2, "--shard", "such as 0/4"),
    ("sample --label 1 -o x.gif", 2, "-o x.gif", ".png"),
    ("sample --label 1 -n 2 -o x.png", 2, "-o x.png holds one image, and this is 2", "sweep"),
    ("sample --label 77", 2, "--label 77", "guidegen labels"),
    ("inspect text.txt", 4, "text.txt is a file", "guidegen convert"),
    ("convert text.txt out", 4, "text.txt is of no format that guidegen converts", "guided-diffusion"),
    ("verify folder", 2, "folder is not a run directory", "run.json"),
    ("report folder", 2, "folder is not a run directory", "run.json"),
    ("again text.txt", 2, "text.txt does not say how it was drawn", "settings"),
    ("evaluate folder", 2, "Missing option '--reference'", "real images"),
    ("ls nowhere", 2, "nowhere is not a folder", "-o"),
    (f"sample --label {LONG}", 2, "--label", "guidegen labels"),
    (f"sample --label 1 --num {LONG}", 2, "--num", "…"),
    (f"sample --label 1 --mode {LONG}", 2, "--mode", "…"),
    (f"sample --label 1 --w {LONG}x", 2, "--w", "finite number"),
    (f"sample --label 1 --{LONG}", 2, "No such option", "…"),
]


@pytest.mark.parametrize(
    ("line", "code", "names", "advises"), WRONG, ids=[f"{i}-{line[:40]}" for i, (line, *_) in enumerate(WRONG)]
)
def test_wrong_commands(line: str, code: int, names: str, advises: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, text = said(monkeypatch, *line.split())
    assert found == code, text
    assert text.startswith("error: ")
    assert names in text
    assert advises in text
    assert len(text.splitlines()) <= 2
    assert len(text) < 600
    assert "\x1b" not in text
    assert "goes on" not in text
    assert not Path("guidegen-runs").exists()


def test_a_device_that_is_not_there_names_those_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, there in (("mps", torch.backends.mps.is_available()), ("cuda", torch.cuda.is_available())):
        if not there:
            code, text = said(monkeypatch, "sample", "--label", 1, "--device", device)
            assert code == 2
            assert f"--device {device}" in text
            assert "choose auto" in text


def changed(folder: Path, to: Path, part: str, tensor: torch.Tensor | float) -> str:
    """Copies a checkpoint with another tensor in a part, or another first number of it; returns its name."""
    shutil.copytree(folder, to)
    (path,) = (to / part).glob("*.safetensors")
    weights = load_file(path)
    name = next(key for key in sorted(weights) if weights[key].ndim == 4)
    if isinstance(tensor, float):
        weights[name].view(-1)[0] = tensor
    else:
        weights[name] = tensor
    save_file(weights, path)
    return name


@pytest.mark.parametrize("flags", [(), ("--mode", "classifier"), ("--mode", "autoguidance", "--guide-model", "odd")])
def test_tensors_of_another_shape_and_numbers_that_are_none(
    with_null: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = "classifier" if "classifier" in flags else "unet"
    model = () if "odd" in flags else ("-m", "odd")
    for to, tensor in (("odd", torch.zeros(3, 5)), ("nan", float("nan"))):
        name = changed(with_null, Path(to), part, tensor)
        words = [word.replace("odd", to) for word in (*model, *flags)]
        code, text = said(monkeypatch, "sample", "--label", 1, "--steps", 2, "-q", "-o", f"run-{to}", *words)
        assert name in text
        assert f"{to}/{part}" in text
        assert (code, "[3, 5]" in text, "NaN" in text) == ((4, True, False) if to == "odd" else (3, False, True)), text
