"""Simulated machines: Ray nodes on this machine, each with processes of its own, that a test can crash."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from commands import left_behind, python_path
from servers import free_port

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
SEEN = {"PYTHONPATH": python_path()}


def processes(mark):
    """Yield the ids of the processes with the mark in their environment."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                yield int(entry.name)
        except OSError:
            continue


def crash(mark):
    """Kill all processes of a machine, and those that they start meanwhile, as a power failure does."""
    while found := list(processes(mark)):
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        left_behind(mark)


class Machines:
    """A head node that runs no training, and two worker nodes of one CPU.

    Args:
        folder: for Ray sessions; its path is short, for the sockets in it.
        words: further arguments of the head's command.
        environment: further variables of all machines.
    """

    def __init__(self, folder, *words, **environment):
        self.folder, self.words, self.environment = folder, words, environment
        self.head, self.workers = str(uuid.uuid4()), []

    def open(self):
        """Start a new head and two new worker nodes."""
        self.address = f"127.0.0.1:{free_port()}"
        self.open_head()
        self.workers = []
        for _ in range(2):
            self.add()

    def open_head(self):
        """Start a new head at the address of the last one."""
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
        """Crash the worker node that runs a process, and start another."""
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
