"""Takes down what becomes of trials, in the study and in MLflow, and says whether they go on."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ray import tune as ray_tune
from ray.tune.experiment import Trial

from grainmill.errors import GrainmillError, SearchError
from grainmill.execution import evaluate_group
from grainmill.execution.training_job import StudySetup
from grainmill.execution.watchdog import WatchdogMessages
from grainmill.search.asha import ASHA, forecast
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study
from grainmill.tracking.sync import MLflowSync

WAIT_SECONDS = 60
"""Without a trial that runs, before the user hears what is missing."""
FAILURES = 5
"""Trials that fail before a search is given up, if more fail than not."""


class Observer(Protocol):
    """Is told of the progress."""

    def message(self, message: str) -> None:
        """A step of the whole begins."""

    def trial(self, name: str, record: TrialRecord) -> None:
        """A trial began, finished an epoch, or ended."""


Result = TypeVar("Result")


def _fatal(method: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps what must end the search: Tune takes an error of a callback for one of the trial, and tries that again."""

    @wraps(method)
    def call(clerk: "TrialCallback", *args: Any, **kwargs: Any) -> Result:
        if clerk.fatal:
            raise clerk.fatal
        try:
            return method(clerk, *args, **kwargs)
        except GrainmillError as error:
            clerk.fatal = error
            raise

    return call


