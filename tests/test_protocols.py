"""`guidegen evaluate --protocol`: the numbers of the original functions, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

from guidegen.cli.evaluate import evaluate
from guidegen.cli.evaluate_flags import EvaluateFlags
from guidegen.errors import CheckpointError, UnsafeError, UsageError
from guidegen.evaluate import protocols, published, scores, statistics
from guidegen.evaluate.cache import FeatureCache
from guidegen.evaluate.distances import FrechetDistance
from guidegen.evaluate.features import Reader
from guidegen.evaluate.measure import METRICS_FILE, open_drawn, read_metrics
from guidegen.evaluate.plain_pickle import read_plain_pickle
from guidegen.evaluate.published import PublishedReader
from guidegen.runs.directory import Run
from guidegen.spec.cell import Cell
from guidegen.spec.plan import Plan
from guidegen.spec.settings import Settings

SIZE, POOL, SPATIAL, DINO, CLASSES = 8, 6, 5, 4, 7
Npz = Callable[..., Path]


def pictures(seed: int, count: int, level: int = 128) -> Any:
    return np.random.default_rng(seed).normal(level, 40, (count, SIZE, SIZE, 3)).clip(0, 255).astype(np.uint8)


def projection(width: int) -> Any:
    return np.random.default_rng(width).normal(size=(SIZE * SIZE * 3, width)).astype(np.float32) / 400


def features_of(images: Any, width: int) -> Any:
    return np.maximum(images.reshape(len(images), -1).astype(np.float32) @ projection(width), 0)


def reader(name: str, layers: dict[str, int], known: bool, head: Any = None) -> PublishedReader:
    def read(pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.permute(0, 2, 3, 1).numpy()
        return torch.from_numpy(np.concatenate([features_of(images, width) for width in layers.values()], 1))

    ends = np.cumsum([0, *layers.values()]).tolist()
    columns = {layer: slice(ends[i], ends[i + 1]) for i, layer in enumerate(layers)}
    identity = hashlib.sha256(f"{name} {layers}".encode()).hexdigest()
    return PublishedReader(name, identity, read, None, "0" * 64, known, columns, head)


HEAD = torch.from_numpy(np.random.default_rng(5).normal(size=(CLASSES, POOL)))


@pytest.fixture(params=[True])
def known(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """In place of Inception and DINOv2: random projections, a few features wide."""

    def inception(_: Any, __: Any, ___: Any, resizing: str = "", spatial: bool = False) -> PublishedReader:
        return reader("Inception-v3", {"pool": POOL} | ({"spatial": SPATIAL} if spatial else {}), known, HEAD)

    monkeypatch.setattr(protocols, "open_inception", inception)
    monkeypatch.setattr(published, "open_inception", inception)
    monkeypatch.setattr(protocols, "open_dinov2", lambda *_: reader("DINOv2", {"dinov2": DINO}, known))
    monkeypatch.setattr(statistics, "_WIDTHS", {"pool": POOL, "spatial": SPATIAL, "dinov2": DINO})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "run"
    settings = Settings("cfg", "model", "0" * 64, "DDIMScheduler", 5, None, "fp32", 5)
    images = iter(pictures(1, 40, 140))
    with Run(folder, settings, {"command": "sample", "options": {}}, plan=Plan((0, 1), range(20), (2.0,))) as run:
        for label in (0, 1):
            for seed in range(20):
                run.write(Cell(label, seed, 2.0), next(images), str(label), 1)
    return folder


@pytest.fixture
def npz(tmp_path: Path) -> Npz:
    """A file of statistics of 60 images, and of 30 of them the pictures."""

    def make(name: str, *parts: str) -> Path:
        every = pictures(2, 60)
        pool, spatial = (features_of(every, width).astype(float) for width in (POOL, SPATIAL))
        held = {
            "mu": pool.mean(0),
            "sigma": np.cov(pool, rowvar=False),
            "mu_s": spatial.mean(0),
            "sigma_s": np.cov(spatial, rowvar=False),
            "arr_0": every[:30],
        }
        np.savez(tmp_path / name, **{part: held[part] for part in parts})
        return tmp_path / name

    return make


VIRTUAL = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")


def measure(run: Path, reference: Path | None, protocol: str | None, **flags: Any) -> None:
    given = {"curves": False, "quiet": True, "halves": 3, "json_rows": True, "protocol": protocol}
    evaluate([run], EvaluateFlags(reference, **(given | flags)))


def frechet(fake: Any, mu: Any, sigma: Any) -> float:
    """As guided-diffusion's evaluator and EDM2 have it."""
    from scipy.linalg import sqrtm

    own = np.cov(fake.astype(float), rowvar=False)
    difference = fake.astype(float).mean(0) - mu
    return float(difference @ difference + np.trace(own) + np.trace(sigma) - 2 * np.trace(sqrtm(own @ sigma).real))


