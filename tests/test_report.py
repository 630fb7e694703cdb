"""`guidegen report` as text and in a real browser, and what `sample` and `sweep` do afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, on_a_terminal
from PIL import Image

from guidegen.cli.report import write_report
from guidegen.errors import UsageError
from guidegen.evaluate.measure import images_digest, open_drawn, write_metrics
from guidegen.evaluate.metrics import METRICS
from guidegen.report.page import safe_json
from guidegen.runs.directory import Run
from guidegen.runs.manifest import read_rows
from guidegen.spec.cell import Cell
from guidegen.spec.plan import Plan
from guidegen.spec.settings import Settings

Command = Callable[..., subprocess.CompletedProcess[str]]
WEIGHTS = (0.0, 1.5, 4.0)
LABELS = {3: "<script>window.harmed = 1</script>", 5: '"><img src=x onerror="window.harmed=2">', 7: "</script><b>& co\u2028"}
HOSTILE = "</script><script>window.harmed = 3</script>"


def pixels(label: int, seed: int, w: float, size: int = 8) -> Any:
    return np.random.default_rng((label, seed, int(w * 10))).integers(0, 255, (size, size, 3)).astype(np.uint8)


def write_run(folder: Path, mode: str, weights: tuple[float, ...] = WEIGHTS, size: int = 8, seeds: int = 2) -> Path:
    given = Settings(mode, f"model {HOSTILE}", "0" * 64, "DDIMScheduler", 5, None, "fp32", 5)
    options = {"model": HOSTILE, "w": "0:4:1", "label": ["all"], "out": "x", "steps": 5}
    options |= {"wait": True, "scale": 2, "stepwise": "strips", "verbose": True, "report": True}
    plan = Plan(list(LABELS), range(seeds), weights, grid=True)
    with Run(folder, given, {"command": "sweep", "options": options}, plan=plan) as run:
        for label, name in LABELS.items():
            for seed in range(seeds):
                for w in weights:
                    run.write(Cell(label, seed, w), pixels(label, seed, w, size), name, 7)
    Image.new("RGB", (4, 4)).save(folder / "grid.png")
    return folder


def measured(folder: Path, base: float) -> Path:
    """Rows of metrics with numbers that this test makes up, so that the page can be asked for them."""
    drawn, rows = open_drawn(folder), []
    for i, (key, group) in enumerate(drawn.groups().items()):
        figures = {m.name: {"value": base + i * (j + 1) / 10, "spread": 0.05, "images": 6} for j, m in enumerate(METRICS)}
        rows.append(
            {
                "mode": drawn.mode,
                **dict(zip(drawn.axes, key, strict=True)),
                "images": 6,
                "distinct": 6,
                "metrics": figures,
                "features": {"name": HOSTILE, "sha256": None, "width": 4, "inception": False},
                "judge": None,
                "reference": {"source": "x.npz", "images": 9, "sha256": "0"},
                "spread": None,
                "images_sha256": images_digest(row["sha256"] for row in group),
            }
        )
    write_metrics(folder, rows)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of the same labels and seeds; the second was drawn at two of the first one's weights and one more."""
    folder = tmp_path_factory.mktemp("runs")
    return measured(write_run(folder / "a", "cfg"), 1), measured(write_run(folder / "b", "classifier", (0.0, 1.5, 8.0)), 2)


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path]) -> Path:
    path = runs[0].parent / "report.html"
    write_report(runs, path, quiet=True)
    return path


def data_of(path: Path) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_page_holds_everything_and_asks_for_nothing(page: Path, runs: tuple[Path, Path]) -> None:
    text, data = page.read_text(), data_of(page)
    assert [run["name"] for run in data["runs"]] == ["classifier-free guidance", "classifier guidance"]
    assert sum(len(run["cells"]) for run in data["runs"]) == 36
    # the two runs share the images at w = 0 and 1.5 here, and each is kept once
    assert len(data["images"]) == 6 * 4
    assert all(source.startswith("data:image/png;base64,") for source in data["images"])
    assert data["runs"][0]["settings"]["steps"] == 5
    assert data["runs"][0]["command"].startswith("guidegen sweep --model '</script>")
    assert data["runs"][0]["again"] == f"guidegen sample --model '{HOSTILE}' --steps 5"
    assert data["runs"][0]["cells"][1]["again"] == ["--w", "1.5", "--label", "3", "--seed", "0"]
    page_itself = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page_itself)
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src &#x27;none&#x27;" in text
    assert "unsafe-inline" not in text


