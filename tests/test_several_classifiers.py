"""Several classifiers at once, each with a weight: from the command line to the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from conftest import NAMES, settings_of, tiny_classifier
from setups import draw_job, open_sampler, options_of
from torch import Tensor

from guidegen.cli.drawing import carry_out
from guidegen.cli.dry_run import print_costs
from guidegen.cli.options import find_classifier
from guidegen.cli.resolve import Job, plan_job
from guidegen.cli.show import _classifier_line
from guidegen.errors import UsageError
from guidegen.models.checkpoint import ClassifierInfo, open_checkpoint
from guidegen.models.classifiers.info import AnyClassifier
from guidegen.models.classifiers.opening import load_classifier, open_classifiers
from guidegen.models.loading import load_network
from guidegen.sampling import sampler as samplers
from guidegen.sampling.sampler import Sampler, Tally
from guidegen.sampling.setup import plan_scheduler
from guidegen.scores.gradient import SummedScore
from guidegen.scores.guided import Guide
from guidegen.scores.interfaces import Cost
from guidegen.scores.noise import Level
from guidegen.spec.cell import Cell
from guidegen.spec.command import Command as CommandLine

Command = Callable[..., Any]
SHUFFLED = {"0": "lion", "1": "crane", "2": "goldfish, Carassius auratus"}
STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two noise-aware classifiers, the second of three labels in another order; a ViT of clean images; a CLIP."""
    import transformers

    top = tmp_path_factory.mktemp("several")
    for name, seed, names in (("first", 1, NAMES), ("second", 2, SHUFFLED)):
        classifier = tiny_classifier(seed, names)
        with torch.no_grad():  # a gradient that shows in the picture
            for weight in classifier.parameters():
                weight *= 1.5
        classifier.save_pretrained(top / name)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {int(i): name for i, name in NAMES.items()}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, id2label=names, **shape)
    transformers.ViTForImageClassification(config).save_pretrained(top / "vit")
    size = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (top / "vit" / "preprocessor_config.json").write_text(json.dumps(size))
    pipelines.clip(top / "clip")
    return {path.name: path for path in top.iterdir()}


def flags(model: Path, out: Path | None = None, *classifiers: object, **given: Any) -> Any:
    usual = {"mode": "classifier", "model": str(model), "out": out and str(out), "steps": STEPS, "label": ["goldfish"]}
    return options_of(**(usual | {"classifier": [*map(str, classifiers)]} | given))


def drawn(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def planned_nfe(job: Job, capfd: pytest.CaptureFixture[str]) -> int:
    capfd.readouterr()
    print_costs(job)
    return next(int(line.split()[0]) for line in capfd.readouterr().out.splitlines() if "(NFE)" in line)


def sampler_of(
    model: Path, classifier: AnyClassifier, mode: str = "classifier", fixed_rows: int | None = None, **others: Any
) -> Sampler:
    checkpoint = open_checkpoint(model)
    walker = plan_scheduler(checkpoint, "ddim", STEPS, None)
    settings = settings_of(mode, STEPS, classifier=classifier.name, classifier_input=classifier.input, **others)
    return open_sampler(checkpoint, classifier, walker, settings, torch.device("cpu"), fixed_rows=fixed_rows)


def test_weights_stand_after_the_last_colon(folders: dict[str, Path], with_null: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(with_null)

    def found(*refs: object) -> tuple[str, list[tuple[Path, float]]]:
        classifier = find_classifier([*map(str, refs)], checkpoint)
        assert classifier is not None
        return classifier.name, [(part.folder, weight) for part, weight in classifier.parts]

    first, vit = folders["first"], folders["vit"]
    assert found(first, f"{vit}:0.5") == ("first:1.0, vit:0.5", [(first, 1.0), (vit, 0.5)])
    assert found(f"{vit}:-2e-1") == ("vit:-0.2", [(vit, -0.2)])
    colon = tmp_path / "classifier:2"
    tiny_classifier().save_pretrained(colon)
    assert found(colon) == ("classifier:2", [(colon, 1.0)]), "a folder of that name is there"
    assert found(f"{colon}:3") == ("classifier:2:3.0", [(colon, 3.0)])
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\nfrom guidegen import ClassifierModel\n"
        "JUDGE = ClassifierModel(lambda device: torch.nn.Flatten(), {0: 'lion'}, 'denoised')\n"
    )
    assert found(f"{own}:JUDGE", f"{first}:2")[0] == "JUDGE:1.0, first:2.0"
    assert found(f"{own}:JUDGE:0.5")[0] == "JUDGE:0.5"
    with pytest.raises(UsageError, match="named twice"):
        found(f"{own}:JUDGE", f"{own}:JUDGE:2")


def test_one_of_weight_1_is_as_without_a_weight(folders: dict[str, Path], with_null: Path) -> None:
    plain, weighed = (plan_job(flags(with_null, None, f"{folders['first']}{text}")) for text in ("", ":1"))
    assert isinstance(weighed.models.classifier, ClassifierInfo)
    assert asdict(weighed.settings) == asdict(plain.settings)
    assert weighed.output == plain.output


def test_each_label_is_asked_of_the_classifier_that_it_belongs_to() -> None:
    class Part:
        """Answers its own number and the label; `calls` at `rows` are what it was asked for."""

        def __init__(self, number: int, cost: Cost):
            self.number, self.cost, self.rows = number, cost, 0

        def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, level: object, null: Tensor) -> Tensor:
            self.rows += len(x_t)
            return x_t + null + (10 * self.number + labels)[:, None, None, None]

    parts = [Part(1, Cost(1)), Part(2, Cost(2)), Part(3, Cost(1, needs_null=True))]
    score = SummedScore(parts)
    assert score.cost == Cost(1, True, (2, 1))
    assert score.cost.of([0, 1, 2, 4]) == 1 + 2 + 1 + 2
    x, null = torch.arange(4.0)[:, None, None, None], torch.full((4, 1, 1, 1), 100.0)
    found = score(x, torch.tensor(0), torch.tensor([7 * 3 + 1, 5 * 3, 6 * 3 + 1, 4 * 3]), None, null)  # type: ignore[arg-type]
    assert found.flatten().tolist() == [0 + 100 + 27, 1 + 100 + 15, 2 + 100 + 26, 3 + 100 + 14]
    assert [part.rows for part in parts] == [2, 2, 0]


