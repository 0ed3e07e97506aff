"""Servers that are processes of their own: PostgreSQL and MLflow's tracking server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest


def free_port():
    """Return a local port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Postgres:
    """A PostgreSQL server on a free local port, with its data in a folder."""

    def __init__(self, folder):
        self.folder, self.user = folder, []
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        found = shutil.which("pg_ctl") or (programs and programs[-1] / "pg_ctl")
        if not found:
            pytest.skip("PostgreSQL is not installed")
        self.programs = Path(found).parent
        if os.geteuid() == 0:  # its server refuses to run as root
            self.user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")
        self.port = free_port()
        self._call("initdb", "-D", folder / "data", "-A", "trust", "-U", "mill", "--no-sync")
        self.start()

    def _call(self, program, *words):
        command = [*self.user, self.programs / program, *words]
        subprocess.run(
            command, cwd="/", check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def start(self):
        options = f"-F -p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        self._call("pg_ctl", "start", "-w", "-D", self.folder / "data", "-o", options, "-l", self.folder / "log")

    def stop(self):
        """Stop at once, as a power failure does."""
        self._call("pg_ctl", "stop", "-m", "immediate", "-D", self.folder / "data")

    def url(self, password=""):
        return f"postgresql://mill{password and ':'}{password}@127.0.0.1:{self.port}/postgres"


@pytest.fixture(scope="session")
def postgres():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        server = Postgres(Path(folder))
        yield server
        server.stop()


class TrackingServer:
    """MLflow's tracking server with proxied artifacts on a free local port. It can be frozen, killed and restarted."""

    def __init__(self, folder):
        self.choose_port()
        self.artifacts = folder / "artifacts"
        self.command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        self.command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        self.command += ["--artifacts-destination", str(self.artifacts)]
        self.start()

    def choose_port(self):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self, command=None, **environment):
        self.process = subprocess.Popen(
            command or self.command,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said, awaited = [], {"startup complete", "Uvicorn running"}  # it works, and it listens; in either order
        for line in self.process.stderr:
            self.said.append(line)
            awaited -= {words for words in awaited if words in line}
            if not awaited:
                break
        else:
            raise AssertionError("".join(self.said))
        while not self._listens():  # several workers say so before the first of them does
            assert self.process.poll() is None, self.said
            time.sleep(0.05)
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr))  # or its pipe fills up
        self._reader.start()

    def _listens(self):
        with socket.socket() as line:
            return line.connect_ex(("127.0.0.1", self.port)) == 0

    def send(self, number):
        os.killpg(self.process.pid, number)

    def end(self, number=signal.SIGTERM):
        self.send(number)
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory):
    """One tracking server for the session. Tests that freeze or kill it use the fixture `server` instead."""
    made = TrackingServer(tmp_path_factory.mktemp("tracking"))
    yield made
    made.end()


@pytest.fixture
def server(tracking_server):
    """The tracking server of the session for tests that freeze or kill it. It runs again after each test."""
    yield tracking_server
    if tracking_server.process.poll() is None:
        tracking_server.send(signal.SIGCONT)
    else:
        tracking_server.start()