def test_text_is_escaped(page: Path) -> None:
    text = page.read_text()
    for hostile in (*LABELS.values(), HOSTILE):
        assert hostile not in text
    assert len(re.findall("<script", text)) == 2
    assert len(re.findall("</script", text)) == 2
    assert [subject["name"] for subject in data_of(page)["runs"][0]["subjects"]] == list(LABELS.values())
    assert json.loads(safe_json({"<&>": "\u2028</script>"})) == {"<&>": "\u2028</script>"}


def test_images_in_the_page_have_the_pixels_of_the_files(page: Path, runs: tuple[Path, Path]) -> None:
    import base64
    import io

    data = data_of(page)
    for cell in data["runs"][0]["cells"]:
        inside = Image.open(io.BytesIO(base64.b64decode(data["images"][cell["image"]].partition(",")[2])))
        with Image.open(runs[0] / cell["row"]["file"]) as file:
            assert np.array_equal(np.asarray(inside), np.asarray(file))


def test_past_the_limit_images_are_linked(
    runs: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_report(runs, tmp_path / "small.html", max_size=0.001)
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'small.html'}\n"
    assert re.match(r"0\.\d MB, 36 images linked, as they exceed --max-size", err)
    links = data_of(tmp_path / "small.html")["images"]
    assert len(links) == 36
    assert all((tmp_path / link).is_file() for link in links)
    write_report(runs, tmp_path / "large.html")
    assert re.match(r"0\.\d MB, 36 images inside it", capfd.readouterr().err)


def test_large_images_become_thumbnails(tmp_path: Path) -> None:
    run = write_run(tmp_path / "large", "cfg", (1.0,), size=300, seeds=1)
    write_report([run], tmp_path / "r.html", thumbnail=64, quiet=True)
    data = data_of(tmp_path / "r.html")
    assert not data["pixelated"]
    assert all(source.startswith("data:image/webp") for source in data["images"])
    assert sum(map(len, data["images"])) < 3 * 64 * 64 * 3
    assert data["curves"] is None
    assert "guidegen evaluate" in data["unmeasured"]


def test_what_it_refuses(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UsageError, match=r"written as \.html"):
        write_report(runs, tmp_path / "r.pdf")
    with pytest.raises(UsageError, match="no such folder"):
        write_report(runs, tmp_path / "absent" / "r.html")


def test_stale_metrics_and_gaps_are_told(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "a"))
    with Run(run, Settings(**json.loads((run / "run.json").read_text())["settings"]), {}) as more:
        (run / Cell(3, 0, 1.5).file).unlink()
        more.write(Cell(3, 0, 1.5), None, LABELS[3], 7)
    write_report([run], tmp_path / "r.html", quiet=True)
    data = data_of(tmp_path / "r.html")
    assert any("1 of 18 images came out non-finite" in text for text in data["warnings"])
    assert any("1 rows of metrics are of other images" in text for text in data["warnings"])
    (cell,) = (one for one in data["runs"][0]["cells"] if one["image"] is None)
    assert cell["row"]["status"] == "nonfinite"


def test_settings_are_words_and_only_what_is_set(page: Path) -> None:
    data = data_of(page)
    assert data["subtitle"] == "2 runs"
    for run in data["runs"]:
        assert run["about"] == "DDIM, 5 steps · 18 images"
        assert None not in run["settings"].values()
        assert not any("_" in name for name in run["settings"])


def test_warnings_of_evaluate_are_in_the_report(tmp_path: Path) -> None:
    run = measured(write_run(tmp_path / "few", "cfg"), 1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_metrics(run, [row | {"features": row["features"] | {"width": 64}} for row in rows])
    write_report([run], tmp_path / "r.html", quiet=True)
    assert any("6 images at a weight are too few" in text for text in data_of(tmp_path / "r.html")["warnings"])


def test_open_shows_the_page_where_there_is_a_browser(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)))
    result = call("report", *runs, "-o", tmp_path / "r.html", "--open")
    assert opened == [(tmp_path / "r.html").as_uri()]
    assert "no browser" in result.stderr


