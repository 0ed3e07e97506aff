"""What a Tune trial runs: a training, alone in its process or at the head of a warm Ray Train group.

A warm group stays for one training after another, for starting it takes longer than a short one. Its leader, the
trial, lays a job on a desk. The workers take it from there, train, and after each epoch hand in
its metrics and wait for the word to go on. A worker that fails takes its group with it; Ray Train starts the group
again, with as many as there is room for, and the job goes on from its last checkpoint.
"""

from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

import ray
import ray.train
import ray.train.torch
import ray.tune
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group_table

from grainmill.execution import evaluate_group, heartbeat
from grainmill.execution.mailbox import RESTARTS, Mailbox
from grainmill.execution.network import Network
from grainmill.execution.training_job import LeftNodeError, StudySetup, TrainingJob, cause, epochs

GROUP_RESTARTS = 20
"""Failures before a group is given up, over all its jobs."""
WAIT_SECONDS = 60
"""Without workers, before the user hears what a trial waits for."""
RESIZE_SECONDS = 60.0
"""Between two looks of an elastic group whether there is room for more workers."""


class WorkerGroupEndedError(Exception):
    """A group ended; says why."""


class WorkerGroup:
    """The workers, as their leader sees them. They end with the leader's process."""

    def __init__(self, plan: StudySetup, ward: Any) -> None:
        self.plan, need = plan, plan.need
        self.desk = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=evaluate_group.beside()).remote()
        strategy = {"pack": "PACK", "spread": "STRICT_SPREAD" if need.apart else "SPREAD"}
        trainer = ray.train.torch.TorchTrainer(
            _serve,
            train_loop_config={"desk": self.desk, "ward": ward},
            scaling_config=ray.train.ScalingConfig(
                num_workers=need.most if need.fewest == need.most else (need.fewest, need.most),
                use_gpu="GPU" in need.bundle,
                resources_per_worker=need.bundle,
                placement_strategy=strategy[plan.resources.placement],
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            ),
            run_config=ray.train.RunConfig(
                name=f"group-{uuid4()}",
                storage_path=plan.ray,
                failure_config=ray.train.FailureConfig(max_failures=GROUP_RESTARTS),
            ),
            torch_config=Network(),
        )
        self.end = evaluate_group.fitted(trainer)
        self.place: evaluate_group.Place | None = None
        """What the workers occupy, as far as they have told."""

    def close(self) -> None:
        """End the workers, and free what they occupy."""
        ray.cancel(self.end, force=True)
        if self.place:
            evaluate_group.vacate(self.place)

    @property
    def gone(self) -> bool:
        """Whether it ended."""
        return bool(ray.wait([self.end], timeout=0)[0])

    def train(self, job: TrainingJob, report: Callable[[dict[str, Any]], None]) -> None:
        """Train, calling `report` with every epoch's metrics; if that raises, the workers leave the job.

        When workers begin, at first or after a failure, their number is reported as `workers`, with their `place`; what
        they wait for as `waiting`; why the job failed, in the end, as its `cause`.

        Raises:
            WorkerGroupEndedError: the group has ended.
        """
        ray.get(self.desk.lay.remote(job))
        try:
            while (message := self._read(report)) is not None:
                self.place = message.get("place", self.place)
                report(dict(message))
                if "cause" in message:  # no end follows a failure
                    return
                if "epoch" in message:
                    ray.get(self.desk.answer.remote(True))
        except BaseException:
            self.desk.answer.remote(False)
            raise

    def _read(self, report: Callable[[dict[str, Any]], None]) -> Mapping[str, Any] | None:
        message = self.desk.read.remote()
        while not (ready := ray.wait([message, self.end], timeout=WAIT_SECONDS)[0]):
            if not self._stands():
                report({"waiting": evaluate_group.missing_resources(self.plan)})
        if ready[0] != message:
            try:
                ray.get(self.end)
            except Exception as error:
                raise WorkerGroupEndedError(f"the group of workers ended: {cause(error)}") from error
            raise WorkerGroupEndedError("the group of workers ended")
        found: Mapping[str, Any] | None = ray.get(message)
        return found

    def _stands(self) -> bool:
        """Whether the workers have the place that they told: they lose it with a node, or when they fail."""
        return self.place is not None and placement_group_table(self.place.bundles).get("state") == "CREATED"


