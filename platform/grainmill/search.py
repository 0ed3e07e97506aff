"""Space and objectives -> Optuna study, Tune searcher and scheduler; the only room that knows Optuna.

The study, in a SQLite file of the run's folder, is the record of the trials: their settings, every
epoch's metrics, their states and their MLflow runs. What a killed process left running is handed out
again, under the same number. A trial that was stopped early is PRUNED there, never COMPLETE.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from grainmill.experiment import Experiment, Search
from grainmill.space import Parameter, Scalar, Setting, grid, resolve

State = Literal["running", "complete", "stopped", "failed"]
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
STARTUP_SHARE = 3
"""One trial in so many is drawn at random before TPE begins, ten at most."""


@dataclass(frozen=True)
class Record:
    """One trial as the study knows it."""

    number: int
    state: State
    setting: Setting
    history: tuple[Mapping[str, float], ...]
    """Metrics of each epoch, the first epoch first; each with `epoch`."""
    run_id: str | None
    """Of its MLflow run."""
    cause: str | None
    """Why it failed."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the last epoch; empty before the first."""
        return self.history[-1] if self.history else {}


class Study:
    """An Optuna study in a file, and what the mill asks of it."""

    def __init__(self, file: Path, name: str, experiment: Experiment, first: Setting, trials: int) -> None:
        """Open the study `name`, or make it.

        Args:
            file: SQLite database, made if need be.
            name: of the study in the file.
            experiment: its space, objective and search.
            first: the setting of the first trial; it may lie outside the space.
            trials: how many there are in all.
        """
        self.name, self.experiment, self.first, self.trials = name, experiment, first, trials
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}"),
            sampler=_sampler(experiment.search, trials),
            directions=["maximize" if way == "max" else "minimize" for way in experiment.objective.values()],
            study_name=name,
            load_if_exists=True,
        )
        if not self.used():
            self._enqueue(first)

    @property
    def records(self) -> list[Record]:
        """All trials that have a setting, by number."""
        return [_record(trial) for trial in self._study.get_trials(deepcopy=False) if "setting" in trial.user_attrs]

    def used(self) -> int:
        """Trials that count: one that failed is made up for, by another, when the run is carried on."""
        return sum(record.state != "failed" for record in self.records)

    def ask(self) -> Record | None:
        """A new trial; None when all have been given out."""
        if self.used() >= self.trials:
            return None
        if self.experiment.search.sampler == "grid":
            self._enqueue(self._next_of_grid())
        trial = self._study.ask()
        fixed = trial.user_attrs.get("fixed", {})

        def draw(name: str, parameter: Parameter) -> Scalar:
            if name in fixed and not parameter.contains(fixed[name]):
                return fixed[name]  # outside the space: the sampler is not told of it
            return _suggest(trial, name, parameter)

        trial.set_user_attr("setting", resolve(self.experiment.space, draw))
        return self.record(trial.number)

    def record(self, number: int) -> Record:
        """One trial."""
        return _record(self._frozen(number))

    def note(self, number: int, key: str, value: Any) -> None:
        """Keep something with a trial: `run_id`, `cause`."""
        self._trial(number).set_user_attr(key, value)

    def report(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Take down an epoch's metrics; False if that epoch is known already, as it is after a resume."""
        trial, history = self._trial(number), self._frozen(number).user_attrs.get("history", [])
        if history and metrics["epoch"] <= history[-1]["epoch"]:
            return False
        trial.set_user_attr("history", [*history, dict(metrics)])
        values = [metrics[name] for name in self.experiment.objective]
        if len(values) == 1:  # Optuna has no intermediate values with several objectives
            trial.report(values[0], int(metrics["epoch"]))
        return True

    def close(self, number: int, failed: bool) -> State:
        """Decide the final state of a trial from what it reported; closing twice changes nothing."""
        record = self.record(number)
        values = [record.metrics.get(name, math.nan) for name in self.experiment.objective]
        if failed or not all(map(math.isfinite, values)):
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        elif record.metrics["epoch"] < self.experiment.base.epochs:
            self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self._study.tell(number, values, skip_if_finished=True)
        return self.record(number).state

    def best(self) -> Record | None:
        """The complete trial that is best by the first objective, ties by the next; None without one."""
        complete = [record for record in self.records if record.state == "complete"]
        signs = {name: 1 if way == "max" else -1 for name, way in self.experiment.objective.items()}
        return max(complete, key=lambda r: [sign * r.metrics[name] for name, sign in signs.items()], default=None)

    def _enqueue(self, setting: Setting) -> None:
        """Make `setting` that of the next trial, unless one is waiting already."""
        if not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self._study.enqueue_trial(dict(setting), user_attrs={"fixed": dict(setting)})

    def _next_of_grid(self) -> Setting:
        """One that was not tried; or else, of those that failed, one that failed least often."""
        # Not by Optuna's samplers of grids: they never come back to what failed, and stop the loop that we do not use.
        records = [(frozenset(record.setting.items()), record.state) for record in self.records]
        taken = {point for point, state in records if state != "failed"}
        failures = Counter(point for point, _ in records if point not in taken)
        points = {frozenset(setting.items()): setting for setting in chain([self.first], grid(self.experiment.space))}
        return points[min((point for point in points if point not in taken), key=failures.__getitem__)]

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _trial(self, number: int) -> optuna.Trial:
        # Only ask() gives out a Trial; to write on one that another process began, it is built from its row's id.
        return optuna.Trial(self._study, self._frozen(number)._trial_id)


def _record(trial: FrozenTrial) -> Record:
    kept = trial.user_attrs
    history = tuple(kept.get("history", ()))
    return Record(trial.number, _STATES[trial.state], kept["setting"], history, kept.get("run_id"), kept.get("cause"))


def _sampler(search: Search, trials: int) -> optuna.samplers.BaseSampler:
    if search.sampler != "tpe":  # a grid draws nothing
        return optuna.samplers.RandomSampler(seed=search.seed)
    startup = min(10, max(1, trials // STARTUP_SHARE))
    # constant_liar: trials that still run count as poor, so that the next one is drawn elsewhere.
    return optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=startup, constant_liar=True)


def _suggest(trial: optuna.Trial, name: str, parameter: Parameter) -> Scalar:
    if parameter.choice:
        return trial.suggest_categorical(name, parameter.choice)
    if parameter.integer:
        return trial.suggest_int(name, *parameter.integer)
    bounds = parameter.loguniform or parameter.uniform
    assert bounds, "a parameter has one kind"
    return trial.suggest_float(name, *bounds, log=parameter.loguniform is not None)


class StudySearcher(Searcher):  # type: ignore[misc]
    """Hands the study's trials to Tune, first those that a killed process left running.

    It only gives. What comes back is taken down by the observer of the trials, which sees why a trial
    failed too.
    """

    def __init__(self, study: Study) -> None:
        super().__init__()
        self.study = study
        self._left_running = [record for record in study.records if record.state == "running"]

    @property
    def open_trials(self) -> int:
        """How many trials are still to be run."""
        return self.study.trials - self.study.used() + len(self._left_running)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The number and the settings of the next trial."""
        record = self._left_running.pop(0) if self._left_running else self.study.ask()
        if record is None:
            return Searcher.FINISHED
        return {"number": record.number, "spec": self.study.experiment.spec(record.setting).model_dump()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is in its database."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for a restore that we do not use; an open database does not pickle


class _SparingASHA(ASHAScheduler):  # type: ignore[misc]
    """ASHA that lets the first trial, the published setting, run to its end, so that all can be held against it."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config["number"] == 0 else decision


def build_scheduler(experiment: Experiment) -> TrialScheduler:
    """The Tune scheduler of an experiment; its rungs count epochs."""
    search, epochs = experiment.search, experiment.base.epochs
    if search.scheduler == "none":
        return FIFOScheduler()
    ((metric, mode),) = experiment.objective.items()
    return _SparingASHA(
        time_attr="epoch",
        metric=metric,
        mode=mode,
        max_t=epochs,
        grace_period=search.grace_epochs or math.ceil(epochs / 3),
        reduction_factor=search.reduction,
    )