# In a browser.


def wait_until(tab: Any, condition: str, seconds: float = 15.0) -> None:
    """The page's own policy forbids the eval that playwright's waiting uses."""
    end = time.monotonic() + seconds
    while not tab.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed, so the page is not tried in a browser"
    )
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is installed, so the page is not tried in a browser")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file; when the test is over, nothing may have been complained of or asked of a network."""
    troubles: list[str] = []
    contexts = []

    def go(path: Path, allowed: Path | None = None, **settings: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | settings))
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))

        def check(request: Any) -> None:
            if request.url.startswith("data:") or request.url == path.as_uri():
                return
            if allowed is None or not request.url.startswith(allowed.as_uri()):
                troubles.append(request.url)

        tab.on("request", check)
        tab.goto(path.as_uri())
        tab.wait_for_selector(".tile img")
        return tab

    yield go
    for context in contexts:
        context.close()
    assert troubles == []


FILES = "() => [...document.querySelectorAll('.tile')].map((tile) => tile.querySelector('img')?.dataset.file ?? null)"
SHOWN = """async () => {
  const found = [];
  for (const image of document.querySelectorAll(".tile img")) {
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    found.push([image.dataset.file, [...pen.getImageData(0, 0, canvas.width, canvas.height).data]]);
  }
  return found;
}"""


def expected_files(w: float, present: tuple[bool, bool]) -> list[str | None]:
    """Label by label, in it the seeds of the first run and those of the second."""
    return [
        f"images/w{w}/label{label:04d}/{seed:06d}.png" if there else None
        for label in LABELS
        for there in present
        for seed in range(2)
    ]


def test_the_slider_changes_every_image(page: Path, visit: Callable[..., Any]) -> None:
    tab = visit(page)
    slider = tab.locator("#slider")
    assert slider.get_attribute("max") == "3"  # 0, 1.5, 4 and 8
    for place, (w, present) in enumerate(
        [(0.0, (True, True)), (1.5, (True, True)), (4.0, (True, False)), (8.0, (False, True))]
    ):
        slider.fill(str(place))
        assert tab.evaluate(FILES) == expected_files(w, present)
        assert tab.locator("#now").inner_text() == f"w = {w:g}"
    slider.fill("1")
    for file, shown in tab.evaluate(SHOWN):  # not the name alone: the pixels that the browser draws
        label, seed = int(file.split("/")[2][5:]), int(file.split("/")[3][:-4])
        assert np.array_equal(np.reshape(shown, (8, 8, 4))[..., :3], pixels(label, seed, 1.5)), file


def swept(folder: Path, own_weights: bool = False) -> Path:
    """One run of two methods at two numbers of steps; with weights of their own, each method at one w."""
    given = Settings("cfg", "model", "0" * 64, "DDIMScheduler", 5, None, "fp32", 5)
    by = (("guidance", ("cfg", "apg")), ("steps", (5, 10)))
    own = ("guidance", (1.5, 4.0)) if own_weights else None
    plan = Plan([3, 5], range(2), WEIGHTS, grid=True, by=by, own_weights=own)
    with Run(folder, given, {"command": "sweep", "options": {"by": ["guidance=cfg,apg", "steps=5,10"]}}, plan=plan) as run:
        for cell in plan.cells():
            run.write(cell, pixels(cell.label, cell.seed, cell.w + len(str(cell.variant))), LABELS[cell.label], 7)
    Image.new("RGB", (4, 4)).save(folder / "grid.png")
    return folder


