"""Search: results for the accelerator time spent, and the time of a suggestion in a long study.

    python -m tests.benchmarks.search [--seeds 30] [--trials 64] [--epochs 27]
    python -m tests.benchmarks.search --suggest [--sizes 1000 10000]

The first command simulates eight workers (see `curves`); its numbers do not depend on the machine. All contestants
begin with the published setting. Only complete trials count, by their values without noise.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import optuna
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from grainmill.config.experiment import Experiment, experiment_model
from grainmill.config.space import Setting, resolve
from grainmill.execution.searcher import StudySearcher
from grainmill.search import samplers
from grainmill.search.asha import ASHA
from grainmill.search.study import Study
from multigrain import trainable
from tests.benchmarks import curves
from tests.benchmarks.table import FOLDER, machine

WORKERS = 8
SHARES = (0.2, 0.4, 0.6, 1.0)
"""Shares of the budget after which the results are compared."""


def experiment(objectives: tuple[str, ...], epochs: int, **search: Any) -> Experiment:
    content = {
        "name": "simulated",
        "data": {"builtin": "shapes"},
        "base": {"epochs": epochs},
        "space": curves.SPACE,
        "objective": dict.fromkeys(objectives, "max"),
        "search": search,
    }
    return experiment_model(trainable).model_validate(content)


class Ours:
    """Grainmill's study, searcher and ASHA, called as the `TrialCallback` calls them."""

    def __init__(self, world: curves.World, objectives: tuple[str, ...], trials: int, **search: Any) -> None:
        checked = experiment(objectives, world.epochs, seed=world.seed, trials=trials, **search)
        memory = optuna.storages.InMemoryStorage()  # a database gives the same answers, later
        with mock.patch.object(optuna.storages, "get_storage", return_value=memory):
            self.study = Study("sqlite://", "trial", checked, checked.first, trials)
        self.asha = ASHA(checked)
        self.searcher = StudySearcher(self.study, self.asha, lambda: False)

    def suggest(self) -> tuple[int, Setting] | None:
        """Implement `curves.Player`."""
        suggestion = self.searcher.suggest("any")
        if not isinstance(suggestion, dict):
            return None
        return suggestion["number"], self.study.record(suggestion["number"]).setting

    def goes_on(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Implement `curves.Player`."""
        self.study.report(number, metrics)
        if metrics["epoch"] >= self.study.experiment.base.epochs:
            return True
        verdict = self.asha.judge(self.study.record(number))
        if verdict == "pause":
            self.study.note(number, "paused", True)
        return verdict == "continue"

    def ended(self, number: int, metrics: Mapping[str, float]) -> None:
        """Implement `curves.Player`."""
        if self.study.record(number).state != "paused":
            self.study.close(number, failed=False)


class Tune:
    """Ray Tune's OptunaSearch and ASHA with their defaults, called as its controller calls them.

    ASHA judges by one metric. OptunaSearch tells Optuna that a stopped trial is complete, with its last metrics.
    """

    def __init__(self, world: curves.World, objectives: tuple[str, ...]) -> None:
        checked = experiment(objectives, world.epochs)

        def draw(trial: Any) -> Setting:
            return resolve(checked.space, lambda name, parameter: samplers.suggest(trial, name, parameter))

        metrics, modes = (list(objectives), ["max"] * 2) if len(objectives) > 1 else (objectives[0], "max")
        self.search = OptunaSearch(draw, metrics, modes, [checked.reference], seed=world.seed)
        self.asha = ASHAScheduler("epoch", objectives[0], "max", max_t=world.epochs)
        self.given = 0

    def suggest(self) -> tuple[int, Setting] | None:
        """Implement `curves.Player`."""
        number, self.given = self.given, self.given + 1
        self.asha.on_trial_add(None, SimpleNamespace(trial_id=number))
        return number, self.search.suggest(number)

    def goes_on(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Implement `curves.Player`."""
        trial = SimpleNamespace(trial_id=number)
        if self.asha.on_trial_result(None, trial, metrics) == TrialScheduler.STOP:
            return False
        self.search.on_trial_result(number, {**metrics, "training_iteration": int(metrics["epoch"])})
        return True

    def ended(self, number: int, metrics: Mapping[str, float]) -> None:
        """Implement `curves.Player`."""
        self.search.on_trial_complete(number, {**metrics, "training_iteration": int(metrics["epoch"])})


def contestants(objectives: tuple[str, ...], trials: int) -> dict[str, Any]:
    """Constructors of the searches by name; those that stop trials get more of them than they can run."""
    whole, many = trials * 2, trials * 4
    return {
        "ours": partial(Ours, objectives=objectives, trials=many),
        "ours, losers pause": partial(Ours, objectives=objectives, trials=many, losers="pause"),
        "ours without stopping": partial(Ours, objectives=objectives, trials=whole, scheduler="none"),
        "random": partial(Ours, objectives=objectives, trials=whole, scheduler="none", sampler="random"),
        "NSGA-II": partial(Ours, objectives=objectives, trials=whole, scheduler="none", sampler="nsga2"),
        "Tune, OptunaSearch and ASHA": partial(Tune, objectives=objectives),
    }


def found(seed: int, name: str, objectives: tuple[str, ...], trials: int, epochs: int) -> list[float]:
    """Share of the best possible result that one search has found after each share of the budget."""
    world = curves.World(seed, epochs)
    # Mean time of that many complete trials.
    budget = trials * epochs * curves.EPOCH_SECONDS * 0.91
    finished = curves.play(world, contestants(objectives, trials)[name](world), WORKERS, budget)
    return [curves.share(world, finished, len(objectives) > 1, budget * part) for part in SHARES]


def simulate(seeds: int, trials: int, epochs: int, processes: int) -> None:
    """Print the results of each contestant, and whether the goals are met."""
    before, results = machine(), {}
    print(f"share of the best possible, {seeds} seeds, budget of {trials} whole trials on {WORKERS} workers")
    with ProcessPoolExecutor(processes) as pool:
        for objectives in (curves.METRICS, ("mean",)):
            names = list(contestants(objectives, trials))
            jobs = {
                name: [pool.submit(found, seed, name, objectives, trials, epochs) for seed in range(seeds)]
                for name in names
            }
            shares = {name: np.array([job.result() for job in jobs[name]]) for name in names}
            print(f"\n{' and '.join(objectives):<30}" + "".join(f"{f'at {part:.0%}':>22}" for part in SHARES))
            for name, table in shares.items():
                low, middle, high = np.percentile(table, [25, 50, 75], axis=0)
                cells = zip(middle, low, high, strict=True)
                print(f"{name:<30}" + "".join(f"{m:>8.3f} ({a:.3f}-{b:.3f})" for m, a, b in cells))
            _goals(shares)
            results[" and ".join(objectives)] = {name: table.tolist() for name, table in shares.items()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "search.json"
    path.write_text(json.dumps({"name": "search", **before, "at": SHARES, "floor": curves.FLOOR, "shares": results}))
    print(f"\n{path}")


def _goals(shares: Mapping[str, np.ndarray]) -> None:
    early = shares["ours"][:, SHARES.index(0.4)]
    for name, table in shares.items():
        if name in ("ours", "ours, losers pause"):
            continue
        part = statistics.median(early / table[:, -1])
        met = "met" if part >= 0.95 else "missed"
        print(f"at 40 % of the seconds, ours has {part:.1%} of what {name} has in the end; goal 95 %: {met}")
    ahead = shares["ours"] - shares["random"]
    met = "met" if (np.median(ahead, axis=0) >= 0).all() else "missed"
    counts = ", ".join(f"{(column < 0).sum()} at {part:.0%}" for column, part in zip(ahead.T, SHARES, strict=True))
    print(f"never below random, in the median: {met}; seeds below it: {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--suggest", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    options = parser.parse_args()
    if options.suggest:
        from tests.benchmarks import studies

        studies.main(options.sizes)
    else:
        simulate(options.seeds, options.trials, options.epochs, options.processes)


if __name__ == "__main__":
    main()
