"""Every use of Ray's private interfaces, as seen in Ray 2.60, with the public interface that would replace it.

`pyproject.toml` allows only the Ray versions that the tests ran with, because any release may change these names.
"""

from collections.abc import Iterator
from typing import Any

import grpc
import ray
from ray._private.state import state as _state
from ray.exceptions import RayActorError


def kubernetes_object(namespace: str, path: str) -> Any:
    """Read a KubeRay object, such as `rayclusters/NAME`, with the rights of this pod.

    Replacement: the `kubernetes` package, or a filled table behind `ray.autoscaler`'s `get_cluster_config`.

    Raises:
        OSError: there is no Kubernetes token, no answer, or no permission.
    """
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    return KubernetesHttpApiClient(namespace).get(path)


def head_answers(address: str, seconds: float) -> tuple[str, bool]:
    """Look for the head of a cluster at an address; returns the resolved address, and whether a head answers there.

    Replacement: a connection timeout for `ray.init`, which tries for minutes and may then end the process.

    Raises:
        ValueError: the text is not an address.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address

    resolved = canonicalize_bootstrap_address(address)
    if not resolved:
        return address, True
    with init_grpc_channel(resolved) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            return resolved, False
    return resolved, True


def server_version(client: Any) -> str:
    """Version of Ray on the cluster of a `JobSubmissionClient`. Replacement: a public property of the client."""
    return str(client._server_ray_version)


def draining_nodes() -> set[str]:
    """Ids of the nodes that are to be taken away. Replacement: a field of `ray.nodes()`."""
    return set(_state.get_draining_nodes())


def actor_id(actor: Any) -> bytes:
    """Binary id of the actor behind a handle. Replacement: a public property of `ActorHandle`."""
    return bytes(actor._actor_id.binary())


def train_controller() -> tuple[Any, str]:
    """Actor that controls the Ray Train group of this worker, and the name of its request for resources.

    The request stays with Ray's autoscaler for minutes. Replacement: a public way to end a group from outside, with
    everything that it holds.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    context = get_train_context()
    return context.controller_actor, f"train-{context.train_run_context.run_id}"


def cancel_request(name: str) -> None:
    """Withdraw a Ray Train group's request for resources. Replacement: see `train_controller`."""
    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator")
    except ValueError:  # no such actor: nobody has asked for resources
        return
    coordinator.cancel_request.remote(name)


def orphaned_placement_groups(killed: bytes | None) -> Iterator[Any]:
    """Yield the placement groups that dead actors of this job have left, and those of the actor with the id `killed`.

    Replacement: the creators in `ray.util.placement_group_table` or in `ray.util.state.list_placement_groups`.
    """
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id()).binary()
    driver = ray.ActorID.nil().binary()  # counts as a dead actor
    for entry in _state._connect_and_get_accessor().get_placement_group_table():
        found = PlacementGroupTableData.FromString(entry)
        creator, exists = found.creator_actor_id, found.creator_job_id == job and found.state != found.REMOVED
        if exists and (creator == killed or (found.creator_actor_dead and creator != driver)):
            yield PlacementGroup(ray.PlacementGroupID(found.placement_group_id))


def near_this_node() -> dict[str, str]:
    """Options that place a Tune trial's bundles on this process's node if there is room.

    Replacement: a scheduling strategy for the bundles of `ray.tune.PlacementGroupFactory`.
    """
    return {"strategy": "STRICT_PACK", "_soft_target_node_id": ray.get_runtime_context().get_node_id()}


def preempted(reason: str) -> RayActorError:
    """Error of an actor whose node is taken away, which neither Tune nor Ray Train counts as a failure.

    Replacement: a public exception with which a training asks to be started again elsewhere.
    """
    return RayActorError(None, reason, False, True)
