"""`guidegen evaluate`: what it reads, what it refuses, what it keeps."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from guidegen.cli.evaluate import evaluate
from guidegen.cli.evaluate_flags import EvaluateFlags
from guidegen.errors import CheckpointError, UnsafeError, UsageError
from guidegen.evaluate import features, metrics
from guidegen.evaluate.measure import METRICS_FILE, open_drawn, read_metrics
from guidegen.models.checkpoint import open_classifier
from guidegen.report.series import make_series
from guidegen.runs.directory import Run
from guidegen.runs.images import CorruptImageError
from guidegen.spec.cell import Cell
from guidegen.spec.plan import Plan
from guidegen.spec.settings import Settings

Command = Callable[..., subprocess.CompletedProcess[str]]
SIZE = 16
NAMES = {0: "lion", 1: "crane", 2: "crane"}
WEIGHTS = (0.0, 2.0, 4.0)


def picture(label: int, seed: int, w: float) -> Any:
    """Noise whose mean follows the label, the more so with w; at w = 0 the label does not show."""
    rng = np.random.default_rng((seed, int(10 * w), label if w else 0))
    level = 128 + (w * 25 * (label - 1) if w else 0)
    return rng.normal(level, 30, (SIZE, SIZE, 3)).clip(0, 255).astype(np.uint8)


def write_run(folder: Path, mode: str = "cfg", labels: tuple[int, ...] = (0, 1, 2), seeds: int = 8, **settings: Any) -> Path:
    given = Settings(mode, "model", "0" * 64, "DDIMScheduler", 5, None, "fp32", 5, **settings)
    plan = Plan(labels, range(seeds), WEIGHTS, grid=True)
    with Run(folder, given, {"command": "sweep", "options": {}}, plan=plan) as run:
        for label in labels:
            for seed in range(seeds):
                for w in WEIGHTS:
                    run.write(Cell(label, seed, w), picture(label, seed, w), NAMES[label], 1)
    Image.new("RGB", (4, 4)).save(folder / "grid.png")
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("drawn") / "run")


@pytest.fixture
def run(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "run"))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image classifier of transformers whose ids differ from the run's and whose names do not."""
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks") / "tiny-resnet"
    config = transformers.ResNetConfig(
        embedding_size=6,
        hidden_sizes=[6, 10],
        depths=[1, 1],
        layer_type="basic",
        id2label={0: "crane", 1: "gull", 2: "crane, hoist", 3: "lion, king of beasts"},
    )
    transformers.ResNetForImageClassification(config).eval().save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    preprocessing = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="module")
def real() -> tuple[Any, list[int]]:
    """Images to measure against, between those of w = 0 and of w = 2, and their labels."""
    labels = [label for label in (0, 1, 2) for _ in range(9)]
    return np.stack([picture(label, 100 + i, 1.0) for i, label in enumerate(labels)]), labels


@pytest.fixture
def npz(tmp_path: Path, real: tuple[Any, list[int]]) -> Path:
    np.savez(tmp_path / "real.npz", arr_0=real[0], arr_1=np.array(real[1]))
    return tmp_path / "real.npz"


