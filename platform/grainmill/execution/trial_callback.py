"""Recording of trials: what Tune reports goes to the study and to MLflow, and decides whether a trial goes on."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from ray import tune as ray_tune
from ray.tune.experiment import Trial

from grainmill.errors import GrainmillError, SearchError
from grainmill.execution import placement
from grainmill.execution.training_job import StudySetup
from grainmill.execution.watchdog import WatchdogMessages
from grainmill.messages import EpochReport, NodeLeaving, TrialFailed, WaitingForResources, WorkersStarted, decode
from grainmill.search.asha import ASHA, forecast
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study
from grainmill.tracking.sync import MLflowSync

WAIT_SECONDS = 60
"""Time without a running trial after which the user is told what is missing."""
FAILURES = 5
"""Failed trials after which a search is given up, if more have failed than not."""


class Observer(Protocol):
    """Receives the progress of a run, for the user."""

    def message(self, message: str) -> None:
        """Receive the beginning of a step, or an event."""

    def trial(self, name: str, record: TrialRecord) -> None:
        """Receive a trial that has started, finished an epoch, or ended."""


class _Work(NamedTuple):
    """Work on a trial since its number of workers changed last."""

    since: float
    """Time of that change, in seconds."""
    cost: Mapping[str, float]
    """Cost of the trial until then."""
    workers: int


Result = TypeVar("Result")


def _fatal(method: Callable[..., Result]) -> Callable[..., Result]:
    """Keep an error that must end the search. Tune takes a callback's error for one of the trial, and retries that."""

    @wraps(method)
    def call(callback: "TrialCallback", *args: Any, **kwargs: Any) -> Result:
        if callback.fatal_error:
            raise callback.fatal_error
        try:
            return method(callback, *args, **kwargs)
        except GrainmillError as error:
            callback.fatal_error = error
            raise

    return call


