"""Finding a method and its options, the schedule of its weight, and `guidegen guidances`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from guidegen.cli import app
from guidegen.errors import UsageError
from guidegen.scores.interfaces import Step, Weights
from guidegen.scores.methods import METHODS, PARTS, choices, find_method
from guidegen.scores.noise import Level
from guidegen.scores.schedule import SCHEDULES, GuidanceSchedule, interval_factors, make_schedule, schedule_factors

Command = Callable[..., Any]
LEVELS = [Level(math.cos(angle), math.sin(angle)) for angle in torch.linspace(math.pi / 2 - 0.01, 0.05, 10).tolist()]
FLOW = [Level(1 - s, s) for s in (1.0, 0.8, 0.6, 0.4, 0.2)]

CUSTOM = '''
def Halfway(unconditional, conditional, w, step, *, bias=0.5, name="a", odd=False, turns=2):
    """Towards the middle of the two."""
    middle = (unconditional + conditional) / 2 + bias
    return unconditional + w * (middle - unconditional)
'''


# --- methods and options


def test_names_and_options() -> None:
    method, options = find_method("APG", {"eta": "1", "momentum": "-0.25", "space": "native"})
    assert method is METHODS["apg"]
    assert options == {"eta": 1.0, "momentum": -0.25, "space": "native"}
    assert isinstance(options["eta"], float)
    assert find_method("frequency", {"halvings": "3"})[1] == {"halvings": 3}
    assert find_method("cfg")[1] == {}
    assert choices(METHODS["apg"], "space") == ("x0", "native")
    assert choices(METHODS["apg"], "eta") == ()


@pytest.mark.parametrize(
    ("ref", "options", "told"),
    [
        ("agp", {}, "Did you mean apg?"),
        ("cfgzero", {}, "Did you mean cfg-zero?"),
        ("nonsense", {}, "There are cfg, cfg\\+\\+, rescale"),
        ("rescale", {"fi": "1"}, "rescale has no such option. It has phi=0.7."),
        ("cfg", {"phi": "1"}, "cfg has no options"),
        ("rescale", {"phi": "much"}, "give a number"),
        ("rescale", {"phi": "nan"}, "give a finite number"),
        ("renorm", {"limit": "inf"}, "give a finite number"),
        ("apg-mix", {"start": "2.5"}, "give a whole number"),
        ("apg", {"space": "latent"}, "give x0 or native"),
        ("threshold", {"percentile": "99.5"}, r"quantile\(\) q must be in the range"),
        ("power", {"exponent": "900"}, "not finite"),
        ("missing.py:Name", {}, "No Python file at missing.py"),
    ],
)
def test_what_is_wrong_is_said(ref: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told) as raised:
        find_method(ref, options)
    assert str(raised.value).startswith(("--guidance", "No Python file"))
    assert str(raised.value).count("\n") <= 1


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(CUSTOM)
    assert CUSTOM.count("\n") <= 15
    method, options = find_method(f"{file}:Halfway", {"bias": "0.25", "odd": "yes", "turns": "3", "name": "b"})
    assert options == {"bias": 0.25, "odd": True, "turns": 3, "name": "b"}
    assert (method.line, method.linear, method.gain) == ("Towards the middle of the two.", False, None)
    u, c = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    guided = method(u, c, torch.full((1, 1, 1, 1), 4.0), Step(u, LEVELS[3], "epsilon"), bias=0.25)
    assert (guided == 3).all()
    with pytest.raises(UsageError, match="give yes or no"):
        find_method(f"{file}:Halfway", {"odd": "maybe"})
    with pytest.raises(UsageError, match="Other is not there; it should be a function"):
        find_method(f"{file}:Other")
    assert "Halfway" not in METHODS  # asked for by its path alone


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def F(u, c, w", "SyntaxError"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("F = 3", "F is a int; it should be a function"),
        ("def F(u, c): return u", "TypeError"),
        ("def F(u, c, w, step, *, k): return u", "give k a default"),
        ("def F(u, c, w, step): return u.mean()", r"gives \(\) torch.float32"),
        ("def F(u, c, w, step): return (u + w * (c - u)).double()", "float64"),
        ("def F(u, c, w, step): return u / 0", "not finite"),
        ("def F(u, c, w, step): return u[:, :1]", r"gives \(2, 1, 8, 8\)"),
    ],
)
def test_broken_methods_of_ones_own(tmp_path: Path, code: str, told: str) -> None:
    file = tmp_path / "own.py"
    file.write_text(code)
    with pytest.raises(UsageError, match=told):
        find_method(f"{file}:F")


def test_each_method_is_told() -> None:
    for name, method in METHODS.items():
        assert name == method.name == name.lower()
        assert method.line
        assert method.formula
        assert re.search(r"\d{4}", method.source)
        documented = method.combine.__doc__ or ""
        assert all(f"{option}: " in documented for option in method.options), name
        assert method.changes in PARTS or name == "cfg"


# --- when


def on(interval: str, levels: list[Level] = LEVELS) -> list[int]:
    return [i for i, factor in enumerate(interval_factors(levels, interval)) if factor]


def test_interval_in_sigma_over_alpha() -> None:
    ratios = [level.sigma / level.alpha for level in LEVELS]
    for low, high in ((0.3, 2.0), (0.0, 1.0), (1.0, math.inf)):
        assert on(f"{low}:{high}") == [i for i, ratio in enumerate(ratios) if low < ratio <= high]
    assert on("0:inf") == list(range(10))
    assert on("0:0.7", FLOW) == [3, 4]  # 0.4 / 0.6 and 0.2 / 0.8
    assert on("0:inf", FLOW) == [0, 1, 2, 3, 4]  # pure noise has no ratio but inf
    assert on("0:1e12", FLOW) == [1, 2, 3, 4]
    exact = [Level(0.5, 1.0), Level(0.5, 0.5), Level(1.0, 0.25)]  # ratios 2, 1, 1/4
    assert on("1:2", exact) == [0]  # without its lower end, with its upper one
    assert on("0.25:1", exact) == [1]


def test_interval_in_steps() -> None:
    assert on("10%:60%") == [1, 2, 3, 4, 5]
    assert on("0%:100%") == list(range(10))
    assert on("50%:100%") == [5, 6, 7, 8, 9]
    many = LEVELS * 10
    assert on("29%:30%", many) == [29]  # int(0.29 * 100) is 28: counted in whole hundredths, not in floats
    assert on("12.5%:25%", LEVELS[:8]) == [1]


@pytest.mark.parametrize("interval", ["5", "1:2:3", "a:b", "2:1", "1:1", "-1:2", "10%:2", "60%:10%", "0%:101%", "nan:1", ""])
def test_interval_of_another_form(interval: str) -> None:
    for levels in (LEVELS, []):
        with pytest.raises(UsageError, match="give LOW:HIGH"):
            interval_factors(levels, interval)


def test_interval_that_holds_no_step() -> None:
    with pytest.raises(UsageError, match=r"none of the 10 steps, whose sigma / alpha is 0.05 to 100"):
        interval_factors(LEVELS, "1000:2000")
    assert interval_factors([], "1000:2000") == []


# --- how much


def all_schedules() -> list[str]:
    names = [name.replace("A,B", "2,5").replace(":A", ":0.4") for name in SCHEDULES]
    return names + [f"inverse-{name}" for name in names]


@pytest.mark.parametrize("count", [2, 7, 50, 1000])
def test_schedules_have_mean_one(count: int) -> None:
    for name in all_schedules():
        factors = schedule_factors(name, count)
        assert len(factors) == count
        assert min(factors) >= 0
        assert math.fsum(factors) / count == pytest.approx(1, abs=1e-12), name
        turned = schedule_factors(name.removeprefix("inverse-") if "inverse" in name else f"inverse-{name}", count)
        assert turned[::-1] == pytest.approx(factors, abs=1e-9)


def test_shapes_of_schedules() -> None:
    assert schedule_factors(None, 3) == schedule_factors("constant", 3) == [1.0, 1.0, 1.0]
    assert schedule_factors("linear", 4) == pytest.approx([0.25, 0.75, 1.25, 1.75])
    cosine = [1 - math.cos(math.pi * (i + 0.5) / 20) for i in range(20)]  # its mean over midpoints is 1 as it stands
    assert schedule_factors("cosine", 20) == pytest.approx(cosine)
    assert schedule_factors("sine", 20) == pytest.approx(cosine[::-1])
    assert schedule_factors("v", 4) == pytest.approx([1.5, 0.5, 0.5, 1.5])
    assert schedule_factors("lambda", 4) == pytest.approx([0.5, 1.5, 1.5, 0.5])
    clamped = schedule_factors("clamp-linear:0.5", 100)
    assert clamped[:25] == pytest.approx([clamped[0]] * 25)
    assert clamped[-1] / clamped[0] == pytest.approx(1.99 / 0.5)
    assert schedule_factors("power-cosine:1", 9) == pytest.approx(schedule_factors("cosine", 9))


@pytest.mark.parametrize(("a", "b"), [(2, 2), (1, 3), (2.5, 5), (0.5, 0.5)])
def test_beta_is_the_density(a: float, b: float) -> None:
    count = 40
    density = torch.distributions.Beta(torch.tensor(a).double(), torch.tensor(b).double())
    values = density.log_prob((torch.arange(count).double() + 0.5) / count).exp()
    assert schedule_factors(f"beta:{a},{b}", count) == pytest.approx((values / values.mean()).tolist(), rel=1e-9)
    assert schedule_factors("beta", count) == schedule_factors("beta:2,2", count)


@pytest.mark.parametrize(
    "name", ["exponential", "linear:2", "beta:1", "beta:a,b", "beta:0,1", "beta:inf,1", "inverse", "v:"]
)
def test_schedules_of_another_form(name: str) -> None:
    if name == "v:":  # nothing after the colon asks for nothing
        assert schedule_factors(name, 4) == schedule_factors("v", 4)
        return
    with pytest.raises(UsageError, match="--w-schedule"):
        schedule_factors(name, 10)


def test_schedule_that_is_zero_everywhere() -> None:
    with pytest.raises(UsageError, match="zero at each of the 1 steps"):
        schedule_factors("v", 1)


# --- both


def test_schedule_spends_the_same_weight_inside_the_interval() -> None:
    for interval in (None, "0.3:2", "20%:50%"):
        inside = interval_factors(LEVELS, interval)
        for name in (None, *all_schedules()):
            schedule = make_schedule(LEVELS, interval, name, METHODS["cfg"])
            assert all((factor > 0) <= (flag > 0) for factor, flag in zip(schedule.factors, inside, strict=True))
            assert math.fsum(schedule.factors) / sum(inside) == pytest.approx(1, abs=1e-12)
            w = [schedule.weights(i, Weights(6.0, 3.0, 2.0)) for i in range(10) if inside[i]]
            assert [math.fsum(each) / len(w) for each in zip(*w, strict=True)] == pytest.approx([6.0, 3.0, 2.0])


def test_weights_of_a_step() -> None:
    schedule = GuidanceSchedule(gains=(1.0, 1.0, 1.0, 4.0), factors=(0.0, 1.0, 1.5, 0.5))
    assert schedule.weights(0, Weights(7.0, 5.0, 3.0)) == (
        1.0,
        0.0,
        1.0,
    )  # off: the model as it is
    assert schedule.weights(1, Weights(7.3, 5.1, 3.7)) == (7.3, 5.1, 3.7)  # on: to the last bit
    assert schedule.weights(2, Weights(7.0, 5.0, 3.0)) == (10.0, 7.5, 4.0)
    assert schedule.weights(3, Weights(7.0, 5.0, 3.0)) == (
        1 + 27 / 2,
        10.0,
        2.0,
    )  # w_guide has no gain
    for index in range(3):  # nothing is amplified at w <= 1, so there is nothing to vary
        for w in (0.0, 0.5, 1.0, -2.0):
            assert schedule.weights(index, Weights(w, 0.0, 1.0)) == (w, 0.0, 1.0)
    assert schedule.weights(3, Weights(0.1, 0.0, 1.0))[0] == pytest.approx(0.4)
    assert schedule.weights(3, Weights(0.0, 0.0, 1.0)) == (0.0, 0.0, 1.0)


def test_gains_of_a_schedule() -> None:
    assert make_schedule(LEVELS, None, None, METHODS["apg"]).gains == (1.0,) * 10
    gains = make_schedule(FLOW, None, None, METHODS["cfg++"], [*FLOW[1:], Level(1.0, 0.0)]).gains
    ratios = [level.sigma / level.alpha for level in FLOW[1:]]
    expected = [now / (now - then) for now, then in zip(ratios, [*ratios[1:], 0.0], strict=True)]
    assert gains == pytest.approx([1.0, *expected])
    with pytest.raises(UsageError, match="takes no noise away"):
        make_schedule(FLOW, None, None, METHODS["cfg++"], [*FLOW[1:], FLOW[-1]])


# --- the command


def printed(*args: str) -> str:
    """What the command prints; in this process, which has torch already."""
    done = CliRunner().invoke(app, ["guidances", *args], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_list_for_people_and_for_programs() -> None:
    plain = printed()
    for method in METHODS.values():
        assert f"{method.name}\t{method.line}\t{method.formula}\t{method.source}" in plain
    assert "grad log p(x|y) = grad log p(x) + grad log p(y|x)" in plain
    assert max((line for line in plain.splitlines() if "\t" not in line), key=len)[80:] == ""
    rows = [json.loads(line) for line in printed("--json").splitlines()]
    assert [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        assert row["options"] == dict(METHODS[row["name"]].options)
        assert row["calls"] == {"cfg": 2, "classifier": 1, "both": 2}


def test_one_of_them(tmp_path: Path) -> None:
    told = printed("apg")
    assert "--guidance-opt space=x0  (x0 or native)" in told
    assert "arXiv 2410.02416" in told
    assert "rho / (rho - rho')" in printed("cfg++")
    file = tmp_path / "own.py"
    file.write_text(CUSTOM)
    assert "Towards the middle of the two." in printed(f"{file}:Halfway")


def test_none_of_them(guidegen: Command) -> None:
    unknown = guidegen("guidances", "agp")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "Did you mean apg?" in unknown.stderr
