"""`guidegen convert`: what it makes opens and samples, published networks are known, bad inputs are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adm_reference import Classifier, Options, UNet, randomise
from typer.testing import CliRunner

from guidegen.cli import app
from guidegen.cli.convert import _stoppable, _write
from guidegen.errors import CheckpointError, GuidegenError, StoppedError, UnsafeError, UsageError
from guidegen.models.convert import adm
from guidegen.models.convert.adm_layout import Choices, recognise

Result = subprocess.CompletedProcess[str]
TINY = Options(mult=(1, 1), head_channels=16)
SAID = ("--size", 8, "--head-channels", 16, "--attention-order", "legacy", "--schedule", "linear")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 91\n"


def state_of(o: Options = TINY, kind: type = UNet) -> dict[str, Any]:
    return dict(randomise(kind(o), seed=0).state_dict())


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adm") / "model.pt"
    torch.save(state_of(), path)
    return path


def run(*args: object) -> str:
    """A command in this process; raises its error, returns standard output."""
    result = CliRunner().invoke(app, list(map(str, args)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def convert(*args: object) -> str:
    return run("convert", *args)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- what it makes


def test_converted_unet_and_classifier_are_inspected_and_sample(
    guidegen: Callable[..., Result], tmp_path: Path, unet_file: Path
) -> None:
    folder = tmp_path / "adm"
    torch.save(state_of(kind=Classifier), tmp_path / "classifier.pt")
    (tmp_path / "names.json").write_text(json.dumps([f"thing {i}" for i in range(5)]))
    made = guidegen("convert", unet_file, "adm", *SAID)
    assert (made.returncode, made.stdout) == (0, "adm\n"), made.stderr
    assert "unet of 8x8; unconditional; levels of 32, 32; heads of 16 channels in legacy order; linear" in made.stderr
    again = json.loads(convert(unet_file, folder, *SAID, "--overwrite", "--json"))
    assert again == {"type": "file", "path": str(folder), "run": None}
    words = ("--head-channels", 16, "--labels", tmp_path / "names.json")
    assert run("convert", tmp_path / "classifier.pt", folder / "classifier", *words) == f"{folder}/classifier\n"
    assert listing(tmp_path)[0] == "adm"  # nothing hidden is left
    facts = json.loads(run("inspect", folder, "--json"))
    assert facts["modes"] == ["classifier", "none"]
    assert facts["learned variance"] is True
    assert facts["scheduler"] == "DDIMScheduler"
    assert facts["parameters"] == sum(value.numel() for value in state_of().values())
    what = ("--mode", "classifier", "--label", "thing 3", "--w", 2, "--steps", 4)
    assert run("sample", "-m", folder, *what, "-o", tmp_path / "x.png") == f"{tmp_path / 'x.png'}\n"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("own", [{"heads": 2, "head_channels": None, "mult": (1, 2)}, {"width": 64, "mult": (0.5, 1)}])
def test_converted_unet_that_diffusers_has_no_class_for_opens(own: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state_of(Options(attention=(1, 2), **own)), tmp_path / "m.pt")
    heads = ("--heads", own["heads"]) if "heads" in own else SAID[2:4]
    run("convert", tmp_path / "m.pt", tmp_path / "made", *SAID[:2], *heads, *SAID[4:])
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert index["unet"] == ["guidegen", "AdmUNet2DModel"]
    assert json.loads(run("inspect", tmp_path / "made", "--json"))["modes"] == ["none"]
    (tmp_path / "made" / "model_index.json").write_text(json.dumps(index | {"scheduler": ["guidegen", "AdmUNet2DModel"]}))
    with pytest.raises(UnsafeError, match="scheduler"):
        run("inspect", tmp_path / "made")


def test_names_reach_the_folder(tmp_path: Path) -> None:
    torch.save(state_of(Options(classes=3)), tmp_path / "m.pt")
    (tmp_path / "names.json").write_text('{"0": "a", "1": "b, bee", "2": "c"}')
    convert(tmp_path / "m.pt", tmp_path / "made", *SAID, "--labels", tmp_path / "names.json")
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert index["id2label"] == {"0": "a", "1": "b, bee", "2": "c"}
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    convert(tmp_path / "m.pt", tmp_path / "bare", *SAID)
    assert "id2label" not in json.loads((tmp_path / "bare" / "model_index.json").read_text())


@pytest.mark.parametrize(("schedule", "named"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_scheduler_is_the_published_schedule(schedule: str, named: str, tmp_path: Path, unet_file: Path) -> None:
    from adm_reference import cumulative_alphas

    from guidegen.sampling.schedulers import make_scheduler

    convert(unet_file, tmp_path / "made", *SAID[:-1], schedule)
    config = json.loads((tmp_path / "made" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["beta_schedule"], config["steps_offset"], config["timestep_spacing"]) == (named, 0, "leading")
    kept = make_scheduler(config).alphas_cumprod.double()
    assert ((kept - cumulative_alphas(schedule)).abs() / kept).max() < 1e-4  # a thousand products in fp32


def test_half_precision_weights_become_fp32(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save({key: value.half() for key, value in state_of().items()}, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "made", *SAID)
    weights = load_file(tmp_path / "made" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


# --- published networks, by the flags of guided-diffusion's README; with them, millions of parameters

LONG = (1, 1, 2, 2, 4, 4)
HALF = (0.5, 1, 1, 2, 2, 4, 4)
PUBLISHED: list[tuple[str, str, type, Options, int]] = [
    ("64", "64x64_diffusion", UNet, Options(192, (1, 2, 3, 4), 3, (2, 4, 8), None, 64, True, classes=1000, size=64), 296),
    ("128", "128x128_diffusion", UNet, Options(256, (1, 1, 2, 3, 4), 2, (4, 8, 16), 4, None, classes=1000, size=128), 422),
    ("256", "256x256_diffusion", UNet, Options(256, LONG, 2, (8, 16, 32), None, 64, classes=1000, size=256), 554),
    ("256-uncond", "256x256_diffusion_uncond", UNet, Options(256, LONG, 2, (8, 16, 32), None, 64, size=256), 553),
    ("512", "512x512_diffusion", UNet, Options(256, HALF, 2, (16, 32, 64), None, 64, classes=1000, size=512), 559),
    ("64", "64x64_classifier", Classifier, Options(128, (1, 2, 3, 4), 4, (2, 4, 8), None, 64, classes=1000, size=64), 65),
    (
        "128",
        "128x128_classifier",
        Classifier,
        Options(128, (1, 1, 2, 3, 4), 2, (4, 8, 16), None, 64, classes=1000, size=128),
        43,
    ),
    ("256", "256x256_classifier", Classifier, Options(128, LONG, 2, (8, 16, 32), None, 64, classes=1000, size=256), 54),
    ("512", "512x512_classifier", Classifier, Options(128, HALF, 2, (16, 32, 64), None, 64, classes=1000, size=512), 54),
]


@pytest.mark.parametrize(("preset", "name", "kind", "o", "millions"), PUBLISHED, ids=[row[1] for row in PUBLISHED])
def test_published_network_is_known_at_its_true_shapes(
    preset: str, name: str, kind: type, o: Options, millions: int
) -> None:
    with torch.device("meta"):
        state = kind(o).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    by_name = recognise(shapes, f"{name}.pt", Choices())
    assert recognise(shapes, "model.pt", Choices(), preset) == by_name
    layout, choices = by_name
    order, schedule = "new" if o.new_order else "legacy", "cosine" if preset == "64" else "linear"
    assert choices == Choices(o.size, o.heads, o.head_channels, order, None if kind is Classifier else schedule)
    assert (layout.layers, layout.time_channels, layout.labels) == (o.res_blocks, o.width, o.classes)
    network = adm.build(layout, choices)
    missing, unexpected = network.load_state_dict(adm.convert_weights(state, layout, choices), assign=True)
    assert (missing, unexpected) == ([], [])
    count = sum(value.numel() for value in network.parameters())
    assert count == sum(value.numel() for value in state.values())
    assert round(count / 1e6) == millions
    assert (
        type(network).__name__
        == {
            Classifier: "NoisyClassifier",
            UNet: "AdmUNet2DModel" if preset in ("128", "512") else "UNet2DModel",
        }[kind]
    )


def test_published_name_on_another_network_counts_for_nothing(tmp_path: Path) -> None:
    torch.save(state_of(), tmp_path / "64x64_diffusion.pt")
    with pytest.raises(UsageError, match="--size, --heads or --head-channels, --attention-order, --schedule"):
        convert(tmp_path / "64x64_diffusion.pt", tmp_path / "made")


def test_shapes_alone_suggest_a_preset_but_do_not_choose_it() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in UNet(PUBLISHED[0][3]).state_dict().items()}
    with pytest.raises(UsageError, match="--preset 64"):
        recognise(shapes, "ema.pt", Choices())
    _, choices = recognise(shapes, "ema.pt", Choices(schedule="linear", heads=3), "64")
    assert choices == Choices(64, 3, None, "new", "linear")


# --- what it refuses: code, words, and that nothing is left


class Evil:
    """Would make a file if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch pwned",))


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in state_of().items() if not name.startswith(key)}


