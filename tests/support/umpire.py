"""An observer of trials that keeps what it is told, and an umpire that rules over the toy's processes."""

import os
import signal
import socket
import threading

import pytest


class Memory:
    """An `Observer` that keeps what it is told."""

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
    """Hears of each process of the toy before it keeps an epoch, and does to it what `rule` says.

    `rule(name, epoch, rank, pid)` returns True to leave the process without an answer. What it raises is raised at the
    end; the process gets its answer.
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
    """A rule that does a deed when a process gets to a place, name, epoch and rank, for the first time."""
    left = [place]

    def rule(name, epoch, rank, pid):
        if left and (name, epoch, rank) == place:
            left.clear()
            return deed(pid)
        return None

    return rule


def kill(pid):
    os.kill(pid, signal.SIGKILL)
