"""Warm Ray Train group that does one training job after another: starting workers can take longer than a job.

The driver of the group, a trial's process, puts a job into the mailbox. The workers take it, train, report each epoch
and wait for the answer to go on. A worker that fails ends its group. Ray Train starts the group again with as many
workers as there is room for, and the job goes on from its last checkpoint.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group_table

from grainmill.cluster import ray_private
from grainmill.execution import heartbeat, placement
from grainmill.execution.mailbox import JobMessage, Mailbox
from grainmill.execution.network import Network
from grainmill.execution.training_job import LeftNodeError, StudySetup, TrainingJob, cause, epochs
from grainmill.messages import EpochReport, Message, TrialFailed, WaitingForResources, WorkersStarted
from grainmill.storage import workspace

GROUP_RESTARTS = 20
"""Failures of a group before it is given up, over all its jobs."""
WAIT_SECONDS = 60
"""Time without workers after which the user is told what the trial waits for."""
RESIZE_SECONDS = 60.0
"""Interval at which an elastic group looks for room for more workers."""


class WorkerGroupEndedError(Exception):
    """A worker group has ended; the message says why."""


class WorkerGroup:
    """The workers, as seen from the process that leads them. They end with that process."""

    def __init__(self, setup: StudySetup, watchdog: Any) -> None:
        self.setup, need = setup, setup.need
        self.mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=placement.this_node()).remote()
        strategy = {"pack": "PACK", "spread": "STRICT_SPREAD" if need.one_per_node else "SPREAD"}
        self._exit = ExitStack()
        folder = self._exit.enter_context(workspace.temporary_folder())
        trainer = ray.train.torch.TorchTrainer(
            _run_worker,
            train_loop_config={"mailbox": self.mailbox, "watchdog": watchdog},
            scaling_config=ray.train.ScalingConfig(
                num_workers=need.most if need.fewest == need.most else (need.fewest, need.most),
                use_gpu="GPU" in need.bundle,
                resources_per_worker=need.bundle,
                placement_strategy=strategy[setup.resources.placement],
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            ),
            run_config=ray.train.RunConfig(
                name=f"group-{uuid4()}",
                storage_path=str(folder),  # for Ray's own state; checkpoints are the trainable's
                failure_config=ray.train.FailureConfig(max_failures=GROUP_RESTARTS),
            ),
            torch_config=Network(),
        )
        self.end = placement.start_trainer(trainer)
        """Reference that is ready when the group has ended."""
        self.reservation: placement.Reservation | None = None
        """Cluster resources of the workers that started last."""

    def close(self) -> None:
        """End the workers, and free their resources."""
        ray.cancel(self.end, force=True)
        if self.reservation:
            placement.free(self.reservation)
        self._exit.close()

    @property
    def ended(self) -> bool:
        """Return True when the group has ended."""
        return bool(ray.wait([self.end], timeout=0)[0])

    def train(self, job: TrainingJob, report: Callable[[Message], None]) -> None:
        """Train, and pass on every message of the workers. If `report` raises, the workers leave the job.

        Raises:
            WorkerGroupEndedError: the group has ended.
        """
        ray.get(self.mailbox.put_job.remote(job))
        try:
            while (message := self._next_message(report)) is not None:
                if isinstance(message, WorkersStarted):
                    self.reservation = message.reservation
                report(message)
                if isinstance(message, TrialFailed):  # the last message
                    return
                if isinstance(message, EpochReport):
                    ray.get(self.mailbox.answer.remote(True))
        except BaseException:
            self.mailbox.answer.remote(False)
            raise

    def _next_message(self, report: Callable[[Message], None]) -> JobMessage | None:
        message = self.mailbox.next_message.remote()
        while not (ready := ray.wait([message, self.end], timeout=WAIT_SECONDS)[0]):
            if not self._has_resources():
                report(WaitingForResources(placement.missing_resources(self.setup)))
        if ready[0] != message:
            try:
                ray.get(self.end)
            except Exception as error:
                raise WorkerGroupEndedError(f"the group of workers ended: {cause(error)}") from error
            raise WorkerGroupEndedError("the group of workers ended")
        found: JobMessage | None = ray.get(message)
        return found

    def _has_resources(self) -> bool:
        """Return True while the workers hold their resources, which they lose with a node or when they fail."""
        return (
            self.reservation is not None
            and placement_group_table(self.reservation.placement_group).get("state") == "CREATED"
        )


class _MailboxGoneError(Exception):
    """The driver of the group has ended, and the mailbox with it."""


def _get(answer: Any) -> Any:
    """Wait for an answer of the mailbox."""
    try:
        return ray.get(answer)
    except RayActorError:
        raise _MailboxGoneError from None


def _run_worker(config: Mapping[str, Any]) -> None:
    """Do job after job until the driver of the group ends. Every worker runs this."""
    with suppress(_MailboxGoneError):  # not a failure, after which Ray Train would start other workers
        _do_jobs(config["mailbox"], heartbeat.own_sender(config["watchdog"]))


def _do_jobs(mailbox: Any, sender: heartbeat.HeartbeatSender) -> None:
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    first = ray.train.get_context().get_world_rank() == 0

    def from_first(value: Any) -> Any:
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    reservation, workers = placement.own_reservation(), distributed.get_world_size()
    group, number = from_first(str(uuid4())), 0
    while True:
        number, job = _get(mailbox.take_job.remote(number, group, workers, reservation))
        try:
            with (
                sender.working_on(replace(job, attempt=group)),
                closing(epochs(job, sender.heartbeat)) as reports,
            ):
                for report in reports:
                    with sender.waiting():
                        go_on = from_first(_get(mailbox.report_epoch.remote(number, report)) if first else None)
                    if not go_on:
                        break
        except LeftNodeError:
            _get(mailbox.workers_leave.remote(number))
            raise ray_private.preempted("its node is to be taken away") from None
        except _MailboxGoneError:
            raise
        except Exception as error:
            _get(mailbox.worker_fails.remote(number, group, cause(error)))
            raise
        if first:
            _get(mailbox.job_done.remote(number))
