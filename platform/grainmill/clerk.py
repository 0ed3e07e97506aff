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
from ray.util.placement_group import PlacementGroup, remove_placement_group

from grainmill import group
from grainmill.errors import GrainmillError, SearchError
from grainmill.halving import Halving
from grainmill.study import Record, Study
from grainmill.tracking import PARENT, Tracker
from grainmill.worker import Plan

WAIT_SECONDS = 60
"""Without a trial that runs, before the user hears what is missing."""
FAILURES = 5
"""Trials that fail before a search is given up, if more fail than not."""


class Watch(Protocol):
    """Is told of the progress."""

    def note(self, message: str) -> None:
        """A step of the whole begins."""

    def trial(self, name: str, record: Record) -> None:
        """A trial began, finished an epoch, or ended."""


Result = TypeVar("Result")


def _fatal(method: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps what must end the search: Tune takes an error of a callback for one of the trial, and tries that again."""

    @wraps(method)
    def call(clerk: "Clerk", *args: Any, **kwargs: Any) -> Result:
        if clerk.fatal:
            raise clerk.fatal
        try:
            return method(clerk, *args, **kwargs)
        except GrainmillError as error:
            clerk.fatal = error
            raise

    return call


class Clerk(ray_tune.Callback):  # type: ignore[misc]
    """Hears from Tune of the trials of one study.

    The study is written first and is right; what a killed process did not tell MLflow any more is made up for when
    the next one begins.
    """

    def __init__(self, plan: Plan, study: Study, halving: Halving, tracker: Tracker, parent: str, watch: Watch) -> None:
        self.plan, self.study, self.halving, self.watch = plan, study, halving, watch
        self.tracker, self.parent = tracker, parent
        self.fatal: GrainmillError | None = None
        """Why the search must end; nothing is taken down any more."""
        self.open_runs: dict[int, str] = {}
        self.began: dict[int, tuple[float, Mapping[str, float]]] = {}
        """When a trial began or went on, in seconds, and what it had cost before."""
        records = study.records
        self.costs = {record.number: dict(record.cost) for record in records}
        self.causes: Counter[str] = Counter()
        self.ended_well = 0
        self.places: dict[int, PlacementGroup] = {}
        """What the workers of a trial's group occupy."""
        self.busy_at = time.monotonic()
        """When last a trial ran."""
        self.strays = {
            name: run_id
            for run_id, (name, status) in tracker.tagged(PARENT, parent).items()
            if name.startswith(f"{plan.study}-") and status in ("RUNNING", "SCHEDULED")
        }
        for record in records:
            if plan.name(record.number) in self.strays:
                self._make_up(record, self.strays[plan.name(record.number)])

    def _make_up(self, record: Record, run_id: str) -> None:
        """Tell MLflow what the study knows already, of a run that a killed process left behind."""
        known = self.tracker.last_epoch(run_id)
        for row in record.history:
            if row["epoch"] > known:
                self.tracker.log(run_id, int(row["epoch"]), row)
        if record.state in ("complete", "stopped", "failed"):
            self._close_run(record)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ray_tune.Callback, ())  # Tune pickles its callbacks for a restore that we do not use

    @_fatal
    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Open its run."""
        number = trial.config["number"]
        if number in self.open_runs:  # its process died, and Tune began it again
            self._vacate(number)
            return
        name, record = self.plan.name(number), self.study.record(number)
        self.began[number] = time.monotonic(), record.cost
        run_id = record.run_id or self.strays.pop(name, None)
        if run_id:
            self.tracker.set_status(run_id, "RUNNING")
            self.tracker.tag(run_id, {"state": "running"})
        else:
            run_id = self.tracker.start(name, _flat(trial.config["spec"]), {"state": "running"}, self.parent)
        if record.run_id is None:
            self.study.note(number, "run_id", run_id)
        self.open_runs[number] = run_id
        self._tell(number)

    @_fatal
    def goes_on(self, trial: Trial, result: Mapping[str, Any]) -> bool:
        """Take down an epoch, or the cause of a failure; whether the trial goes on after it."""
        number = trial.config["number"]
        if "waiting" in result:
            self.watch.note(result["waiting"])
            return True
        if "cause" in result:
            self.study.note(number, "cause", result["cause"])
            return False
        if place := result.get("place"):
            self.places[number] = place
        self.costs[number] = self._cost(number)
        metrics = {name: float(result[name]) for name in result["reported"]} | self.costs[number]
        if variants := json.loads(result["variants"]):
            self.study.note(number, "variants", variants)
        if self.study.report(number, metrics):
            self.tracker.log(self.open_runs[number], int(metrics["epoch"]), metrics)
            self._tell(number)
        record, experiment = self.study.record(number), self.study.experiment
        if wrong := [name for name in experiment.objective if not math.isfinite(metrics[name])]:
            self.study.note(number, "cause", f"{wrong[0]} is {metrics[wrong[0]]} after epoch {metrics['epoch']:g}")
            return False
        if metrics["epoch"] >= experiment.base.epochs:
            return True
        if self.spent():
            return False
        verdict = self.halving.judge(record)
        if verdict == "pause":
            self.study.note(number, "paused", True)
        return verdict == "continue"

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
        now = time.monotonic()
        if any(trial.status == Trial.RUNNING for trial in trials):
            self.busy_at = now
        elif now - self.busy_at > WAIT_SECONDS:
            self.busy_at = now
            self.watch.note(group.scarcity(self.plan.bundle, self.plan.workers))

    def _end(self, number: int) -> None:
        self.costs[number] = self._cost(number)
        self.study.note(number, "cost", self.costs[number])
        self.began.pop(number)
        record = self.study.record(number)
        if record.state != "paused":
            self.study.close(number, failed=record.cause is not None)
        self._close_run(self.study.record(number))
        self.open_runs.pop(number)
        self._tell(number)
        self._stop_if_hopeless(self.study.record(number))

    def _close_run(self, record: Record) -> None:
        run_id = record.run_id
        assert run_id, "a trial that began has a run"
        epochs = int(record.metrics.get("epoch", 0))
        tags = {"state": f"{record.state} at epoch {epochs}"} | ({"cause": record.cause} if record.cause else {})
        self.tracker.tag(run_id, tags)
        statuses = {"failed": "FAILED", "paused": "SCHEDULED"}
        self.tracker.set_status(run_id, statuses.get(record.state, "FINISHED"))  # type: ignore[arg-type]

    def _stop_if_hopeless(self, record: Record) -> None:
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
        began, before = self.began[number]
        seconds = (time.monotonic() - began) * self.plan.workers
        amounts = {"cpu_seconds": self.plan.bundle.get("CPU", 0), "gpu_seconds": self.plan.bundle.get("GPU", 0)}
        return {name: before.get(name, 0) + seconds * amount for name, amount in amounts.items()}

    def _vacate(self, number: int) -> None:
        """Free what workers without a leader occupy: Ray Train does only where it can ask a dashboard for the dead."""
        if place := self.places.pop(number, None):
            remove_placement_group(place)

    def end_unfinished(self) -> None:
        """Close the MLflow runs of trials that were interrupted; the trials themselves stay to be carried on."""
        for number in list(self.places):
            self._vacate(number)
        for number in list(self.open_runs):
            self.tracker.set_status(self.open_runs.pop(number), "KILLED")

    def close_paused(self) -> None:
        """No trial gets another chance: those that waited for one are stopped at their epoch."""
        for record in self.study.records:
            if record.state == "paused":
                self.study.close(record.number, failed=False)
                self._close_run(self.study.record(record.number))
                self._tell(record.number)

    def _tell(self, number: int) -> None:
        self.watch.trial(self.plan.name(number), self.study.record(number))


def _cause(trial: Trial) -> str:
    """The last line of a trial's traceback."""
    lines = Path(trial.error_file).read_text().split("\n") if trial.error_file else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "unknown")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
