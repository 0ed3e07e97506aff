"""Heartbeats of a trial's processes: a thread reports every few seconds to the watchdog of the study.

The watchdog's answer says whether the process must leave its node. Imported in every worker, and therefore light.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from grainmill.execution.training_job import TrainingJob

HEARTBEAT_SECONDS = 5.0
"""Interval between two reports of a process to the watchdog."""
RETRY_SECONDS = 1.0
"""Pause before the next report to a watchdog that did not answer."""
DUMP_SIGNAL = signal.SIGUSR1
"""Signal on which a process writes the stacks of its threads to its log."""


class Process(NamedTuple):
    """Process of the cluster, distinct from any later process with the same id."""

    node: str
    pid: int
    start_ticks: int
    """Start of the process, in clock ticks since its machine started."""

    @classmethod
    def this(cls) -> "Process":
        """Return the calling process."""
        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), _start_ticks(os.getpid()))

    @property
    def alive(self) -> bool:
        """Return True while the process runs. Valid only on its node."""
        with suppress(FileNotFoundError, ProcessLookupError):
            return _start_ticks(self.pid) == self.start_ticks
        return False


def _start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


class State(NamedTuple):
    """Work of a process, as it reports it."""

    trial: str = ""
    """Name of the trial that the process works on; empty between trials."""
    attempt: str = ""
    """Id that all processes share which now work on the trial."""
    since_step: float = 0.0
    """Time in seconds since the last training step; 0 while no step is due."""
    longest_step: float = 0.0
    """Duration in seconds of the trial's longest step."""


class HeartbeatSender:
    """Reports this process to the watchdog. A process creates only one; see `own_sender`."""

    def __init__(self, watchdog: Any) -> None:
        self.must_leave = False
        """True as soon as the process must leave its node; never False again."""
        self._watchdog, self._process = watchdog, Process.this()
        self._trial = self._attempt = ""
        self._last_step: float | None = None
        """Time of the last step, in seconds; None while no step is due."""
        self._longest_step = 0.0
        faulthandler.register(DUMP_SIGNAL)
        threading.Thread(target=self._report, name="heartbeat", daemon=True).start()

    def heartbeat(self) -> bool:
        """Note a training step; the `catalog.Heartbeat` of a training in this process."""
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._last_step if self._last_step else 0)
        self._last_step = now
        return self.must_leave

    @contextmanager
    def working_on(self, job: TrainingJob, trains: bool = True) -> Iterator[None]:
        """Report that this process trains a job or, with `trains=False`, leads its workers."""
        self._trial, self._attempt, self._longest_step = job.name, job.attempt, 0.0
        self._last_step = time.monotonic() if trains else None
        self._watchdog.update.remote(self._process, self._state())
        try:
            yield
        finally:
            self._trial, self._attempt, self._last_step = "", "", None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Report that no step is due, because this process waits for another."""
        self._last_step = None
        try:
            yield
        finally:
            self._last_step = time.monotonic()

    def _state(self) -> State:
        last = self._last_step
        return State(self._trial, self._attempt, time.monotonic() - last if last else 0.0, self._longest_step)

    def _report(self) -> None:
        while True:
            try:
                self.must_leave |= ray.get(self._watchdog.receive.remote(self._process, self._state()))
            except RayError:  # the watchdog is being restarted
                time.sleep(RETRY_SECONDS)
            if self.must_leave:  # from now on, the watchdog answers without delay
                time.sleep(HEARTBEAT_SECONDS)


_sender: HeartbeatSender | None = None


def own_sender(watchdog: Any) -> HeartbeatSender:
    """Return the sender of this process; the first call creates it."""
    global _sender  # noqa: PLW0603  # a process has one
    _sender = _sender or HeartbeatSender(watchdog)
    return _sender
