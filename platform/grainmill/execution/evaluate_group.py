"""Evaluation of a model: in this process, or on every worker of a Ray Train group."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from grainmill import trainable as catalog
from grainmill.errors import EvaluationError, GrainmillError, ResourceError
from grainmill.storage.mirror import S3Files


def run_evaluation(trainable: catalog.Trainable, folder: Path, settings: Any, out: Path) -> catalog.EvaluationResult:
    """Evaluate the model in `folder` in this process.

    Raises:
        EvaluationError: the model cannot be evaluated.
    """
    try:
        return trainable.evaluate(folder, settings, out, S3Files())
    except (OSError, ValueError) as error:
        raise EvaluationError(str(error)) from error


def run_evaluation_on_group(
    workers: int, trainable: catalog.Trainable, folder: Path, settings: Any, out: Path, storage: Path
) -> catalog.EvaluationResult:
    """Run `run_evaluation` on each worker of a group, and return the result of rank 0.

    A worker takes one CPU and, if the cluster has one for each, a GPU. All nodes must see the folders, among them
    `storage`, which gets Ray's own files.

    Raises:
        EvaluationError: a worker cannot evaluate the model.
        ResourceError: the cluster has too few CPUs, or a worker cannot use its GPU.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from grainmill.execution import placement
    from grainmill.execution.network import Network

    total = ray.cluster_resources()
    if total.get("CPU", 0) < workers:
        raise ResourceError(
            f"an evaluation on {workers} workers needs {workers} CPU (one each), but the cluster has "
            f"{total.get('CPU', 0):g}; lower --workers"
        )
    name = trainable.__name__  # type: ignore[attr-defined]  # a trainable is a module
    trainer = TorchTrainer(
        partial(_evaluate, name, folder.absolute(), settings, out.absolute(), Path.cwd()),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, resources_per_worker={"CPU": 1}, use_gpu=total.get("GPU", 0) >= workers
        ),
        run_config=ray.train.RunConfig(name="group", storage_path=str(storage.absolute())),
        torch_config=Network(),
    )
    try:
        result: catalog.EvaluationResult = ray.get(placement.start_trainer(trainer)).return_value
    except ray.train.WorkerGroupError as error:
        # When one worker gives up, the others lose their connection to it.
        failures = (failure for _, failure in sorted(error.worker_failures.items()))
        raise next((one for one in failures if isinstance(one, GrainmillError)), error) from None
    return result


def _evaluate(name: str, folder: Path, settings: Any, out: Path, here: Path) -> catalog.EvaluationResult:
    from grainmill.cluster import hardware

    hardware.check_gpu()
    if here.is_dir():
        os.chdir(here)  # paths in the settings may be relative, and Ray Train works elsewhere
    return run_evaluation(catalog.find(name), folder, settings, out)
