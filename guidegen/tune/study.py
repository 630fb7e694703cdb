"""The study of Optuna that keeps what was measured, and that all processes of a search share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidegen.errors import OutputError, UsageError, first_line, quoted
from guidegen.runs.locks import run_json_lock
from guidegen.spec.cell import fingerprint
from guidegen.tune.rounds import Evaluation
from guidegen.tune.space import Dimension, Setting, Space

if TYPE_CHECKING:
    import optuna

FILE = "tune.db"
_ABOUT, _FIRST_SEEDS = "guidegen", "first seeds"
_SECONDS = 60
"""How long SQLite waits for another process that writes."""


def require_packages() -> None:
    """Raises UsageError if a package of the extra is not installed."""
    if lacks := [name for name in ("optuna", "scipy", "torchmetrics", "matplotlib") if find_spec(name) is None]:
        raise UsageError(f'guidegen tune needs {lacks[0]}, which is not installed: pip install "guidegen[tune]"')


def checked_address(url: str) -> str:
    """The URL of a database without its password, for what is printed and kept.

    Raises:
        UsageError: it is none, or the package that speaks to such a database is not installed.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        address = make_url(url)
        address.get_dialect().import_dbapi()
    except (SQLAlchemyError, ImportError) as error:
        raise UsageError(
            f"--storage cannot be opened: {first_line(error)}. Give such as postgresql://USER@HOST/NAME."
        ) from None
    return address.render_as_string(hide_password=True)


class Study:
    """What was measured, on disk or in a database.

    Args:
        folder: the run directory, which all processes share.
        url: a database as SQLAlchemy names it; None for a file in the run directory.
        space: what is varied.
        metrics: name -> +1 where more is better, -1 where less is.
        about: what the numbers depend on, and the `first seeds` of the first round; of a study that is there, its own count.

    Raises:
        UsageError: the study that is there is of something else.
        OutputError: the database cannot be opened.
    """

    def __init__(self, folder: Path, url: str | None, space: Space, metrics: Mapping[str, int], about: Mapping[str, Any]):
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        address = url or f"sqlite:///{(folder / FILE).absolute()}"
        wait = {"connect_args": {"timeout": _SECONDS}} if address.startswith("sqlite") else {"pool_pre_ping": True}
        self._space, self._metrics = space, list(metrics)
        try:
            with run_json_lock(folder):  # of several that begin at once, one makes the tables
                storage = optuna.storages.RDBStorage(address, engine_kwargs=wait)
                others = {key: value for key, value in about.items() if key != _FIRST_SEEDS}
                name = f"guidegen-{folder.name}-{fingerprint(others)}" if url else "guidegen"  # others may share a database
                self._study = optuna.create_study(
                    storage=storage, study_name=name, directions=_directions(metrics), load_if_exists=True
                )
                there = self._study.user_attrs.get(_ABOUT)
                if there is None:
                    self._study.set_user_attr(_ABOUT, dict(about))
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ValueError) as error:
            shown = checked_address(url) if url else folder / FILE
            raise OutputError(f"The search cannot be kept in {shown}: {first_line(error)}.") from error
        if there is not None:
            _check_same(folder, there, about)
        self.first_seeds = int((there or about)[_FIRST_SEEDS])
        """Seeds of the first round, which follow from the budget of the command that began."""

    def evaluations(self) -> list[Evaluation]:
        """All that was measured so far, each once."""
        import optuna

        found: dict[Any, Evaluation] = {}
        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            about = trial.user_attrs
            setting = tuple(_as_given(each, trial.params[each.name]) for each in self._space.dimensions)
            values = dict(zip(self._metrics, trial.values, strict=True))
            one = Evaluation(setting, about["seeds"], about["images"], values, about["errors"], about["replicates"])
            found.setdefault((setting, one.seeds), one)
        return list(found.values())

    def find(self, setting: Setting, seeds: int) -> Evaluation | None:
        """What was measured of a setting."""
        return next((one for one in self.evaluations() if (one.setting, one.seeds) == (setting, seeds)), None)

    def add(self, one: Evaluation) -> None:
        """Keeps what was measured."""
        self._study.add_trial(_trial(self._space, one, list(self._metrics)))


def _trial(space: Space, one: Evaluation, metrics: Sequence[str]) -> optuna.trial.FrozenTrial:
    import optuna

    return optuna.trial.create_trial(
        params={each.name: value for each, value in zip(space.dimensions, one.setting, strict=True)},
        distributions={each.name: _distribution(each) for each in space.dimensions},
        values=[one.values[metric] for metric in metrics],
        user_attrs={
            "seeds": one.seeds,
            "images": one.images,
            "errors": dict(one.errors),
            "replicates": {metric: list(some) for metric, some in one.replicates.items()},
        },
    )


def propose(space: Space, measured: Sequence[Evaluation], metrics: Mapping[str, int], count: int) -> list[Setting]:
    """Settings at which Optuna's Gaussian process expects the most, each metric in turn; of values at equal seeds."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = []
    for i, (metric, better) in enumerate(metrics.items()):
        sampler = optuna.samplers.GPSampler(seed=0, n_startup_trials=0, deterministic_objective=False)
        study = optuna.create_study(sampler=sampler, directions=_directions({metric: better}))
        study.add_trials([_trial(space, one, [metric]) for one in measured])
        middle = sorted(one.values[metric] for one in measured)[len(measured) // 2]
        for _ in range(len(range(i, count, len(metrics)))):
            trial = study.ask({each.name: _distribution(each) for each in space.dimensions})
            study.tell(trial, middle)  # so that the next one is elsewhere
            found.append(space.nearest(tuple(trial.params[each.name] for each in space.dimensions)))
    return found


def pareto_front(measured: Sequence[Evaluation], metrics: Mapping[str, int], space: Space) -> list[Evaluation]:
    """Those that none of the others beats in all of the metrics; of values at equal seeds."""
    import optuna

    study = optuna.create_study(directions=_directions(metrics))
    study.add_trials([_trial(space, one, list(metrics)) for one in measured])
    return [measured[trial.number] for trial in study.best_trials]


def _directions(metrics: Mapping[str, int]) -> list[Any]:
    return ["maximize" if better > 0 else "minimize" for better in metrics.values()]


def _distribution(each: Dimension) -> optuna.distributions.BaseDistribution:
    import optuna

    if each.values:
        return optuna.distributions.CategoricalDistribution(each.values)
    if each.name == "steps":
        return optuna.distributions.IntDistribution(int(each.low), int(each.high))
    return optuna.distributions.FloatDistribution(each.low, each.high)


def _as_given(each: Dimension, value: Any) -> Any:
    """The value of a list that is equal: databases keep them as JSON."""
    return next((some for some in each.values if some == value), value)


def _check_same(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [name for name in {**now, **there} if name != _FIRST_SEEDS and there.get(name) != now.get(name)]
    differ = [f"{name} {quoted(str(there.get(name)))} there, {quoted(str(now.get(name)))} now" for name in names]
    if differ:
        raise UsageError(
            f"{folder} holds a search of other settings: {'; '.join(differ)}.\nName another -o, or --overwrite it."
        )
