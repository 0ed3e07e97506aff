"""Record of a search: an Optuna study in its own database, which Optuna's other tools open as it is.

The study holds the trials: their settings, the metrics of every epoch, their states and cost. A trial that a killed
process left running is handed out again under the same number. A trial that was stopped early is PRUNED, not COMPLETE.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from grainmill.config.experiment import Experiment
from grainmill.config.space import Parameter, Scalar, Setting, grid, resolve
from grainmill.config.validation import COSTS
from grainmill.errors import StorageError
from grainmill.search import samplers
from grainmill.search.records import State, TrialRecord
from grainmill.storage import sqlite

_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
PATIENCE = (0.5, 1, 2, 4, 8, 15, 30, 60)
"""Pauses in seconds between attempts to reach the database; after the last one the search ends with an error."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _patient(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a method of `Study` try again while the database does not answer, and raise StorageError in the end."""

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for pause in (*PATIENCE, None):
            try:
                return method(*args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                if pause is None:
                    raise _unreachable(args[0].url, error) from error  # type: ignore[attr-defined]  # of a Study
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    return call


def _prepare_file(url: str) -> None:
    """Make the database if it is a SQLite file that does not exist; raise StorageError if it cannot be used."""
    file = sqlite.file_of(url)
    if file is None:
        return
    if problem := sqlite.problem(file):
        raise StorageError(f"a study needs a SQLite file to read and write, but {problem}")
    sqlite.make(file, lambda draft: optuna.storages.RDBStorage(draft).engine.dispose())


def _unreachable(url: str, error: Exception) -> StorageError:
    where = make_url(url).render_as_string(hide_password=True)
    reason = str(error.__cause__ or error).splitlines()[0]
    return StorageError(
        f"the study's database must answer at {where}, but does not ({reason}); start it, and the same command "
        "carries on: nothing is lost"
    )


class Study:
    """The Optuna study of one search."""

    keep: Callable[[], None] = staticmethod(lambda: None)
    """Saves a database in a file where it outlives this machine; set by the caller that knows the folder."""

    def __init__(self, url: str, name: str, experiment: Experiment, first: Sequence[Setting], trials: int) -> None:
        """Open the study `name`, or make it.

        Args:
            url: database, such as `sqlite:////folder/study.db`; a missing SQLite file is made.
            name: name of the study in the database.
            experiment: its space, objective and search.
            first: settings of the first trials; they may lie outside the space.
            trials: number of all trials.
        Raises:
            StorageError: the database does not answer, or another version of Optuna wrote it.
        """
        self.url, self.name, self.experiment, self.first, self.trials = url, name, experiment, first, trials
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            _prepare_file(url)
            self._study = optuna.create_study(
                storage=optuna.storages.RDBStorage(url),
                sampler=samplers.build(experiment, trials, 0),
                directions=["maximize" if way == "max" else "minimize" for way in experiment.objective.values()],
                study_name=name,
                load_if_exists=True,
            )
        except RuntimeError as error:  # the tables are of another version
            raise StorageError(
                f"the study's database must be of this Optuna, {optuna.__version__}, but: {error}; "
                "upgrade it with `optuna storage upgrade`, or choose another name"
            ) from error
        except SQLAlchemyError as error:
            raise _unreachable(url, error) from error
        except ImportError as error:
            raise StorageError(f"PostgreSQL needs a driver ({error}); pip install 'grainmill[postgres]'") from error
        self._prepare()

    @property
    @_patient
    def records(self) -> list[TrialRecord]:
        """All trials that have a setting, by number."""
        return [_record(trial) for trial in self._study.get_trials(deepcopy=False) if "setting" in trial.user_attrs]

    @property
    @_patient
    def remaining(self) -> int:
        """Number of trials still to draw. A failed trial is replaced by another when the run is carried on."""
        return self._last - self._given()

    def _given(self, *states: TrialState) -> int:
        """Number of trials that were drawn and are in none of `states`."""
        trials = self._study.get_trials(deepcopy=False)
        return sum("setting" in trial.user_attrs and trial.state not in states for trial in trials)

    @_patient
    def ask(self) -> TrialRecord | None:
        """Draw a new trial; returns None when all have been drawn."""
        if self.remaining <= 0:
            return None
        self._put_back()
        self._study.sampler = samplers.build(self.experiment, self.trials, self._given())
        if self.experiment.search.sampler == "grid" and not self._study.get_trials(False, (TrialState.WAITING,)):
            self._enqueue(self._next_of_grid())
        trial = self._study.ask()
        fixed = trial.user_attrs.get("fixed", {})

        def draw(name: str, parameter: Parameter) -> Scalar:
            if name in fixed and not parameter.contains(fixed[name]):
                return fixed[name]  # outside the space: the sampler must not see it
            return samplers.suggest(trial, name, parameter)

        # Fixed values of parameters that are not searched, such as the seed, come last.
        drawn = resolve(self.experiment.space, draw)
        trial.set_user_attr("setting", drawn | {name: fixed[name] for name in fixed if name not in drawn})
        return self.record(trial.number)

    @_patient
    def record(self, number: int) -> TrialRecord:
        """Record of the trial `number`."""
        return _record(self._frozen(number))

    @_patient
    def note(self, number: int, key: str, value: Any) -> None:
        """Store an attribute of a trial: `cause`, `variants`, `cost`, `hardware` or `paused`."""
        self._trial(number).set_user_attr(key, value)

    def interrupt(self, number: int, why: str) -> int:
        """Record that a trial was interrupted, and starts again at its last checkpoint; returns the epoch."""
        record = self.record(number)
        epoch = int(record.metrics.get("epoch", 0)) + 1
        self.note(number, "interruptions", [*record.interruptions, f"in epoch {epoch}: {why}"])
        return epoch

    @_patient
    def report(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Record the metrics of an epoch; returns False if the epoch is known already, as after a resume."""
        trial, before = self._trial(number), self._frozen(number)
        history = before.user_attrs.get("history", [])
        if history and metrics["epoch"] <= history[-1]["epoch"]:
            return False
        values = [metrics[name] for name in self.experiment.objective]
        # Optuna has no intermediate values with several objectives; a killed process may have ended after this step.
        if len(values) == 1 and int(metrics["epoch"]) not in before.intermediate_values:
            trial.report(values[0], int(metrics["epoch"]))
        trial.set_user_attr("history", [*history, {**metrics, "at": int(time.time() * 1000)}])
        return True

    @_patient
    def close(self, number: int, failed: bool) -> State:
        """Set the final state of a trial by its reports, and return it; closing twice changes nothing."""
        record = self.record(number)
        values = [record.metrics.get(name, math.nan) for name in self.experiment.objective]
        if record.state in ("running", "paused"):
            excess = self.experiment.violations(record.metrics)
            for name, value in zip(self.experiment.constraints, excess, strict=True):
                with warnings.catch_warnings(action="ignore"):  # the value may have been set before a process died
                    self._trial(number).set_constraint(name, value)
        if failed or not all(map(math.isfinite, values)):
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        elif record.metrics["epoch"] < self.experiment.base.epochs:
            self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self._study.tell(number, values, skip_if_finished=True)
        return self.record(number).state

    @_patient
    def adopt(self, url: str, name: str) -> None:
        """Let the sampler learn from the complete trials of an earlier study, which do not count as trials of this one.

        Values outside the space are ignored. A second call adds nothing.

        Raises:
            StorageError: there is no such study, or its objectives differ.
        """
        try:
            earlier = optuna.load_study(study_name=name, storage=optuna.storages.RDBStorage(url))
        except KeyError as error:
            raise StorageError(
                f"a warm start needs an earlier search, but there is no study {name!r} at "
                f"{make_url(url).render_as_string()}; set search.warm_start to the folder of its run"
            ) from error
        wanted = self.experiment.objective
        if earlier.metric_names != list(wanted) or earlier.directions != self._study.directions:
            raise StorageError(
                f"a warm start needs a search of the same objective, {', '.join(wanted)}, but {name!r} has "
                f"{', '.join(earlier.metric_names or ['others'])}; set search.warm_start to another run"
            )
        known = {trial.user_attrs.get("adopted") for trial in self._study.get_trials(deepcopy=False)}
        for trial in earlier.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            origin = f"{name} {trial.number}"
            if "setting" in trial.user_attrs and origin not in known:
                self._study.add_trial(samplers.adopted(trial, self.experiment.space, {"adopted": origin}))

    def _prepare(self) -> None:
        """Enqueue the first settings that no trial has, also after an interruption, and count the trials to draw."""
        if self._study.metric_names is None:
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                self._study.set_metric_names(list(self.experiment.objective))
        self._put_back()
        trials = self._study.get_trials(deepcopy=False)
        given = [trial.user_attrs.get("fixed") for trial in trials if trial.state != TrialState.FAIL]
        missing = [setting for setting in self.first if dict(setting) not in given]
        self._last = self._given() + max(self.trials - self._given(TrialState.FAIL), len(missing))
        for setting in missing:
            self._enqueue(setting)

    def _put_back(self) -> None:
        """Fail the trials that were interrupted while they were drawn, and enqueue their fixed settings again."""
        trials = self._study.get_trials(deepcopy=False)
        waiting = [trial.user_attrs.get("fixed") for trial in trials if trial.state == TrialState.WAITING]
        for trial in trials:
            if trial.state == TrialState.RUNNING and "setting" not in trial.user_attrs:
                fixed = trial.user_attrs.get("fixed")
                if fixed is not None and fixed not in waiting:
                    self._enqueue(fixed)
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _enqueue(self, setting: Setting) -> None:
        self._study.enqueue_trial(dict(setting), user_attrs={"fixed": dict(setting)})

    def _next_of_grid(self) -> Setting:
        """A setting of the grid that was not tried; if all were, the failed one with the fewest failures."""
        # Optuna's grid sampler never returns to a failed setting, and stops a loop that Grainmill does not use.
        records = [(frozenset(record.setting.items()), record.state) for record in self.records]
        taken = {point for point, state in records if state != "failed"}
        failures = Counter(point for point, _ in records if point not in taken)
        points = {frozenset(setting.items()): setting for setting in chain(self.first, grid(self.experiment.space))}
        return points[min((point for point in points if point not in taken), key=failures.__getitem__)]

    def _id(self, number: int) -> int:
        """Id of a trial's row in the database."""
        return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _frozen(self, number: int) -> FrozenTrial:
        # Reads one row; get_trials would read every running trial with its history.
        return self._study._storage.get_trial(self._id(number))

    def _trial(self, number: int) -> optuna.Trial:
        # Optuna hands out a Trial in ask() only; to write to a trial of another process, it is built from the id.
        return optuna.Trial(self._study, self._id(number))


def _record(trial: FrozenTrial) -> TrialRecord:
    kept = trial.user_attrs
    state = "paused" if trial.state == TrialState.RUNNING and kept.get("paused") else _STATES[trial.state]
    rows = kept.get("history", ())
    history = tuple({name: value for name, value in row.items() if name != "at"} for row in rows)
    reported = {name: history[-1][name] for name in COSTS if history and name in history[-1]}
    cost = max(kept.get("cost", {}), reported, key=lambda cost: sum(cost.values()))
    why, variants = kept.get("cause"), kept.get("variants", {})
    times, interruptions = tuple(row["at"] for row in rows), tuple(kept.get("interruptions", ()))
    hardware = kept.get("hardware", {})
    return TrialRecord(
        trial.number, state, kept["setting"], history, times, why, variants, cost, interruptions, hardware
    )
