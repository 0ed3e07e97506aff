"""Trainings whose node is to be taken away, and those that hang."""

import os
import signal
import subprocess
import sys
import textwrap
import uuid

import pytest
from conftest import TESTS
from test_cli import left_behind
from test_kills import Arena, once

from grainmill import pulse


@pytest.fixture
def arena(tmp_path, ray_cluster, umpire, watch):
    return Arena(tmp_path, umpire, watch)


NOTICE = """
    import socket, sys, time
    from pathlib import Path
    import ray
    from conftest import Memory, Umpire
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
    from test_kills import Arena, once
    from grainmill import trials

    workers, folder = int(sys.argv[1]), Path(sys.argv[2])
    trials.RESTARTS = 0  # to leave a node is no failure

    def raylet(pid):
        "Of a worker: its parent."
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def drain(pid):
        place[pid] = raylet(pid)
        (node,) = [one for one in nodes if one.all_processes["raylet"][0].process.pid == place[pid]]
        until = int(time.time() * 1000) + 15_000
        assert GcsClient(cluster.address).drain_node(node.node_id, DRAIN_NODE_REASON_PREEMPTION, "", until)[0]

    def rule(name, step, rank, pid):
        print(time.time(), name, step, rank, pid, file=sys.stderr)
        place[pid] = raylet(pid)
        if name == "trial-0001" and rank == workers - 1 and step == 5:
            drain(pid)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(workers + 1)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    umpire, watch, place = Umpire(), Memory(), {}
    arena = Arena(folder, umpire, watch)
    arena.data, umpire.rule = {"hold": "trial-0001 5"}, rule
    records = arena.run(arena.grid([0.25, 0.75], base={"steps": 3}), workers=workers, concurrent=1)
    arena.check(records, [0.25, 0.75], steps=3)
    assert "trial-0001: its node is to be taken away; saved in epoch 2, goes on elsewhere" in watch.notes, watch.notes
    last = workers - 1
    (before,) = {pid for name, step, rank, pid in umpire.heard if (name, step, rank) == ("trial-0001", 5, last)}
    after = {pid for name, step, _, pid in umpire.heard if name == "trial-0001" and step > 5}
    assert len(after) == workers
    assert place[before] not in {place[pid] for pid in after}
    umpire.close()
    ray.shutdown()
    cluster.shutdown()
    print("nothing lost")
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2], ids=["alone", "group"])
def test_training_leaves_a_node_that_is_to_be_taken_away_and_repeats_no_step(tmp_path, workers):
    mark = str(uuid.uuid4())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "GRAINMILL_TEST": mark}
    command = [sys.executable, "-c", textwrap.dedent(NOTICE), str(workers), str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.stdout.endswith("nothing lost\n"), found.stdout + found.stderr
    assert left_behind(mark) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2], ids=["alone", "group"])
def test_process_that_is_stopped_is_noticed_ended_and_goes_on_from_its_checkpoint(arena, monkeypatch, workers):
    monkeypatch.setattr(pulse, "SILENCE_SECONDS", 8.0)

    def stop(pid):
        os.kill(pid, signal.SIGSTOP)
        return True

    arena.umpire.rule = once(("trial-0001", 5, workers - 1), stop)
    records = arena.run(arena.grid([0.25], base={"steps": 3}), workers=workers, concurrent=1)
    arena.check(records, [0.25], ["trial-0001 4", "trial-0001 5"], steps=3)
    (stopped,) = {
        pid for name, step, rank, pid in arena.umpire.heard if (name, step, rank) == ("trial-0001", 5, workers - 1)
    }
    (note,) = [note for note in arena.watch.notes if note.startswith("trial-0001")]
    assert f"trial-0001: its process {stopped} has been silent for " in note
    assert "in _compute; all stacks are in /" in note
