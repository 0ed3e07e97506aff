"""What runs on the workers: a Tune trial, alone or at the head of a Ray Train group, and the training itself.

Kept light, for it is imported in every worker: no MLflow, no Optuna, and torch only where it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.tune

from grainmill import catalog
from grainmill.experiment import Resources

WORKER_RESTARTS = 1
"""Failures of a group's workers before its trial fails; they go on from the last checkpoint."""


@dataclass(frozen=True)
class Plan:
    """What all trials of a study share, in plain data."""

    study: str
    trainable: str
    """Dotted path of its module."""
    data: Mapping[str, Any]
    folder: Path
    """Of the run; all nodes must see it."""
    resources: Resources
    workers: int

    def name(self, number: int) -> str:
        """Of a trial: for people, folders and MLflow."""
        return f"{self.study}-{number:04d}"

    def checkpoints(self, number: int) -> Path:
        """Folder for a trial's checkpoints."""
        return self.folder / "trials" / self.name(number)

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker takes from the cluster."""
        needs = {"CPU": float(self.resources.cpus_per_worker), "GPU": self.resources.gpus_per_worker}
        return {name: amount for name, amount in needs.items() if amount}


@dataclass(frozen=True)
class Job:
    """One training run, in plain data."""

    trainable: str
    """Dotted path of its module."""
    spec: Mapping[str, Any]
    data: Mapping[str, Any]
    folder: str
    """For checkpoints; all workers must see it."""


def work(job: Job, report: Callable[[dict[str, Any]], None]) -> None:
    """Train, calling `report` with every epoch's metrics, `epoch` itself, and the list of their names, `reported`."""
    trainable = catalog.find(job.trainable)
    spec, data = trainable.Spec.model_validate(job.spec), trainable.Data.model_validate(job.data)
    for result in trainable.fit(spec, data, Path(job.folder)):
        metrics = {"epoch": result.epoch, **result.metrics}
        # Tune adds keys of its own to a result; `reported` tells ours from them.
        report({**metrics, "reported": list(metrics)})


def work_in_group(config: Mapping[str, Any]) -> None:
    """`work`, on one worker of a Ray Train group."""
    work(config["job"], ray.train.report)


def trial(plan: Plan, config: Mapping[str, Any]) -> None:
    """One Tune trial, of `number` and `spec`: alone in this process, or at the head of a Ray Train group."""
    checkpoints = plan.checkpoints(config["number"])
    job = Job(plan.trainable, config["spec"], plan.data, str(checkpoints))
    if plan.workers == 1:
        work(job, ray.tune.report)
        return
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        work_in_group,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers, use_gpu="GPU" in plan.bundle, resources_per_worker=plan.bundle
        ),
        run_config=ray.train.RunConfig(
            name="group",
            storage_path=str(checkpoints),
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=WORKER_RESTARTS),
        ),
    ).fit()
