"""Machines that are real Ray nodes on this one, each of processes of its own; they crash when a test wants it."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from commands import PYTHON_PATH, left_behind
from servers import free_port

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
SEEN = {"PYTHONPATH": PYTHON_PATH}


def processes(mark):
    """Those with the mark in their environment."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                yield int(entry.name)
        except OSError:
            continue


def crash(mark):
    """As if a machine went off: all its processes, and what they start meanwhile."""
    while found := list(processes(mark)):
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        left_behind(mark)


class Machines:
    """A head that runs no training, and two machines of one CPU.

    Args:
        folder: Ray's; a path that sockets have room for.
        words: more of the head's command.
        environment: more variables of all machines.
    """

    def __init__(self, folder, *words, **environment):
        self.folder, self.words, self.environment = folder, words, environment
        self.head, self.workers = str(uuid.uuid4()), []

    def open(self):
        """A new head, and new machines."""
        self.address = f"127.0.0.1:{free_port()}"
        self.open_head()
        self.workers = []
        for _ in range(2):
            self.add()

    def open_head(self):
        """A new head where the last one was."""
        self.head, port = str(uuid.uuid4()), self.address.partition(":")[2]
        Path(self.folder, "ray_current_cluster").unlink(missing_ok=True)  # a new machine knows of no earlier head
        self._start(
            *(self.head, "--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={self.folder}"),
            *("--include-dashboard=true", f"--dashboard-port={free_port()}", *self.words),
        )

    def add(self):
        mark = str(uuid.uuid4())
        self._start(mark, f"--address={self.address}", "--num-cpus=1")
        self.workers.append(mark)

    def lose(self, pid):
        """The machine that a process runs on, for a new one."""
        (mark,) = [mark for mark in self.workers if pid in processes(mark)]
        self.workers.remove(mark)
        crash(mark)
        self.add()

    def close(self):
        for mark in (*self.workers, self.head):
            crash(mark)

    def _start(self, mark, *words):
        environment = {**os.environ, **TOKEN, **SEEN, **self.environment, "GRAINMILL_TEST": mark}
        command = [Path(sys.executable).with_name("ray"), "start", *words, "--dashboard-agent-listen-port=0"]
        started = subprocess.run(
            [*command, "--object-store-memory=100000000", "--disable-usage-stats"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert started.returncode == 0, started.stdout
