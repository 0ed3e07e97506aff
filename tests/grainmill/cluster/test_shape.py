"""What a cluster can become, by its file, and what never fits into it."""

from pathlib import Path

import pytest
import yaml

from grainmill.cluster import shape
from grainmill.cluster.shape import Cluster, NodeType, trials_that_fit
from grainmill.config.resources import Need
from grainmill.errors import ExperimentError, ResourceError

INFRA = Path(__file__).parents[3] / "infra"
SMALL = NodeType("small", {"CPU": 4.0}, 3)
LARGE = NodeType("large", {"CPU": 16.0, "GPU": 2.0}, 2)
HEAD = NodeType("head", {"CPU": 0.0}, 1)


@pytest.mark.parametrize(
    ("bundle", "count"),
    [
        ({"CPU": 16.0}, 1),
        ({"CPU": 17.0}, 0),
        ({"CPU": 3.0}, 5),
        ({"CPU": 1.0, "GPU": 1.0}, 2),
        ({"CPU": 1.0, "GPU": 2.0}, 1),
        ({"CPU": 1.0, "GPU": 0.2}, 10),
        ({"CPU": 1.0, "GPU": 0.4}, 4),  # two on each GPU: none works on parts of two
        ({"CPU": 1.0, "GPU": 0.6}, 2),
        ({"CPU": 1.0, "TPU": 1.0}, 0),
    ],
)
def test_a_node_holds_as_many_workers_as_its_scarcest_resource(bundle, count):
    assert LARGE.holds(bundle) == count


def test_a_node_with_part_of_a_gpu_holds_what_ten_thousandths_say():
    assert NodeType("part", {"CPU": 9.0, "GPU": 0.6}, 1).holds({"CPU": 1.0, "GPU": 0.2}) == 3


def test_room_counts_every_node_that_may_come_and_the_head_if_it_works():
    both = Cluster(HEAD, (LARGE, SMALL), 5, 60.0)
    # 3 nodes of one worker and 2 of five of 3 CPU, and no more than five nodes.
    assert both.trials_that_fit(Need({"CPU": 3.0}, 1, 1)) == 13
    assert (
        Cluster(HEAD, (LARGE, SMALL), 4, 60.0).trials_that_fit(Need({"CPU": 3.0}, 1, 1)) == 8
    )  # those without GPUs first
    assert both.trials_that_fit(Need({"CPU": 1.0, "GPU": 1.0}, 1, 1)) == 4
    assert both.trials_that_fit(Need({"CPU": 1.0, "GPU": 1.0}, 3, 3)) == 1  # over two nodes
    working = NodeType("head", {"CPU": 6.0}, 1)
    assert Cluster(working, (SMALL,), 3, 60.0).trials_that_fit(Need({"CPU": 3.0}, 1, 1)) == 5


@pytest.mark.parametrize(
    ("bundle", "workers", "message"),
    [
        (
            {"CPU": 1.0, "GPU": 4.0},
            1,
            "one worker needs 1 CPU and 4 GPU, but no node type has more than 2 GPU (head: 0 CPU; small: 4 CPU; "
            "large: 16 CPU, 2 GPU); lower gpus_per_worker to 2",
        ),
        (
            {"CPU": 32.0, "GPU": 4.0},
            1,
            "one worker needs 32 CPU and 4 GPU, but no node type has more than 16 CPU and 2 GPU (head: 0 CPU; "
            "small: 4 CPU; large: 16 CPU, 2 GPU); lower cpus_per_worker to 16, gpus_per_worker to 2",
        ),
        (
            {"CPU": 1.0, "GPU": 2.0},
            3,
            "a trial needs 3 workers of 1 CPU and 2 GPU each, but the cluster has room for 2 at most (large: 16 CPU, "
            "2 GPU); lower the workers to 2",
        ),
    ],
)
def test_what_never_fits_is_refused_with_the_nearest_that_does(bundle, workers, message):
    with pytest.raises(ResourceError) as caught:
        Cluster(HEAD, (SMALL, LARGE), 5, 60.0).trials_that_fit(Need(bundle, workers, workers))
    assert str(caught.value) == message


ONE = Need({"CPU": 1.0}, 1, 1)


@pytest.mark.parametrize(
    ("cpus", "workers", "trials"),
    [((2, 2), 2, 2), ((4, 1, 1), 2, 2), ((4, 1), 2, 1), ((3, 3, 3), 2, 4), ((2, 1, 1), 3, 1)],
)
def test_workers_of_a_trial_that_are_spread_share_no_node(cpus, workers, trials):
    nodes = [NodeType("node", {"CPU": float(count)}, 1) for count in cpus]
    assert trials_that_fit(nodes, Need({"CPU": 1.0}, workers, workers, one_per_node=True)) == trials
    with pytest.raises(ResourceError, match=rf"each of its 4 workers, but the cluster has {len(cpus)} that|room for"):
        trials_that_fit(nodes, Need({"CPU": 1.0}, 4, 4, one_per_node=True))


def test_a_trial_of_few_or_many_workers_has_room_if_the_few_have():
    nodes = [NodeType("node", {"CPU": 5.0}, 1)]
    assert trials_that_fit(nodes, Need({"CPU": 1.0}, 2, 9)) == 1
    assert trials_that_fit(nodes, Need({"CPU": 1.0}, 1, 2)) == 2
    with pytest.raises(ResourceError, match="needs 6 workers of 1 CPU each, but the cluster has room for 5 at most"):
        trials_that_fit(nodes, Need({"CPU": 1.0}, 6, 9))


