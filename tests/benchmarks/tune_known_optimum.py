"""The rounds of `guidegen tune` on curves with a known optimum and noise: coverage, precision, and what grids need for it.

    python tests/benchmarks/tune_known_optimum.py [--runs 100] [--budget 3000]

Precision is the root mean square error of the best w. A grid of K weights takes the best of its means; the same
model of the curve on 9 weights is shown beside it. The other way in the table is the best of the grids.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import table
from table import Row

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_tune import SPACE, evaluation, found, moved, noisy, of_grid, searched, skewed

from guidegen.tune.model import error_covariance, posterior

CURVES = {
    "parabola": (lambda w: 0.5 * (w - 3) ** 2, 3.0),
    "steep, then slow": (skewed, float(np.log(20))),
    "flat": (lambda w: 0.1 * (w - 4) ** 2, 4.0),
    "kink": (lambda w: 3 * abs(w - 2.3) ** 1.5, 2.3),
}


def of_fit(draw, weights: int, seeds: int) -> float:
    """The w that is best by the model of the curve on a full grid."""
    settings = [(float(w),) for w in np.linspace(0.5, 8, weights)]
    measured = [evaluation(w, draw(w, seeds)) for (w,) in settings]
    points, candidates = SPACE.points(settings), SPACE.candidates(SPACE.whole)
    spreads, replicates = (np.array([getattr(one, name)["m"] for one in measured]) for name in ("errors", "replicates"))
    errors = error_covariance(points, spreads, replicates)
    curve = posterior(points, np.array([one.values["m"] for one in measured]), errors, SPACE.points(candidates))
    return candidates[curve.best][0]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for name, (curve, optimum) in CURVES.items():
        for noise, loose in ((3.0, 0.02), (3.0, 0.3), (3.0, 1.0), (10.0, 0.1)):
            inside, widths, errors = 0, [], {}
            for seed in range(options.runs):
                of_run, by = moved(curve, seed)
                draw, best_w = noisy(of_run, noise, loose, seed, options.budget), optimum + by
                best, low, high = found(searched(draw, options.budget))
                inside += low - 0.005 <= best_w <= high + 0.005
                widths.append(high - low)
                errors.setdefault("tune", []).append(best - best_w)
                for times in (1, 3):
                    for weights in (9, 16, 31):
                        error = of_grid(draw, weights, times * options.budget // weights) - best_w
                        errors.setdefault(f"grid of {weights}, {times}x the images", []).append(error)
                    error = of_fit(draw, 9, times * options.budget // 9) - best_w
                    errors.setdefault(f"our model on 9, {times}x", []).append(error)
            by_way = {who: float(np.sqrt(np.mean(np.square(some)))) for who, some in errors.items()}
            ours = by_way.pop("tune")
            best = min((who for who in by_way if "grid" in who), key=lambda who: by_way[who])
            fits = ", ".join(f"{error:.3f}" for who, error in by_way.items() if "model" in who)
            inside_of = f"in the interval in {inside} of {options.runs} runs"
            yield Row(
                f"tune's error of the best w: {name}, noise {noise:g}, {loose:.0%} of it alone",
                f"{ours:.3f}",
                f"{best}: {by_way[best]:.3f}",
                f"{ours / by_way[best]:.2f}",
                "",
                f"{inside_of}, width {np.mean(widths):.2f}; our model on full grids {fits}",
            )


def main() -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--budget", type=int, default=3000)
    table.show(rows(parser.parse_args()))


if __name__ == "__main__":
    main()
