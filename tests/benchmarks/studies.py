"""Time of the calls of a study with many trials: ours against plain Optuna on a copy of the same SQLite file."""

import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

from grainmill.config.space import resolve
from grainmill.execution.searcher import StudySearcher
from grainmill.search import samplers
from grainmill.search.asha import ASHA
from grainmill.search.study import Study
from tests.benchmarks import curves, search
from tests.benchmarks.table import Goal, machine, report

RUNNING = 8
CALLS = 5
EPOCHS = 27


def opened(folder: Path, sampler: str, size: int) -> Study:
    checked = search.experiment(curves.METRICS, EPOCHS, sampler=sampler, trials=size + 100)
    return Study(f"sqlite:///{folder / 'study.db'}", "trial", checked, [], size + 100)


def fill(folder: Path, size: int) -> None:
    """Write a study in which two of three trials were stopped after a third; directly, as Optuna would take minutes."""
    study, world, random = opened(folder, "random", size), curves.World(0, EPOCHS), np.random.default_rng(0)
    space = study.experiment.space
    known = {name: samplers._distribution(parameter) for name, parameter in space.items()}
    tables: dict[str, list[tuple[Any, ...]]] = {"trials": [], "values": [], "params": [], "user_attributes": []}
    day = "2026-01-01 00:00:00.000000"
    for number in range(size):
        setting = resolve(space, lambda _, parameter: curves.drawn(random, parameter))
        history = [metrics for _, metrics in world.training(setting, number)][: 9 if number % 3 else EPOCHS]
        key, state = number + 1, "PRUNED" if number % 3 else "COMPLETE"
        tables["trials"].append((key, number, 1, state, day, day))
        if state == "COMPLETE":
            tables["values"] += [(None, key, at, history[-1][name], "FINITE") for at, name in enumerate(curves.METRICS)]
        for name, value in setting.items():
            if name != "loss.weight" or setting["batch.repeats"] != 1:  # otherwise it was not drawn
                inner = known[name].to_internal_repr(value)
                tables["params"].append((None, key, name, inner, distribution_to_json(known[name])))
        kept = {"setting": setting, "history": history, "run_id": "0" * 32, "cost": {"gpu_seconds": 1.0}}
        tables["user_attributes"] += [(None, key, name, json.dumps(value)) for name, value in kept.items()]
    with sqlite3.connect(folder / "study.db") as database:
        for name, rows in tables.items():
            places = ", ".join("?" * len(rows[0]))
            database.executemany(
                f"insert into {'trials' if name == 'trials' else f'trial_{name}'} values ({places})", rows
            )


def timed(figures: dict[str, list[float]], name: str, call: Callable[..., Any], *args: Any) -> Any:
    started = time.perf_counter()
    result = call(*args)
    figures.setdefault(name, []).append(1e3 * (time.perf_counter() - started))
    return result


def ours(folder: Path, sampler: str, size: int, figures: dict[str, list[float]]) -> None:
    """Time suggestions while other trials run, reports of epochs, judgements at rungs and ends of trials."""
    study = opened(folder, sampler, size)
    asha = ASHA(study.experiment, study.records)
    searcher, world = StudySearcher(study, asha, lambda: False), curves.World(0, EPOCHS)
    for name in range(RUNNING):
        searcher.suggest(str(name))
    label = f"{sampler}, {size} trials"
    for _ in range(CALLS):
        number = timed(figures, f"suggest, {label}", searcher.suggest, "next")["number"]
        for _, metrics in islice(world.training(study.record(number).setting, number), 9):
            timed(figures, f"report, {label}", study.report, number, metrics)
        record = study.record(number)
        timed(figures, f"judge at a rung, {label}", asha.judge, record)
        timed(figures, f"close, {label}", study.close, number, False)


def plain(folder: Path, sampler: str, size: int, figures: dict[str, list[float]]) -> None:
    """Time the same draws by Optuna alone, and its own calls to set an attribute and to end a trial."""
    space = opened(folder, sampler, size).experiment.space
    checked = search.experiment(curves.METRICS, EPOCHS, sampler=sampler)
    storage, built = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}"), samplers.build(checked, size + 100)
    study = optuna.load_study(study_name="trial", storage=storage, sampler=built)

    def ask() -> optuna.Trial:
        trial = study.ask()
        resolve(space, lambda name, parameter: samplers.suggest(trial, name, parameter))
        return trial

    running, label = [ask() for _ in range(RUNNING)], f"{sampler}, {size} trials"
    for _ in range(CALLS):
        trial = timed(figures, f"Optuna: ask, {label}", ask)
        timed(figures, f"Optuna: set_user_attr, {label}", trial.set_user_attr, "history", [])
        timed(figures, f"Optuna: tell, {label}", study.tell, trial, None, TrialState.PRUNED)
    del running


def main(sizes: list[int]) -> None:
    before, figures, goals = machine(), {}, []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fill(folder, size)
            for sampler in ("random", "tpe", "nsga2"):
                for contestant in (ours, plain):
                    own = folder / f"{sampler}-{contestant.__name__}"
                    own.mkdir()
                    shutil.copy(folder / "study.db", own)
                    contestant(own, sampler, size, figures)
                label = f"{sampler}, {size} trials"
                goals += [
                    Goal(f"suggest, {label}", f"Optuna: ask, {label}"),
                    Goal(f"close, {label}", f"Optuna: tell, {label}"),
                ]
    report("studies", figures, goals, before, "milliseconds", more_is_better=False)