def class_score(features: Any, size: int) -> float:
    logits = features.astype(float) @ HEAD.numpy().T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [p[i : i + size] for i in range(0, len(p), size)]
    return float(np.mean([np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()) for part in parts]))


def test_adm_has_the_numbers_of_the_suite(drawn: Path, npz: Npz) -> None:
    path = npz("VIRTUAL.npz", *VIRTUAL)
    measure(drawn, path, "adm")
    (row,), stale = read_metrics(open_drawn(drawn))
    held, fake = np.load(path), pictures(1, 40, 140)
    pool, spatial = features_of(fake, POOL), features_of(fake, SPATIAL)
    figures = {name: figure["value"] for name, figure in row["metrics"].items()}
    assert figures["frechet_distance"] == pytest.approx(frechet(pool, held["mu"], held["sigma"]), rel=1e-4)
    assert figures["spatial_frechet_distance"] == pytest.approx(frechet(spatial, held["mu_s"], held["sigma_s"]), rel=1e-4)
    assert figures["class_score"] == pytest.approx(class_score(pool, 5000), rel=1e-6)
    real = features_of(held["arr_0"], POOL)

    def radii(x: Any) -> Any:
        return np.sort(np.linalg.norm(x[:, None] - x, axis=2), 1)[:, 3]

    between = np.linalg.norm(pool[:, None] - real, axis=2)
    assert figures["precision"] == pytest.approx((between <= radii(real)).any(1).mean())
    assert figures["recall"] == pytest.approx((between <= radii(pool)[:, None]).any(0).mean())
    about = row["protocol"]
    assert (stale, about["name"], about["images"], about["rounding"]) == (0, "adm", 40, "to the nearest")
    assert about["statistics"] == "of the file (pool, spatial)"
    assert about["neighbour_images"] == 30
    assert all(figure["spread"] > 0 for figure in row["metrics"].values())


