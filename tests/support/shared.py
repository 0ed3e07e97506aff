"""What several test files share: one Ray cluster, an umpire of its processes, servers, and a screen."""

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

# Before the libraries are imported: nothing leaves this machine, and only our own output is printed.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # as the command does
os.environ["OMP_NUM_THREADS"] = "1"  # on images this small, threads cost more than they save

import pytest
import ray

from multigrain.config.data import DataSettings
from multigrain.data.builtin import write_builtin
from multigrain.hooks import no_progress

SUPPORT = Path(__file__).parent


def free_port():
    """Of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def pytest_runtest_setup():
    """What MLflow's set_tracking_uri left of another test is no user's: a command would take it for that."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """40 drawn images of 32 pixels in 8 classes, 26 of them for training, with a copy-detection set; read only."""
    settings = DataSettings(builtin="shapes", images=40, image_size=32)
    return write_builtin(settings, tmp_path_factory.mktemp("builtin"), no_progress)


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for the session; its workers find the toy trainable."""
    environment = {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


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


class Postgres:
    """A private PostgreSQL, for this user alone, on a free port of this machine."""

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
        """As if the machine went off."""
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
    """A real tracking server that proxies its artifacts, on a port of its own; it can freeze, die and come back."""

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


@pytest.fixture
def server(tmp_path):
    made = TrackingServer(tmp_path)
    yield made
    made.send(signal.SIGCONT)
    made.end()
