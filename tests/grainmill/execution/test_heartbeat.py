"""Trainings whose node is to be taken away, and those that hang."""

import asyncio
import faulthandler
import itertools
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from grainmill.execution import heartbeat, watchdog
from grainmill.execution.training_job import TrainingJob


def state(attempt="", still=0.0, longest=0.0):
    return heartbeat.State("trial-0003" if attempt else "", attempt, still, longest)


ONE, OTHER, ELSEWHERE = (heartbeat.Process(node, pid, 7) for node, pid in (("a", 1), ("a", 2), ("b", 3)))


@pytest.mark.parametrize(
    ("at", "still", "longest", "why"),
    [
        (100.0, 0, 0, None),
        (60.0, 0, 0, None),
        (59.5, 0, 0, "its process 1 has been silent for 40 s"),
        (99.0, 600, 0, None),
        (99.0, 601, 3, "no step of its process 1 for 601 s, where the longest took 3.0 s"),
        (99.0, 601, 30.1, None),  # 20 times the longest
        (99.0, 603, 30.1, "no step of its process 1 for 603 s, where the longest took 30.1 s"),
    ],
)
def test_process_hangs_that_says_nothing_or_makes_no_step_for_far_longer_than_ever(at, still, longest, why):
    heard = {ONE: (at, state("x", still, longest)), OTHER: (100.0, state())}
    assert watchdog.hanging(heard, 100.0, 40.0) == ({ONE: why} if why else {})


def test_processes_on_a_drained_node_and_all_of_their_trial_must_leave(monkeypatch):
    """They are told whatever the order in which the watchdog learns of node and process."""
    nodes = set()
    monkeypatch.setattr(watchdog, "draining_nodes", lambda: set(nodes))
    monkeypatch.setattr(watchdog, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.1)

    async def scene():
        made = watchdog.Watchdog(40.0)
        assert not await made.receive(ONE, state("x")), "is answered after a while"
        monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 30.0)
        async with asyncio.timeout(10):
            waiting = [made.receive(ONE, state("x")), made.receive(ELSEWHERE, state("x")), made.receive(OTHER, state())]
            waiting = [asyncio.create_task(one) for one in waiting]
            await asyncio.sleep(0)
            nodes.add("b")
            assert await waiting[0], "works on the same trial"
            assert await waiting[1], "is on the node"
            assert not waiting[2].done()
            await made.update(OTHER, state("x"))
            assert await waiting[2], "works on the trial from now on"
            assert await made.receive(ELSEWHERE, state()), "is told again"
            assert await made.receive(ELSEWHERE, state("y"))
            assert await made.receive(OTHER, state("y"))
        monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.1)
        assert not await made.receive(OTHER, state("z"))

    asyncio.run(scene())


def test_watchdog_dumps_all_processes_of_a_trial_ends_the_one_that_hangs_and_says_so(monkeypatch):
    looked = []

    async def on_node(work, process, end):
        looked.append((work, process, end))
        return "It was at home" if process != ELSEWHERE else ""

    monkeypatch.setattr(watchdog, "draining_nodes", set)
    monkeypatch.setattr(watchdog, "_run_on_node", on_node)
    monkeypatch.setattr(watchdog, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.01)

    async def scene():
        made = watchdog.Watchdog(40.0)
        await made.receive(ELSEWHERE, state("y", 1e6))  # has gone meanwhile, which is no news
        await made.receive(OTHER, state("x"))
        async with asyncio.timeout(10):
            await made.receive(ONE, state("x", 1e6))
            return await made.next_message(), made.reports

    note, heard = asyncio.run(scene())
    why = "no step of its process 1 for 1000000 s, where the longest took 0.0 s"
    assert note == f"trial-0003: {why}; it was ended and goes on from its checkpoint. It was at home"
    assert set(looked) == {(watchdog._dump, *one) for one in ((ELSEWHERE, True), (ONE, True), (OTHER, False))}
    assert heard.keys() == {OTHER}


def test_watchdog_that_was_stopped_itself_ends_no_process(monkeypatch):
    monkeypatch.setattr(watchdog, "draining_nodes", lambda: time.sleep(0.2) or set())
    monkeypatch.setattr(watchdog, "_run_on_node", None)
    monkeypatch.setattr(watchdog, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.1)

    async def scene():
        made = watchdog.Watchdog(0.15)
        await made.update(ONE, state("x"))
        for _ in range(8):
            await made.receive(OTHER, state("x"))
        return made.reports

    assert asyncio.run(scene()).keys() == {ONE, OTHER}


