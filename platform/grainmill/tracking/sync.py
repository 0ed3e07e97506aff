"""Tells MLflow of a study's trials, from a thread of its own: training never waits for MLflow.

What is still to be told is not kept here but in the study. A run in MLflow is brought up to what the trial's record
says, however much of it was missed: the server may be slow, gone for minutes, or other than before. Every epoch has
the time of its report, so that MLflow takes it once even where it did not answer and was told again.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, repeat
from types import TracebackType
from typing import Any

from grainmill.errors import TrackingError
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study
from grainmill.tracking.mlflow_runs import PARENT, Status, Tracker

PAUSES = (0.5, 1, 2, 4, 8)
"""Seconds between attempts; the last one again and again."""
PATIENCE = 300
"""Seconds that the end of a study waits for MLflow."""
BRIEF = 10
"""Seconds that it waits where the study was cut short."""


@dataclass
class _Run:
    """A trial's run, as far as MLflow is known to have it."""

    id: str
    status: str
    epoch: float | None = None
    """The last one told; None if MLflow must be asked."""
    tags: Mapping[str, str] = field(default_factory=dict)


class MLflowSync:
    """Brings the runs of one study's trials up to date. As a context, it ends when all is told, or time is up."""

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
            study: whose trials.
            name: of the run of a trial, by its number.
            tracker: where to.
            parent: id of the run above them.
            note: is told when MLflow is lost, and when it is back.
        """
        self._study, self._name, self._tracker, self._parent, self._note = study, name, tracker, parent, note
        self._changed = threading.Condition()
        self._waiting: dict[int | None, tuple[TrialRecord, bool] | None] = {}
        """By number, the newest of each trial; None stands for a look at all runs."""
        self._busy = self._over = False
        self._error: Exception | None = None
        """Of the last attempt."""
        self._runs: dict[str, _Run] | None = None
        """By name; None if MLflow must be asked."""
        self._own: dict[str, str] = {}
        """Ids of the runs that were told something, by name."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-sync", daemon=True)
        self._thread.start()

    def enqueue(self, record: TrialRecord, running: bool) -> None:
        """See to it that MLflow gets to know all of a trial; returns at once.

        Args:
            record: how the trial stands.
            running: whether a process running on it.
        """
        with self._changed:
            self._waiting[record.number] = record, running
            self._changed.notify_all()

    def __enter__(self) -> "MLflowSync":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait until MLflow knows everything.

        Raises:
            TrackingError: it did not answer for `PATIENCE`. Where the study was cut short, it waits more briefly, and
                the error that did so is the one to tell.
        """
        try:
            with self._changed:
                self._waiting[None] = None
                self._changed.notify_all()
            patience = PATIENCE if error is None else BRIEF
            if self._error and error is None:
                self._note(f"waiting up to {patience / 60:g} minutes for MLflow")
            if not self._drained(patience) and error is None:
                raise TrackingError(
                    f"MLflow must be told all of a study in the end, but was not within {patience} seconds: "
                    f"{self._error or 'it is slow'}; nothing is lost: the same command tells it and carries on"
                ) from self._error
        finally:
            self._ended.set()
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _drained(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._busy), seconds)

    def _next(self) -> tuple[int | None, tuple[TrialRecord, bool] | None] | None:
        """What to tell; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._over)
            if self._over:
                return None
            number = next(iter(self._waiting))
            self._busy = True
            return number, self._waiting.pop(number)

    def _work(self) -> None:
        pauses = chain(PAUSES, repeat(PAUSES[-1]))
        while (item := self._next()) is not None:
            number, told = item
            try:
                self._tell(*told) if told else self._look()
            except Exception as error:  # told at the end; it must not end the thread
                self._failed(number, told, error)
                self._ended.wait(next(pauses))
                continue
            if self._error:
                self._note("MLflow answers again")
                self._error, pauses = None, chain(PAUSES, repeat(PAUSES[-1]))
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _failed(self, number: int | None, told: tuple[TrialRecord, bool] | None, error: Exception) -> None:
        if not self._error:
            self._note(f"training goes on, and MLflow is told later: {error}")
        with self._changed:
            self._error, self._runs, self._busy = error, None, False
            self._waiting.setdefault(number, told)
            self._waiting.setdefault(None, None)  # an answer that got lost may have left a run twice
            self._changed.notify_all()

    def _look(self) -> None:
        """Learn which runs there are, and remove those that were made twice since an answer got lost."""
        self._runs = None
        runs: dict[str, _Run] = {}
        doubles = []
        found = self._tracker.runs_by_tag(PARENT, self._parent)
        for run_id, (name, status) in reversed(found.items()):  # the oldest first
            if name in runs:
                ours = run_id == self._own.get(name)
                doubles.append(runs[name].id if ours else run_id)
                if not ours:
                    continue
            runs[name] = _Run(run_id, status)
        for run_id in doubles:
            self._tracker.remove(run_id)
        self._runs = runs

    def _tell(self, record: TrialRecord, running: bool) -> None:
        name, status = self._name(record.number), _status(record, running)
        if self._runs is None:
            self._look()
            assert self._runs is not None
        if name not in self._runs:
            self._runs[name] = _Run(self._tracker.start(name, {}, {"state": "running"}, self._parent), "RUNNING")
        run = self._runs[name]
        if run.epoch is None and run.status == status and status in ("FINISHED", "FAILED"):
            return  # the status is the last thing that is told
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
    interruptions = {"interruptions": "; ".join(record.interruptions)} if record.interruptions else {}
    cause = {"cause": record.cause} if record.cause else {}
    return {"state": f"{record.state}{at}", **interruptions, **cause}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
