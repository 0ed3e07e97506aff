"""The pulse of a process that trains, or leads those that do: that it is alive, and whether it must leave its node.

A thread tells the study's ward (see `ward`) every few seconds how the process is; its answer says whether to leave.
Light, for it is in every worker.
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

TELL_SECONDS = 5.0
"""Between two words of a process to the ward."""
AGAIN_SECONDS = 1.0
"""Before a ward is asked again that did not answer."""
DUMP = signal.SIGUSR1
"""Has a process write the stacks of its threads to its log."""


class Process(NamedTuple):
    """A process of the cluster; never taken for a later one with the same number."""

    node: str
    pid: int
    began: int
    """In clock ticks since its machine did."""

    @classmethod
    def this(cls) -> "Process":
        """The one that calls."""
        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), _began(os.getpid()))

    @property
    def here(self) -> bool:
        """Whether it is alive, asked on its node."""
        with suppress(FileNotFoundError, ProcessLookupError):
            return _began(self.pid) == self.began
        return False


def _began(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


class State(NamedTuple):
    """How a process is."""

    name: str = ""
    """The trial that it works on, for people; empty between trials."""
    attempt: str = ""
    """What it has in common with the other processes that work on the trial now."""
    still: float = 0.0
    """Seconds since its last step; 0 while no step is to come from it."""
    longest: float = 0.0
    """Seconds that a step of this trial took."""


class HeartbeatSender:
    """Of the process that makes it, which must make one alone."""

    def __init__(self, ward: Any) -> None:
        self.leave = False
        """Whether it must leave; once True, it stays so."""
        self._ward, self._process = ward, Process.this()
        self._name = self._attempt = ""
        self._at: float | None = None
        """When the last step was done, in seconds; None while none is to come."""
        self._longest = 0.0
        faulthandler.register(DUMP)
        threading.Thread(target=self._tell, name="pulse", daemon=True).start()

    def beat(self) -> bool:
        """The training's; see `catalog.Heartbeat`."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._at if self._at else 0)
        self._at = now
        return self.leave

    @contextmanager
    def of(self, job: TrainingJob, trains: bool = True) -> Iterator[None]:
        """While this process works on a job: trains it, or leads those that do."""
        self._name, self._attempt, self._longest = job.name, job.attempt, 0.0
        self._at = time.monotonic() if trains else None
        self._ward.note.remote(self._process, self._state())
        try:
            yield
        finally:
            self._name, self._attempt, self._at = "", "", None

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While this process waits for somebody else, so that no step is to come."""
        self._at = None
        try:
            yield
        finally:
            self._at = time.monotonic()

    def _state(self) -> State:
        at = self._at
        return State(self._name, self._attempt, time.monotonic() - at if at else 0.0, self._longest)

    def _tell(self) -> None:
        while True:
            try:
                self.leave |= ray.get(self._ward.hear.remote(self._process, self._state()))
            except RayError:  # it is being started again
                time.sleep(AGAIN_SECONDS)
            if self.leave:  # is answered at once from now on
                time.sleep(TELL_SECONDS)


_own: HeartbeatSender | None = None


def own(ward: Any) -> HeartbeatSender:
    """The pulse of this process."""
    global _own  # noqa: PLW0603  # a process has one
    _own = _own or HeartbeatSender(ward)
    return _own