HUNG = """
    import faulthandler, sys, time
    sys.path[:0] = {path}
    from grainmill.execution import heartbeat, training_job

    def stuck():
        print("stuck", flush=True)
        time.sleep(3600)

    def epochs():
        stuck()

    faulthandler.register(heartbeat.DUMP_SIGNAL)
    epochs()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_examined_process_writes_its_stacks_and_is_ended_if_asked(tmp_path, stopped):
    with (tmp_path / "log").open("w") as log:
        log.write("before\n")
        log.flush()
        command = [sys.executable, "-c", textwrap.dedent(HUNG).format(path=sys.path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout.readline() == "stuck\n"
    process.stdout.close()
    who = heartbeat.Process("here", process.pid, heartbeat._start_ticks(process.pid))
    assert watchdog._dump(who._replace(start_ticks=who.start_ticks - 1), True) == "", "a later process with its number"
    if stopped:
        process.send_signal(signal.SIGSTOP)
    told = watchdog._dump(who, False)
    assert told.endswith(f" in stuck; all stacks are in {tmp_path / 'log'}")
    assert process.poll() is None
    assert watchdog._dump(who, True).endswith(f" in stuck; all stacks are in {tmp_path / 'log'}")
    assert process.wait() == -signal.SIGKILL
    assert watchdog._dump(who, True) == ""
    assert (tmp_path / "log").read_text().startswith("before\n")


def test_location_is_that_of_the_thread_that_trains_or_else_of_any():
    waits = 'Thread 0x2 (most recent call first):\n  File "a.py", line 1 in wait\n  File "a.py", line 9 in run\n'
    trains = '(most recent call first):\n  File "b.py", line 2 in step\n  File "c.py", line 3 in epochs\n'
    for which in ("Thread 0x1 ", "Current thread 0x1 "):
        assert watchdog._location(waits + "\n" + which + trains) == 'File "b.py", line 2 in step'
        assert watchdog._location(which + trains + "\n" + waits) == 'File "b.py", line 2 in step'
    assert watchdog._location(waits) == 'File "a.py", line 1 in wait'
    assert watchdog._location("") == "an unknown place"


class Calls:
    """A watchdog as a process sees it: keeps the states that it receives, and answers them in turn."""

    def __init__(self):
        self.states, self.answers, self.waits = [], queue.Queue(), threading.Event()
        self.update = self.receive = self

    def remote(self, process, told):
        assert process == heartbeat.Process("here", os.getpid(), heartbeat._start_ticks(os.getpid()))
        self.states.append(told)
        return told


@pytest.fixture
def calls(monkeypatch):
    made = Calls()

    def get(_):
        made.waits.set()
        answer = made.answers.get()
        made.waits.clear()
        return answer

    monkeypatch.setattr(heartbeat.ray, "get", get)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(
        heartbeat.Process, "this", lambda: heartbeat.Process("here", os.getpid(), heartbeat._start_ticks(os.getpid()))
    )
    yield made
    made.waits.wait()  # the sender's thread waits here for good, and never asks a real watchdog
    faulthandler.unregister(heartbeat.DUMP_SIGNAL)


def test_sender_reports_the_job_and_the_time_of_its_step_and_is_told_to_leave(calls, monkeypatch):
    clock = itertools.count(100.0)  # a second passes with each look at it
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: next(clock))
    own, job = heartbeat.HeartbeatSender(calls), TrainingJob("toy", {}, {}, "", "trial-0003", "x")
    assert own._state() == ("", "", 0.0, 0.0)
    with own.working_on(job):  # at 100; told at 101
        assert calls.states[-1] == ("trial-0003", "x", 1.0, 0.0)
        assert own.heartbeat() is False  # at 102
        assert own._state() == ("trial-0003", "x", 1.0, 2.0)  # at 103
        with own.waiting():
            assert own._state() == ("trial-0003", "x", 0.0, 2.0)
        assert own.heartbeat() is False  # the rest was no step
        assert own._state() == ("trial-0003", "x", 1.0, 2.0)
    assert own._state() == ("", "", 0.0, 2.0)
    with own.working_on(job, trains=False):
        assert own._state() == ("trial-0003", "x", 0.0, 0.0)
        calls.answers.put(True)
        while not own.must_leave:
            time.sleep(0.01)
        assert own.heartbeat() is True
