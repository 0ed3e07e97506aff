"""How many trials the Ray cluster holds at once: when it has grown, if it grows by itself, else as it is."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ray
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

from grainmill.cluster import shape
from grainmill.cluster.shape import Cluster, NodeType
from grainmill.config.resources import Need
from grainmill.errors import ExperimentError, ResourceError

MONITOR = "monitor.py"
"""Ray's autoscaler, a process on the head."""


def trials_at_once(need: Need, limit: int | None, note: Callable[[str], None]) -> int:
    """How many trials are to be asked for at once.

    Args:
        need: what each of them takes.
        limit: most of them at once. Where it cannot be told whether the cluster grows, as many are asked for, whatever
            is there.
        note: hears of a cluster that must grow for the first trial, if that cannot be told.
    Raises:
        ResourceError: not one fits, nor will.
    """
    found = possible_cluster()
    if found is not None:
        fits = found.trials_that_fit(need)
        return min(fits, limit or fits)
    try:
        fits = shape.trials_that_fit(present_nodes(), need)
    except ResourceError as error:
        if limit is None:
            raise ResourceError(f"{error}, or set resources.concurrent if the cluster grows by itself") from None
        note(f"waiting for the cluster to grow: {error}")
        return limit
    return limit or fits


def present_nodes() -> list[NodeType]:
    """The nodes that are there."""
    return [NodeType("node", node["Resources"], 1) for node in ray.nodes() if node["Alive"]]


def possible_cluster() -> Cluster | None:
    """What this cluster can become; None if it does not grow, or if that cannot be told from here.

    Ray has a table of node types for its drivers (`get_cluster_config`), but leaves it empty as of 2.60. So what its
    autoscaler reads is read: the file of `ray up`, or KubeRay's object. Both can be seen on the head, where jobs run.
    """
    with suppress(ExperimentError):  # Ray takes more than we understand
        return _launched() or _kubernetes()
    return None


def _launched() -> Cluster | None:
    """By the file with which the autoscaler of this cluster was started on this machine."""
    address = ray.get_runtime_context().gcs_address
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if f"--gcs-address={address}" in words and any(Path(word).name == MONITOR for word in words):
            files = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
            return shape.read_cluster(Path(files[0]).expanduser()) if files and files[0] else None
    return None


def _kubernetes() -> Cluster | None:
    """By the RayCluster to which this pod belongs; its head may read it, for its autoscaler runs there."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), os.environ.get("RAY_CLUSTER_NAMESPACE")  # KubeRay sets them
    if not (name and namespace):
        return None
    try:
        found = KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    except OSError:  # no token of Kubernetes, no answer, no right
        return None
    return shape.parse_cluster(name, found)
