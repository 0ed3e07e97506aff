"""Watchdog over the processes of a study: ends those that hang, and makes trials leave nodes that are to be taken away.

An actor beside the driver, which receives every process's heartbeat. If a process of a trial is on a node that is being
drained, all processes of the trial are told to leave. A process hangs if it is silent, as when it is stopped, or if a
step takes far longer than any before. Before it is ended, all processes of its trial write their stacks to their logs.
"""

import asyncio
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grainmill.cluster.ray_private import draining_nodes
from grainmill.execution.heartbeat import DUMP_SIGNAL, HEARTBEAT_SECONDS, Process, State

CHECK_SECONDS = 1.0
"""Interval between two checks of nodes and processes."""
SILENCE_SECONDS = 40.0
"""Time without a heartbeat after which a process is taken to hang."""
STALL_SECONDS = 600.0
"""Shortest time without a step after which a training is taken to hang."""
STALL_FACTOR = 20
"""Shortest such time as a multiple of the training's longest step."""
DUMP_SECONDS = 10.0
"""Time for a process to write its stacks."""


class Watchdog:
    """Receives the heartbeats of all processes of a study; an actor."""

    def __init__(self, silence: float) -> None:
        self.silence = silence
        """Time in seconds without a heartbeat after which a process is taken to hang."""
        self.reports: dict[Process, tuple[float, State]] = {}
        """Last report of each process, and when it came, in seconds."""
        self.draining: set[str] = set()
        """Nodes that are to be taken away."""
        self.leaving: set[str] = set()
        """Attempts with a process on such a node."""
        self.changed = asyncio.Condition()
        self.messages: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def receive(self, process: Process, state: State) -> bool:
        """Receive a heartbeat. Returns True at once when the process must leave, otherwise False after a while."""
        if not self._tasks:
            self._start(self._watch())
        await self.update(process, state)
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_SECONDS), self.changed:
                await self.changed.wait_for(lambda: self._must_leave(process))
        return self._must_leave(process)

    async def update(self, process: Process, state: State) -> None:
        """Receive the state of a process."""
        self.reports[process] = time.monotonic(), state
        if process.node in self.draining or state.attempt in self.leaving:
            await self._warn(self.draining, {state.attempt})

    async def next_message(self) -> str:
        """Wait for the next message for the user."""
        return await self.messages.get()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _must_leave(self, process: Process) -> bool:
        _, state = self.reports.get(process, (0.0, State()))
        return process.node in self.draining or state.attempt in self.leaving

    async def _warn(self, nodes: set[str], attempts: set[str]) -> None:
        """Set the nodes that are to be taken away, and tell all processes of these attempts to leave."""
        self.draining, self.leaving = nodes, self.leaving | attempts - {""}
        async with self.changed:
            self.changed.notify_all()

    async def _watch(self) -> None:
        """Check nodes and processes, forever."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(CHECK_SECONDS)
            nodes = await asyncio.to_thread(draining_nodes)
            if nodes != self.draining:
                await self._warn(
                    nodes, {state.attempt for one, (_, state) in self.reports.items() if one.node in nodes}
                )
            now = time.monotonic()
            if now - began > self.silence / 2:  # the watchdog itself was stopped, and may have missed heartbeats
                self.reports = {process: (now, state) for process, (_, state) in self.reports.items()}
            for process, reason in hanging(self.reports, now, self.silence).items():
                _, state = self.reports.pop(process)
                self._start(self._end(process, state, reason))

    async def _end(self, process: Process, state: State, reason: str) -> None:
        """End a process that hangs, after all processes of its trial have written their stacks."""
        others = [one for one, (_, its) in self.reports.items() if state.attempt and its.attempt == state.attempt]
        stacks, *_ = await asyncio.gather(
            _run_on_node(_dump, process, True), *(_run_on_node(_dump, other, False) for other in others)
        )
        if stacks:  # otherwise the process has ended by itself
            what = f"it was ended and goes on from its checkpoint. {stacks}"
            await self.messages.put(f"{state.trial or 'a process between trials'}: {reason}; {what}")


def hanging(reports: dict[Process, tuple[float, State]], now: float, silence: float) -> dict[Process, str]:
    """Find the processes that hang, each with the reason for the user. See `Watchdog` for `reports` and `silence`."""
    found = {}
    for process, (at, state) in reports.items():
        limit = max(STALL_SECONDS, STALL_FACTOR * state.longest_step)
        if now - at > silence:
            found[process] = f"its process {process.pid} has been silent for {now - at:.0f} s"
        elif state.since_step > limit:
            found[process] = (
                f"no step of its process {process.pid} for {state.since_step:.0f} s, "
                f"where the longest took {state.longest_step:.1f} s"
            )
    return found


def start() -> Any:
    """Start the watchdog of a study near the driver, which calls this. The actor ends with its handle."""
    near = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(Watchdog).options(num_cpus=0, max_restarts=-1, max_concurrency=100_000, scheduling_strategy=near)
    return actor.remote(SILENCE_SECONDS)


class WatchdogMessages:
    """Receives the watchdog's messages for the user."""

    def __init__(self, watchdog: Any) -> None:
        self._watchdog, self._next = watchdog, watchdog.next_message.remote()

    def poll(self) -> str | None:
        """Return the next message, or None at once if there is none."""
        if not ray.wait([self._next], timeout=0)[0]:
            return None
        answer, self._next = self._next, self._watchdog.next_message.remote()
        with suppress(RayError):  # the watchdog is being restarted
            return ray.get(answer)
        return None


async def _run_on_node(work: Any, process: Process, *rest: Any) -> str:
    """Run a function on the node of a process; returns an empty string if the node does not answer."""
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    task = ray.remote(work).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(3 * DUMP_SECONDS):
            return await task.remote(process, *rest)
    return ""


def _dump(process: Process, end: bool) -> str:
    """Make a process of this node write its stacks to its log; end the process if requested.

    Returns:
        The place where the process was, and its log; an empty string if the process has ended.
    """
    if not process.alive:
        return ""
    with suppress(ProcessLookupError):
        log, stacks = _written_stacks(process.pid)
        if end:
            os.kill(process.pid, signal.SIGKILL)
        return f"It was at {_location(stacks)}; all stacks are in {log}"
    return ""


def _written_stacks(pid: int) -> tuple[Path, str]:
    """Log of a process, and the stacks that it wrote there on request; no stacks if its log is no file."""
    log = Path(f"/proc/{pid}/fd/2").resolve()
    before = log.stat().st_size if log.is_file() else 0
    os.kill(pid, signal.SIGCONT)  # a stopped process could not write
    os.kill(pid, DUMP_SIGNAL)
    until, size = time.monotonic() + DUMP_SECONDS, before
    while log.is_file() and time.monotonic() < until:
        time.sleep(0.2)
        last, size = size, log.stat().st_size
        if size == last > before:  # the output is complete
            return log, log.read_bytes()[before:].decode(errors="replace")
    return log, ""


def _location(stacks: str) -> str:
    """Find the line of code in faulthandler's output where the training thread was, or else any thread."""
    threads = [[line.strip() for line in one.splitlines()[1:]] for one in re.split("[Tt]hread 0x", stacks)[1:]]
    trains = [lines for lines in threads if any(line.endswith("in epochs") for line in lines)]
    return next((lines[0] for lines in (*trains, *threads) if lines), "an unknown place")