def test_two_combinations_of_one_run_stand_side_by_side(tmp_path: Path, visit: Callable[..., Any]) -> None:
    run = measured(swept(tmp_path / "run"), 1)
    write_report([run], tmp_path / "r.html", quiet=True)
    data = data_of(tmp_path / "r.html")
    assert [line["name"] for line in data["curves"]["series"]] == [
        "apg, steps = 5",
        "apg, steps = 10",
        "cfg, steps = 5",
        "cfg, steps = 10",
    ]
    assert data["runs"][0]["again"] == "guidegen sample"
    again = {tuple(cell["other"]): cell["again"] for cell in data["runs"][0]["cells"] if cell["x"] == 4}
    assert again["apg", 10][:6] == ["--w", "4.0", "--guidance", "apg", "--steps", "10"]
    assert again["cfg", 5][:4] == ["--w", "4.0", "--steps", "5"]
    assert data["runs"][0]["settings"]["guidance"] == "apg, cfg"
    tab = visit(tmp_path / "r.html")

    def files(w: float, *folders: str) -> list[str]:
        return [
            f"images/{folder}/w{w}/label{label:04d}/{seed:06d}.png"
            for label in (3, 5)
            for folder in folders
            for seed in (0, 1)
        ]

    first, second = "guidance=apg,steps=5", "guidance=apg,steps=10"
    for place, w in enumerate(WEIGHTS):
        tab.locator("#slider").fill(str(place))
        assert tab.evaluate(FILES) == files(w, first, second)
    lists = tab.locator(".heads select")
    assert lists.count() == 4
    lists.nth(2).select_option(label="cfg")
    assert tab.evaluate(FILES) == files(4.0, first, "guidance=cfg,steps=10")
    assert tab.evaluate("() => [...document.querySelectorAll('.heads select')].indexOf(document.activeElement)") == 2
    tab.locator("#slider").fill("1")
    assert tab.evaluate(FILES) == files(1.5, first, "guidance=cfg,steps=10")
    colours = tab.evaluate("() => [...document.querySelectorAll('.heads .swatch')].map((mark) => mark.style.background)")
    assert colours == ["var(--s0)", "var(--s3)"], "those of their curves"
    tab.locator(".tile").nth(2).click()
    row = tab.locator("#detail-row").inner_text()
    assert "cfg" in row
    assert "--steps 10 --label 3 --seed 0" in tab.locator("#detail-command").inner_text()


def test_what_was_drawn_at_its_own_w_is_shown_from_there(tmp_path: Path, visit: Callable[..., Any]) -> None:
    write_report([swept(tmp_path / "run", own_weights=True)], tmp_path / "r.html", quiet=True)
    tab = visit(tmp_path / "r.html")
    tab.locator(".heads select").nth(2).select_option(label="cfg")
    for place in "01":
        tab.locator("#slider").fill(place)
        assert [file.split("/")[1:3] for file in tab.evaluate(FILES)[::2]] == [
            ["guidance=apg,steps=5", "w4.0"],
            ["guidance=cfg,steps=10", "w1.5"],
        ] * 2
    assert [text.split("\n")[-1] for text in tab.locator(".heads .axes").all_inner_texts()] == ["w = 4", "w = 1.5"]


def test_the_keys(page: Path, visit: Callable[..., Any]) -> None:
    tab = visit(page)
    now = tab.locator("#now")
    tab.keyboard.press("Home")
    assert now.inner_text() == "w = 0"
    tab.keyboard.press("ArrowLeft")
    assert now.inner_text() == "w = 0"
    tab.keyboard.press("ArrowRight")
    assert now.inner_text() == "w = 1.5"
    tab.keyboard.press("End")
    assert now.inner_text() == "w = 8"
    tab.locator("#slider").focus()
    tab.keyboard.press("ArrowLeft")  # the slider's own: one step, not two
    assert now.inner_text() == "w = 4"
    assert tab.evaluate(FILES) == expected_files(4.0, (True, False))
    tab.locator("#filter").fill("img")
    tab.keyboard.press("ArrowLeft")  # belongs to the text
    assert now.inner_text() == "w = 4"
    assert tab.locator(".row:visible h3").all_inner_texts() == [f"{LABELS[5]}\nlabel 5"]


