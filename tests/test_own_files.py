"""Files of one's own: run once, as modules, and blamed by file and line for all that goes wrong in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import call

from guidegen.errors import GuidegenError, UsageError
from guidegen.models.python_ref import ClassifierModel, Model
from guidegen.python_file import read_python_ref

Command = Callable[..., Any]
PLAIN = """
from __future__ import annotations
from dataclasses import dataclass
import guidegen, torch

@dataclass
class Config:
    width: int = 3

class Denoiser:
    prediction_type = "epsilon"
    def __call__(self, x, t, labels):
        return 0.1 * x

def load(device):
    print("loading", Config())
    return Denoiser()

SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False}
MODEL = guidegen.Model(load=load, shape=(3, 8, 8), scheduler=SCHEDULER, labels={0: "cat"})
"""
METHODS = """
import pathlib
with pathlib.Path(__file__).with_name("runs").open("a") as file:
    file.write("x")
def one(u, c, w, step): return u + w * (c - u)
def two(u, c, w, step, *, more=1.0): return u + w * more * (c - u)
"""


def written(folder: Path, text: str, name: str = "own.py") -> str:
    (folder / name).write_text(text)
    return f"{folder / name}"


def test_dataclasses_and_words_on_standard_output(guidegen: Command, tmp_path: Path) -> None:
    written(tmp_path, PLAIN)
    done = guidegen("sample", "-m", "own.py:MODEL", "--label", "cat", "--steps", 2, "--json", "-o", "run")
    assert done.returncode == 0, done.stderr
    assert "loading Config(width=3)" in done.stderr
    assert [json.loads(line)["label_name"] for line in done.stdout.splitlines()] == ["cat"]


@pytest.mark.parametrize("command", ["sample", "sweep"])
def test_a_file_is_run_once(command: str, guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    written(tmp_path, METHODS)
    flags = ["--guidance", "own.py:one"] if command == "sample" else ["--by", "guidance=own.py:one,own.py:two"]
    done = guidegen(command, "-m", with_null, "--label", 1, "--w", 2, "--steps", 2, *flags, "-o", "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs").read_text() == "x"


def test_a_changed_file_is_run_again_and_modules_beside_it_are_found(tmp_path: Path) -> None:
    (tmp_path / "a_module_beside.py").write_text("value = 7\n")
    ref = f"{written(tmp_path, 'import a_module_beside; X = [a_module_beside.value]')}:X"
    first = read_python_ref(ref, list)
    assert first == [7]
    assert read_python_ref(ref, list) is first
    written(tmp_path, "X = [8]")
    assert read_python_ref(ref, list) == [8]


# what is wrong, its line, a word of the message
AT_IMPORT = [
    ("x = 1\nraise ValueError('no weights\\nhere')", 2, "ValueError: no weights"),
    ("def f(:\n  pass", 1, "SyntaxError"),
    ("x = '\0'", None, "null bytes"),
    ("import sys\nsys.exit(0)", 2, "exits with 0"),
    ("raise SystemExit(99)", 1, "exits with 99"),
    ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
    ("raise GeneratorExit", 1, "GeneratorExit"),
    ("class Mine(BaseException): pass\nraise Mine('odd')", 2, "Mine: odd"),
    ("class Mute(Exception):\n    def __str__(self): raise OSError\nraise Mute", 3, "Mute"),
    ("def f(): return f()\nf()", 1, "RecursionError"),
    ("import no_such_module_at_all", 1, "no_such_module_at_all"),
    ("raise RuntimeError('x' * 10**6)", 1, "RuntimeError: xxx"),
    ("import guidegen\nM = guidegen.Model(None, (3, 8, 8), {})", 2, "load should be a function"),
    ("def __getattr__(name): raise OSError('gone')", 1, "OSError: gone"),
    ("M = 3", None, "is a int; it should be a guidegen.Model"),
    ("M = None", None, "is not there"),
]


@pytest.mark.parametrize(("text", "line", "words"), AT_IMPORT, ids=[text[:24] for text, *_ in AT_IMPORT])
def test_what_a_file_raises_has_its_line(text: str, line: int | None, words: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    for error, flags in ((4, ("-m", f"{file}:M")), (2, ("--guidance", f"{file}:M"))):
        if error == 2 and words.startswith("is a int"):
            words = "should be a function"
        result = call("sample", "--label", 1, "--dry-run", *flags, code=error)
        message = str(result.exception)
        assert words in message
        assert line is None or f"{file}:{line}: " in message
        assert message.count("\n") <= 1
        assert len(message) < 1000 + 2 * len(file)


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"load": None}, "load"),
    *(({"shape": shape}, "shape") for shape in ((3, 8), (3, 8, 0), (3, 8, 1e9), "388", None, (3, 8, True), (3, 8, 10**9))),
    *(({"scheduler": value}, "scheduler") for value in (None, [], "DDIM", {1: 2})),
    *(({"labels": value}, "labels") for value in (["cat"], {"x": "cat"}, {0: 1}, {-1: "cat"}, {True: "cat"})),
    *(({"steps": value}, "steps") for value in (0, -1, True, "50", 1.5, None)),
    *(({"image_size": value}, "image_size") for value in ((8,), 8, (0, 8), ("a", "b"))),
    *(({"version": value}, "version") for value in (None, 3, b"x")),
    ({"has_null": "yes"}, "has_null"),
]


@pytest.mark.parametrize(("wrong", "field"), FIELDS)
def test_fields_are_checked_where_they_are_given(wrong: dict[str, Any], field: str) -> None:
    given: dict[str, Any] = {"load": lambda device: None, "shape": (3, 8, 8), "scheduler": {"_class_name": "DDIMScheduler"}}
    Model(**given)
    with pytest.raises(UsageError, match=f"^Model: {field}"):
        Model(**given | wrong)


@pytest.mark.parametrize("wrong", [{"load": 3}, {"labels": {}}, {"labels": ["cat"]}, {"input": "clean"}, {"version": 1}])
def test_fields_of_a_classifier_are_too(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"load": lambda device: None, "labels": {0: "cat"}}
    ClassifierModel(**given)
    with pytest.raises(UsageError, match=f"^ClassifierModel: {next(iter(wrong))}"):
        ClassifierModel(**given | wrong)


# in PLAIN: what, with what, a line that it should name, a word of the message
AT_WORK = [
    ('prediction_type = "epsilon"', "pass", "class", "prediction_type"),
    ('prediction_type = "epsilon"', 'prediction_type = ["epsilon"]', "class", "prediction_type"),
    ('prediction_type = "epsilon"', 'prediction_type = "sample"', "class", "predicts sample"),
    ("return Denoiser()", "return None", "def load", "NoneType"),
    ("return Denoiser()", "raise OSError('no file')", "raise OSError", "OSError: no file"),
    ("return Denoiser()", "import sys; sys.exit(0)", "sys.exit", "exits with 0"),
    ("return 0.1 * x", "return None", "def __call__", "NoneType"),
    ("return 0.1 * x", "return x[:, :1]", "def __call__", "(1, 1, 8, 8)"),
    ("return 0.1 * x", "return x.double()", "def __call__", "float64"),
    ("return 0.1 * x", "return x * float('nan')", "def __call__", "finite"),
    ("return 0.1 * x", "return x @ x[0, 0, :3]", "return x @", "RuntimeError"),
    ("return 0.1 * x", "raise KeyboardInterrupt", "raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("return 0.1 * x", "raise SystemExit", "raise SystemExit", "exits with None"),
    ("def __call__(self, x, t, labels)", "def __call__(self, x)", "def __call__", "TypeError"),
    ('"_class_name": "DDIMScheduler", ', "", None, "_class_name"),
    ('{"_class_name": "DDIMScheduler"', '{"_class_name": 7', None, "_class_name"),
    ('"clip_sample": False', '"clip_sample": False, "prediction_type": "noise"', None, "noise"),
]


@pytest.mark.parametrize(("what", "by", "place", "words"), AT_WORK, ids=[f"{by[:30]}" for _, by, *_ in AT_WORK])
def test_what_a_model_does_wrong_has_its_line(what: str, by: str, place: str | None, words: str, tmp_path: Path) -> None:
    assert what in PLAIN
    text = PLAIN.replace(what, by)
    file = written(tmp_path, text)
    result = call("sample", "-m", f"{file}:MODEL", "--label", 0, "--steps", 2, "--w", 1, "-o", tmp_path / "run", code=4)
    message = str(result.exception)
    assert words in message
    lines = [number for number, line in enumerate(text.splitlines(), 1) if place and place in line]
    assert not place or any(f"{file}:{number}: " in message for number in lines) or place == "class"
    assert message.count("\n") <= 1


METHOD = """
calls = 0
def mine(u, c, w, step):
    global calls
    calls += 1
    return u + w * (c - u) if calls < 12 else WRONG
