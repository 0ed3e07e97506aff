"""What every worker runs, in a Tune trial of its own or in a Ray Train group: train, and report each epoch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from grainmill import catalog


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