@pytest.mark.parametrize("known", [True, False], indirect=True)
def test_only_the_published_weights_have_the_published_names(
    drawn: Path, npz: Npz, known: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    measure(drawn, npz("VIRTUAL.npz", *VIRTUAL), "adm", json_rows=False, quiet=False)
    said = capfd.readouterr()
    distances = ["fid", "sfid"] if known else ["frechet_distance", "spatial_frechet_distance"]
    head = ["mode", "w", "images", distances[0], "precision", "recall", distances[1]]
    assert said.out.splitlines()[0].split() == [*head, "inception_score" if known else "class_score"]
    assert ("not known to be the published ones" in said.err) == (not known)
    assert "published numbers are of 50,000 images, these of 40" in said.err


def test_edm2_reads_its_pickles_and_edms_npz(drawn: Path, npz: Npz, tmp_path: Path) -> None:
    every, fake = pictures(2, 60), pictures(1, 40, 140)
    held: dict[str, Any] = {"num_images": 60}
    for name, width in (("fid", POOL), ("fd_dinov2", DINO)):
        made = features_of(every, width).astype(float)
        held[name] = {"mu": made.mean(0), "sigma": np.cov(made, rowvar=False)}
    (tmp_path / "img.pkl").write_bytes(pickle.dumps(held))
    measure(drawn, tmp_path / "img.pkl", "edm2", extrapolate=True)
    (row,), _ = read_metrics(open_drawn(drawn))
    for metric, name, width in (("frechet_distance", "fid", POOL), ("dinov2_frechet_distance", "fd_dinov2", DINO)):
        expected = frechet(features_of(fake, width), held[name]["mu"], held[name]["sigma"])
        assert row["metrics"][metric]["value"] == pytest.approx(expected, rel=1e-4)
        extrapolated = row["metrics"][f"{metric}_extrapolated"]
        assert 0 < abs(extrapolated["value"] - expected) < extrapolated["spread"]
    assert row["protocol"]["statistics_images"] == 60
    measure(drawn, npz("edm.npz", "mu", "sigma"), "edm2")
    (row,), _ = read_metrics(open_drawn(drawn))
    assert "dinov2_frechet_distance" not in row["metrics"]


def test_references_of_other_sizes_are_resized_by_the_protocol(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pictures of twice the size, each pixel four times, have the features of their mean over four."""
    plain = reader("Inception-v3", {"pool": POOL}, True, HEAD)
    pooled = replace(plain, network=lambda pixels: plain.network(torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 8)))
    monkeypatch.setattr(protocols, "open_inception", lambda *_: pooled)
    small = pictures(2, 30)
    large = small.repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "small.npz", arr_0=small)
    np.savez(tmp_path / "large.npz", arr_0=large)
    (tmp_path / "both").mkdir()
    for i in range(30):
        Image.fromarray((small if i % 2 else large)[i]).save(tmp_path / "both" / f"{i:02}.png")

    def distance(name: str, protocol: str) -> float:
        measure(drawn, tmp_path / name, protocol, quiet=False)
        (row,), _ = read_metrics(open_drawn(drawn))
        return float(row["metrics"]["frechet_distance"]["value"])

    expected = distance("small.npz", "fidelity")
    assert "resizes each" not in capfd.readouterr().err
    assert distance("large.npz", "fidelity") == pytest.approx(expected, rel=1e-5)
    assert "large.npz has images of 16x16, the run of 8x8: the protocol resizes each" in capfd.readouterr().err
    assert distance("both", "clean-fid") == pytest.approx(distance("small.npz", "clean-fid"), rel=1e-5)
    with pytest.raises(UsageError, match="images of 8x8 and of 16x16, and --protocol fidelity takes one size"):
        measure(drawn, tmp_path / "both", "fidelity")
    measure(drawn, tmp_path / "both", "fidelity", resize="box")


@pytest.mark.parametrize(
    ("protocol", "parts", "word"),
    [
        ("adm", ("mu", "sigma"), "no mu_s and sigma_s.*--protocol fidelity"),
        ("adm", VIRTUAL[:4], r"no images \(arr_0\)"),
        ("fidelity", ("mu_s", "sigma_s"), "has no arr_0"),
        ("loud", ("mu", "sigma"), "choose adm, edm2"),
        (None, ("mu", "sigma"), "alone: --protocol fidelity"),
        (None, VIRTUAL[:4], "--protocol adm measures against them"),
        ("cmmd", ("mu", "sigma"), "statistics alone"),
    ],
)
def test_a_reference_of_the_wrong_kind(
    protocol: str | None, parts: tuple[str, ...], word: str, drawn: Path, npz: Npz
) -> None:
    (drawn / METRICS_FILE).unlink(missing_ok=True)
    with pytest.raises(UsageError, match=word):
        measure(drawn, npz("x.npz", *parts), protocol)
    assert not (drawn / METRICS_FILE).exists()


def test_statistics_are_never_passed_over_in_silence(drawn: Path, npz: Npz, tmp_path: Path) -> None:
    path = npz("VIRTUAL.npz", *VIRTUAL)
    with pytest.raises(UsageError, match="--protocol adm measures against them"):
        measure(drawn, path, None, features="inception")
    (tmp_path / "img.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.zeros(POOL), "sigma": np.eye(POOL)}}))
    for protocol in (None, "adm", "fidelity"):
        with pytest.raises(UsageError, match="--protocol edm2"):
            measure(drawn, tmp_path / "img.pkl", protocol)


@pytest.mark.parametrize(
    "held",
    [
        {"mu": np.zeros(POOL + 1), "sigma": np.eye(POOL + 1)},
        {"mu": np.zeros(POOL), "sigma": np.eye(POOL + 1)},
        {"mu": np.full(POOL, np.nan), "sigma": np.eye(POOL)},
        {"mu": np.zeros(POOL), "sigma": -np.eye(POOL)},
        {"mu": np.zeros(POOL), "sigma": np.triu(np.ones((POOL, POOL)))},
        {"mu": np.array(["a"] * POOL), "sigma": np.eye(POOL)},
    ],
)
def test_what_are_no_statistics(held: dict[str, Any], drawn: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **held)
    with pytest.raises(UsageError, match=r"x\.npz"):
        measure(drawn, tmp_path / "x.npz", "fidelity")


def test_pickles_are_read_without_running_them(tmp_path: Path) -> None:
    held = {"a": np.arange(6.0).reshape(2, 3), "b": [np.float32(2), 1, "x"], "c": np.asfortranarray(np.eye(2, 3))}
    path = tmp_path / "x.pkl"
    for protocol in range(6):
        path.write_bytes(pickle.dumps(held, protocol))
        found = read_plain_pickle(path)
        assert np.array_equal(found["a"], held["a"])
        assert np.array_equal(found["c"], held["c"])
        assert found["b"] == [2, 1, "x"]
    for bad in (pickle.dumps(print), pickle.dumps(Path("x")), b"cos\nsystem\n(S'touch x'\ntR."):
        path.write_bytes(bad)
        with pytest.raises(UnsafeError, match="can run code"):
            read_plain_pickle(path)
    for torn in (b"", pickle.dumps(held)[:-40], pickle.dumps(np.array([print], object), 2), b"x" * 50):
        path.write_bytes(torn)
        with pytest.raises((UsageError, UnsafeError)):
            read_plain_pickle(path)


def test_pickles_do_not_keep_the_reader_for_ever(tmp_path: Path) -> None:
    pair: Any = ()
    for _ in range(60):
        pair = (pair, pair)
    inner = pickle.dumps(pair, 3)[2:-1]
    for endless in (b"\x80\x04}(" + inner + b"Nu.", b"\x80\x04cnumpy\ndtype\n" + inner + b"\x85R."):
        (tmp_path / "x.pkl").write_bytes(endless)
        with pytest.raises(UsageError, match="cannot be read as a pickle of arrays"):
            read_plain_pickle(tmp_path / "x.pkl")


def test_the_images_of_others(npz: Npz, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An .npz of samples, in its order, and a folder: the same numbers, and nothing is written beside them."""
    fake = pictures(1, 40, 140)
    np.savez(tmp_path / "samples.npz", arr_0=fake)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(fake):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:02d}.png")
    there = {path.name for path in tmp_path.iterdir()}
    path = npz("VIRTUAL.npz", *VIRTUAL)
    rows = []
    for one in ("samples.npz", "folder"):
        measure(tmp_path / one, path, "adm")
        rows.append(json.loads(capfd.readouterr().out))
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert rows[0]["metrics"]["class_score"]["value"] == pytest.approx(class_score(features_of(fake, POOL), 5000))
    assert (rows[0]["protocol"]["order"], rows[0]["protocol"]["rounding"]) == ("as they come", None)
    assert {path.name for path in tmp_path.iterdir()} == there | {"VIRTUAL.npz"}


def test_shards_make_the_features(drawn: Path, npz: Npz, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = npz("stats.npz", "mu", "sigma"), []
    shutil.rmtree(drawn / "features", ignore_errors=True)
    call = Reader.__call__
    monkeypatch.setattr(Reader, "__call__", lambda self, images: seen.append(len(images)) or call(self, images))
    for shard in ("0/3", "1/3", "2/3"):
        measure(drawn, None, "fidelity", shard=shard)
    assert sum(seen) == 40
    measure(drawn, path, "fidelity")
    assert sum(seen) == 40
    (row,), _ = read_metrics(open_drawn(drawn))
    assert row["metrics"]["class_score"]["images"] == 40


def test_saved_statistics_are_read_again(drawn: Path, npz: Npz, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=pictures(2, 60))
    for protocol, name in (("adm", "made.npz"), ("edm2", "made.pkl"), ("fidelity", "only.npz")):
        measure(drawn, tmp_path / "images.npz", protocol, save_reference=tmp_path / name)
        (first,), _ = read_metrics(open_drawn(drawn))
        measure(drawn, tmp_path / name, protocol)
        (again,), _ = read_metrics(open_drawn(drawn))
        for metric, figure in first["metrics"].items():
            assert again["metrics"][metric]["value"] == pytest.approx(figure["value"], rel=1e-9)
    assert np.array_equal(np.load(tmp_path / "made.npz")["arr_0"], pictures(2, 60))
    others = np.load(npz("theirs.npz", "mu", "sigma"))
    np.testing.assert_allclose(np.load(tmp_path / "only.npz")["sigma"], others["sigma"], rtol=1e-6)
    with pytest.raises(UsageError, match=r"name an \.pkl file"):
        measure(drawn, tmp_path / "images.npz", "edm2", save_reference=tmp_path / "x.npz")


def test_saved_statistics_of_another_network_are_refused(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "images.npz", arr_0=pictures(2, 60))
    for protocol, name in (("fidelity", "made.npz"), ("edm2", "made.pkl")):
        measure(drawn, tmp_path / "images.npz", protocol, save_reference=tmp_path / name)
    other = replace(reader("Inception-v3", {"pool": POOL}, True, HEAD), weights="1" * 64, preprocessing="cut in two")
    monkeypatch.setattr(protocols, "open_inception", lambda *_: other)
    for protocol, name in (("fidelity", "made.npz"), ("edm2", "made.pkl")):
        with pytest.raises(UsageError, match=r"was made with Inception-v3 00000000.* this is 11111111, cut in two"):
            measure(drawn, tmp_path / name, protocol)


def test_clip_reads_what_the_code_of_cmmd_gives_it() -> None:
    """The largest square at the centre by Pillow's bicubic filter, in 8 bits; then CLIP's own scaling."""
    images = np.random.default_rng(0).integers(0, 256, (2, 30, 41, 3), np.uint8)
    squares = [Image.fromarray(image).crop((5, 0, 35, 30)).resize((16, 16), Image.Resampling.BICUBIC) for image in images]
    made = published._centre(16, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert np.array_equal(made.permute(0, 2, 3, 1).numpy(), np.stack(squares))


@pytest.mark.parametrize("known", [True, False], indirect=True)
def test_check(known: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "check", lambda one: {
        "network": one.name, "sha256": one.weights, "published": one.inception, "preprocessing": "", "finite": True,
        "features": {"pool": {"norm": 1.0, "first": [0.5]}},
    })  # fmt: skip
    if known:
        evaluate([], EvaluateFlags(check=True))
        assert "the published weights" in capfd.readouterr().out
    else:
        with pytest.raises(CheckpointError, match="have other names"):
            evaluate([], EvaluateFlags(check=True))


def test_the_standard_error_of_the_score_is_the_true_one() -> None:
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(200):
        value, error = scores.inception_score(torch.randn(300, POOL, generator=generator), HEAD, 100, False)
        values.append(value)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_the_distance_at_infinitely_many_images() -> None:
    """Of samples of the reference's distribution it is nothing, where that of 400 has a bias."""
    generator = torch.Generator().manual_seed(0)
    distance = FrechetDistance(torch.randn(20_000, 10, generator=generator))
    samples = [torch.randn(400, 10, generator=generator) for _ in range(10)]
    found = [scores.extrapolated(distance, x, [0] * 400, False) for x in samples]
    biased, free = np.mean([distance(x) for x in samples]), np.mean([each[0] for each in found if each])
    assert abs(free) < biased / 4
    assert scores.extrapolated(distance, samples[0][:12], [0] * 12, False) is None


def test_clip_distance_is_that_of_its_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1).double() for n in (20, 30))

    def mean(a: Any, b: Any) -> float:
        return float((-torch.cdist(a, b).square() / 200).exp().mean())

    value, error = scores.ClipDistance(y).measure(x, [0] * 20, 3)
    assert value == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    assert error is not None
    assert 0 < error < math.inf


def test_two_images_are_enough_for_the_clip_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The example of its code has three, all alike: 2000 (1 − exp(−|x − y|²/200))."""
    monkeypatch.setattr(protocols, "open_clip", lambda *_: reader("CLIP", {"clip": DINO}, True))
    one = {name: pictures(seed, 1) for seed, name in enumerate(("real", "fake"))}
    for name, picture in one.items():
        np.savez(tmp_path / name, arr_0=picture.repeat(2, 0))
    flags = EvaluateFlags(tmp_path / "real.npz", protocol="cmmd", curves=False, json_rows=True, quiet=True)
    evaluate([tmp_path / "fake.npz"], flags)
    found = json.loads(capfd.readouterr().out)["metrics"]["clip_distance"]
    apart = features_of(one["real"], DINO).astype(float) - features_of(one["fake"], DINO)
    assert found["value"] == pytest.approx(2000 * (1 - math.exp(-np.square(apart).sum() / 200)), rel=1e-5)
    np.savez(tmp_path / "single", arr_0=one["fake"])
    with pytest.raises(UsageError, match="has 1 images, and the metrics need 2"):
        evaluate([tmp_path / "single.npz"], flags)


@pytest.mark.parametrize("shift", [0.5, 0.0])  # the latter of the reference's own distribution
def test_the_standard_error_of_the_clip_distance_is_the_true_one(shift: float) -> None:
    generator = torch.Generator().manual_seed(1)

    def unit(count: int, shift: float) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator) + shift, dim=1)

    distance = scores.ClipDistance(unit(200, 0))
    values, errors = zip(*[distance.measure(unit(80, shift), [0] * 80, 1) for _ in range(250)], strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_a_damaged_part_of_the_cache_is_made_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features", "a" * 64)
    made = {f"{i:064x}": (f"{i:032x}", np.full(3, i, np.float32)) for i in range(5)}
    cache.write(made)
    (path,) = (tmp_path / "features").iterdir()
    assert FeatureCache(tmp_path / "features", "a" * 64).stored([f"{3:064x}"])[:].tolist() == [[3, 3, 3]]
    whole = path.read_bytes()
    for torn in (b"", whole[:-1], whole + b"x", whole[:100], b"x" * len(whole)):
        path.write_bytes(torn)
        assert FeatureCache(tmp_path / "features", "a" * 64).missing([f"{3:064x}"]) == [0]
    path.write_bytes(whole)
    assert FeatureCache(tmp_path / "features", "b" * 64).missing([f"{3:064x}"]) == [0]


def test_dinov2_has_the_positions_of_its_own_code() -> None:
    """A scale of (n + 0.1) / m, as in `interpolate_pos_encoding` of DINOv2: not what transformers does."""
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=70, patch_size=14, mlp_ratio=2
    )
    network = transformers.Dinov2Model(config).eval()
    before = network.embeddings.position_embeddings.detach().clone()
    published._interpolate_positions(network, 28)
    found = network.embeddings.position_embeddings
    assert found.shape == (1, 5, 8)
    grid = before[:, 1:].reshape(1, 5, 5, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, scale_factor=(2.1 / 5, 2.1 / 5), mode="bicubic")
    torch.testing.assert_close(found[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 4, 8))
    assert network(pixel_values=torch.zeros(1, 3, 28, 28)).pooler_output.shape == (1, 8)


def test_a_sweep_is_measured_by_a_protocol(
    with_null: Path, npz: Npz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--evaluate` with `--protocol`; what could not be measured is refused before anything is drawn."""
    monkeypatch.chdir(tmp_path)
    args = ("sweep", "-m", with_null, "--steps", 1, "--labels-random", 8, "-w", "0,2", "-o", "run", "--evaluate")
    for reference, protocol, word in (
        (npz("two.npz", "mu", "sigma"), (), "--protocol fidelity"),
        (npz("two.npz", "mu", "sigma"), ("--protocol", "adm"), "no mu_s and sigma_s"),
        (npz("five.npz", *VIRTUAL), ("--protocol", "loud"), "choose adm"),
    ):
        refused = call(*args, reference, *protocol, code=2)
        assert word in str(refused.exception)
        assert not (tmp_path / "run").exists()
    for reference, protocol in ((npz("two.npz", "mu", "sigma"), "fidelity"), (npz("five.npz", *VIRTUAL), "adm")):
        call(*args, reference, "--protocol", protocol)
        rows, _ = read_metrics(open_drawn(tmp_path / "run"))
        assert [(row["w"], row["protocol"]["name"], row["labels"][:6]) for row in rows] == [
            (w, protocol, "random") for w in (0, 2)
        ]


def test_every_protocol_is_described() -> None:
    assert all(one.about and one.made_with for one in protocols.PROTOCOLS.values())