class TrialCallback(ray_tune.Callback):  # type: ignore[misc]
    """Hears from Tune of the trials of one study.

    The study is written first and is right; the MLflow sync brings MLflow up to it, what a killed process did not tell
    included.
    """

    def __init__(
        self,
        plan: StudySetup,
        study: Study,
        asha: ASHA,
        mlflow_sync: MLflowSync,
        observer: Observer,
        listener: WatchdogMessages,
    ) -> None:
        self.plan, self.study, self.asha, self.mlflow_sync, self.observer = plan, study, asha, mlflow_sync, observer
        self.listener = listener
        self.fatal: GrainmillError | None = None
        """Why the search must end; nothing is taken down any more."""
        self.began: dict[int, tuple[float, Mapping[str, float], int]] = {}
        """Since when a trial has had so many workers, in seconds; what it had cost before; how many."""
        records = study.records
        self.costs = {record.number: dict(record.cost) for record in records}
        self.causes: Counter[str] = Counter()
        self.ended_well = 0
        self.places: dict[int, evaluate_group.Place] = {}
        """What the workers of a trial's group occupy."""
        self.at_work: set[int] = set()
        """Trials whose group works."""
        self.left: set[int] = set()
        """Trials that left a node, and are to begin again elsewhere."""
        self.busy_at = time.monotonic()
        """When last a trial ran."""
        self.forecast = ""
        """Of the cost; empty before the first trial is complete."""
        for record in records:
            mlflow_sync.enqueue(record, running=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ray_tune.Callback, ())  # Tune pickles its callbacks for a restore that we do not use

    @_fatal
    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """It runs."""
        number = trial.config["number"]
        if number in self.began:  # Tune began it again
            self._vacate(number)
            if number not in self.left:
                self._interrupted(number, "its process died")
            self.left.discard(number)
            return
        self.began[number] = time.monotonic(), self.study.record(number).cost, self.plan.need.fewest
        self._tell(number)

    @_fatal
    def goes_on(self, trial: Trial, result: Mapping[str, Any]) -> bool:
        """Take down an epoch, or the cause of a failure; whether the trial goes on after it."""
        number = trial.config["number"]
        if "reported" not in result:
            return self._hear(number, result)
        self.costs[number] = self._cost(number)
        metrics = {name: float(result[name]) for name in result["reported"]} | self.costs[number]
        if variants := json.loads(result["variants"]):
            self.study.note(number, "variants", variants)
        if self.study.report(number, metrics):
            self._tell(number)
        record, experiment = self.study.record(number), self.study.experiment
        if wrong := [name for name in experiment.objective if not math.isfinite(metrics[name])]:
            self.study.note(number, "cause", f"{wrong[0]} is {metrics[wrong[0]]} after epoch {metrics['epoch']:g}")
            return False
        if metrics["epoch"] >= experiment.base.epochs:
            return True
        if self.spent():
            return False
        verdict = self.asha.judge(record)
        if verdict == "pause":
            self.study.note(number, "paused", True)
        return verdict == "continue"

    def _hear(self, number: int, result: Mapping[str, Any]) -> bool:
        """What a trial says besides its epochs; whether it goes on."""
        if "cause" in result:
            self.study.note(number, "cause", result["cause"])
            return False
        if "workers" in result or self.plan.need.most > 1:
            self._work(number, result.get("workers", 0))
        if "left" in result:
            self.left.add(number)
            self.at_work.discard(number)
            epoch = self.study.interrupt(number, "its node was taken away")
            name = self.plan.name(number)
            self.observer.message(f"{name}: its node is to be taken away; saved in epoch {epoch}, goes on elsewhere")
        elif "waiting" in result:
            self._wait(result["waiting"])
        else:
            if number in self.at_work:
                self._interrupted(number, "its workers began again")
            self.at_work.add(number)
            self.left.discard(number)
            self.places[number] = result["place"]
        return True

    @_fatal
    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close it, unless it waits for another chance."""
        self._end(trial.config["number"])

    @_fatal
    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Its process or node died too often."""
        number = trial.config["number"]
        self.study.note(number, "cause", _cause(trial))
        self._end(number)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """End the search here, where Tune passes errors on; say so if it waits for others to leave the cluster."""
        if self.fatal:
            raise self.fatal
        if message := self.listener.heard():
            self.observer.message(message)
        now = time.monotonic()
        if any(trial.status == Trial.RUNNING for trial in trials):
            self.busy_at = now
        elif now - self.busy_at > WAIT_SECONDS:
            self.busy_at = now
            self._wait(evaluate_group.missing_resources(self.plan))

    def _end(self, number: int) -> None:
        self.costs[number] = self._cost(number)
        self.study.note(number, "cost", self.costs[number])
        self.began.pop(number)
        self.at_work.discard(number)
        record = self.study.record(number)
        if record.state != "paused":
            self.study.close(number, failed=record.cause is not None)
        self._tell(number)
        record = self.study.record(number)
        if record.state == "complete" and not self.forecast and self.study.trials > 1:
            self.forecast = forecast(self.study.experiment, record)
            self.observer.message(self.forecast)
        self._stop_if_hopeless(record)

    def _stop_if_hopeless(self, record: TrialRecord) -> None:
        if record.state != "failed":
            self.ended_well += 1
            return
        self.causes[record.cause or "no finite objective"] += 1
        failed = self.causes.total()
        if failed >= FAILURES and failed > self.ended_well:
            ((cause, count),) = self.causes.most_common(1)
            raise SearchError(
                f"most trials must come through, but {failed} of {failed + self.ended_well} failed, {count} of them "
                f"so: {cause}; put that right, and the same command carries on"
            )

    def spent(self) -> bool:
        """Whether the budget is."""
        budget = self.study.experiment.budget
        limits = {"gpu_seconds": budget.gpu_hours, "cpu_seconds": budget.cpu_hours}
        return any(
            sum(cost.get(name, 0) for cost in self.costs.values()) >= hours * 3600
            for name, hours in limits.items()
            if hours is not None
        )

    def _cost(self, number: int) -> dict[str, float]:
        began, before, workers = self.began[number]
        seconds = (time.monotonic() - began) * workers
        bundle = self.plan.need.bundle
        amounts = {"cpu_seconds": bundle.get("CPU", 0), "gpu_seconds": bundle.get("GPU", 0)}
        return {name: before.get(name, 0) + seconds * amount for name, amount in amounts.items()}

    def _work(self, number: int, workers: int) -> None:
        """From now on, so many work on a trial."""
        *_, before = self.began[number]
        self.began[number] = time.monotonic(), self._cost(number), workers
        need = self.plan.need
        if workers and workers != before and need.fewest < need.most:
            self.observer.message(f"{self.plan.name(number)}: {workers} of up to {need.most} workers")

    def _wait(self, what: str) -> None:
        evaluate_group.release()  # nobody else gives back what the dead have taken
        self.observer.message(what)

    def _interrupted(self, number: int, why: str) -> None:
        epoch = self.study.interrupt(number, why)
        self.observer.message(f"{self.plan.name(number)}: {why} in epoch {epoch}; goes on from its last checkpoint")

    def _vacate(self, number: int) -> None:
        """Free what workers without a leader occupy."""
        self.at_work.discard(number)
        if place := self.places.pop(number, None):
            evaluate_group.vacate(place)

    def end_unfinished(self) -> None:
        """No process works on the trials any more that were interrupted; they stay to be carried on."""
        for number in list(self.places):
            self._vacate(number)
        if self.plan.need.most > 1:
            evaluate_group.release()  # a node with room that is taken does not go
        for number in list(self.began):
            self.began.pop(number)
            self.mlflow_sync.enqueue(self.study.record(number), running=False)

    def close_paused(self) -> None:
        """No trial gets another chance: those that waited for one are stopped at their epoch."""
        for record in self.study.records:
            if record.state == "paused":
                self.study.close(record.number, failed=False)
                self._tell(record.number)

    def _tell(self, number: int) -> None:
        self.study.keep()
        record = self.study.record(number)
        self.mlflow_sync.enqueue(record, running=number in self.began)
        self.observer.trial(self.plan.name(number), record)


def _cause(trial: Trial) -> str:
    """The last line of a trial's traceback."""
    lines = Path(trial.error_file).read_text().split("\n") if trial.error_file else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "unknown")