"""


@pytest.mark.parametrize("wrong", ["None", "c[:1, :1]", "c.double()", "1 / 0", "exit(0)"])
def test_images_stay_that_are_done_when_a_method_fails(wrong: str, with_null: Path, tmp_path: Path) -> None:
    file = written(tmp_path, METHOD.replace("WRONG", wrong))
    flags = ("-m", with_null, "--label", 1, "--num", 9, "--steps", 2, "--batch-size", 1, "--guidance", f"{file}:mine")
    message = str(call("sample", *flags, "-o", tmp_path / "run", code=2).exception)
    assert any(f"{file}:{line}: " in message for line in (3, 6))
    rows = (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()
    assert 0 < len(rows) < 9
    assert all((tmp_path / "run" / json.loads(row)["file"]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def mine(u, c, w, step): return 3", "gives a int"),
        ("def mine(u, c, w): return u", "TypeError"),
        ("def mine(u, c, w, step, *, rate): return u", "give rate a default"),
        ("def mine(u, c, w, step): return u.mul_(2)", "in place"),
        ("def mine(u, c, w, step): return u / 0", "not finite"),
        ("mine = print", "NoneType"),
        ("mine = 'text'", "should be a function"),
        ("class mine:\n  def __call__(self): pass", "mine"),
    ],
)
def test_what_is_no_method(text: str, words: str, with_null: Path, tmp_path: Path) -> None:
    ref = f"{written(tmp_path, text)}:mine"
    message = str(call("sample", "-m", with_null, "--label", 1, "--guidance", ref, "--dry-run", code=2).exception)
    assert words in message
    assert ref.rpartition(":")[0] in message


JUDGE = """
import torch, guidegen
class Judge(torch.nn.Module):
    def forward(self, images):
        return WHAT
