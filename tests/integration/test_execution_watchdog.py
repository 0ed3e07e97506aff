"""Trainings whose node is to be taken away, and those that hang, on real Ray."""

import os
import signal

import pytest
from commands import run_whole
from umpire import once

from grainmill.execution import watchdog

NOTICE = r"""
    import os, subprocess, sys, time
    from datetime import UTC, datetime, timedelta
    from pathlib import Path
    import ray
    from servers import free_port
    from umpire import Memory, Umpire
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
    from arena import Arena
    from metadata_service import SCRIPT, Metadata
    from grainmill.execution import runner

    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    runner.RESTARTS = 0  # to leave a node is no failure

    def raylet(pid):
        "Of a worker: its parent."
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def drain(pid):
        place[pid] = raylet(pid)
        (node,) = [one for one in nodes if one.all_processes["raylet"][0].process.pid == place[pid]]
        if workers > 1:
            until = int(time.time() * 1000) + 15_000
            assert GcsClient(cluster.address).drain_node(node.node_id, DRAIN_NODE_REASON_PREEMPTION, "", until)[0]
            return
        # As on AWS, but that the node of the script is not the only one of its machine.
        program, where = Path(sys.executable).with_name("ray"), f"--address {cluster.address} --node-id {node.node_id}"
        ray_command.parent.mkdir()
        ray_command.write_text(f'#!/bin/sh\nexec {program} "$@" {where}\n')
        ray_command.chmod(0o755)
        metadata.announced = datetime.now(UTC) + timedelta(seconds=15)

    def rule(name, step, rank, pid):
        place[pid] = raylet(pid)
        if name == "trial-0001" and rank == workers - 1 and step == 5:
            drain(pid)

    port = free_port()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(workers + 1)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    umpire, observer, place, metadata, ray_command = Umpire(), Memory(), {}, Metadata(), folder / "bin" / "ray"
    environment = {**os.environ, "PATH": f"{ray_command.parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(SCRIPT), "--metadata", metadata.address, "--poll", "0.1"]
    notice = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    arena = Arena(folder, umpire, observer)
    arena.data, umpire.rule = {"hold": "trial-0001 5"}, rule
    records = arena.run(arena.grid([0.25, 0.75], base={"steps": 3}), workers=workers, concurrent=1)
    arena.check(records, [0.25, 0.75], steps=3)
    assert "trial-0001: its node is to be taken away; saved in epoch 2, goes on elsewhere" in observer.notes
    assert [record.interruptions for record in records] == [(), ("in epoch 2: its node was taken away",), ()]
    last = workers - 1
    (before,) = {pid for name, step, rank, pid in umpire.heard if (name, step, rank) == ("trial-0001", 5, last)}
    after = {pid for name, step, _, pid in umpire.heard if name == "trial-0001" and step > 5}
    assert len(after) == workers
    assert place[before] not in {place[pid] for pid in after}
    if workers == 1:
        assert notice.wait() == 0
    notice.kill()
    notice.wait()
    metadata.close()
    umpire.close()
    ray.shutdown()
    cluster.shutdown()
    print("nothing lost")
"""


@pytest.mark.parametrize("workers", [1, 2], ids=["alone", "group"])
def test_training_leaves_a_node_that_is_to_be_taken_away_and_repeats_no_step(tmp_path, workers):
    run_whole(NOTICE, tmp_path, workers)


@pytest.mark.parametrize("workers", [1, 2], ids=["alone", "group"])
def test_process_that_is_stopped_is_noticed_ended_and_goes_on_from_its_checkpoint(arena, monkeypatch, workers):
    monkeypatch.setattr(watchdog, "SILENCE_SECONDS", 8.0)

    def stop(pid):
        os.kill(pid, signal.SIGSTOP)
        return True

    place = ("trial-0001", 5, workers - 1)
    arena.umpire.rule = once(place, stop)
    records = arena.run(arena.grid([0.25], base={"steps": 3}), workers=workers, concurrent=1)
    arena.check(records, [0.25], ["trial-0001 4", "trial-0001 5"], steps=3)
    stopped = next(pid for *where, pid in arena.umpire.heard if tuple(where) == place)
    note = next(note for note in arena.observer.notes if note.startswith("trial-0001"))
    assert f"trial-0001: its process {stopped} has been silent for " in note
    assert "in _compute; all stacks are in /" in note