def test_images_are_those_of_the_summed_gradients(folders: dict[str, Path], with_null: Path) -> None:
    """Against a loop of its own over diffusers' UNet and scheduler, and autograd through both classifiers."""
    classifier = open_classifiers([(str(folders["first"]), 30.0), (str(folders["second"]), -12.0)])
    sampler = sampler_of(with_null, classifier)
    tally = Tally()
    images, calls = sampler.draw([Cell(4, 3, 2.0), Cell(0, 9, 1.5)], tally=tally)
    assert calls == [STEPS * 3] * 2
    assert tally.made == 2 * STEPS * 3
    assert sampler.setup.plain_cost(5) == 5 * STEPS * 3

    checkpoint = open_checkpoint(with_null)
    unet = load_network(checkpoint, "cpu")
    networks = [load_classifier(part, "cpu") for part, _ in classifier.parts]
    for image, seed, w, columns in zip(images, (3, 9), (2.0, 1.5), ((4, 0), (0, 2)), strict=True):  # lion, goldfish
        walker = plan_scheduler(checkpoint, "ddim", STEPS, None)
        x = torch.randn((1, *checkpoint.shape), generator=torch.Generator().manual_seed(seed))
        for t in walker.timesteps:
            leaf = x.clone().requires_grad_()
            log_p = [net(leaf, t[None]).log_softmax(1)[0, i] for net, i in zip(networks, columns, strict=True)]
            (gradient,) = torch.autograd.grad(30 * log_p[0] - 12 * log_p[1], leaf)
            with torch.no_grad():
                eps = unet(x, t, torch.tensor([5])).sample
            sigma = (1 - walker.alphas_cumprod[t]).sqrt()
            x = walker.step(eps - w * sigma * gradient, t, x).prev_sample
        # a batch of two in ours, one in theirs: fp32 rounding over three steps
        torch.testing.assert_close(image, x[0], rtol=1e-4, atol=1e-4)
    plain, _ = sampler_of(with_null, classifier.parts[0][0]).draw([Cell(4, 3, 60.0)])
    assert (plain[0] - images[0]).abs().max() > 1e-3, "the second one counts"


