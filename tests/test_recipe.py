"""The recipe of the bundled checkpoint, on photographs made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import tiny_unet
from diffusers import UNet2DModel
from photographs import shrink, small_classifier, write_noise
from torch import nn

from guidegen.models.classifiers.noisy import NoisyClassifier
from guidegen.zoo import batches, calibration, classifier, cpu, loop, tradeoff
from guidegen.zoo import train as recipe

pa = pytest.importorskip("pyarrow")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_noise(tmp_path / "data")


def test_images_are_decoded_once_and_only_of_the_classes(data: Path) -> None:
    images, labels = batches.load_images(data, "train", [1, 207], 32)
    assert images.shape == (16, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert sorted(set(labels.tolist())) == [1, 207]
    with pytest.raises(FileNotFoundError):
        batches.load_images(data, "train", [999], 32)


def test_batches_are_a_function_of_seed_and_step(data: Path) -> None:
    images, labels = batches.load_images(data, "train", [1, 207, 281], 8)
    first, again = (batches.Batches(images, labels, 6, seed=3, device="cpu") for _ in range(2))
    for a, b in zip(first(7), again(7), strict=True):
        assert torch.equal(a, b)
    x_t, t, x0, eps, _ = first(7)
    alpha, sigma = (s[t][:, None, None, None] for s in batches.alphas_sigmas())
    torch.testing.assert_close(x_t, alpha * x0 + sigma * eps)
    assert not torch.equal(first(8)[0], x_t)


def test_shifts_reflect_at_the_border(data: Path) -> None:
    images = torch.rand(5, 3, 8, 8)
    down, right = torch.tensor([[0], [2], [-2], [1], [-1]]), torch.tensor([[0], [-1], [1], [2], [-2]])
    padded = nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    for got, image, i, j in zip(batches.shifted(images, down, right), padded, down.flatten(), right.flatten(), strict=True):
        assert torch.equal(got, image[:, 2 - i : 10 - i, 2 - j : 10 - j])
    photographs = batches.load_images(data, "train", [1, 207], 8)
    still, moved = (batches.Batches(*photographs, 16, 0, "cpu", shift)(4) for shift in (0, 2))
    assert torch.equal(still[1], moved[1])
    assert not torch.equal(still[2], moved[2])


def test_noise_levels_cover_every_timestep() -> None:
    alpha, sigma = batches.alphas_sigmas()
    t = batches.draw_timesteps(20_000, (sigma / alpha).log(), torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() == 999
    assert len(t.unique()) > 900


def test_stopped_training_goes_on_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    images, labels = batches.load_images(data, "train", [1, 207, 281], 8)
    loss_of = recipe.unet_loss(batches.Batches(images, labels, 4, 0, "cpu"), dropout=0.5)

    def train(state: str, loss: Any) -> nn.Module:
        model = tiny_unet(num_class_embeds=1001)
        return loop.train(model, loss, tmp_path / state, 6, 4, 1e-3, 0.0, False, save_seconds=0.0)

    def dies(model: nn.Module, step: int) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return loss_of(model, step)

    whole = train("whole.state", loss_of)
    with pytest.raises(KeyboardInterrupt):
        train("cut.state", dies)
    resumed = train("cut.state", loss_of)
    start = tiny_unet(num_class_embeds=1001)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert not torch.equal(whole.state_dict()["conv_in.weight"], start.state_dict()["conv_in.weight"])


def test_fewer_images_than_the_state_has_seen_are_refused(data: Path, tmp_path: Path) -> None:
    images, labels = batches.load_images(data, "train", [1, 207, 281], 8)
    loss_of = recipe.unet_loss(batches.Batches(images, labels, 4, 0, "cpu"), dropout=0.5)
    model, state = tiny_unet(num_class_embeds=1001), tmp_path / "a.state"
    loop.train(model, loss_of, state, 2, 4, 1e-3, 0.0, False)
    before = state.read_bytes()
    loop.train(model, loss_of, state, 2, 4, 1e-3, 0.0, False)
    assert state.read_bytes() == before
    with pytest.raises(typer.BadParameter, match="has seen 8 images"):
        loop.train(model, loss_of, state, 1, 4, 1e-3, 0.0, False)


def one_network(labels: int = 3) -> Any:
    torch.manual_seed(0)
    names = {str(label): "x" for label in range(labels)}
    return NoisyClassifier(sample_size=8, block_out_channels=(16, 32), down_block_types=("DownBlock2D",) * 2, id2label=names)


def test_norms_for_a_cpu_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    images, weight, bias = (torch.randn(size, generator=draw, requires_grad=True) for size in ((3, 32, 5, 4), 32, 32))
    expected = nn.functional.group_norm(images, 8, weight, bias, 1e-5)
    got = cpu._GroupNorm.apply(images.contiguous(memory_format=torch.channels_last), weight, bias, 8, 1e-5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    g = torch.randn(expected.shape, generator=draw)
    inputs = (images, weight, bias)
    first = [torch.autograd.grad(y, inputs, g, create_graph=True) for y in (got, expected)]
    second = [torch.autograd.grad(sum(each.square().sum() for each in some), (images, weight)) for some in first]
    for a, b in [*zip(*first, strict=True), *zip(*second, strict=True)]:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_network_made_faster_computes_the_same() -> None:
    network, x, t = one_network().to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    expected = network(x, t)
    cpu.speed_up(network)
    torch.testing.assert_close(network(x, t), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(x, t).float(), expected, atol=0.05, rtol=0.05)


def test_two_draws_are_one_batch() -> None:
    network, x = one_network(), torch.randn(4, 3, 8, 8)

    def loss_of(model: nn.Module, draw: int) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return model(x[2 * draw : 2 * draw + 2], torch.tensor([5])).square().mean()

    loss = loop.accumulate_gradients(loss_of, network, [0, 1], "cpu")
    gradients = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    whole = network(x, torch.tensor([5])).square().mean()
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    for weight, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-6, rtol=1e-4)


def test_boxes_have_shares_from_none_to_all() -> None:
    share = classifier.random_boxes(4000, 16, torch.Generator().manual_seed(0)).float().mean((1, 2, 3))
    # half of the area on average, less what falls outside the image
    assert 0.2 < share.mean() < 0.5
    assert share.min() < 0.02
    assert share.max() > 0.9


def test_targets_are_as_mixed_as_the_images() -> None:
    """Photographs of one colour for each label: the share of a colour is the probability of its label."""
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 16, 16)
    made = classifier.LabelledBatches(images, torch.tensor([7, 3]), 64, 0, "cpu", [3, 7], cutmix=0.5)
    made.noised = lambda x0, t, eps: x0  # type: ignore[method-assign]
    x0, _, target = made(2)
    torch.testing.assert_close(target.sum(1), torch.ones(64))
    # colours were changed by less than 0.8 of the 2 between black and white
    torch.testing.assert_close((x0 > 0).float().mean((1, 2, 3)), target[:, 0])
    assert 10 < ((target > 0) & (target < 1)).any(1).sum() < 50
    plain = classifier.LabelledBatches(images, torch.tensor([7, 3]), 64, 0, "cpu", [3, 7])
    assert set(plain(2)[2].flatten().tolist()) == {0.0, 1.0}


def test_colours_change_a_little() -> None:
    images = torch.rand(50, 3, 8, 8) * 1.6 - 0.8
    changed = classifier.random_colours(images, 0.2, torch.Generator().manual_seed(0))
    assert changed.abs().max() <= 1
    assert 0.02 < (changed - images).abs().mean() < 0.3
    torch.testing.assert_close(classifier.random_colours(images, 0.0, torch.Generator()), images)


def test_a_share_of_each_label_is_split_off() -> None:
    labels = torch.arange(3).repeat(20)
    off, rest = classifier.split_off(labels, 0.1, 0)
    assert labels[off].bincount().tolist() == [2, 2, 2]
    assert sorted([*off.tolist(), *rest.tolist()]) == list(range(60))
    assert torch.equal(classifier.split_off(labels, 0.1, 0)[0], off)


def test_some_columns_of_a_classifier() -> None:
    network, x, t = one_network(labels=4).eval(), torch.randn(2, 3, 8, 8), torch.tensor([9, 9])
    some = classifier.with_columns(network, [3, 1], {"8": "b", "9": "a"})
    assert list(some.config.id2label) == ["8", "9"]
    torch.testing.assert_close(some(x, t), network(x, t)[:, [3, 1]])


def test_a_negative_class_begins_at_zero() -> None:
    network, x, t = one_network().eval(), torch.randn(2, 3, 8, 8), torch.tensor([9, 9])
    more = classifier.with_negative_class(network).eval()
    assert more.config.negative_class
    torch.testing.assert_close(more(x, t), torch.cat([network(x, t), torch.zeros(2, 1)], 1))


def test_the_classifier_alone_wants_a_unet_that_draws(data: Path, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="has no UNet"):
        recipe.main(data, tmp_path, part="classifier")


def test_calibration_finds_the_temperature() -> None:
    """A network that sees the label of each image and is right as often as its logits say, times 2."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4000,), generator=draw)
    logits = torch.randn(4000, 4, generator=draw)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    images = torch.zeros(4000, 3, 8, 8, dtype=torch.uint8)
    made = classifier.LabelledBatches(images, labels, 8, 0, "cpu", range(4))
    parts = iter(list(logits.split(250)) * 4)
    scales = classifier.fit_logit_scales(lambda x_t, t: 2 * next(parts), made, levels=2, draws=2)
    assert scales == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.mark.usefixtures("small")
