"""transformers image classifiers as guides: preprocessing, gradients, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NAMES
from torch import Tensor

from guidegen.errors import CheckpointError, GuidegenError, UnsafeError, UsageError
from guidegen.models.checkpoint import open_classifier
from guidegen.models.classifiers.networks import ImageClassifier
from guidegen.models.classifiers.opening import load_classifier
from guidegen.models.classifiers.preprocessing import Preprocessing
from guidegen.scores.gradient import DenoisedScore, NoisyScore
from guidegen.scores.interfaces import NULL
from guidegen.scores.noise import Level

NAMES_ELSEWHERE = {0: "lion", 1: "tabby, tabby cat", 2: "goldfish, Carassius auratus"}
VIT = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
CONVNEXT = {
    "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
CLIP = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32}, "resample": 3,
    "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
}  # fmt: skip


def make(kind: str, names: dict[int, str] = NAMES_ELSEWHERE) -> Any:
    import transformers

    torch.manual_seed(0)
    common = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    if kind == "vit":
        config = transformers.ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            **common,
        )
        return transformers.ViTForImageClassification(config).eval()
    if kind == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **common
        )
        return transformers.ResNetForImageClassification(config).eval()
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4, **common)
    return transformers.ConvNextForImageClassification(config).eval()


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    make("vit").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(VIT))
    return folder


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
@pytest.mark.parametrize("config", [VIT, CONVNEXT, CLIP])
def test_gradients_agree_with_finite_differences(kind: str, config: dict[str, Any]) -> None:
    network = ImageClassifier(make(kind).double(), Preprocessing.from_config(config))
    x, label, level = torch.rand((1, 3, 24, 24)).double() * 2 - 1, torch.tensor([2]), Level(0.8, 0.6)
    score = DenoisedScore(network, {0: 0, 1: 1, 2: 2}, Straight())

    def log_p(point: Tensor) -> Tensor:
        return network(Straight.denoise(point, level)).log_softmax(-1)[0, 2]

    direction, step = torch.randn((1, 3, 24, 24)).double(), 1e-7
    slope = (log_p(x + step * direction) - log_p(x - step * direction)) / (2 * step)
    gradient = score(x, torch.tensor(5), label, level).double()
    # central differences err by step^2 where no ReLU turns between the two; the gradient is returned in fp32
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-8)


class Straight:
    """The denoiser of one Gaussian N(0, 1/4), which is linear: x0 = alpha / (alpha^2 + 4 sigma^2) x_t."""

    prediction_type = "sample"

    @staticmethod
    def denoise(x: Tensor, level: Level) -> Tensor:
        return level.alpha / (level.alpha**2 + 4 * level.sigma**2) * x

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert (labels == NULL).all()  # the estimate is the unconditional one
        return self.denoise(x_t, Level(0.8, 0.6))


def test_gradient_through_the_denoiser_in_closed_form() -> None:
    weight = torch.randn((12, 2), generator=torch.Generator().manual_seed(0)).double()
    level, x = Level(0.8, 0.6), torch.randn((5, 3, 2, 2), generator=torch.Generator().manual_seed(1)).double()
    score = DenoisedScore(lambda x0: x0.flatten(1) @ weight, {0: 0, 1: 1}, Straight())
    gradient = score(x, torch.tensor(0), torch.zeros(5, dtype=torch.long), level).double()
    gain = 0.8 / (0.64 + 4 * 0.36)
    p = (gain * x.flatten(1) @ weight).softmax(-1)
    exact = gain * p[:, 1:] * (weight[:, 0] - weight[:, 1])  # (1 - p_0)(w_0 - w_1) times dx0/dx_t
    torch.testing.assert_close(gradient.flatten(1), exact, rtol=1e-6, atol=1e-8)


def test_it_opens_and_its_labels_match_by_name(vit_folder: Path, with_null: Path) -> None:
    from guidegen.models.checkpoint import open_checkpoint

    info = open_classifier(vit_folder)
    assert info.input == "denoised"
    labels = open_checkpoint(with_null).labels
    assert info.columns(labels) == {0: 2, 1: 1, 4: 0}
    assert info.renumbers(labels)
    x = torch.rand((2, 3, 8, 8)) * 2 - 1
    with torch.no_grad():
        expected = make("vit")(pixel_values=Preprocessing.from_config(VIT)(x)).logits
        torch.testing.assert_close(load_classifier(info, "cpu")(x), expected)


def test_a_noise_aware_classifier_reads_clean_images_when_told(with_null: Path) -> None:
    folder = with_null / "classifier"
    clean = load_classifier(open_classifier(folder, "denoised"), "cpu")
    noisy = load_classifier(open_classifier(folder), "cpu")
    x = torch.rand((2, 3, 8, 8)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(clean(x), noisy(x, torch.zeros(2, dtype=torch.long)))
    columns = {int(label): column for column, label in enumerate(NAMES)}
    plain = NoisyScore(noisy, columns)(x, torch.tensor(0), torch.tensor([1, 2]), Level(1.0, 0.0))
    through = DenoisedScore(clean, columns, Identity())(x, torch.tensor(0), torch.tensor([1, 2]), Level(1.0, 0.0))
    torch.testing.assert_close(plain, through)


class Identity:
    prediction_type = "sample"

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x_t


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


BROKEN: list[tuple[Callable[[Path], object], type[GuidegenError], str]] = [
    (without("preprocessor_config.json"), CheckpointError, "preprocessor_config"),
    (without("model.safetensors"), CheckpointError, "incomplete"),
    (rewrite("config.json", auto_map={"AutoModel": "x.Y"}), UnsafeError, "remote code"),
    (rewrite("config.json", architectures=["BertModel"]), CheckpointError, "BertModel"),
    (rewrite("config.json", hidden_size=24), CheckpointError, "do not (load|fit)"),
    (rewrite("config.json", num_hidden_layers=3), CheckpointError, "do not fit"),
    (rewrite("preprocessor_config.json", resample=99), CheckpointError, "resample"),
    (rewrite("preprocessor_config.json", size={"longest_edge": 3}), CheckpointError, "size"),
    (
        rewrite("preprocessor_config.json", image_processor_type="DonutImageProcessor"),
        CheckpointError,
        "DonutImageProcessor",
    ),
]


@pytest.mark.parametrize(("damage", "kind", "message"), BROKEN)
def test_broken_ones_say_what_is_wrong(
    vit_folder: Path, tmp_path: Path, damage: Callable[[Path], object], kind: type[GuidegenError], message: str
) -> None:
    import shutil

    folder = Path(shutil.copytree(vit_folder, tmp_path / "vit"))
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        load_classifier(open_classifier(folder), "cpu")
    assert str(caught.value).count("\n") <= 1


def test_it_cannot_read_noisy_images(vit_folder: Path) -> None:
    with pytest.raises(UsageError, match="takes no timestep"):
        open_classifier(vit_folder, "noisy")


def test_it_guides_from_the_command_line(guidegen: Any, unconditional: Path, with_null: Path, vit_folder: Path) -> None:
    steps, common = 3, ("--mode", "classifier", "-c", vit_folder, "--label", "tabby", "--steps", 3, "--json")
    drawn = guidegen("sweep", "-m", unconditional, *common, "--w", "0,2", "-o", "a")
    assert drawn.returncode == 0, drawn.stderr
    rows = [json.loads(line) for line in drawn.stdout.splitlines()]
    assert [(row["w"], row["label"], row["nfe"]) for row in rows] == [(0.0, 1, steps), (2.0, 1, 3 * steps)]
    assert rows[0]["sha256"] != rows[1]["sha256"]
    planned = guidegen("sweep", "-m", unconditional, *common, "--w", "0,2", "-o", "a", "--dry-run")
    assert json.loads(planned.stdout)["nfe"] == 4 * steps
    other = guidegen("sample", "-m", with_null, *common, "-o", "b")
    assert other.returncode == 0
    assert "matched by name" in other.stderr
    unknown = guidegen("sample", "-m", with_null, *common[:5], "crane, hoist", "-o", "c")
    assert unknown.returncode == 2
    assert "does not know it" in unknown.stderr