def measure(run: Path, reference: Path, network: Path, **flags: Any) -> list[dict[str, Any]]:
    given = {"features": str(network), "judge": str(network), "curves": False, "quiet": True, "halves": 3, "json_rows": True}
    evaluate([run], EvaluateFlags(reference, **(given | flags)))
    return [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_rows_and_figures(run: Path, npz: Path, network: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = measure(run, npz, network)
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    about = {"type": "metrics", "path": str(run / "metrics.jsonl"), "run": str(run)}
    assert shown == [about | row for row in rows]
    assert [(row["mode"], row["w"], row["images"], row["distinct"]) for row in rows] == [
        ("cfg", 0.0, 24, 8),
        ("cfg", 2.0, 24, 24),
        ("cfg", 4.0, 24, 24),
    ]
    for row in rows:
        assert set(row["metrics"]) == {metric.name for metric in metrics.METRICS}
        assert row["reference"]["images"] == 27
        assert row["features"]["width"] == 10
        for name, figure in row["metrics"].items():
            assert math.isfinite(figure["value"]), name
            known = {
                "accuracy": 16,
                "confidence": 16,
                "vendi_score": 24,
                "pairwise_distance": 24,
            }  # two of three labels known
            assert figure["images"] == known.get(name, row["distinct"])
    assert rows[1]["metrics"]["recall"]["spread"] is not None
    # the further from the reference, the greater the distance
    assert rows[1]["metrics"]["frechet_distance"]["value"] < rows[2]["metrics"]["frechet_distance"]["value"]


def test_figures_of_each_label(run: Path, npz: Path, network: Path, real: tuple[Any, list[int]], tmp_path: Path) -> None:
    measure(run, npz, network, per_class=True)
    rows = [json.loads(line) for line in (run / "per_class.jsonl").read_text().splitlines()]
    assert [(row["w"], row["label"], row["images"]) for row in rows] == [(w, i, 8) for w in WEIGHTS for i in range(3)]
    reader = features.open_features(str(network), torch.device("cpu"))
    reference = metrics.Meter(torch.from_numpy(reader(real[0])))
    for row in rows:
        images = np.stack([picture(row["label"], seed, row["w"]) for seed in range(8)])
        nan = torch.full((8,), torch.nan)
        alone = metrics.Measured(torch.from_numpy(reader(images)), [*range(8)], [row["label"]] * 8, nan, nan)
        for name, figure in reference.measure(alone, 0).items():
            assert (figure and pytest.approx(figure["value"], rel=1e-4, abs=1e-6)) == (
                row["metrics"][name] and row["metrics"][name]["value"]
            )
    np.savez(tmp_path / "others.npz", arr_0=real[0])
    with pytest.raises(UsageError, match=r"--per-class: the images of .*others\.npz have no labels"):
        measure(tmp_path / "others.npz", npz, network, per_class=True)


def test_the_distance_is_the_one_that_torchmetrics_finds_from_the_files(
    run: Path, npz: Path, network: Path, real: tuple[Any, list[int]]
) -> None:
    """The whole way, written again with transformers and torchmetrics alone; within 1e-3 relative."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from transformers import ResNetModel

    model = ResNetModel.from_pretrained(network).eval()

    class Network(torch.nn.Module):
        num_features = 10

        @torch.no_grad()
        def forward(self, images: Any) -> Any:
            return model((images.float() / 255 - 0.5) / 0.5).pooler_output.flatten(1)

    metric = FrechetInceptionDistance(Network())
    metric.update(torch.from_numpy(real[0]).permute(0, 3, 1, 2), real=True)
    for path in sorted((run / "images" / "w4.0").rglob("*.png")):
        metric.update(torch.from_numpy(np.array(Image.open(path)))[None].permute(0, 3, 1, 2), real=False)
    (found,) = (row for row in measure(run, npz, network) if row["w"] == 4)
    assert found["metrics"]["frechet_distance"]["value"] == pytest.approx(float(metric.compute()), rel=1e-3)


def test_accuracy_is_of_the_label_of_that_name(run: Path, npz: Path, network: Path) -> None:
    """The run keeps short names, two of them alike; there the id decides, and 2 is the classifier's `crane, hoist`."""
    info = open_classifier(network)
    assert features.match_columns(info, NAMES) == {0: 3, 2: 2}
    assert features.match_columns(info, {1: "gull", 7: "", 3: ""}) == {1: 1, 3: 3}
    rows = measure(run, npz, network)
    assert {row["metrics"]["accuracy"]["images"] for row in rows} == {16}
    classifier = features.open_evaluation_classifier(str(network), NAMES, torch.device("cpu")).reader
    right = []
    for label, column in ((0, 3), (2, 2)):
        for path in sorted((run / "images" / "w2.0" / f"label{label:04d}").iterdir()):
            right.append(classifier(np.array(Image.open(path))[None]).argmax() == column)
    assert rows[1]["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))


def test_features_are_computed_once(run: Path, npz: Path, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    call = features.Reader.__call__
    monkeypatch.setattr(features.Reader, "__call__", lambda self, images: seen.append(len(images)) or call(self, images))
    first = measure(run, npz, network, save_reference=npz.with_name("saved.npz"))
    assert sum(seen) == 2 * 72 + 2 * 27  # features and logits, of the run and of the reference
    seen.clear()
    assert measure(run, npz.with_name("saved.npz"), network) == first
    assert seen == []
    plan = Plan(list(NAMES), [50], WEIGHTS)
    with Run(run, Settings(**json.loads((run / "run.json").read_text())["settings"]), {}, plan=plan) as more:
        for w in WEIGHTS:
            for label in NAMES:
                more.write(Cell(label, 50, w), picture(label, 50, w), NAMES[label], 1)
    assert measure(run, npz.with_name("saved.npz"), network)[1]["images"] == 27
    assert sum(seen) == 2 * 9  # what was drawn since


def test_every_kind_of_reference_gives_the_same(
    run: Path, npz: Path, network: Path, real: tuple[Any, list[int]], tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, labels = real
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "folder" / str(label) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    pq.write_table(pa.table({"image": [png(image) for image in images], "label": labels}), tmp_path / "real.parquet")
    given = Settings("none", "model", "0" * 64, "DDIMScheduler", 5, None, "fp32", 5)
    with Run(tmp_path / "other", given, {}) as other:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            other.write(Cell(label, i, 1.0), image, NAMES[label], 1)
    found = [
        [row["metrics"] for row in measure(run, reference, network)]
        for reference in (npz, tmp_path / "folder", tmp_path / "real.parquet", tmp_path / "other")
    ]
    assert found[0] == found[1] == found[2] == found[3]


def test_only_the_labels_of_the_run_are_compared(tmp_path: Path, npz: Path, network: Path) -> None:
    some = write_run(tmp_path / "some", labels=(0, 2))
    assert measure(some, npz, network)[0]["reference"]["images"] == 18
    assert measure(some, npz, network, reference_labels="all")[0]["reference"]["images"] == 27
    assert measure(some, npz, network, reference_labels="1-1,2")[0]["reference"]["images"] == 18
    with pytest.raises(UsageError, match="no images with the labels 7"):
        measure(some, npz, network, reference_labels="7")
    with pytest.raises(UsageError, match="run, all, or ids"):
        measure(some, npz, network, reference_labels="lions")


def test_a_reference_of_another_size(run: Path, network: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "large.npz", arr_0=rng.integers(0, 255, (12, 2 * SIZE, 3 * SIZE, 3), np.uint8))
    with pytest.raises(UsageError, match=r"images of 48x32 and the run of 16x16.*\n?.*--resize") as refused:
        measure(run, tmp_path / "large.npz", network)
    assert refused.value.code == 2
    assert not (run / METRICS_FILE).exists()
    rows = measure(run, tmp_path / "large.npz", network, resize="box")
    assert rows[0]["reference"]["source"] == "large.npz, resized with box"
    with pytest.raises(UsageError, match="--resize loud: choose nearest, box"):
        measure(run, tmp_path / "large.npz", network, resize="loud")


def test_too_few_images(run: Path, npz: Path, network: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 3 images at w = 0, and the metrics need 6"):
        measure(write_run(tmp_path / "few", seeds=1), npz, network)
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((4, SIZE, SIZE, 3), np.uint8))
    with pytest.raises(UsageError, match=r"few.npz has 4 images, and the metrics need 6"):
        measure(run, tmp_path / "few.npz", network)


def drop_a_row(run: Path) -> None:
    lines = (run / "manifest.jsonl").read_text().splitlines(keepends=True)
    (run / "manifest.jsonl").write_text("".join(lines[:-1]))


def drop_a_weight(run: Path) -> None:
    """A run that was stopped before its last weight: what is there is a product, and not the one that was asked for."""
    lines = (run / "manifest.jsonl").read_text().splitlines(keepends=True)
    (run / "manifest.jsonl").write_text("".join(line for line in lines if json.loads(line)["w"] < 4))
    shutil.rmtree(run / "images/w4.0")


def lose_an_image(run: Path) -> None:
    (run / "images/w2.0/label0000/000006.png").unlink()


def add_an_image(run: Path) -> None:
    with Run(run, Settings(**json.loads((run / "run.json").read_text())["settings"]), {}) as more:
        more.write(Cell(2, 99, 4.0), picture(2, 99, 4.0), "crane", 1)


def forget_the_plan(run: Path) -> None:
    about = json.loads((run / "run.json").read_text())
    del about["plans"]
    (run / "run.json").write_text(json.dumps(about))


def spoil_an_image(run: Path) -> None:
    (run / "images/w2.0/label0000/000006.png").write_bytes(png(np.zeros((SIZE, SIZE, 3), np.uint8)))


def fail_an_image(run: Path) -> None:
    with Run(run, Settings(**json.loads((run / "run.json").read_text())["settings"]), {}) as more:
        (run / Cell(0, 0, 2.0).file).unlink(missing_ok=True)
        more.write(Cell(0, 0, 2.0), None, "lion", 1)


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (drop_a_row, "1 of 72 images are missing, such as images/w4.0/label0002/000007.png"),
        (drop_a_weight, "24 of 72 images are missing, such as images/w4.0/"),
        (lose_an_image, "000006.png cannot be read: No such file"),
        (spoil_an_image, "000006.png has changed since it was drawn"),
        (fail_an_image, "1 of 72 images came out non-finite, such as images/w2.0/label0000/000000.png"),
        (add_an_image, "1 images are not of its plan and are left out, such as images/w4.0/label0002/000099.png"),
        (forget_the_plan, "run.json has no plan to compare it with"),
        (lambda run: (run / "grid.png").unlink(), "its sweep has not come to its grid"),
    ],
)
def test_an_incomplete_run(harm: Callable[[Path], Any], word: str, run: Path, npz: Path, network: Path) -> None:
    harm(run)
    with pytest.raises(CorruptImageError if harm in (lose_an_image, spoil_an_image) else UsageError) as refused:
        measure(run, npz, network)
    assert word in str(refused.value)
    assert "--partial" in str(refused.value)
    assert not (run / METRICS_FILE).exists()
    rows = measure(run, npz, network, partial=True)
    assert [row["images"] for row in rows][:2] in ([24, 24], [24, 23])
    assert [row["images"] for row in rows][2:] == {drop_a_row: [23], drop_a_weight: []}.get(harm, [24])


def test_any_axis_that_varies_makes_its_own_rows(run: Path, npz: Path, network: Path) -> None:
    """A key that this test makes up: whatever a later mode writes into its rows is an axis."""
    lines = []
    for line in (run / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        lines.append(json.dumps(row | {"guidance": "plain" if row["seed"] % 2 else "fancy", "constant": 3}))
    (run / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    rows = measure(run, npz, network, partial=True)
    assert open_drawn(run).axes == ("w", "guidance")
    assert [(row["w"], row["guidance"]) for row in rows] == [(w, name) for w in WEIGHTS for name in ("fancy", "plain")]
    series = make_series([(open_drawn(run), rows)])
    assert [(line.name, line.x) for line in series] == [
        ("fancy", list(WEIGHTS)),
        ("plain", list(WEIGHTS)),
    ]


def test_best_passes_over_what_was_measured_on_few(run: Path, npz: Path, network: Path) -> None:
    """At w = 0 the labels share their images, 8 instead of 24."""
    rows = measure(run, npz, network)
    (line,) = make_series([(open_drawn(run), rows)])
    recall, accuracy = (next(m for m in metrics.METRICS if m.name == name) for name in ("recall", "accuracy"))
    assert line.thin(recall) == [True, False, False]
    assert line.thin(accuracy) == [False] * 3
    values = line.values(recall)
    assert line.best(recall) == max((1, 2), key=lambda i: values[i] or 0)


def test_metrics_of_other_images_are_left_out(run: Path, npz: Path, network: Path) -> None:
    rows = measure(run, npz, network)
    assert read_metrics(open_drawn(run)) == (rows, 0)
    with Run(run, Settings(**json.loads((run / "run.json").read_text())["settings"]), {}) as more:
        more.write(Cell(0, 0, 2.0), picture(0, 999, 2.0), "lion", 1)
    assert read_metrics(open_drawn(run)) == ([rows[0], rows[2]], 1)


def test_saved_features_of_another_network_are_refused(run: Path, npz: Path, network: Path, with_null: Path) -> None:
    saved = npz.with_name("saved.npz")
    measure(run, npz, network, save_reference=saved)
    with np.load(saved) as data:
        assert data["mu"].shape == (10,)
        assert data["sigma"].shape == (10, 10)
    other = Path(shutil.copytree(network, npz.with_name("other")))
    preprocessing = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(preprocessing | {"resample": 3}))
    with pytest.raises(UsageError, match="holds features of tiny-resnet, not these of other"):
        measure(run, saved, other)


def test_a_classifier_that_guided_and_evaluates_is_warned_of(
    run: Path, npz: Path, network: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sha = features.open_evaluation_classifier(str(network), NAMES, torch.device("cpu")).reader.weights
    guided = write_run(tmp_path / "guided", "classifier", classifier="tiny-resnet", classifier_sha256=sha)
    measure(guided, npz, network, quiet=False)
    said = capfd.readouterr().err
    assert "the evaluation classifier guided" in said
    assert "features are those of the classifier that guided" in said
    assert "only 8 of 24 images differ" in said
    pair = write_run(tmp_path / "pair", "classifier", classifier="a:1.0, b:1.0", classifier_sha256=f"{'0' * 64}, {sha}")
    measure(pair, npz, network, quiet=False)
    assert "the evaluation classifier guided" in capfd.readouterr().err
    measure(run, npz, network, quiet=False)
    assert "guided" not in capfd.readouterr().err


def test_features_of_a_model_without_a_head(network: Path, tmp_path: Path) -> None:
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=4, mlp_ratio=2
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    images = np.stack([picture(1, seed, 2.0) for seed in range(3)])
    found = features.open_features(str(tmp_path / "dino"), torch.device("cpu"))(images)
    with torch.no_grad():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).pooler_output
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_bundled_features_are_what_its_head_reads() -> None:
    from guidegen.models.classifiers.opening import load_classifier

    reader = features.open_features("bundled", torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    head = load_classifier(open_classifier(features.BUNDLED_CLASSIFIER), "cpu")
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        logits = head(x, torch.zeros(2).long())
        again = head.head(torch.from_numpy(reader(images))) * head.config.logit_scales[0]
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="reads images of 32x32, and these have 16x16"):
        reader(np.zeros((1, 16, 16, 3), np.uint8))


def test_unsafe_or_unknown_networks(network: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    remote = Path(shutil.copytree(network, tmp_path / "remote"))
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(UnsafeError):
        features.open_features(str(remote), cpu)
    pickled = Path(shutil.copytree(network, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UnsafeError, match="pickled"):
        features.open_features(str(pickled), cpu)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        features.open_features(str(tmp_path / "nothing"), cpu)


def test_only_inception_is_called_fid() -> None:
    first, second = metrics.METRICS[:2]
    assert [metrics.title_of(m, False) for m in (first, second)] == ["Fréchet distance", "Kernel distance"]
    assert [metrics.title_of(m, True) for m in (first, second)] == ["FID", "KID"]


def test_a_missing_package_is_named(run: Path, npz: Path, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchmetrics" else find(name))
    with pytest.raises(UsageError, match="pip install torchmetrics"):
        measure(run, npz, network)


@pytest.mark.parametrize(
    ("name", "make", "word"),
    [
        ("none.npz", lambda path: np.savez(path, other=np.zeros(3)), "has no arr_0"),
        ("float.npz", lambda path: np.savez(path, arr_0=np.zeros((7, SIZE, SIZE, 3))), "should be uint8"),
        ("torn.npz", lambda path: path.write_bytes(b"PK\3\4torn"), "cannot be read as .npz"),
        ("torn.parquet", lambda path: path.write_bytes(b"PAR1torn"), "cannot be read as .parquet"),
        ("empty", lambda path: path.mkdir(), "no images in that folder"),
        ("notes.txt", lambda path: path.write_text("x"), "give a folder of images"),
        ("absent", lambda path: None, "no such file or folder"),
    ],
)
def test_what_is_no_reference(
    name: str, make: Callable[[Path], Any], word: str, run: Path, network: Path, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(UsageError, match=word):
        measure(run, tmp_path / name, network)


def test_curves_of_two_runs(run: Path, npz: Path, network: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "classifier")
    flags = EvaluateFlags(npz, features=str(network), judge=str(network), quiet=True, halves=2, out=tmp_path, json_rows=True)
    evaluate([run, other], flags)
    svg = (tmp_path / "curves.svg").read_text()
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1600, round(160 * (1.45 + 2.55 * 4)))
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
        assert {(0x25, 0x63, 0xEB), (0xD9, 0x66, 0x0A), (255, 255, 255)} <= colours  # both lines, on white
    assert "http://www.w3.org" in svg
    before = svg, (tmp_path / "curves.png").read_bytes()
    evaluate([run, other], flags)
    assert ((tmp_path / "curves.svg").read_text(), (tmp_path / "curves.png").read_bytes()) == before


def test_the_command(guidegen: Command, run: Path, npz: Path, network: Path) -> None:
    args = ("evaluate", run, "--reference", npz, "--features", network, "--judge", network, "--halves", "2")
    result = guidegen(*args)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["mode", "w", "images", *(metric.name for metric in metrics.METRICS)]
    assert [line.split()[:3] for line in lines[1:]] == [["cfg", "0", "24"], ["cfg", "2", "24"], ["cfg", "4", "24"]]
    assert "±" in lines[2]
    assert lines[1].count("(8)") == 6  # how many of the 24 were distinct, beside each figure that is of those
    assert "27 reference images of real.npz" in result.stderr
    assert f"curves: {run}/curves.svg" in result.stderr
    drop_a_row(run)
    refused = guidegen(*args)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is not complete" in refused.stderr