def test_one_command_makes_a_checkpoint_that_opens(data: Path, tmp_path: Path) -> None:
    from diffusers import DDIMPipeline

    from guidegen.models.checkpoint import open_checkpoint, open_classifier

    out = tmp_path / "out"
    seen = "unet=8,pretraining=16,classifier=8,drawn=9,negatives=16,scores=8"
    recipe.main(data, out, classes="1,207,281", size=8, images=seen, batch=4)
    checkpoint = open_checkpoint(str(out))
    assert (checkpoint.null_label, checkpoint.prediction_type) == (1000, "v_prediction")
    assert checkpoint.labels.names == {1: "goldfish", 207: "golden retriever", 281: "tabby"}
    judge = open_classifier(checkpoint.bundled_classifier or "")
    assert judge.columns(checkpoint.labels) == {1: 0, 207: 1, 281: 2}
    assert not checkpoint.refusal("both", classifier=True)
    noisy, clean = (open_classifier(checkpoint.bundled_classifier or "", input) for input in ("noisy", "denoised"))
    x = torch.randn(2, 3, 8, 8)
    logits = noisy.load("cpu")(x, torch.tensor([0, 0]))
    assert logits.shape == (2, 4)  # the labels, and what the model drew
    torch.testing.assert_close(clean.load("cpu")(x), logits[:, :3])
    assert set(DDIMPipeline.from_pretrained(out).components) == {"unet", "scheduler"}


