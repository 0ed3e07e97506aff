"""What runs on the workers: a training, epoch after epoch, and what all trainings of a study share.

Kept light, for it is imported in every worker: no MLflow, no Optuna, and torch only where it is used.
"""

import json
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from grainmill import trainable as catalog
from grainmill.config.resources import Need, Resources, Workers
from grainmill.storage import workspace
from grainmill.storage.mirror import S3Files


@dataclass(frozen=True)
class StudySetup:
    """What all trials of a study share, in plain data."""

    study: str
    trainable: str
    """Dotted path of its module."""
    data: Mapping[str, Any]
    folder: str
    """Of the run: one that all nodes see, or `s3://bucket/prefix`."""
    resources: Resources
    workers: Workers

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
    def need(self) -> Need:
        """What a trial takes from the cluster."""
        return self.resources.need(self.workers)


@dataclass(frozen=True)
class TrainingJob:
    """One training run, in plain data."""

    trainable: str
    """Dotted path of its module."""
    spec: Mapping[str, Any]
    data: Mapping[str, Any]
    folder: str
    """For checkpoints; one that all workers see, or `s3://bucket/prefix`, of which each has a copy."""
    name: str = ""
    """Of its trial."""
    attempt: str = ""
    """Of this start of it, unlike all others."""


class LeftNodeError(Exception):
    """A training ended early, with all steps kept, because its heartbeat said so."""


def epochs(
    job: TrainingJob, heartbeat: catalog.Heartbeat = catalog.no_heartbeat
) -> Generator[dict[str, Any], None, None]:
    """Train; yields every epoch's metrics, `epoch` itself, the list of their names, `reported`, and any `variants`.

    What the training leaves in a folder in S3 is safe there before an epoch is yielded, and at its end.

    Raises:
        LeftNodeError: it ended before its last epoch.
        StorageError: the folder in S3 cannot be read or written.
    """
    trainable = catalog.find(job.trainable)
    spec, data = trainable.Spec.model_validate(job.spec), trainable.Data.model_validate(job.data)
    done = 0
    with workspace.opened(job.folder) as kept, kept.followed():
        _meet()
        for result in trainable.fit(spec, data, kept.path, heartbeat, S3Files()):
            kept.push()
            metrics = {"epoch": result.epoch, **result.metrics}
            # Tune adds keys of its own to a result, and flattens it; `reported` tells ours from them.
            yield {**metrics, "reported": list(metrics), "variants": json.dumps(dict(result.variants))}
            done = result.epoch
        kept.push()
    if done < spec.epochs:  # type: ignore[attr-defined]  # see catalog.Trainable
        raise LeftNodeError


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
