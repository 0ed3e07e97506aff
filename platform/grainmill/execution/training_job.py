"""Training as a worker runs it, and the setup that all trainings of a study share.

Imported in every worker, and therefore light: no MLflow, no Optuna, and torch only where the trainable has imported it.
"""

import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from grainmill import trainable as catalog
from grainmill.cluster import hardware
from grainmill.config.resources import Need, Resources, Workers
from grainmill.messages import EpochReport
from grainmill.storage import workspace
from grainmill.storage.mirror import S3Files


@dataclass(frozen=True)
class StudySetup:
    """Setup shared by all trials of a study."""

    study: str
    """Name of the study, with which the names of its trials begin."""
    trainable: str
    """Dotted path of the trainable's module."""
    data: Any
    """The trainable's `Data`, validated."""
    folder: str
    """Folder of the run: a path that all nodes see, or `s3://bucket/prefix`."""
    resources: Resources
    workers: Workers

    def trial_name(self, number: int) -> str:
        """Name of a trial, as shown to users and used for its folder and MLflow run."""
        return f"{self.study}-{number:04d}"

    def checkpoint_folder(self, number: int) -> str:
        """Folder of a trial's checkpoints, in the form of `folder`."""
        return f"{self.folder}/trials/{self.trial_name(number)}"

    @property
    def need(self) -> Need:
        """Cluster resources of one trial."""
        return self.resources.need(self.workers)


@dataclass(frozen=True)
class TrainingJob:
    """Training of one trial."""

    trainable: str
    """Dotted path of the trainable's module."""
    spec: Any
    """The trainable's `Spec`, validated by the driver; workers do not validate it again."""
    data: Any
    """The trainable's `Data`, likewise."""
    folder: str
    """Folder of the checkpoints: a path that all workers see, or `s3://bucket/prefix`, of which each has a copy."""
    name: str = ""
    """Name of the trial."""
    attempt: str = ""
    """Unique id of this start of the trial."""


class LeftNodeError(Exception):
    """A training saved all its steps and ended early, because its heartbeat told it to leave the node."""


def epochs(job: TrainingJob, heartbeat: catalog.Heartbeat = lambda: False) -> Generator[EpochReport, None, None]:
    """Train, and yield a report after each epoch. In a worker group, every worker calls this.

    Files of a checkpoint folder in S3 are safe there before an epoch is yielded, and at the end.

    Raises:
        LeftNodeError: the training ended before its last epoch.
        ResourceError: the worker cannot use the GPU that it was given.
        StorageError: the folder in S3 cannot be read or written.
    """
    hardware.check_gpu()
    done, machines = 0, None
    with workspace.opened(job.folder) as kept, kept.uploading():
        _wait_for_all_ranks()  # a rank that starts late must not find files that another has written since
        for result in catalog.find(job.trainable).fit(job.spec, job.data, kept.path, heartbeat, S3Files()):
            kept.upload()
            variants = {name: dict(values) for name, values in result.variants.items()}
            new = {} if machines else (machines := _hardware())
            yield EpochReport(result.epoch, {"epoch": result.epoch, **result.metrics}, variants, new)
            done = result.epoch
        kept.upload()
    if done < job.spec.epochs:
        _wait_for_all_ranks()  # the first worker that raises ends its group; another may still be saving
        raise LeftNodeError


def _wait_for_all_ranks() -> None:
    if group := _process_group():
        group.barrier()


def _hardware() -> dict[str, str]:
    """Hardware of all workers; where they differ, every kind once."""
    found = [hardware.machine()]
    if group := _process_group():
        found *= group.get_world_size()
        group.all_gather_object(found, found[0])
    return {name: "; ".join(dict.fromkeys(one[name] for one in found)) for name in found[0]}


def _process_group() -> Any:
    """The module `torch.distributed` if this process is in a group, else None."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            return distributed
    return None


def cause(error: BaseException) -> str:
    """Describe an error in one line: its type and the last line of its message, which may be a remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