class TrialCallback(ray_tune.Callback):  # type: ignore[misc]
    """Records the trials of one study, as Tune reports them.

    Everything is written to the study first. `MLflowSync` then brings MLflow in line with the study, including what a
    killed process could not report.
    """

    def __init__(
        self,
        setup: StudySetup,
        study: Study,
        asha: ASHA,
        mlflow_sync: MLflowSync,
        observer: Observer,
        watchdog: WatchdogMessages,
    ) -> None:
        self.study_setup, self.study, self.asha, self.mlflow_sync, self.observer = (
            setup,
            study,
            asha,
            mlflow_sync,
            observer,
        )
        self.watchdog = watchdog
        self.fatal_error: GrainmillError | None = None
        """Error that must end the search; nothing more is recorded."""
        self.work: dict[int, _Work] = {}
        """Work on each trial that has started and not ended."""
        records = study.records
        self.costs = {record.number: dict(record.cost) for record in records}
        self.causes: Counter[str] = Counter()
        """Causes of failed trials."""
        self.succeeded = 0
        self.reservations: dict[int, placement.Reservation] = {}
        """Cluster resources that the worker group of a trial holds."""
        self.training: set[int] = set()
        """Trials whose worker group trains."""
        self.leaving: set[int] = set()
        """Trials that have left a node and are to start again elsewhere."""
        self.last_running = time.monotonic()
        """Time when a trial ran last, in seconds."""
        self.forecast_shown = False
        for record in records:
            mlflow_sync.enqueue(record, running=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ray_tune.Callback, ())  # Tune pickles its callbacks for a restore that is not used here

    @_fatal
    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record that a trial starts, or starts again."""
        number = trial.config["number"]
        if number in self.work:
            self._free(number)
            if number not in self.leaving:
                self._interrupted(number, "its process died")
            self.leaving.discard(number)
            return
        self.work[number] = _Work(time.monotonic(), self.study.record(number).cost, self.study_setup.need.fewest)
        self._publish(number)

    @_fatal
    def receive(self, trial: Trial, result: Mapping[str, Any]) -> bool:
        """Record a message of a trial. Returns True when the trial goes on."""
        number, name = trial.config["number"], self.study_setup.trial_name(trial.config["number"])
        match decode(result):
            case EpochReport() as report:
                return self._record_epoch(number, report)
            case TrialFailed(cause):
                self.study.note(number, "cause", cause)
                return False
            case WorkersStarted(workers, reservation):
                self._set_workers(number, workers)
                if number in self.training:
                    self._interrupted(number, "its workers began again")
                self.training.add(number)
                self.leaving.discard(number)
                self.reservations[number] = reservation
            case NodeLeaving():
                self._pause_group(number)
                self.leaving.add(number)
                self.training.discard(number)
                epoch = self.study.interrupt(number, "its node was taken away")
                text = f"{name}: its node is to be taken away; saved in epoch {epoch}, goes on elsewhere"
                self.observer.message(text)
            case WaitingForResources(missing):
                self._pause_group(number)
                self._wait(missing)
        return True

    def _record_epoch(self, number: int, report: EpochReport) -> bool:
        self.costs[number] = self._cost(number)
        metrics = {name: float(value) for name, value in report.metrics.items()} | self.costs[number]
        if report.hardware:
            self.study.note(number, "hardware", report.hardware)
        if report.variants:
            self.study.note(number, "variants", report.variants)
        if self.study.report(number, metrics):
            self._publish(number)
        record, experiment = self.study.record(number), self.study.experiment
        if wrong := [name for name in experiment.objective if not math.isfinite(metrics[name])]:
            self.study.note(number, "cause", f"{wrong[0]} is {metrics[wrong[0]]} after epoch {report.epoch}")
            return False
        if report.epoch >= experiment.base.epochs:
            return True
        if self.spent():
            return False
        verdict = self.asha.judge(record)
        if verdict == "pause":
            self.study.note(number, "paused", True)
        return verdict == "continue"

    @_fatal
    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the end of a trial, unless it is paused."""
        self._end(trial.config["number"])

    @_fatal
    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record that a trial's process or node has died too often."""
        number = trial.config["number"]
        self.study.note(number, "cause", _last_line(trial.error_file))
        self._end(number)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """End the search after a fatal error: here, Tune passes errors on. Tell the user when all trials wait."""
        if self.fatal_error:
            raise self.fatal_error
        if message := self.watchdog.poll():
            self.observer.message(message)
        now = time.monotonic()
        if any(trial.status == Trial.RUNNING for trial in trials):
            self.last_running = now
        elif now - self.last_running > WAIT_SECONDS:
            self.last_running = now
            self._wait(placement.missing_resources(self.study_setup))

    def _end(self, number: int) -> None:
        self.costs[number] = self._cost(number)
        self.study.note(number, "cost", self.costs[number])
        self.work.pop(number)
        self.training.discard(number)
        record = self.study.record(number)
        if record.state != "paused":
            self.study.close(number, failed=record.cause is not None)
        self._publish(number)
        record = self.study.record(number)
        if record.state == "complete" and not self.forecast_shown and self.study.trials > 1:
            self.forecast_shown = True
            self.observer.message(forecast(self.study.experiment, record))
        self._stop_if_hopeless(record)

    def _stop_if_hopeless(self, record: TrialRecord) -> None:
        if record.state != "failed":
            self.succeeded += 1
            return
        self.causes[record.cause or "no finite objective"] += 1
        failed = self.causes.total()
        if failed >= FAILURES and failed > self.succeeded:
            ((cause, count),) = self.causes.most_common(1)
            raise SearchError(
                f"most trials must come through, but {failed} of {failed + self.succeeded} failed, {count} of them "
                f"so: {cause}; put that right, and the same command carries on"
            )

    def spent(self) -> bool:
        """Return True when the trials have used up the GPU or CPU hours of the budget."""
        budget = self.study.experiment.budget
        limits = {"gpu_seconds": budget.gpu_hours, "cpu_seconds": budget.cpu_hours}
        return any(
            sum(cost.get(name, 0) for cost in self.costs.values()) >= hours * 3600
            for name, hours in limits.items()
            if hours is not None
        )

    def _cost(self, number: int) -> dict[str, float]:
        work, bundle = self.work[number], self.study_setup.need.bundle
        seconds = (time.monotonic() - work.since) * work.workers
        amounts = {"cpu_seconds": bundle.get("CPU", 0), "gpu_seconds": bundle.get("GPU", 0)}
        return {name: work.cost.get(name, 0) + seconds * amount for name, amount in amounts.items()}

    def _set_workers(self, number: int, workers: int) -> None:
        before, need = self.work[number].workers, self.study_setup.need
        self.work[number] = _Work(time.monotonic(), self._cost(number), workers)
        if workers and workers != before and need.fewest < need.most:
            self.observer.message(f"{self.study_setup.trial_name(number)}: {workers} of up to {need.most} workers")

    def _pause_group(self, number: int) -> None:
        """Count no cost while a trial's group has no workers. A trial without a group keeps its resources."""
        if self.study_setup.need.most > 1:
            self._set_workers(number, 0)

    def _wait(self, missing: str) -> None:
        placement.free_orphaned()  # Ray itself frees the resources of dead processes only when the job ends
        self.observer.message(missing)

    def _interrupted(self, number: int, why: str) -> None:
        epoch = self.study.interrupt(number, why)
        name = self.study_setup.trial_name(number)
        self.observer.message(f"{name}: {why} in epoch {epoch}; goes on from its last checkpoint")

    def _free(self, number: int) -> None:
        """Free the resources of a worker group whose driver has died."""
        self.training.discard(number)
        if reservation := self.reservations.pop(number, None):
            placement.free(reservation)

    def end_unfinished(self) -> None:
        """Record that no process works on the interrupted trials any more. They remain, to be carried on."""
        for number in list(self.reservations):
            self._free(number)
        if self.study_setup.need.most > 1:
            placement.free_orphaned()  # a node whose resources are reserved is not removed
        for number in list(self.work):
            self.work.pop(number)
            self.mlflow_sync.enqueue(self.study.record(number), running=False)

    def close_paused(self) -> None:
        """Stop the paused trials at their epoch, because none of them gets another chance."""
        for record in self.study.records:
            if record.state == "paused":
                self.study.close(record.number, failed=False)
                self._publish(record.number)

    def _publish(self, number: int) -> None:
        """Save the study, and pass a trial's record on to MLflow and the observer."""
        self.study.keep()
        record = self.study.record(number)
        self.mlflow_sync.enqueue(record, running=number in self.work)
        self.observer.trial(self.study_setup.trial_name(number), record)


def _last_line(file: str | None) -> str:
    """Last line of a traceback in a file that is not empty."""
    lines = Path(file).read_text().split("\n") if file else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "unknown")
