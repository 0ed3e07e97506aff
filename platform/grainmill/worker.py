"""What runs on the workers: a training, epoch after epoch, and what all trainings of a study share.

Kept light, for it is imported in every worker: no MLflow, no Optuna, and torch only where it is used.
"""

import json
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from grainmill import catalog, vault
from grainmill.experiment import Resources


@dataclass(frozen=True)
class Plan:
    """What all trials of a study share, in plain data."""

    study: str
    trainable: str
    """Dotted path of its module."""
    data: Mapping[str, Any]
    folder: str
    """Of the run: one that all nodes see, or `s3://bucket/prefix`."""
    resources: Resources
    workers: int

    def name(self, number: int) -> str:
        """Of a trial: for people, folders and MLflow."""
        return f"{self.study}-{number:04d}"

    def checkpoints(self, number: int) -> str:
        """Folder for a trial's checkpoints."""
        return f"{self.folder}/trials/{self.name(number)}"

    @property
    def ray(self) -> str:
        """Folder for Ray's own files."""
        return f"{self.folder}/ray"

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
    """For checkpoints; one that all workers see, or `s3://bucket/prefix`, of which each has a copy."""


def epochs(job: Job) -> Generator[dict[str, Any], None, None]:
    """Train; yields every epoch's metrics, `epoch` itself, the list of their names, `reported`, and any `variants`.

    Whatever the training has left in its folder is safe in S3 before an epoch is yielded, if the folder is there.
    """
    trainable = catalog.find(job.trainable)
    spec, data = trainable.Spec.model_validate(job.spec), trainable.Data.model_validate(job.data)
    with vault.opened(job.folder) as kept, kept.followed():
        _meet()
        for result in trainable.fit(spec, data, kept.path):
            kept.push()
            metrics = {"epoch": result.epoch, **result.metrics}
            # Tune adds keys of its own to a result, and flattens it; `reported` tells ours from them.
            yield {**metrics, "reported": list(metrics), "variants": json.dumps(dict(result.variants))}


def _meet() -> None:
    """Wait for the other ranks: what one writes must not be what another finds at its start."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()


def cause(error: BaseException) -> str:
    """An error in one line: its type and message, the last line of what a remote traceback says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