@pytest.mark.parametrize(("gradient", "cost"), [("exact", Cost(1, False, (2,))), ("detached", Cost(1, True, (1,)))])
def test_noisy_and_denoised_together(folders: dict[str, Path], with_null: Path, gradient: str, cost: Cost) -> None:
    """The shift of the pair is the weighted sum of what each gives alone."""
    refs, cell = [(str(folders["first"]), 3.0), (str(folders["vit"]), 8.0)], Cell(1, 0, 1.0)
    pair = open_classifiers(refs)
    both = sampler_of(with_null, pair, classifier_gradient=gradient)
    assert isinstance(both.classifier, SummedScore)
    assert both.classifier.cost == cost
    assert both.target(cell) == ((2, 3.0), (3, 8.0))
    x = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(1))

    def shift(sampler: Sampler, weight: float) -> Tensor:
        denoiser, labels = sampler.condition([cell])
        guides = [
            Guide(denoiser, labels, [0.0], [w], sampler.classifier, "cpu", [sampler.target(cell)]) for w in (weight, 0)
        ]
        guided, plain = (guide(x, torch.tensor(400), Level(0.8, 0.6)) for guide in guides)
        return guided - plain

    alone = [sampler_of(with_null, part, classifier_gradient=gradient) for part, _ in pair.parts]
    shifts = [shift(sampler, weight) for sampler, (_, weight) in zip(alone, refs, strict=True)]
    assert min(one.abs().max() for one in shifts) > 1e-4
    # differences of fp32 predictions of order 1
    torch.testing.assert_close(shift(both, 1.0), shifts[0] + shifts[1], rtol=1e-4, atol=2e-6)


def test_bits_do_not_depend_on_the_batch(folders: dict[str, Path], with_null: Path) -> None:
    classifier = open_classifiers([(str(folders["first"]), 20.0), (str(folders["vit"]), 9.0)])
    cells = [Cell(label, seed, w) for label, seed, w in ((0, 0, 1.0), (1, 1, 2.0), (4, 2, 0.0), (0, 3, 3.0), (1, 4, 1.0))]
    sampler = sampler_of(with_null, classifier, fixed_rows=2)
    together, _ = sampler.draw(cells)
    alone = torch.cat([sampler.draw([cell])[0] for cell in cells])
    assert torch.equal(together, alone)


def test_run_and_resume(folders: dict[str, Path], with_null: Path, guidegen: Command, tmp_path: Path) -> None:
    model = ["sweep", "-m", with_null, "--mode", "classifier", "--label", "goldfish", "--w", "0,1,2", "--steps", STEPS]
    pair = ["-c", folders["second"], "-c", f"{folders['vit']}:0.5", "-o", "run"]
    done = guidegen(*model, *pair, "--json")
    assert done.returncode == 0, done.stderr
    assert f"{folders['second']} has other label ids; its labels are matched by name" in done.stderr
    assert f"{folders['vit']} has other" not in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["nfe"] for row in rows] == [STEPS, *[STEPS * (1 + 1 + 2)] * 2]
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    settings = about["settings"]
    assert settings["classifier"] == "second:1.0, vit:0.5"
    assert settings["classifier_input"] == "noisy, denoised"
    assert settings["classifier_gradient"] == "exact"
    hashes = settings["classifier_sha256"].split(", ")
    assert [len(sha) for sha in hashes] == [64, 64]
    assert [(part["path"], part["weight"]) for part in about["classifier"]] == [
        (str(folders["second"]), 1.0),
        (str(folders["vit"]), 0.5),
    ]
    (tmp_path / "run" / rows[1]["file"]).unlink()
    given = {"sweep": True, "w": "0,1,2"}
    draw_job(flags(with_null, tmp_path / "run", folders["second"], f"{folders['vit']}:0.5", **given))
    assert {row["file"]: row["sha256"] for row in drawn(tmp_path / "run")} == {row["file"]: row["sha256"] for row in rows}
    assert (tmp_path / "run" / rows[1]["file"]).is_file()
    with pytest.raises(UsageError, match=r"classifier second:1.0, vit:0.5 there, second:1.0, vit:0.6 now"):
        draw_job(flags(with_null, tmp_path / "run", folders["second"], f"{folders['vit']}:0.6", **given))
    assert _text_of(folders) == ["first (noisy input, 5 labels)", "vit (denoised input, 5 labels, weight 0.5)"]


def _text_of(folders: dict[str, Path]) -> list[str]:
    """What `inspect` says of two."""
    classifier = open_classifiers([(str(folders["first"]), 1.0), (str(folders["vit"]), 0.5)])
    return [_classifier_line(*part).rpartition("/")[2] for part in classifier.parts]