@pytest.mark.parametrize("text", ["unet", "unet=-1", "unet=1e3", "vae=3", ""])
def test_images_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="NAME=N"):
        recipe.images_of(text)


@pytest.mark.usefixtures("small")
def test_training_begins_from_given_weights(data: Path, tmp_path: Path) -> None:
    """No step at all writes the weights that were given, as fp16."""
    given = UNet2DModel(sample_size=8, **recipe.UNET)
    given.save_pretrained(tmp_path / "given")
    recipe.main(data, tmp_path, part="unet", classes="1,207", size=8, images="unet=0", start=tmp_path / "given", batch=4)
    assert str(tmp_path) not in (tmp_path / "unet/config.json").read_text()
    written = UNet2DModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float16).state_dict()
    for name, weight in given.state_dict().items():
        assert torch.equal(weight.half(), written[name]), name


def test_parts_have_names(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="unet or all"):
        recipe.main(tmp_path, tmp_path, part="strong")


@pytest.mark.usefixtures("small")
def test_the_classifier_goes_on_from_either_phase(data: Path, tmp_path: Path) -> None:
    labels = {"1": "goldfish", "207": "golden retriever", "281": "tabby"}

    def train() -> Any:
        return classifier.train_classifier(
            classifier.Training(data, tmp_path, [1, 207, 281], 8, 4, 0), labels, (32, 16)
        ).state_dict()

    whole, again = train(), train()
    (tmp_path / "classifier.state").unlink()
    last = train()
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, last[name]), name


def test_the_table_of_the_classifier(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"1": "goldfish", "207": "golden retriever", "281": "tabby"}
    network = small_classifier(names)
    network.save_pretrained(tmp_path / "classifier")
    calibration.main(data, str(tmp_path / "classifier"), split="train", draws=1)
    lines = capsys.readouterr().out.splitlines()
    heads = ["timestep", "---", "sigma/alpha", "accuracy", "mean confidence"]
    assert [line.split("|")[1].strip() for line in lines[:5]] == heads
    assert {line.count("|") for line in lines[:5]} == {len(calibration.TIMESTEPS) + 2}
    assert lines[5] == "24 photographs, 1 draws of noise each"


def test_the_table_of_the_card() -> None:
    names = ("frechet_distance", "precision", "recall", "density", "coverage")
    row = {"mode": "cfg", "w": 1.5, "metrics": {name: {"value": 0.123} for name in names} | {"accuracy": {"value": 0.784}}}
    assert tradeoff.table([row]).splitlines()[2] == "| cfg | 1.5 | 78.4 % | 0.12 | 0.12 | 0.12 | 0.12 | 0.12 |"
