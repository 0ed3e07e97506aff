"""Real jobs on a cluster that wants a token."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import types
import uuid
from collections import Counter
from pathlib import Path

import pytest
import yaml
from commands import SUPPORT, left_behind, start

CLUSTER = """
    import socket, sys
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": port, "object_store_memory": 128 * 2**20}
    head["dashboard_agent_listen_port"] = 0  # any: what takes the jobs; another Ray on this machine has its default
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(f"http://127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
"""
"""A head that ends with its input."""


TOLD = """

from grainmill import cli

_fit = fit


def fit(spec, data, folder, heartbeat, files):
    Path(data.diary).with_name("place").write_text(cli.__file__)
    yield from _fit(spec, data, folder, heartbeat)
"""
"""At the end of a trainable: where the mill lies that runs it."""


@pytest.fixture
def guarded(tmp_path):
    """A real head that wants a token; its processes know nothing of the tests."""
    token, mark = tmp_path / "token", str(uuid.uuid4())
    token.touch(0o600)
    token.write_text("0123456789abcdef" * 4)
    guard = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "GRAINMILL_TEST": mark}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **guard, "PATH": path, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    environment.pop("PYTHONPATH", None)
    head = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLUSTER)],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    address = head.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), address
    yield types.SimpleNamespace(address=address, token=token)
    head.communicate("")
    assert left_behind(mark) == []


def test_jobs_on_a_cluster_that_wants_a_token(guarded, umpire, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # no token of this machine's user, and a cache of its own
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("mine", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "apples.py").write_text((SUPPORT / "toy.py").read_text() + TOLD)
    monkeypatch.syspath_prepend(tmp_path / "mine")
    content = {
        "name": "apples",
        "trainable": "apples",
        "data": {"diary": str(tmp_path / "diary"), "umpire": umpire.port},
        "space": {"height": {"choice": [0.25]}},
        "base": {"epochs": 2},
        "objective": {"score": "max"},
        "search": {"trials": 2, "scheduler": "none", "sampler": "grid"},
        "winner": {"candidates": 1, "seeds": 1},
        "resources": {"concurrent": 1},
        "storage": str(tmp_path / "runs"),
    }
    (tmp_path / "mine" / "apples.yaml").write_text(yaml.safe_dump(content))
    words = ["submit", "tune", tmp_path / "mine" / "apples.yaml", "--address", guarded.address]
    mark = str(uuid.uuid4())

    def submit(*more):
        process = start([*words, *more], tmp_path / "work", mark)
        return process.communicate()[0], process.returncode

    told, code = submit()
    assert (code, "asks for its token, but that is missing; export RAY_AUTH_MODE=token" in told) == (1, True), told
    (tmp_path / "wrong").touch(0o600)
    (tmp_path / "wrong").write_text("fedcba9876543210" * 4)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "wrong"))
    told, code = submit()
    assert (code, "asks for its token, but that was wrong" in told) == (1, True), told
    assert umpire.heard == []

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(guarded.token))
    waits = threading.Event()

    def hold(name, epoch, rank, pid):
        if (name, epoch) == ("trial-0001", 2) and not waits.is_set():
            waits.set()
            return True
        return None

    umpire.rule = hold
    first = start(words, tmp_path / "work", mark)
    while not waits.wait(1):
        assert first.poll() is None, first.communicate()[0]
    told, code = submit()
    assert (code, "grainmill-apples-1 is running; wait for it" in told) == (1, True), told
    first.send_signal(signal.SIGINT)
    told = first.communicate()[0]
    assert first.returncode == 130, told
    assert "grainmill-apples-1 is left as it is" in told
    (stop,) = [line.split()[1:] for line in told.splitlines() if line.startswith("stop")]
    stopped = subprocess.run(stop, capture_output=True, text=True, check=False)
    assert stopped.returncode == 0, stopped.stderr

    told, code = submit()  # the same command again carries on
    assert code == 0, told
    assert "--submission-id grainmill-apples-2" in told
    assert "2 trials: 2 complete" in told
    assert "models:/apples/1, alias champion" in told
    computed = Counter((tmp_path / "diary").read_text().splitlines())
    assert computed["trial-0000 1"] == computed["trial-0000 2"] == computed["trial-0001 1"] == 1
    assert "runtime_resources/working_dir_files" in (tmp_path / "place").read_text()

    told, code = submit("--set", "name=bad-apples", "--set", "base.kind=broken")
    assert code == 1, told
    assert "the toy is broken" in told
    assert "Job 'grainmill-bad-apples-1' failed" in told
    assert left_behind(mark) == []
