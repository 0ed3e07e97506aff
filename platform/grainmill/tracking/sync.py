"""MLflow sync: brings the MLflow runs of a study's trials up to date from a thread, so that training never waits.

The study is the record. A run is compared with the trial's record and gets what it lacks, so the server may be
slow, gone for minutes, or reset. Each epoch has the time of its report: MLflow stores an epoch once even if it is sent
again because the answer was lost.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from grainmill.errors import TrackingError
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study
from grainmill.tracking.mlflow_runs import PARENT, Status, Tracker

RETRY_SECONDS = (0.5, 1, 2, 4, 8)
"""Pauses after failed attempts; the last one repeats."""
END_SECONDS = 300
"""Longest wait for MLflow at the end of a study."""
CUT_SHORT_SECONDS = 10
"""Longest wait for MLflow at the end of a study that an error cut short."""


@dataclass
class _Run:
    """State of a trial's run in MLflow, as far as it is known."""

    id: str
    status: str
    epoch: float | None = None
    """Last recorded epoch; None if MLflow must be asked."""
    tags: Mapping[str, str] = field(default_factory=dict)


class MLflowSync:
    """Keeps the runs of one study's trials up to date; leaving the context waits until they are."""

    def __init__(
        self,
        study: Study,
        name: Callable[[int], str],
        tracker: Tracker,
        parent: str,
        note: Callable[[str], None],
    ) -> None:
        """
        Args:
            study: the study, which has the records of all trials.
            name: maps the number of a trial to the name of its run.
            tracker: the MLflow experiment.
            parent: id of the parent run.
            note: receives messages when MLflow does not answer, and when it answers again.
        """
        self._study, self._name, self._tracker, self._parent, self._note = study, name, tracker, parent, note
        self._changed = threading.Condition()
        self._queue: dict[int | None, tuple[TrialRecord, bool] | None] = {}
        """Newest update of each trial, by its number; the key None asks for a look at all runs."""
        self._busy = False
        self._error: Exception | None = None
        """Error of the last attempt, if it failed."""
        self._runs: dict[str, _Run] | None = None
        """Runs by name; None if MLflow must be asked."""
        self._own: dict[str, str] = {}
        """Ids of the runs that this object has written to, by name."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-sync", daemon=True)
        self._thread.start()

    def enqueue(self, record: TrialRecord, running: bool) -> None:
        """Have the run of a trial brought up to date; returns at once.

        Args:
            record: present state of the trial.
            running: True if a process works on the trial.
        """
        self._put(record.number, (record, running))

    def _put(self, number: int | None, update: tuple[TrialRecord, bool] | None) -> None:
        with self._changed:
            self._queue[number] = update
            self._changed.notify_all()

    def __enter__(self) -> "MLflowSync":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait until all runs are up to date.

        Raises:
            TrackingError: MLflow did not answer for `END_SECONDS`. After an error that cut the study short, the wait
                is `CUT_SHORT_SECONDS`, and that error goes on instead.
        """
        try:
            self._put(None, None)
            patience = END_SECONDS if error is None else CUT_SHORT_SECONDS
            if self._error and error is None:
                self._note(f"waiting up to {patience / 60:g} minutes for MLflow")
            if not self._drained(patience) and error is None:
                raise TrackingError(
                    f"MLflow must have all of a study at its end, but did not take it within {patience} seconds: "
                    f"{self._error or 'it is slow'}; nothing is lost: the same command sends it and carries on"
                ) from self._error
        finally:
            self._ended.set()
            with self._changed:
                self._changed.notify_all()

    def _drained(self, seconds: float) -> bool:
        """Wait until nothing is left to do; returns False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._queue or self._busy), seconds)

    def _next(self) -> tuple[int | None, tuple[TrialRecord, bool] | None] | None:
        """Wait for the next update and take it from the queue; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended.is_set())
            if self._ended.is_set():
                return None
            number = next(iter(self._queue))
            self._busy = True
            return number, self._queue.pop(number)

    def _work(self) -> None:
        failures = 0
        while (item := self._next()) is not None:
            number, update = item
            try:
                self._update_run(*update) if update else self._look_up_runs()
            except Exception as error:  # reported at the end; it must not end the thread
                self._retry_later(number, update, error)
                self._ended.wait(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
                failures += 1
                continue
            if self._error:
                self._note("MLflow answers again")
                self._error, failures = None, 0
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _retry_later(self, number: int | None, update: tuple[TrialRecord, bool] | None, error: Exception) -> None:
        if not self._error:
            self._note(f"training goes on, and MLflow gets the results later: {error}")
        with self._changed:
            self._error, self._runs, self._busy = error, None, False
            self._queue.setdefault(number, update)
            self._queue.setdefault(None, None)  # a lost answer may have left a run twice
            self._changed.notify_all()

    def _look_up_runs(self) -> None:
        """Ask MLflow for the runs, and remove those that were created twice because an answer was lost."""
        self._runs = None
        runs: dict[str, _Run] = {}
        doubles = []
        for run_id, (name, status) in reversed(self._tracker.runs_by_tag(PARENT, self._parent).items()):
            if name in runs:  # the oldest comes first, and stays unless this object has written to a later one
                ours = run_id == self._own.get(name)
                doubles.append(runs[name].id if ours else run_id)
                if not ours:
                    continue
            runs[name] = _Run(run_id, status)
        for run_id in doubles:
            self._tracker.remove(run_id)
        self._runs = runs

    def _update_run(self, record: TrialRecord, running: bool) -> None:
        name, status = self._name(record.number), _status(record, running)
        if self._runs is None:
            self._look_up_runs()
            assert self._runs is not None
        if name not in self._runs:
            self._runs[name] = _Run(self._tracker.start(name, {"state": "running"}, self._parent), "RUNNING")
        run = self._runs[name]
        if run.epoch is None and run.status == status and status in ("FINISHED", "FAILED"):
            return  # the status is written last, so the run is complete
        self._own[name] = run.id
        if running:
            self._set_status(run, status)
        if run.epoch is None:
            run.epoch = self._tracker.last_epoch(run.id)
            if not run.epoch:
                spec = self._study.experiment.spec(record.setting)
                self._tracker.parameters(run.id, _flat(spec.model_dump()))
        for row, at in zip(record.history, record.times, strict=True):
            if row["epoch"] > run.epoch:
                self._tracker.log(run.id, int(row["epoch"]), row, at)
                run.epoch = row["epoch"]
        if (tags := _tags(record)) != run.tags:
            self._tracker.tag(run.id, tags)
            run.tags = tags
        self._set_status(run, status)

    def _set_status(self, run: _Run, status: Status) -> None:
        if status != run.status:
            self._tracker.set_status(run.id, status)
            run.status = status


def _status(record: TrialRecord, running: bool) -> Status:
    if record.state == "running":
        return "RUNNING" if running else "KILLED"
    return {"paused": "SCHEDULED", "failed": "FAILED"}.get(record.state, "FINISHED")  # type: ignore[return-value]


def _tags(record: TrialRecord) -> dict[str, str]:
    at = "" if record.state == "running" else f" at epoch {record.metrics.get('epoch', 0):g}"
    others = {"interruptions": "; ".join(record.interruptions), "cause": record.cause or ""}
    others |= {f"hardware.{name}": text for name, text in record.hardware.items()}
    return {"state": f"{record.state}{at}", **{name: text for name, text in others.items() if text}}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
