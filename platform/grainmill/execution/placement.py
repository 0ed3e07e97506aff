"""Cluster resources of worker groups: where their processes start, what they hold, and how that is freed."""

from typing import Any, NamedTuple

import ray
from ray.util.placement_group import get_current_placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grainmill.cluster import ray_private
from grainmill.execution.training_job import StudySetup

START_SECONDS = "10"
"""Time in seconds for Ray Train to find room for a group, before it counts anew how many workers fit.

Ray Train counts on a dead node for a while. A growing cluster is asked for nodes all the time, whatever this is."""


def this_node() -> NodeAffinitySchedulingStrategy:
    """Strategy that starts a process on this node only. A group would be lost with any other node it depends on."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def start_trainer(trainer: Any) -> Any:
    """Fit a Ray Train trainer in a process of its own. Returns a reference to the result.

    There, `RAY_ADDRESS` is set, and Ray Train asks this cluster which of its groups are alive. With several clusters on
    one machine it would otherwise ask any of them, end groups that train, and keep the CPUs of dead groups reserved. In
    the main thread of a driver, it would also turn Ctrl-C into an end with exit code 0.
    """

    def fit() -> Any:
        return trainer.fit()

    environment = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": START_SECONDS,
        # Our watchdog alone handles nodes that are to be taken away: every worker saves the step it is in, then all
        # leave. Ray Train's watcher would only mark the workers, wait for the deadline of the node (two minutes where
        # none is known), and then end the group, even if a worker is still saving.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    # With max_calls, the process ends after its one call, and with it Ray Train's own actors.
    once = {"num_cpus": 0, "max_calls": 1, "max_retries": 0, "scheduling_strategy": this_node()}
    return ray.remote(**once, runtime_env={"env_vars": environment})(fit).remote()


class Reservation(NamedTuple):
    """Cluster resources that a worker group holds."""

    placement_group: Any
    controller: Any
    """Ray Train's actor that restarts lost workers."""
    request: str
    """Name of the group's request for resources at Ray's autoscaler."""


def own_reservation() -> Reservation:
    """Return the reservation of the group that this worker belongs to."""
    return Reservation(get_current_placement_group(), *ray_private.train_controller())


def free(reservation: Reservation) -> None:
    """Free the resources of a group that was ended from outside. Ray Train frees only those of groups that it ends."""
    ray.kill(reservation.controller)  # first: it would reserve the resources again
    free_orphaned(ray_private.actor_id(reservation.controller))
    ray_private.cancel_request(reservation.request)


def free_orphaned(killed: bytes | None = None) -> None:
    """Remove the placement groups of this job's dead actors, and those of the actor with the id `killed`.

    Ray keeps them until the job ends. Ray Train's own cleaner learns of a group only when its workers train: it misses
    the placement group of a controller that dies before.
    """
    for group in ray_private.orphaned_placement_groups(killed):
        remove_placement_group(group)


def missing_resources(setup: StudySetup) -> str:
    """Describe what a trial that waits for the cluster needs, for the user."""
    total, free, need = ray.cluster_resources(), ray.available_resources(), setup.need
    parts = [
        f"{amount * need.fewest:g} {name} ({free.get(name, 0):g} of {total.get(name, 0):g} free)"
        for name, amount in need.bundle.items()
    ]
    if need.one_per_node:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        large = sum(all(node.get(name, 0) >= amount for name, amount in need.bundle.items()) for node in nodes)
        parts.append(f"{need.fewest} nodes for its workers ({large} there)")
    return f"waiting for the cluster: a trial needs {', '.join(parts)}"