def test_a_cluster_without_a_worker_has_no_room():
    with pytest.raises(ResourceError, match=r"more than 0 CPU .* use a cluster that has some"):
        trials_that_fit([HEAD], ONE)
    with pytest.raises(ResourceError, match="no nodes"):
        trials_that_fit([], ONE)


def test_the_launchers_file_is_read():
    found = shape.read_cluster(INFRA / "aws" / "cluster.yaml")
    told = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())
    prices = told["provider"]["prices"]
    assert found.head == NodeType("head", {"CPU": 0.0}, 1, 0, prices["head"])
    resources = {"CPU": 16.0, "GPU": 1.0}
    assert found.worker_types == (
        NodeType("worker", resources, 8, 0, prices["worker"]),
        NodeType("worker-fallback", resources, 8, 0, prices["worker-fallback"]),
    )
    assert (found.max_workers, found.idle_seconds) == (8, 300.0)
    assert [node.name for node in found.nodes_for({"CPU": 1.0, "GPU": 1.0})] == ["worker"] * 8


def test_kuberays_object_is_read():
    found = shape.read_cluster(INFRA / "kuberay" / "cluster.yaml")
    assert found.head == NodeType("head", {"CPU": 0.0}, 1)  # as its start parameters say, whatever its pod has
    assert found.worker_types == (NodeType("gpu", {"CPU": 8.0, "GPU": 1.0}, 8),)
    assert (found.max_workers, found.idle_seconds) == (8, 300.0)


def test_kuberays_object_that_does_not_grow_has_the_nodes_that_it_names(tmp_path):
    tree = yaml.safe_load((INFRA / "kuberay" / "cluster.yaml").read_text())
    del tree["spec"]["enableInTreeAutoscaling"]
    tree["spec"]["workerGroupSpecs"][0]["replicas"] = 3
    found = shape.parse_cluster("fixed", tree)
    assert found.worker_types == (NodeType("gpu", {"CPU": 8.0, "GPU": 1.0}, 3, 3),)
    assert found.max_workers == 3


def test_kuberays_group_without_a_limit_has_one():
    tree = yaml.safe_load((INFRA / "kuberay" / "cluster.yaml").read_text())
    for limit in (None, 2147483647):  # as written, and as Kubernetes tells what is not
        group = tree["spec"]["workerGroupSpecs"][0]
        group.pop("maxReplicas", None)
        group |= {} if limit is None else {"maxReplicas": limit}
        assert shape.parse_cluster("unlimited", tree).worker_types[0].max_nodes == 1000


def written(folder, **changes):
    tree = {
        "available_node_types": {"head": {"resources": {"CPU": 1}}, "worker": {"resources": {"CPU": 2}}},
        "head_node_type": "head",
        "provider": {"type": "aws"},
    }
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump({**tree, **changes}))
    return file


def test_what_a_file_leaves_out_is_as_rays_launcher_has_it(tmp_path):
    from ray.autoscaler._private.util import prepare_config

    file = written(tmp_path)
    theirs = prepare_config(yaml.safe_load(file.read_text()))
    found = shape.read_cluster(file)
    (worker,) = found.worker_types
    assert found.max_workers == theirs["max_workers"] == 2
    assert found.idle_seconds == 60 * theirs["idle_timeout_minutes"] == 300
    assert worker.max_nodes == theirs["available_node_types"]["worker"]["max_workers"] == 2
    assert worker.min_nodes == theirs["available_node_types"]["worker"]["min_workers"] == 0
    assert worker.price is None


def test_everything_that_is_wrong_with_a_file_is_told_at_once(tmp_path):
    types = {"head": {"resources": {"CPU": -1}}, "worker": {"min_workers": -2}}
    with pytest.raises(ExperimentError) as caught:
        shape.read_cluster(written(tmp_path, available_node_types=types, idle_timeout_minutes="soon"))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'cluster.yaml'}: 4 problems")
    for part in ("head.resources.CPU: ", "worker.resources: this key", "worker.min_workers: ", "idle_timeout_minutes"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_node_type": "boss"}, "'boss' is no node type of this file; known: head, worker"),
        ({"provider": {"prices": {"worked": 1.0}}}, "'worked' is no node type of this file; known: head, worker"),
    ],
)
def test_a_name_that_no_node_type_has_is_refused(tmp_path, changes, message):
    with pytest.raises(ExperimentError, match=message):
        shape.read_cluster(written(tmp_path, **changes))


@pytest.mark.parametrize("content", [None, "a: [", "- a list", b"\xff\xfe\x00"])
def test_a_file_that_is_none_is_refused_by_its_name(tmp_path, content):
    file = tmp_path / "cluster.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ExperimentError, match=r"cluster.yaml: 1 problem"):
        shape.read_cluster(file)


def test_nodes_with_gpus_come_last_where_none_is_asked_for():
    plain, with_gpu = ({"CPU": 4.0, "memory": 1e9, **gpu} for gpu in ({}, {"GPU": 1.0}))
    types = NodeType("gpu", with_gpu, 1), NodeType("plain", plain, 1)
    nodes = Cluster(HEAD, types, 2, 60.0).nodes_for
    assert [node.name for node in nodes({"CPU": 1.0})] == ["plain", "gpu"]
    assert [node.name for node in nodes({"CPU": 1.0, "GPU": 1.0})] == ["gpu"]