@pytest.mark.parametrize("guidance", [None, "apg"])
def test_calls_that_are_planned_are_those_that_are_made(
    folders: dict[str, Path], with_null: Path, tmp_path: Path, guidance: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Noisy, detached and zero-shot ones, with labels that have weights: the dry run against the rows of the manifest."""
    refs = (folders["first"], f"{folders['clip']}:2", folders["vit"])
    given = {"mode": "both", "classifier_gradient": "detached", "sweep": True, "w": "0,1,3", "w_classifier": "0,1"}
    given |= {"label": ["goldfish:2,lion:-1", "tabby"], "guidance": guidance}
    job = plan_job(flags(with_null, tmp_path / "run", *refs, **given))
    assert job.settings.classifier_input == "noisy, denoised, denoised"
    nfe = planned_nfe(job, capfd)
    carry_out(job, CommandLine("sweep", {}))
    assert nfe == sum(row["nfe"] for row in drawn(tmp_path / "run"))
    # labels 2 c0 - c4 at w = 1: their two predictions, and three gradients of each; null too where it is read
    row = next(row for row in drawn(tmp_path / "run") if row.get("mixture") and (row["w"], row["w_classifier"]) == (1, 1))
    assert row["nfe"] == STEPS * (2 + 1 + 2 * 3)


def test_each_gets_the_label_or_the_prompt(
    folders: dict[str, Path], unconditional: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A zero-shot one beside one with labels: the labels' names are its texts, or the prompts are."""
    refs = (f"{folders['clip']}:4", folders["second"])
    named = plan_job(flags(unconditional, tmp_path / "a", *refs, label=["goldfish,lion"]))
    assert named.settings.classifier_texts == [f"a photo of a {name}" for name in ("lion", "crane", "goldfish")]
    assert [cell.label for cell in named.cells] == [2, 0]
    sampler = samplers.open_sampler(named.setups[()], named.device)
    assert sampler.target(named.cells[0]) == ((2 * 2, 4.0), (2 * 2 + 1, 1.0))
    texts = plan_job(flags(unconditional, tmp_path / "b", *refs, label=["lion"], prompt=["a fox:2 AND snow"], w="5"))
    assert texts.settings.classifier_texts == ["a fox", "snow", ""]
    sampler = samplers.open_sampler(texts.setups[()], texts.device)
    assert sampler.target(texts.cells[0]) == ((0, 8.0), (2, 4.0), (1, 1.0))
    nfe = planned_nfe(texts, capfd)
    carry_out(texts, CommandLine("sample", {}))
    assert [row["nfe"] for row in drawn(tmp_path / "b")] == [nfe] == [STEPS * (1 + 2 * 2 + 1)]


REFUSED = [
    (("first", "second"), {"label": ["tabby"]}, "tabby.*: the classifier .*second does not know it"),
    (("first", "first:2"), {}, "named twice"),
    (("first:0",), {}, "weighs nothing"),
    (("first:0.5", "clip"), {"label": None}, "needs --label"),
    (("first", "second"), {"classifier_gradient": "detached"}, "these read x_t itself"),
    (("vit", "clip"), {"classifier_input": "noisy"}, "ViTForImageClassification takes no timestep"),
    (("first", "vit"), {"mode": "cfg"}, "for the modes classifier and both"),
]


@pytest.mark.parametrize(("names", "given", "words"), REFUSED)
def test_what_holds_for_one_holds_for_each(
    folders: dict[str, Path], with_null: Path, tmp_path: Path, names: tuple[str, ...], given: dict[str, Any], words: str
) -> None:
    top = folders["first"].parent
    with pytest.raises(UsageError, match=words):
        plan_job(flags(with_null, tmp_path / "run", *(top / name for name in names), **given))
    assert not (tmp_path / "run").exists()


def test_an_input_is_for_those_that_can_read_it(folders: dict[str, Path]) -> None:
    refs = [(str(folders["first"]), 1.0), (str(folders["vit"]), 1.0)]
    assert open_classifiers(refs).input == "noisy, denoised"
    assert open_classifiers(refs, "noisy").input == "noisy, denoised"
    assert open_classifiers(refs, "denoised").input == "denoised, denoised"


def test_each_that_reads_noise_is_of_the_models_channels(folders: dict[str, Path], tmp_path: Path) -> None:
    dit = pipelines.dit(tmp_path / "dit")
    with pytest.raises(UsageError, match=r"first reads 3 channels.*draws 4 \(latents\)"):
        plan_job(flags(dit, tmp_path / "run", folders["vit"], folders["first"], label=["tench"]))
