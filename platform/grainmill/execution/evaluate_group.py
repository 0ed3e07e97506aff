"""An evaluation: alone in this process, or alike on every worker of a Ray Train group.

Kept light, for it is imported in every worker: no MLflow, and Ray only where there is a group.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from grainmill import trainable as catalog
from grainmill.errors import EvaluationError, ResourceError
from grainmill.execution.training_job import StudySetup
from grainmill.storage.mirror import S3Files

START_SECONDS = "10"
"""For room to be found for a group, before Ray Train looks anew for how many workers there is room: when a node has
died, it counts on that for a while. A cluster that grows by itself is asked to all the time, whatever this is."""


def run_evaluation(trainable: catalog.Trainable, folder: Path, settings: Any, out: Path) -> catalog.EvaluationResult:
    """Evaluate the model in `folder` in this process.

    Raises:
        EvaluationError: it cannot be evaluated.
    """
    try:
        return trainable.evaluate(folder, settings, out, S3Files())
    except (OSError, ValueError) as error:
        raise EvaluationError(str(error)) from error


def run_evaluation_on_group(
    workers: int, trainable: catalog.Trainable, folder: Path, settings: Any, out: Path, storage: Path
) -> catalog.EvaluationResult:
    """`run_evaluation` on each worker of a group, on the Ray that is there; rank 0's assessment.

    A worker takes one CPU and, if the cluster has one for each, a GPU.

    Args:
        workers: 1 or more.
        trainable, folder, settings, out: see `run_evaluation`; all nodes must see the folders.
        storage: folder for Ray's own files, which all nodes must see.
    Raises:
        EvaluationError: a worker cannot evaluate it.
        ResourceError: the cluster has too few CPUs.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    from grainmill.execution.network import Network

    total = ray.cluster_resources()
    if total.get("CPU", 0) < workers:
        raise ResourceError(
            f"an evaluation on {workers} workers needs {workers} CPU (one each), but the cluster has "
            f"{total.get('CPU', 0):g}; lower --workers"
        )
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "trainable": trainable.__name__,  # type: ignore[attr-defined]  # a trainable is a module
            "folder": str(folder.absolute()),
            "settings": settings.model_dump(by_alias=True),
            "out": str(out.absolute()),
            "here": str(Path.cwd()),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, resources_per_worker={"CPU": 1}, use_gpu=total.get("GPU", 0) >= workers
        ),
        run_config=ray.train.RunConfig(name="group", storage_path=str(storage.absolute())),
        torch_config=Network(),
    )
    try:
        assessment: catalog.EvaluationResult = ray.get(fitted(trainer)).return_value
    except ray.train.WorkerGroupError as error:
        failures = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
        # Where one worker gives up, the others lose their connection to it.
        told = next((failure for failure in failures if isinstance(failure, EvaluationError)), error)
        raise told from None
    return assessment


def _work(config: Mapping[str, Any]) -> catalog.EvaluationResult:
    """`run_evaluation`, on one worker."""
    if Path(config["here"]).is_dir():
        os.chdir(config["here"])  # paths in the settings may be relative, and Ray Train works elsewhere
    trainable = catalog.find(config["trainable"])
    settings = trainable.Evaluation.model_validate(config["settings"])
    return run_evaluation(trainable, Path(config["folder"]), settings, Path(config["out"]))


def fitted(trainer: Any) -> Any:
    """Fit a Ray Train trainer in a process of its own; a reference to what it returns.

    There, Ray's own address is set, so that Ray Train asks this cluster which of its groups are alive. Where several
    run on one machine it asks any of them otherwise, ends groups that train, and leaves the CPUs of dead ones reserved.
    And in the main thread of a driver it would make Ctrl-C an end with exit code 0.
    """
    import ray

    def fit() -> Any:
        return trainer.fit()

    environment = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": START_SECONDS,
    }
    # After its one call the process ends, and with it Ray Train's own actors.
    once = {"num_cpus": 0, "max_calls": 1, "max_retries": 0, "scheduling_strategy": beside()}
    return ray.remote(**once, runtime_env={"env_vars": environment})(fit).remote()


def beside() -> Any:
    """Has Ray start what a group depends on where this process is: not on a node of which others could lose it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Place(NamedTuple):
    """What the workers of a group occupy."""

    bundles: Any
    """Ray's placement group."""
    request: str
    """The name under which Ray Train has asked for room, for three minutes at a time."""
    controller: Any
    """Ray Train's actor that starts workers anew where they are lost."""


def place() -> Place:
    """That of the worker which asks."""
    from ray.train.v2._internal.execution.context import get_train_context
    from ray.util.placement_group import get_current_placement_group

    context = get_train_context()
    request = f"train-{context.train_run_context.run_id}"
    return Place(get_current_placement_group(), request, context.controller_actor)


def vacate(left: Place) -> None:
    """Free what workers leave behind that were ended from outside; Ray Train does only for those that it ends."""
    import ray

    ray.kill(left.controller)  # first: it would take the room anew
    release(left.controller._actor_id.binary())
    with suppress(ValueError):  # nobody is asked
        coordinator = ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator")
        coordinator.cancel_request.remote(left.request)


def release(killed: bytes = b"") -> None:
    """Remove the placement groups that actors of this job took which have died, or one of this id.

    Ray keeps them until the job ends, and Ray Train's own cleaner knows of none before its workers train: of a
    controller that dies as it starts them, the room would be nobody's.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id()).binary()
    nobody = ray.ActorID.nil().binary()  # the driver, which counts as a dead actor
    for entry in state._connect_and_get_accessor().get_placement_group_table():
        found = PlacementGroupTableData.FromString(entry)
        gone = found.creator_actor_id == killed or (found.creator_actor_dead and found.creator_actor_id != nobody)
        if gone and found.creator_job_id == job and found.state != found.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))


def hosts(bundle: Mapping[str, float]) -> int:
    """Nodes that can hold a worker, when nothing else runs there."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes)


def missing_resources(plan: StudySetup) -> str:
    """What a trial that waits for room in the cluster needs, in words."""
    import ray

    total, free, need = ray.cluster_resources(), ray.available_resources(), plan.need
    parts = [
        f"{amount * need.fewest:g} {name} ({free.get(name, 0):g} of {total.get(name, 0):g} free)"
        for name, amount in need.bundle.items()
    ]
    if need.apart:
        parts.append(f"{need.fewest} nodes for its workers ({hosts(need.bundle)} there)")
    return f"waiting for the cluster: a trial needs {', '.join(parts)}"