JUDGE = guidegen.ClassifierModel(lambda device: LOAD, {0: "goldfish, Carassius auratus", 1: "tabby, tabby cat"}, "denoised")
"""


@pytest.mark.parametrize(
    ("what", "load", "words"),
    [
        ("images.mean((2, 3))", "Judge()", "(1, 3); it should be of (1, 2)"),
        ("None", "Judge()", "NoneType"),
        ("images.mean((2, 3))[:, :2].long()", "Judge()", "int64"),
        ("1 / 0", "Judge()", "ZeroDivisionError"),
        ("images", "7", "int"),
        ("images", "exit(0)", "exits with 0"),
    ],
)
def test_what_a_classifier_does_wrong_has_its_line(
    what: str, load: str, words: str, with_null: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, JUDGE.replace("WHAT", what).replace("LOAD", load))
    flags = ("-m", with_null, "--mode", "classifier", "-c", f"{file}:JUDGE", "--label", 1, "--steps", 2)
    message = str(call("sample", *flags, "-o", tmp_path / "run", code=4).exception)
    assert words in message
    assert any(f"{file}:{line}: " in message for line in (3, 4, 5, 6))


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "latin.py").write_bytes(b"x = '\xff'\n")
    for name in ("pipe.py", "folder.py", "loop.py", "latin.py", "nothing.py", "~nobody-of-that-name/x.py"):
        with pytest.raises(GuidegenError) as found:
            read_python_ref(f"{tmp_path / name}:X" if name[0] != "~" else f"{name}:X", Model)
        assert found.value.code == 4


BACKWARD = """
import torch, guidegen
class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t): return x.mean((2, 3))[:, :2]
    @staticmethod
    def backward(ctx, gradient): raise LookupError("odd")
JUDGE = guidegen.ClassifierModel(lambda device: Broken.apply, {0: "goldfish, Carassius auratus", 1: "tabby, tabby cat"})
"""


def test_a_backward_pass_has_its_line_too(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    written(tmp_path, BACKWARD)
    flags = ("-m", with_null, "--mode", "classifier", "-c", "own.py:JUDGE", "--label", 1, "--steps", 2, "-o", "run")
    done = guidegen("sample", *flags)
    assert done.returncode == 4
    assert f"{tmp_path / 'own.py'}:7: LookupError: odd" in done.stderr