def test_seeds_of_its_own_for_each_label(tmp_path: Path, visit: Callable[..., Any]) -> None:
    given = Settings("cfg", "model", "0" * 64, "DDIMScheduler", 5, None, "fp32", 5)
    with Run(tmp_path / "run", given, {}) as run:
        for label, seed in ((3, 0), (3, 1), (5, 2), (7, 9)):
            run.write(Cell(label, seed, 1.0), pixels(label, seed, 1.0), LABELS[label], 7)
    write_report([tmp_path / "run"], tmp_path / "r.html", quiet=True)
    names = [f"images/w1.0/label{label:04d}/{seed:06d}.png" for label, seed in ((3, 0), (3, 1), (5, 2), (7, 9))]
    assert visit(tmp_path / "r.html").evaluate(FILES) == names


def test_names_do_no_harm(page: Path, visit: Callable[..., Any]) -> None:
    tab = visit(page)
    assert tab.evaluate("window.harmed") is None
    names = [text.rpartition("\n")[0] for text in tab.locator(".row h3").all_inner_texts()]
    assert [" ".join(name.split()) for name in names] == [" ".join(name.split()) for name in LABELS.values()]
    assert HOSTILE in tab.locator("#settings").inner_text()
    assert tab.locator("main script, main b:not(.chart b), main img[src=x]").count() == 0


def test_a_click_tells_about_an_image(page: Path, visit: Callable[..., Any]) -> None:
    tab = visit(page)
    tab.keyboard.press("Home")
    tab.locator(".tile").nth(1).click()
    row = tab.locator("#detail-row")
    assert "images/w0.0/label0003/000001.png" in row.inner_text()
    tab.keyboard.press("ArrowRight")
    assert "images/w1.5/label0003/000001.png" in row.inner_text()
    assert tab.locator("#detail-image").get_attribute("data-file") == "images/w1.5/label0003/000001.png"
    assert tab.locator("#detail-command").inner_text().endswith("--steps 5 --w 1.5 --label 3 --seed 1")
    tab.keyboard.press("Escape")
    assert not tab.locator("#detail").is_visible()


def test_the_curves_follow_the_slider(page: Path, visit: Callable[..., Any]) -> None:
    tab = visit(page)
    charts = tab.locator(".chart")
    assert charts.count() == len(METRICS) + 1
    first = charts.first
    places = []
    for place, values in enumerate([["1", "2"], ["1.1", "2.1"], ["1.2", "–"], ["–", "2.2"]]):
        tab.locator("#slider").fill(str(place))
        assert first.locator("h3 b").all_inner_texts() == values
        places.append(float(first.locator(".cursor").get_attribute("x1") or 0))
    assert places == sorted(places)
    assert places[1] - places[0] == pytest.approx((places[3] - places[0]) * 1.5 / 8)
    assert first.locator("p b").all_inner_texts() == ["0", "0"]  # the least distance, of each run
    box = first.locator("svg").bounding_box()
    assert box is not None
    tab.mouse.click(box["x"] + box["width"] * places[1] / 300, box["y"] + box["height"] / 2)
    assert tab.locator("#now").inner_text() == "w = 1.5"


def test_linked_images_are_shown(runs: tuple[Path, Path], visit: Callable[..., Any]) -> None:
    path = runs[0].parent / "linked.html"
    write_report(runs, path, max_size=0, quiet=True)
    tab = visit(path, allowed=runs[0].parent)
    wait_until(tab, "document.querySelector('.tile img').naturalWidth === 8")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page: Path, visit: Callable[..., Any], width: int, scheme: str) -> None:
    tab = visit(page, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    style = "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; })()"
    ink, paper = (np.array([int(n) for n in re.findall(r"\d+", colour)[:3]]) for colour in tab.evaluate(style))

    def luminance(colour: Any) -> float:  # WCAG 2.1
        c = colour / 255
        return float(np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(ink), luminance(paper)))
    assert (high + 0.05) / (low + 0.05) > 7
    assert (luminance(paper) > 0.5) == (scheme == "light")