BAD_FILES: list[tuple[str, Callable[[Path], object], type[GuidegenError], str]] = [
    ("missing", lambda path: None, CheckpointError, "is not there"),
    ("folder", lambda path: path.mkdir(), CheckpointError, "is a folder"),
    ("lfs-pointer", lambda path: path.write_bytes(POINTER), CheckpointError, "git lfs pull"),
    ("empty", lambda path: path.write_bytes(b""), CheckpointError, r"\(0 bytes\)"),
    ("text", lambda path: path.write_text("hello there\n" * 9), CheckpointError, "not of torch.save"),
    ("code", lambda path: torch.save({"x": Evil()}, path), UnsafeError, "posix.system"),
    ("whole-module", lambda path: torch.save(torch.nn.Linear(2, 2), path), UnsafeError, "torch.nn.modules.linear.Linear"),
    ("list", lambda path: torch.save([torch.ones(2)], path), CheckpointError, "found a list"),
    ("tensor", lambda path: torch.save(torch.ones(2), path), CheckpointError, "found a Tensor"),
    ("nothing", lambda path: torch.save({}, path), CheckpointError, "no state dict"),
    (
        "optimizer",
        lambda path: torch.save(torch.optim.AdamW(torch.nn.Linear(1, 1).parameters()).state_dict(), path),
        CheckpointError,
        "no state dict: found {'state': dict, 'param_groups': list}",
    ),
    ("nested", lambda path: torch.save({"state_dict": state_of()}, path), CheckpointError, "'state_dict': dict"),
    (
        "another-network",
        lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
        CheckpointError,
        "time_embed.0.weight is missing. Found 2 tensors, such as weight, bias",
    ),
    (
        "upsampler",
        lambda path: torch.save(state_of(Options(channels=6, learned_variance=False)), path),
        CheckpointError,
        "super-resolution",
    ),
    ("latents", lambda path: torch.save(state_of(Options(channels=4)), path), CheckpointError, "4 channels"),
    ("lacks-a-module", lambda path: torch.save(without("middle_block.2"), path), CheckpointError, "lacks middle_block.2"),
    ("lacks-a-weight", lambda path: torch.save(without("out.2.bias"), path), CheckpointError, "conv_out.bias"),
    ("lacks-a-level", lambda path: torch.save(without("input_blocks.2"), path), CheckpointError, "do not fall into levels"),
    ("too-much", lambda path: torch.save(state_of() | {"extra.w": torch.ones(1)}, path), CheckpointError, "first extra.w"),
    (
        "wrong-shape",
        lambda path: torch.save(state_of() | {"out.0.weight": torch.ones(3)}, path),
        CheckpointError,
        "conv_norm_out.weight",
    ),
    (
        "spatial-pool",
        lambda path: torch.save(
            {k: v for k, v in state_of(kind=Classifier).items() if not k.startswith("out.")}
            | {"out.0.weight": torch.ones(2048, 9), "out.2.weight": torch.ones(5, 2048)},
            path,
        ),
        CheckpointError,
        "spatial pooling",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), [row[1:] for row in BAD_FILES], ids=[row[0] for row in BAD_FILES])
