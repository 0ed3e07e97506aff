"""A head that keeps what it knows in Redis: when it dies, a new one takes over the machines that are there."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import Counter
from pathlib import Path

import pytest
import yaml
from commands import COMMAND, left_behind
from machines import SEEN, TOKEN, Machines, crash, processes
from servers import free_port

EPOCHS = 4
PASSWORD = "mill"


@pytest.fixture
def redis():
    """The variables by which a head finds it, as KubeRay sets them."""
    if not (program := shutil.which("redis-server")):
        pytest.skip("Redis is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        words = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--requirepass", PASSWORD]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert any("Ready to accept connections" in line for line in process.stdout)
            yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}", "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
            process.terminate()
            process.stdout.read()


@pytest.fixture
def machines(redis):
    with tempfile.TemporaryDirectory() as folder:
        made = Machines(folder, f"--redis-password={PASSWORD}", **redis)
        try:
            made.open()
            yield made
        finally:
            made.close()


def raylets(machines):
    found = [pid for mark in machines.workers for pid in processes(mark)]
    return {pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/raylet")}


def test_new_head_takes_over_the_machines_and_the_same_command_carries_on(tmp_path, umpire, machines):
    content = {
        "name": "head",
        "trainable": "toy",
        "data": {"diary": str(tmp_path / "diary"), "umpire": umpire.port},
        "space": {"height": {"uniform": [0.0, 1.0]}},
        "base": {"epochs": EPOCHS},
        "objective": {"score": "max"},
        "search": {"trials": 4, "scheduler": "none"},
        "winner": {"candidates": 1, "seeds": 1},
        "storage": str(tmp_path / "runs"),
    }
    (tmp_path / "head.yaml").write_text(yaml.safe_dump(content))
    mark = str(uuid.uuid4())
    environment = {**os.environ, **TOKEN, **SEEN, "GRAINMILL_TEST": mark, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    there, reached, said = raylets(machines), threading.Event(), tmp_path / "said"
    assert len(there) == 2

    def start():
        with said.open("w") as log:
            command = [sys.executable, "-c", COMMAND, "tune", "head.yaml", "--address", machines.address]
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    def until(name, epoch, rank, pid):
        if (name, epoch) != ("trial-0002", 3) or reached.is_set():
            return False
        reached.set()
        return True

    umpire.rule = until
    with start() as first:
        assert reached.wait(120), said.read_text()
        first.kill()  # it runs on the head
        crash(machines.head)
    machines.open_head()
    with start() as second:
        second.wait()
    assert second.returncode == 0, said.read_text()
    assert raylets(machines) == there
    assert left_behind(mark) == []
    computed = Counter((tmp_path / "diary").read_text().splitlines())
    names = [*(f"trial-000{number}" for number in range(4)), "final-0000"]
    assert computed.keys() == {f"{name} {epoch}" for name in names for epoch in range(1, EPOCHS + 1)}
    # What was cut short was computed again: an epoch of each of two trainings at once.
    assert computed["trial-0002 3"] == 2
    assert computed.total() - len(computed) <= 2