def test_a_thousand_images_stay_smooth(tmp_path: Path, visit: Callable[..., Any]) -> None:
    """2,000 images, of which a slider's step changes those in sight; the step itself takes no noticeable time."""
    names = dict(LABELS)
    try:
        LABELS.update({label: f"label number {label}" for label in range(100, 147)})
        run = write_run(tmp_path / "many", "cfg", (0.0, 1.0), seeds=20)
    finally:
        for label in set(LABELS) - set(names):
            del LABELS[label]
    write_report([run], tmp_path / "many.html", quiet=True)
    tab = visit(tmp_path / "many.html")
    assert tab.locator(".tile").count() == 1000
    assert 0 < tab.locator(".tile img").count() < 800  # those far below wait until they are scrolled to
    took = tab.evaluate("(() => { const t = performance.now(); go(0); go(1); return (performance.now() - t) / 2; })()")
    assert took < 100
    tab.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    wait_until(tab, "document.querySelectorAll('.row:last-child .tile img').length === 20")
    tab.locator("#slider").fill("0")
    assert tab.evaluate(FILES)[-1] == "images/w0.0/label0146/000019.png"


# What sample and sweep do afterwards.


def test_a_sweep_with_all_in_one_command(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8))
    networks = ["--features", with_null / "classifier", "--judge", with_null / "classifier"]
    result = guidegen(
        "sweep", "-m", with_null, "--w", "1,3", "--label", "0-1", "--num", "3", "--steps", "2", "-o", "run",
        "--evaluate", "real.npz", "--report", *networks,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "run/grid.png"
    assert lines[1].split()[:3] == ["mode", "w", "images"]
    assert [line.split()[:3] for line in lines[2:4]] == [["cfg", "1", "6"], ["cfg", "3", "6"]]
    assert lines[-1] == "run/report.html"
    assert {"metrics.jsonl", "curves.svg", "curves.png", "report.html"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert data_of(tmp_path / "run" / "report.html")["curves"]["series"][0]["x"] == [1, 3]


def test_what_cannot_be_done_afterwards_is_refused_before(guidegen: Command, with_null: Path, tmp_path: Path) -> None:
    sample = ("sample", "-m", with_null, "--label", "0", "--steps", "2")
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((8, 12, 12, 3), np.uint8))
    result = guidegen(*sample, "-o", "run", "--evaluate", "real.npz")
    assert result.returncode == 2
    assert "--resize" in result.stderr
    assert not (tmp_path / "run").exists()
    result = guidegen(*sample, "-o", "x.png", "--report")
    assert result.returncode == 2
    assert "need a run directory" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_preview_in_a_terminal_and_nowhere_else(
    guidegen: Command, with_null: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("textual_image")
    sample = ("sample", "-m", with_null, "--label", "0", "--steps", "2", "-o", "run", "--preview")
    piped = guidegen(*sample)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert piped.stdout.count("\n") == 1
    terminal = environment | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "30"}
    code, shown = on_a_terminal(
        [sys.executable, "-m", "guidegen", *map(str, sample)], tmp_path, terminal, (30, 80, 480, 640)
    )
    assert code == 0
    text = shown.decode(errors="replace")
    (row,) = read_rows(tmp_path / "run")
    assert row["file"] in text
    assert "▀" in text or "▄" in text
    with Image.open(tmp_path / "run" / row["file"]) as image:
        corner = image.convert("RGB").getpixel((0, 0))
    assert isinstance(corner, tuple)
    colours = {tuple(map(int, found)) for found in re.findall(r"[34]8;2;(\d+);(\d+);(\d+)", text)}
    nearest = min(max(abs(a - b) for a, b in zip(corner, colour, strict=True)) for colour in colours)
    assert nearest <= 40  # its own colours, blended a little with their neighbours'


def test_a_label_filter_without_a_match_is_reported(page: Path, visit: Callable[..., Any]) -> None:
    tab = visit(page)
    tab.locator("#filter").fill("zebra")
    assert tab.locator("#nothing").inner_text() == 'No label matches "zebra".'
    assert tab.locator(".line.row:visible").count() == 0
    tab.locator("#filter").fill("")
    assert tab.locator("#nothing").inner_text() == ""
    assert tab.locator(".line.row:visible").count() == len(LABELS)


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fills_the_window(page: Path, visit: Callable[..., Any], width: int) -> None:
    tab = visit(page, viewport={"width": width, "height": 900})
    assert tab.evaluate("() => document.querySelector('main').getBoundingClientRect().width") == width
    assert tab.evaluate("() => document.documentElement.scrollWidth") == width
