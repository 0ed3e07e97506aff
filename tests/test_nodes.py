"""Several nodes: where workers are put, what becomes of them when a node dies or comes, and the network between."""

import os
import subprocess
import sys
import textwrap
import uuid

import hosts
import pytest
from conftest import TESTS
from test_cli import left_behind

NODES = """
    import os, signal, socket, sys, time
    from pathlib import Path
    import ray
    from conftest import Umpire
    from grainmill import leader
    from grainmill.experiment import Resources
    from grainmill.worker import Job, Plan
    from ray.cluster_utils import Cluster

    folder, leader.RESIZE_SECONDS = Path(sys.argv[1]), 2.0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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

    nodes = {}  # by training, epoch and rank; those of the latest start

    def train(name, workers, report=lambda message: None, rule=lambda place: False, epochs=3, **resources):
        "Returns what the leader reported."
        said = []

        def hear(name, epoch, rank, pid):
            nodes[name, epoch, rank] = parent(pid)
            return rule((epoch, rank))

        def listen(message):
            said.append((message.get("epoch"), message.get("workers", message.get("world_size"))))
            report(said)

        umpire.rule = hear
        group = leader.Group(Plan("trial", "toy", {}, folder, Resources(**resources), workers))
        group.train(Job("toy", {"epochs": epochs}, {"umpire": umpire.port}, str(folder / name)), listen)
        group.close()
        return said

    def on(name, epoch):
        return {node for (known, number, _), node in nodes.items() if (known, number) == (name, epoch)}

    def loses_its_node(name):
        "The rule, and when: the second worker's node dies in the second epoch."
        moments, dead = [], []

        def rule(place):
            if not moments and place == (2, 1):
                dead.append(nodes[name, 2, 1])
                moments.append(time.monotonic())
                kill_node(*dead)
                return True
            if len(moments) == 1 and place[0] == 2 and nodes[(name, *place)] not in dead:
                moments.append(time.monotonic())
                print(f"{name}: {moments[1] - moments[0]:.1f} seconds from the death of a node to training")

            return False

        return rule

    assert train("apart", 2, placement="spread") == [(None, 2), (1, 2), (2, 2), (3, 2)]
    assert len(on("apart", 1)) == 2

    said = train("together", 2, rule=loses_its_node("together"))
    assert said == [(None, 2), (1, 2), (None, 2), (1, 2), (2, 2), (3, 2)], said  # the result of an epoch comes again
    assert len(on("together", 1)) == len(on("together", 3)) == 1
    assert on("together", 1) != on("together", 3)

    lost = loses_its_node("elastic")

    def wait_for_the_node(place):
        "In the third epoch, the one worker waits until Ray Train has found the node that came."
        return lost(place) or (place == (3, 0) and ("elastic", 3, 1) not in nodes and not said.count((None, 2)) > 1)

    said = []

    def comes_back(told):
        said[:] = told
        if told[-1] == (2, 1):
            cluster.add_node(num_cpus=2)

    train("elastic", (1, 2), comes_back, wait_for_the_node, cpus_per_worker=2)
    assert said == [(None, 2), (1, 2), (None, 1), (1, 1), (2, 1), (None, 2), (2, 2), (3, 2)], said

    umpire.close()
    ray.shutdown()
    cluster.shutdown()
    print("nothing lost")
"""


@pytest.mark.slow
def test_workers_are_where_they_should_and_go_on_when_nodes_die_and_come(tmp_path):
    mark = str(uuid.uuid4())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "GRAINMILL_TEST": mark}
    command = [sys.executable, "-c", textwrap.dedent(NODES), str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.stdout.endswith("nothing lost\n"), found.stdout + found.stderr
    assert left_behind(mark) == []


HOSTS = """
    import sys
    from pathlib import Path
    import hosts
    hosts.join()
    hosts.start((1, 1))
    from grainmill import leader
    from grainmill.experiment import Resources
    from grainmill.worker import Job, Plan
    from multigrain.spec import MultiGrainSpec

    folder = Path(sys.argv[1])
    settings = {"image_size": 32, "epochs": 1, "model": {"trunk": "resnet18"}, "batch": {"size": 24}}
    spec = MultiGrainSpec.model_validate(settings | {"compute": {"precision": "fp32"}}).model_dump()
    job = Job("multigrain.trainable", spec, {"folder": sys.argv[2]}, str(folder / "checkpoints"))
    group = leader.Group(Plan("trial", job.trainable, job.data, folder, Resources(placement="spread"), 2))
    said = [(0, hosts.crossed())]
    group.train(job, lambda message: said.append((message.get("epoch"), hosts.crossed())))
    assert [epoch for epoch, _ in said] == [0, None, 1], said
    come, gone = (after - before for before, after in zip(said[1][1], said[2][1], strict=True))
    print(come, gone)
"""


@pytest.mark.slow
def test_group_on_two_hosts_trains_over_their_cable(tmp_path, shapes_folder):
    if not hosts.permitted():
        pytest.skip("two hosts on one machine need the right to make network namespaces, unshare and ip")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [*hosts.INSIDE, sys.executable, "-c", textwrap.dedent(HOSTS), str(tmp_path), str(shapes_folder)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    # 26 images twice an epoch in batches of 24: three steps. In each, either rank sends all gradients once at least:
    # 11 million of a ResNet-18, in four bytes each.
    assert min(map(int, found.stdout.split())) > 3 * 11_000_000 * 4, found.stdout