def test_bad_file_is_refused(
    make: Callable[[Path], object],
    error: type[GuidegenError],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "bad.pt")
    before = listing(tmp_path)
    with pytest.raises(error, match=words) as caught:
        convert("bad.pt", "made", *SAID[: 4 if words == "spatial pooling" else None])
    assert str(caught.value).startswith("bad.pt")
    assert len(str(caught.value).splitlines()) <= 2
    assert listing(tmp_path) == before


def test_cut_file_is_refused(tmp_path: Path, unet_file: Path) -> None:
    for share in (0.3, 0.97):
        data = unet_file.read_bytes()
        (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match="cut short"):
            convert(tmp_path / "cut.pt", tmp_path / "made", *SAID)


BAD_WORDS: list[tuple[tuple[object, ...], str]] = [
    ((), "give --size, --heads or --head-channels, --attention-order, --schedule"),
    (("--size", 8, "--heads", 1), "give --schedule"),
    (("--size", 7, *SAID[2:]), "multiples of 2"),
    (("--size", 8, "--heads", 5, *SAID[4:]), "--heads 5 does not divide"),
    (("--size", 8, "--head-channels", 48, *SAID[4:]), "--head-channels 48 does not divide"),
    ((*SAID, "--heads", 2), "Give one"),
    (("--preset", "64"), "not the unet of --preset 64: time_channels 32, there 192"),
    ((*SAID, "--labels", "names.json"), "unconditional"),
    ((*SAID, "--labels", "nix.json"), "cannot be read: No such file"),
    ((*SAID, "--labels", "numbers.json"), "should map ids to names; that of 0 is int"),
]


