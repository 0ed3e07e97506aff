"""Several nodes: where workers are put, what becomes of them when a node dies or comes, and the network between."""

import os
import subprocess
import sys
import textwrap

import hosts
import pytest
from commands import python_path, run_whole

NODES = """
    import os, signal, sys, time
    from pathlib import Path
    import ray
    from servers import free_port
    from umpire import Umpire
    from grainmill.execution import watchdog, worker_group
    from grainmill.config.experiment import Resources
    from grainmill.execution.training_job import TrainingJob, StudySetup
    from grainmill.messages import EpochReport, WaitingForResources, WorkersStarted
    import toy
    from ray.cluster_utils import Cluster

    folder, worker_group.RESIZE_SECONDS = Path(sys.argv[1]), 2.0
    port = free_port()
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": port})
    for _ in range(3):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    umpire = Umpire()

    def parent(pid):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def kill_node(raylet):
        "It and its workers, all at once, as if the machine went off."
        assert "raylet" in Path(f"/proc/{raylet}/cmdline").read_text()
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        workers = [pid for pid in pids if Path(f"/proc/{pid}").exists() and parent(pid) == raylet]
        for pid in (raylet, *workers):
            os.kill(pid, signal.SIGKILL)

    def begun(said):
        return [(epoch, workers) for epoch, workers in said if epoch != "waits"]  # a start may take long

    def train(name, workers, told=lambda said: None, holds=lambda place, said: False, **resources):
        "Messages of the group while the second worker's node dies in epoch 2 of 3; the nodes before and after that."
        said, there, after, dead = [], {}, {}, []

        def rule(_, epoch, rank, pid):
            node = parent(pid)
            if not dead:
                there[epoch, rank] = node
                if epoch == 2 and len([place for place in there if place[0] == 2]) == begun(said)[0][1]:
                    dead.extend([there[2, 1], time.monotonic()])
                    kill_node(dead[0])
                return epoch == 2
            if not after and node != dead[0]:
                print(f"{name}: {time.monotonic() - dead[1]:.1f} seconds from the death of a node to training")
            after[epoch, rank] = node
            return holds((epoch, rank), said)

        def report(message):
            match message:
                case EpochReport():
                    said.append((message.epoch, message.metrics["world_size"]))
                case WorkersStarted():
                    said.append((None, message.workers))
                case WaitingForResources():
                    said.append(("waits", message.missing))
            told(said)

        umpire.rule = rule
        setup = StudySetup("trial", "toy", toy.Data(), str(folder), Resources(**resources), workers)
        group = worker_group.WorkerGroup(setup, watchdog.start())
        group.train(TrainingJob("toy", toy.Spec(epochs=3), toy.Data(umpire=umpire.port), str(folder / name)), report)
        group.close()
        return said, *({node for (epoch, _), node in nodes.items() if epoch >= 2} for nodes in (there, after))

    # A node for each worker, though one would hold both; there is a third to go on with.
    said, before, after = train("apart", 2, placement="spread")
    # The result of an epoch comes again when a group goes on from its checkpoint.
    assert begun(said) == [(None, 2), (1, 2), (None, 2), (1, 2), (2, 2), (3, 2)], said
    assert len(before) == len(after) == 2
    assert len(before & after) == 1

    # One or two workers that each fill one of the two nodes that are left.
    def comes_back(said):
        if said[-1] == (2, 1):
            cluster.add_node(num_cpus=2)

    def until_it_is_two(place, said):
        return place == (3, 0) and said.count((None, 2)) == 1  # it is ended when Ray Train has found the new node

    said, before, after = train("elastic", (1, 2), comes_back, until_it_is_two, cpus_per_worker=2)
    assert begun(said) == [(None, 2), (1, 2), (None, 1), (1, 1), (2, 1), (None, 2), (2, 2), (3, 2)], said
    assert len(before) == len(after) == 2
    assert len(before & after) == 1

    # Three workers together on one node, that holds them; the others do not, even together.
    cluster.add_node(num_cpus=6)
    worker_group.WAIT_SECONDS = 2
    waits = []

    def comes_late(said):
        if said[-1][0] == "waits" and (1, 3) in said:
            if not waits:
                cluster.add_node(num_cpus=6)
            waits.append(said[-1][1])

    said, before, after = train("together", 3, comes_late, cpus_per_worker=2)
    assert begun(said) == [(None, 3), (1, 3), (None, 3), (1, 3), (2, 3), (3, 3)], said
    assert waits[0].startswith("waiting for the cluster: a trial needs 6 CPU ("), waits
    assert len(before) == len(after) == 1

    umpire.close()
    ray.shutdown()
    cluster.shutdown()
    print("nothing lost")
"""


def test_workers_are_where_they_should_and_go_on_when_nodes_die_and_come(tmp_path):
    run_whole(NODES, tmp_path)


HOSTS = """
    import sys
    from pathlib import Path
    import hosts
    hosts.join()
    hosts.start((1, 1))
    from grainmill.execution import watchdog, worker_group
    from grainmill.config.experiment import Resources
    from grainmill.execution.training_job import TrainingJob, StudySetup
    from grainmill.messages import WaitingForResources
    from multigrain.config.data import DataSettings
    from multigrain.config.training import MultiGrainSpec

    folder = Path(sys.argv[1])
    settings = {"image_size": 32, "epochs": 1, "model": {"trunk": "resnet18"}, "batch": {"size": 24}}
    spec = MultiGrainSpec.model_validate(settings | {"compute": {"precision": "fp32"}})
    job = TrainingJob("multigrain.trainable", spec, DataSettings(folder=sys.argv[2]), str(folder / "checkpoints"))
    setup = StudySetup("trial", job.trainable, job.data, str(folder), Resources(placement="spread"), 2)
    group = worker_group.WorkerGroup(setup, watchdog.start())
    said = [(0, hosts.crossed())]

    def hear(message):
        if not isinstance(message, WaitingForResources):  # how long it takes to start does not matter
            said.append((getattr(message, "epoch", None), hosts.crossed()))

    group.train(job, hear)
    assert [epoch for epoch, _ in said] == [0, None, 1], said
    come, gone = (after - before for before, after in zip(said[1][1], said[2][1], strict=True))
    print(come, gone)
"""


def test_group_on_two_hosts_trains_over_their_cable(tmp_path, shapes_folder):
    if not hosts.permitted():
        pytest.skip("two hosts on one machine need the right to make network namespaces, unshare and ip")
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [*hosts.INSIDE, sys.executable, "-c", textwrap.dedent(HOSTS), str(tmp_path), str(shapes_folder)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    # 26 images twice an epoch in batches of 24: three steps. In each, either rank sends all gradients once at least:
    # 11 million of a ResNet-18, in four bytes each.
    assert min(map(int, found.stdout.split())) > 3 * 11_000_000 * 4, found.stdout
