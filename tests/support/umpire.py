"""An observer that keeps what it receives, and an umpire that controls the training processes of the toy."""

import os
import signal
import socket
import threading

import pytest


class Memory:
    """An `Observer` that keeps messages and trials."""

    def __init__(self):
        self.notes, self.trials = [], []

    def message(self, message):
        self.notes.append(message)

    def trial(self, name, record):
        self.trials.append((name, record.state, int(record.metrics.get("epoch", 0))))


@pytest.fixture
def observer():
    return Memory()


class Umpire:
    """A server to which each training process of the toy reports each step and then waits for an answer.

    `rule(name, step, rank, pid)` is called for each report. It may kill or stop the process. If it returns True, the
    process gets no answer. An error that it raises is raised again by `close`; the process gets its answer.
    """

    def __init__(self):
        self.rule = lambda *_: None
        self.heard, self._unanswered, self._errors = [], [], []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self):
        while True:
            line, _ = self._server.accept()
            words = line.makefile().readline().split()
            if not words:  # the end, or a process that was killed meanwhile
                line.close()
                if self._server.fileno() == -1:
                    return
                continue
            place = (words[0], *map(int, words[1:]))
            self.heard.append(place)
            try:
                silent = self.rule(*place)
            except Exception as error:
                self._errors.append(error)
                silent = False
            if silent:
                self._unanswered.append(line)
            else:
                line.close()

    def close(self):
        line = socket.create_connection(("127.0.0.1", self.port))
        self._server.close()
        line.close()
        self._thread.join()
        for line in self._unanswered:
            line.close()
        if self._errors:
            raise self._errors[0]


@pytest.fixture
def umpire():
    made = Umpire()
    yield made
    made.close()


def once(place, deed):
    """Return a rule that calls `deed(pid)` when a process first reaches a place: (name, step, rank)."""
    left = [place]

    def rule(name, epoch, rank, pid):
        if left and (name, epoch, rank) == place:
            left.clear()
            return deed(pid)
        return None

    return rule


def kill(pid):
    os.kill(pid, signal.SIGKILL)