@pytest.mark.parametrize(("words", "message"), BAD_WORDS)
def test_bad_options_are_refused(
    words: tuple[object, ...], message: str, unet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.json").write_text('["a", "b"]')
    (tmp_path / "numbers.json").write_text('{"0": 1}')
    before = listing(tmp_path)
    with pytest.raises(UsageError, match=message):
        convert(unet_file, "made", *words)
    assert listing(tmp_path) == before


def test_bad_options_of_a_classifier_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.pt"
    torch.save(state_of(kind=Classifier), path)
    (tmp_path / "names.json").write_text('["a", "b"]')
    for words, message in (
        (("--schedule", "linear"), "a classifier has none"),
        (("--heads", 2), "Give --head-channels"),
        (("--size", 16, "--head-channels", 16), "for images of 8x8"),
        (("--head-channels", 16, "--labels", tmp_path / "names.json"), "names 2 labels; the model has 5, from 0 to 4"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(path, tmp_path / "made", *words)
    torch.save(state_of(Options(mult=(1, 1, 1), attention=(), size=16), Classifier), path)
    with pytest.raises(UsageError, match="levels of 1 or 2 or 5 ResNet blocks"):
        convert(path, tmp_path / "made", "--head-channels", 16)
    with pytest.raises(CheckpointError, match="levels of 3 ResNet blocks"):
        convert(path, tmp_path / "made", "--head-channels", 16, "--res-blocks", 3)
    convert(path, tmp_path / "made", "--head-channels", 16, "--res-blocks", 1)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["sample_size"] == 16


def test_destination_is_never_lost(tmp_path: Path, unet_file: Path) -> None:
    made = tmp_path / "made"
    convert(unet_file, made, *SAID)
    first = listing(made)
    with pytest.raises(UsageError, match="not empty"):
        convert(unet_file, made, *SAID)
    (made / "scheduler" / "scheduler_config.json").write_text("{}")
    convert(unet_file, made, *SAID, "--overwrite")
    assert "beta_schedule" in (made / "scheduler" / "scheduler_config.json").read_text()
    (made / "classifier").mkdir()
    with pytest.raises(UsageError, match="holds classifier, which convert did not write"):
        convert(unet_file, made, *SAID, "--overwrite")
    (made / "classifier").rmdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        convert(unet_file, tmp_path / "file", *SAID, "--overwrite")
    (tmp_path / "empty").mkdir()
    convert(unet_file, tmp_path / "empty", *SAID)
    assert listing(tmp_path / "empty") == listing(made) == first


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), StoppedError("stop", 15)])
def test_failed_writing_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    class Fails:
        def save(self, folder: Path) -> None:
            (folder / "half").write_text("half")
            raise error

    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("before")
    with pytest.raises(type(error)):
        _write(Fails(), tmp_path / "made")  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        _write(Fails(), tmp_path / "new" / "made")  # type: ignore[arg-type]
    assert listing(tmp_path) == ["made", "made/config.json", "new"]


def test_sigterm_is_an_error_with_its_code() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError) as caught, _stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_refusals_reach_the_shell(guidegen: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "pointer.pt").write_bytes(POINTER)
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    for name, code, word in (("pointer.pt", 4, "git lfs pull"), ("evil.pt", 5, "posix.system")):
        result = guidegen("convert", name, "made")
        assert (result.returncode, result.stdout) == (code, "")
        assert word in result.stderr
        assert "Traceback" not in result.stderr
    assert listing(tmp_path) == ["evil.pt", "pointer.pt"]