class _DeskGoneError(Exception):
    """The leader has ended, and the desk with it."""


def _told(answer: Any) -> Any:
    """What the desk says."""
    try:
        return ray.get(answer)
    except RayActorError:
        raise _DeskGoneError from None


def _serve(config: Mapping[str, Any]) -> None:
    """What each worker of a group runs: job after job, until the leader ends."""
    with suppress(_DeskGoneError):  # no failure, for which Ray Train would take room for other workers
        _work(config)


def _work(config: Mapping[str, Any]) -> None:
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    desk, first = config["desk"], ray.train.get_context().get_world_rank() == 0

    def agreed(word: Any) -> Any:
        box = [word]
        distributed.broadcast_object_list(box)
        return box[0]

    own, place, workers = heartbeat.own(config["ward"]), evaluate_group.place(), distributed.get_world_size()
    name, number = agreed(str(uuid4())), 0
    while True:
        number, job = _told(desk.take.remote(number, name, workers, place))
        try:
            with own.of(replace(job, attempt=name)), closing(epochs(job, own.beat)) as results:
                for metrics in results:
                    with own.resting():
                        go_on = agreed(_told(desk.hand_in.remote(number, metrics)) if first else None)
                    if not go_on:
                        break
        except LeftNodeError:
            _told(desk.leave.remote(number))
            raise _taken_away() from None
        except _DeskGoneError:
            raise
        except Exception as error:
            _told(desk.failing.remote(number, name, cause(error)))
            raise
        if first:
            _told(desk.done.remote(number))


def _taken_away() -> RayActorError:
    """As if the process had died with a node that was taken away: Tune and Ray Train do not count that as a failure."""
    return RayActorError(None, "its node is to be taken away", False, True)


_groups: dict[str, WorkerGroup] = {}


def _lead(plan: StudySetup, job: TrainingJob, ward: Any) -> None:
    """Train a job with the group of this process for a plan, started if need be."""
    for left in reversed(range(1 + RESTARTS)):
        found = _groups.get(plan.study)
        if found is None or found.gone:
            found = _groups[plan.study] = WorkerGroup(plan, ward)
        try:
            return found.train(job, ray.tune.report)
        except WorkerGroupEndedError:
            found.close()
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def _train(job: TrainingJob, own: heartbeat.HeartbeatSender) -> None:
    """Train a job in this process."""
    with closing(epochs(job, own.beat)) as results:
        for metrics in results:
            with own.resting():
                ray.tune.report(metrics)


def trial(plan: StudySetup, config: Mapping[str, Any], ward: Any) -> None:
    """One Tune trial, of `number` and `spec`: alone in this process, or at the head of a warm Ray Train group.

    What it raises is reported as its `cause`: Tune's own retries are for processes and nodes that die. That a node is
    to be taken away is reported as `left`; the trial, or its group, begins again elsewhere, as often as that happens.

    Args:
        ward: that of the study; see `ward`.
    """
    number, own = config["number"], heartbeat.own(ward)
    job = TrainingJob(
        plan.trainable, config["spec"], plan.data, plan.checkpoints(number), plan.name(number), str(uuid4())
    )
    try:
        if own.leave:  # a worker of a group takes a step first, for all must leave together
            raise LeftNodeError
        with own.of(job, trains=plan.need.most == 1):
            if plan.need.most == 1:
                _train(job, own)
            else:
                _lead(plan, job, ward)
    except LeftNodeError:
        ray.tune.report({"left": True})
        raise _taken_away() from None
    except Exception as error:
        ray.tune.report({"cause": cause(error)})
