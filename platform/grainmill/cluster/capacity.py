"""Number of trials that the Ray cluster can run at once: at its full size if it grows by itself, otherwise as it is."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ray

from grainmill.cluster import ray_private, shape
from grainmill.cluster.shape import Cluster, NodeType
from grainmill.config.resources import Need
from grainmill.errors import ExperimentError, ResourceError


def trials_at_once(need: Need, limit: int | None, message: Callable[[str], None]) -> int:
    """Return the number of trials to request at once.

    Args:
        need: resources of one trial.
        limit: upper bound; where nothing shows whether the cluster grows, this many are requested in any case.
        message: receives a note when the cluster must grow for the first trial and may be unable to.
    Raises:
        ResourceError: no trial fits, now or later.
    """
    cluster = possible_cluster()
    if cluster is not None:
        fits = cluster.trials_that_fit(need)
        return min(fits, limit or fits)
    try:
        nodes = [NodeType("node", node["Resources"], 1) for node in ray.nodes() if node["Alive"]]
        fits = shape.trials_that_fit(nodes, need)
    except ResourceError as error:
        if limit is None:
            raise ResourceError(f"{error}, or set resources.concurrent if the cluster grows by itself") from None
        message(f"waiting for the cluster to grow: {error}")
        return limit
    return limit or fits


def possible_cluster() -> Cluster | None:
    """Return the cluster at its full size; None if it does not grow or its configuration cannot be read from here.

    Ray's own table of node types (`get_cluster_config`) is empty as of 2.60. The configuration of Ray's autoscaler is
    read instead: the file of `ray up`, or KubeRay's object. Both are available on the head, where jobs run.
    """
    with suppress(ExperimentError):  # Ray accepts more than `shape` understands
        return _launcher_cluster() or _kubernetes_cluster()
    return None


def _launcher_cluster() -> Cluster | None:
    """Read the cluster file that Ray's autoscaler, `monitor.py`, was started with on this machine, for this cluster."""
    address = ray.get_runtime_context().gcs_address
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        if f"--gcs-address={address}" in words and any(Path(word).name == "monitor.py" for word in words):
            files = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
            return shape.read_cluster(Path(files[0]).expanduser()) if files and files[0] else None
    return None


def _kubernetes_cluster() -> Cluster | None:
    """Read the RayCluster object of this pod. The head's pod has the permission, because its autoscaler needs it."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), os.environ.get("RAY_CLUSTER_NAMESPACE")  # set by KubeRay
    if not (name and namespace):
        return None
    try:
        return shape.parse_cluster(name, ray_private.kubernetes_object(namespace, f"rayclusters/{name}"))
    except OSError:
        return None
