"""`guidegen tune`: the model of a curve, rounds of drawing, and searches that are killed, shared and gone on with."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NAMES, SIZE, call
from typer.testing import CliRunner

from guidegen.cli import app
from guidegen.errors import GuidegenError, UsageError
from guidegen.tune.measuring import _groups
from guidegen.tune.model import Points, error_covariance, jackknife_error, posterior
from guidegen.tune.rounds import Evaluation, Goal, Progress, Search, first_seeds
from guidegen.tune.space import Dimension, Space, parse_range
from guidegen.tune.study import checked_address

pytest.importorskip("optuna")
GROUPS = 24
SPACE = Space((Dimension("w", (), 0.5, 8.0, 0.01),))


# --- curves with a known optimum and a known noise


def noisy(curve: Callable[[float], float], spread: float, loose: float, seed: int, most: int) -> Callable[[float, int], Any]:
    """From w and a number of seeds to one value a seed: the curve, an error that is smooth in w, and one that is not."""
    random = np.random.default_rng(seed)
    slow, phase = random.standard_normal((6, most)) / 2, random.uniform(0, 2 * np.pi, (6, most))

    def draw(w: float, seeds: int) -> Any:
        smooth = np.cos(slow[:, :seeds] * w + phase[:, :seeds]).sum(0) / 3**0.5
        rough = np.random.default_rng([seed, round(100 * w)]).standard_normal(seeds)
        return curve(w) + spread * ((1 - loose) ** 0.5 * smooth + loose**0.5 * rough)

    return draw


def evaluation(w: float, values: Any) -> Evaluation:
    """What is measured of the mean over seeds."""
    group = np.arange(len(values)) % GROUPS
    sums, counts = np.bincount(group, values, GROUPS), np.bincount(group, minlength=GROUPS)
    without = (values.sum() - sums) / (len(values) - counts)
    error = jackknife_error(without)
    return Evaluation((w,), len(values), len(values), {"m": float(values.mean())}, {"m": error}, {"m": without.tolist()})


def searched(draw: Callable[[float, int], Any], budget: int, target: float | None = None) -> Progress:
    """A search for the least, to its end."""
    first = SPACE.first_settings()
    goal = Goal({"m": -1}, budget, target, 1, first_seeds(len(first), budget, 1, 48))
    search, there = Search(SPACE, goal, first), list[Evaluation]()
    while (progress := search.progress(there)).reason is None:
        there += [evaluation(w, draw(w, progress.rounds[-1].seeds)) for (w,) in progress.todo]
    return progress


def found(progress: Progress) -> tuple[float, float, float]:
    """The best w and the 95 % interval of it."""
    one = progress.fits["m"]
    w = np.array([setting[0] for setting in one.candidates])
    low, high = np.quantile(w[one.curve.minima], [0.025, 0.975])
    return float(w[one.curve.best]), float(low), float(high)


def of_grid(draw: Callable[[float, int], Any], weights: int, seeds: int) -> float:
    """The w that is best on a full grid."""
    grid = np.linspace(0.5, 8, weights)
    return float(grid[np.argmin([draw(w, seeds).mean() for w in grid])])


def skewed(w: float) -> float:
    """As a distance falls and rises over w; least at ln 20."""
    return float(10 * np.exp(-w) + 0.5 * w)


def moved(curve: Callable[[float], float], seed: int) -> tuple[Callable[[float], float], float]:
    """The curve moved along w, so that no grid has its optimum, and how far."""
    by = float(np.random.default_rng([seed, 1]).uniform(-0.25, 0.25))
    return lambda w: curve(w - by), by


@pytest.mark.parametrize(("curve", "optimum"), [(lambda w: 0.5 * (w - 3) ** 2, 3.0), (skewed, float(np.log(20)))])
def test_the_optimum_is_in_the_interval_and_takes_a_third_of_a_grid(curve: Callable[[float], float], optimum: float) -> None:
    budget, runs = 1500, 50
    inside, tuned, grids = 0, [], []
    for seed in range(runs):
        of_run, by = moved(curve, seed)
        draw = noisy(of_run, 3.0, 0.1, seed, 500)
        progress = searched(draw, budget)
        assert progress.images <= budget
        best, low, high = found(progress)
        inside += low - 0.005 <= optimum + by <= high + 0.005
        tuned.append(best - optimum - by)
        grids.append([of_grid(draw, weights, 3 * budget // weights) - optimum - by for weights in (9, 16, 31)])
    assert inside >= 0.9 * runs
    error, of_grids = np.sqrt(np.mean(np.square(tuned))), np.sqrt(np.mean(np.square(grids), axis=0))
    assert (error <= of_grids).all(), (error, of_grids)


def test_a_search_stops_where_it_is_precise_enough_or_the_best_is_at_an_end() -> None:
    loose = searched(noisy(lambda w: 0.5 * (w - 3) ** 2, 3.0, 0.1, 0, 9000), 30_000, target=0.05)
    assert (loose.reason, loose.images < 30_000) == ("precision reached", True)
    assert loose.fits["m"].curve.loss <= 0.05
    assert searched(noisy(lambda w: 3 * w, 1.0, 0.1, 0, 9000), 30_000).reason == "the best lies at the end of the range"
    assert searched(lambda w, seeds: np.ones(seeds), 3000).reason == "budget spent", "what does not vary at all"


def test_rounds_compare_equal_numbers_and_draw_what_is_there_no_more() -> None:
    progress = searched(noisy(skewed, 3.0, 0.1, 1, 4000), 20_000)
    seeds = [each.seeds for each in progress.rounds]
    assert seeds == sorted(seeds)
    assert len(seeds) > 2
    assert {one.images for one in progress.measured} == {seeds[-1]}
    again = set(progress.rounds[1].settings) & set(progress.rounds[0].settings)
    assert again, "what was drawn in the first round serves in the second"


def test_common_errors_cancel() -> None:
    random = np.random.default_rng(0)
    shared = random.standard_normal(GROUPS) / 5
    points = Points(np.linspace(0, 1, 5)[:, None], np.zeros(5, np.int64))
    replicates = np.array([shared + random.standard_normal(GROUPS) / 500 for _ in range(5)])
    covariance = error_covariance(points, np.full(5, 1.0), replicates)
    difference = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert difference < 0.01 * covariance[0, 0]
    alone = error_covariance(points, np.full(5, 1.0), random.standard_normal((5, GROUPS)) / 5)
    assert abs(alone[0, 1]) < 0.5 * alone[0, 0]
    silent = error_covariance(points, np.full(5, 1.0), np.zeros((5, GROUPS)))
    np.testing.assert_allclose(silent, np.eye(5), err_msg="such as an accuracy of 0 of few images at all settings")


def test_the_curve_goes_through_values_without_errors() -> None:
    points = Points(np.linspace(0, 1, 6)[:, None], np.zeros(6, np.int64))
    values = np.square(points.x[:, 0] - 0.4)
    curve = posterior(points, values, np.zeros((6, 6)), points)
    np.testing.assert_allclose(curve.mean, values, atol=1e-3)
    assert curve.best == 2


# --- what is varied


@pytest.mark.parametrize(
    ("word", "axis", "ends"),
    [
        ("w=0.5:8", "w", (0.5, 8.0)),
        ("w-classifier=0:4", "w_classifier", (0.0, 4.0)),
        ("steps=10:50", "steps", (10.0, 50.0)),
        ("apg.eta=0:1", "apg.eta", (0.0, 1.0)),
        ("w=1,2,4", "w", (1.0, 4.0)),
        ("w=0:8:2", "w", (0.0, 8.0)),
    ],
)
def test_ranges(word: str, axis: str, ends: tuple[float, float]) -> None:
    dimension = parse_range(word)
    assert dimension is not None
    assert (dimension.name, dimension.ends) == (axis, ends)


@pytest.mark.parametrize("word", ["interval=0.3:5", "guidance=cfg,apg", "steps=10,20", "scheduler=ddim,euler"])
def test_lists_are_those_of_a_sweep(word: str) -> None:
    assert parse_range(word) is None


@pytest.mark.parametrize("word", ["w=8:0.5", "w=1:1", "w=a:2", "w=nan:2", "steps=0:10", "steps=1.5:10", "w="])
def test_what_is_no_range_is_refused(word: str) -> None:
    with pytest.raises(UsageError):
        parse_range(word)


def test_settings_are_short_numbers_inside_the_range() -> None:
    space = Space((Dimension("w", (), 0.0, 8.0, 0.01), Dimension("guidance", ("cfg", "apg"))))
    settings = space.candidates(space.whole)
    assert {guidance for _, guidance in settings} == {"cfg", "apg"}
    assert all(0 < w <= 8 and len(str(w)) <= 4 for w, _ in settings), "at 0 all labels would be one image"
    there = [(3.0, "cfg")]
    assert (3.0, "cfg") in space.design(0, ((0.6, 0.75),), 5, there), "in place of a new one beside it"


def test_groups_are_of_whole_seeds() -> None:
    rows: Any = [None] * 48
    masks = _groups(rows, 16)
    assert len(masks) == 16
    assert all(set(np.flatnonzero(mask) % 16) == {i} for i, mask in enumerate(masks))
    assert sum(mask.sum() for mask in _groups(rows[:30], 3)) == 30


def test_passwords_are_not_shown() -> None:
    assert checked_address("sqlite://me:secret@host/x") == "sqlite://me:***@host/x"


# --- the command


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    images = np.random.default_rng(0).integers(0, 256, (60, SIZE, SIZE, 3), np.uint8)
    np.savez(path, arr_0=images, arr_1=np.arange(60) % 2)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image classifier of transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks") / "tiny-resnet"
    names = {int(label): name for label, name in NAMES.items()}
    config = transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], layer_type="basic", id2label=names
    )
    transformers.ResNetForImageClassification(config).eval().save_pretrained(folder)
    about = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


def words(checkpoint: Path, network: Path, reference: Path, out: Path, *more: object) -> list[object]:
    """A search of a few hundred tiny images."""
    given = ["--label", "0,1", "--steps", 2, "--by", "w=0.5:6", "--device", "cpu", "--budget", 600, "-o", out, *more]
    return ["tune", "-m", checkpoint, "--features", network, "--judge", network, "--reference", reference, *given]


def rows_of(folder: Path) -> list[str]:
    """The file of each row of all manifests."""
    lines = [line for path in folder.glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line)["file"] for line in lines]


def forked(arguments: list[object], cwd: Path) -> int:
    """The id of a process that does what the command does."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(cwd / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        app([*map(str, arguments)], standalone_mode=False)
        code = 0
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rows_in(folder: Path) -> int:
    """How many rows all manifests have."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("manifest*.jsonl"))


TWO = ("--metric", "frechet_distance", "--metric", "pairwise_distance")


@pytest.fixture(scope="module")
def searched_run(
    with_null: Path, network: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, list[str]]:
    """A run in which a search for two metrics was made, what that printed, and the files that it drew."""
    folder = tmp_path_factory.mktemp("tune") / "run"
    result = call(*words(with_null, network, reference, folder, *TWO, "--json"))
    return folder, result, sorted(rows_of(folder))


def test_the_answer(searched_run: tuple[Path, Any, list[str]], with_null: Path) -> None:
    folder, result, files = searched_run
    (line,) = result.stdout.splitlines()
    answer = json.loads(line)
    assert answer["type"] == "tune"
    assert answer["spent"] == len(files) <= 600
    first, second = answer["metrics"]
    assert (first["metric"], second["metric"]) == ("frechet_distance", "pairwise_distance")
    low, high = first["interval"]["w"]
    assert 0.5 <= low <= first["best"]["w"] <= high <= 6
    assert answer["front"]
    assert first["command"] == (
        f"guidegen sample --label 0,1 --model {with_null} --steps 2 --device cpu --w {first['best']['w']}"
    )
    assert "95 % interval of the best w" in result.stderr
    assert "Pareto front of frechet_distance and pairwise_distance" in result.stderr
    assert "reference images are too few" not in result.stderr, "60 for 10 features"
    assert (folder / "tune.svg").stat().st_size > 1000
    call("report", folder, "-o", folder / "report.html", "-q")
    page = (folder / "report.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert "95 % interval of the best w" in page
    call("verify", folder)


def test_a_search_that_is_killed_ten_times_and_shared_by_four(
    searched_run: tuple[Path, Any, list[str]],
    with_null: Path,
    network: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GUIDEGEN_TUNE_PARENT", str(os.getpid()))  # workers print and plot nothing
    _, result, files = searched_run
    folder = tmp_path / "run"
    command = words(with_null, network, reference, folder, *TWO, "--batch-size", 8)
    for kills in range(10):
        before, pid = rows_in(folder), forked(command, tmp_path)
        deadline = time.monotonic() + 60
        while rows_in(folder) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.01 * kills)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert before < rows_in(folder) < len(files)
    study = (folder / "tune.db").stat().st_ino
    pids = [forked(command, tmp_path) for _ in range(4)]
    assert [ended(pid) for pid in pids] == [0] * 4, (tmp_path / "log").read_text()
    assert sorted(rows_of(folder)) == files, "each once, and the same as undisturbed"
    assert (folder / "tune.db").stat().st_ino == study
    monkeypatch.delenv("GUIDEGEN_TUNE_PARENT")
    together = json.loads(call(*command, "--json").stdout)
    alone = json.loads(result.stdout)
    assert [one["best"] for one in together["metrics"]] == [one["best"] for one in alone["metrics"]]


def test_the_same_command_draws_nothing_and_a_larger_budget_goes_on(
    searched_run: tuple[Path, Any, list[str]], with_null: Path, network: Path, reference: Path
) -> None:
    folder, result, before = searched_run
    again = call(*words(with_null, network, reference, folder, *TWO, "--json"))
    assert json.loads(again.stdout)["metrics"] == json.loads(result.stdout)["metrics"]
    assert sorted(rows_of(folder)) == before
    call(*words(with_null, network, reference, folder, *TWO, "--budget", 800))
    files = rows_of(folder)
    assert len(before) < len(files) <= 800
    assert set(before) < set(files)
    assert len(set(files)) == len(files)
    call(*words(with_null, network, reference, folder, "--metric", "recall"), code=2)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--by", "w=1:2"], "twice"),
        (["--w", 3], "instead of --w"),
        (["--metric", "beauty"], "frechet_distance, kernel_distance"),
        (["--budget", 30], "336 in all"),
        (["--by", "guidance=cfg"], "nothing to search"),
        (["--by", "guidance=cfg,nosuch"], "nosuch"),
        (["--by", "guidance=cfg@3,apg@5"], "VALUE@W"),
        (["--by", "label=0,1"], "--label"),
        (["--seed", "random"], "another search each time"),
        (["-o", "x.png"], "run directory"),
        (["--storage", "nosuch"], "postgresql://USER@HOST/NAME"),
        (["--storage", "sqlite:///x.db", "--overwrite"], "other machines"),
        (["--seeds-per-label", "--budget", 1_000_000], "100,000 seeds"),
        (["--threads", 9999], "may use"),
        (["--metric", "accuracy", "--judge", "nosuch/model", "--offline"], ""),
    ],
)
def test_what_cannot_be_searched_is_refused(
    more: list[object], word: str, with_null: Path, network: Path, reference: Path, tmp_path: Path
) -> None:

    result = CliRunner().invoke(app, [str(each) for each in words(with_null, network, reference, tmp_path / "run", *more)])
    assert isinstance(result.exception, GuidegenError), result.output
    assert result.exception.code in (2, 4)
    assert word in str(result.exception)
    assert not (tmp_path / "run/images").exists()


def test_labels_have_seeds_of_their_own_and_a_search_starts_over(with_null: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    search = ["--by", "w=1,3", "--metric", "nfe", "--budget", 100, "--device", "cpu"]
    command = ["tune", "-m", with_null, "--label", "0,1", "--steps", 1, *search, "-o", run]
    found = call(*command, "--seeds-per-label")
    assert "seeds-per-label" not in found.stdout, "the command draws one image"
    assert {int(Path(file).stem) // 100_000 for file in rows_of(run)} == {0, 1}
    refused = call(*command, code=2)
    assert "seeds per label 'True' there, 'None' now" in str(refused.exception)
    assert "--overwrite" in str(refused.exception)

    (run / "tune.svg").write_text("<svg>mine</svg>")
    assert "--force" in str(call(*command, "--overwrite", code=2).exception)
    assert len(rows_of(run)) == 96, "nothing is deleted before"
    study = (run / "tune.db").read_bytes()
    call(*command, "--overwrite", "--force", "--workers", 2, "--threads", 1)
    assert len(rows_of(run)) == 96
    assert {int(Path(file).stem) // 100_000 for file in rows_of(run)} == {0}
    assert (run / "tune.db").read_bytes() != study
    assert "overwrite" not in json.loads((run / "tune.json").read_text())["search"]
    call("sample", "-m", with_null, "--label", 0, "--steps", 1, "--device", "cpu", "-o", f"{run}/", "--overwrite")
    assert not list(run.glob("tune.[dj]*"))


def test_the_missing_extra_is_named(
    with_null: Path, network: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import guidegen.tune.study

    monkeypatch.setattr(guidegen.tune.study, "find_spec", lambda name: None if name == "optuna" else object())
    with pytest.raises(UsageError, match=r'pip install "guidegen\[tune\]"'):
        guidegen.tune.study.require_packages()
