"""Where a study's processes are watched over: who must leave a node that is to be taken away, and who hangs.

The ward is an actor beside the driver, which hears of every process's pulse. It answers when one of the processes of a
trial is on a node that is being drained: then the whole trial must leave. It ends processes that hang: those that are
silent, as when they are stopped, and those that make no step for far longer than they ever took. First they, and all
that work on the same trial, write their stacks to their logs.
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

from grainmill.execution.heartbeat import DUMP, TELL_SECONDS, Process, State

LOOK_SECONDS = 1.0
"""Between two looks at nodes and processes."""
SILENCE_SECONDS = 40.0
"""Without a word, before a process is taken to be frozen."""
STEP_SECONDS, LONGER = 600.0, 20
"""Without a step, before a training is taken to hang: so many seconds, and so many times its longest step so far."""
DUMP_SECONDS = 10.0
"""For a process to write down its stacks."""


class Watchdog:
    """Hears of all processes of a study; an actor."""

    def __init__(self, silence: float) -> None:
        """
        Args:
            silence: seconds without a word, before a process is taken to be frozen.
        """
        self.silence = silence
        self.heard: dict[Process, tuple[float, State]] = {}
        """When last, in seconds, and what."""
        self.drained: set[str] = set()
        """Nodes that are to be taken away."""
        self.leaving: set[str] = set()
        """Attempts with a process on such a node."""
        self.changed = asyncio.Condition()
        self.news: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def hear(self, process: Process, state: State) -> bool:
        """How a process is; whether it must leave. Is answered when it must, or after a while."""
        if not self._tasks:
            self._start(self._look())
        await self.note(process, state)
        with suppress(TimeoutError):
            async with asyncio.timeout(TELL_SECONDS), self.changed:
                await self.changed.wait_for(lambda: self._must_leave(process))
        return self._must_leave(process)

    async def note(self, process: Process, state: State) -> None:
        """How a process is."""
        self.heard[process] = time.monotonic(), state
        if process.node in self.drained or state.attempt in self.leaving:
            await self._warn(self.drained, {state.attempt})

    async def told(self) -> str:
        """The next that the user should hear; waits for it."""
        return await self.news.get()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _must_leave(self, process: Process) -> bool:
        _, state = self.heard.get(process, (0.0, State()))
        return process.node in self.drained or state.attempt in self.leaving

    async def _warn(self, nodes: set[str], attempts: set[str]) -> None:
        """These nodes are to be taken away, and all that work on these attempts must leave."""
        self.drained, self.leaving = nodes, self.leaving | attempts - {""}
        async with self.changed:
            self.changed.notify_all()

    async def _look(self) -> None:
        """Again and again: which nodes are drained, and who hangs."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
            nodes = await asyncio.to_thread(_drained)
            if nodes != self.drained:
                await self._warn(nodes, {state.attempt for one, (_, state) in self.heard.items() if one.node in nodes})
            now = time.monotonic()
            if now - began > self.silence / 2:  # what was not heard while the ward itself slept tells nothing
                self.heard = {process: (now, state) for process, (_, state) in self.heard.items()}
            for process, why in hanging(self.heard, now, self.silence).items():
                _, state = self.heard.pop(process)
                self._start(self._end(process, state, why))

    async def _end(self, process: Process, state: State, why: str) -> None:
        """End a process that hangs, after those of its trial, and it, have written down their stacks."""
        others = [one for one, (_, its) in self.heard.items() if state.attempt and its.attempt == state.attempt]
        stacks, *_ = await asyncio.gather(
            _on_node(_examined, process, True), *(_on_node(_examined, other, False) for other in others)
        )
        if stacks:  # else it is gone, which is no news
            what = f"it was ended and goes on from its checkpoint. {stacks}"
            await self.news.put(f"{state.name or 'a process between trials'}: {why}; {what}")


def hanging(heard: dict[Process, tuple[float, State]], now: float, silence: float) -> dict[Process, str]:
    """Which processes hang, and why one thinks so.

    Args:
        heard: when each was heard of, in seconds, and what.
        now: in seconds.
        silence: seconds without a word, before a process is taken to be frozen.
    """
    found = {}
    for process, (at, state) in heard.items():
        limit = max(STEP_SECONDS, LONGER * state.longest)
        if now - at > silence:
            found[process] = f"its process {process.pid} has been silent for {now - at:.0f} s"
        elif state.still > limit:
            found[process] = (
                f"no step of its process {process.pid} for {state.still:.0f} s, "
                f"where the longest took {state.longest:.1f} s"
            )
    return found


def start() -> Any:
    """The ward of a study, beside the driver, which calls this; it ends with its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    made = ray.remote(Watchdog).options(num_cpus=0, max_restarts=-1, max_concurrency=100_000, scheduling_strategy=here)
    return made.remote(SILENCE_SECONDS)


class WatchdogMessages:
    """The user's ear at a ward."""

    def __init__(self, ward: Any) -> None:
        self._ward, self._next = ward, ward.told.remote()

    def heard(self) -> str | None:
        """The next that the user should hear, if there is anything; does not wait."""
        if not ray.wait([self._next], timeout=0)[0]:
            return None
        answer, self._next = self._next, self._ward.told.remote()
        with suppress(RayError):  # the ward is being started again
            return ray.get(answer)
        return None


def _drained() -> set[str]:
    """Nodes of this cluster that are to be taken away."""
    return set(ray._private.state.state.get_draining_nodes())


async def _on_node(work: Any, process: Process, *rest: Any) -> str:
    """What a function returns on the node of a process; empty if that node does not answer."""
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(3 * DUMP_SECONDS):
            return (
                await ray.remote(work)
                .options(num_cpus=0, max_retries=0, scheduling_strategy=there)
                .remote(process, *rest)
            )
    return ""


def _examined(process: Process, end: bool) -> str:
    """Have a process of this node write its stacks to its log, and end it if so asked.

    Returns:
        Where it was, and the log; empty if the process is gone.
    """
    if not process.here:
        return ""
    with suppress(ProcessLookupError):
        log, stacks = _dumped(process.pid)
        if end:
            os.kill(process.pid, signal.SIGKILL)
        return f"It was at {_place(stacks)}; all stacks are in {log}"
    return ""


def _dumped(pid: int) -> tuple[Path, str]:
    """The log of a process, and the stacks that it wrote there; none where its log is no file."""
    log = Path(f"/proc/{pid}/fd/2").resolve()
    before = log.stat().st_size if log.is_file() else 0
    os.kill(pid, signal.SIGCONT)  # a stopped one could not write
    os.kill(pid, DUMP)
    until, size = time.monotonic() + DUMP_SECONDS, before
    while log.is_file() and time.monotonic() < until:
        time.sleep(0.2)
        last, size = size, log.stat().st_size
        if size == last > before:  # nothing more comes
            return log, log.read_bytes()[before:].decode(errors="replace")
    return log, ""


def _place(stacks: str) -> str:
    """Where, by what faulthandler wrote, the thread was that trains, or else any."""
    threads = [[line.strip() for line in one.splitlines()[1:]] for one in re.split("[Tt]hread 0x", stacks)[1:]]
    trains = [lines for lines in threads if any(line.endswith("in epochs") for line in lines)]
    return next((lines[0] for lines in (*trains, *threads) if lines), "an unknown place")
