"""What a Tune trial runs: a training, alone in its process or at the head of a warm Ray Train group.

A warm group stays for one training after another, for starting it takes longer than a short one. Its leader, the
trial, lays a job on a desk. The workers take it from there, train, and after each epoch hand in
its metrics and wait for the word to go on. A worker that fails takes its group with it; Ray Train starts the group
again, and the job goes on from its last checkpoint.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any
from uuid import uuid4

import ray
import ray.train
import ray.train.torch
import ray.tune
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from grainmill import group
from grainmill.worker import Job, Plan, cause, epochs

RESTARTS = 1
"""Failures of its workers, or of its whole group, before a job is given up."""
GROUP_RESTARTS = 20
"""Failures before a group is given up, over all its jobs."""
START_SECONDS = 60
"""For a group to start, before the user hears what it waits for."""


class _Desk:
    """Where leader and workers meet; an actor. Jobs are numbered from 1."""

    def __init__(self) -> None:
        self.number = 0
        self.job: Job | None = None
        self.over = True
        self.causes: dict[str, str] = {}
        """Groups that took the job, by the identity that each start gives them, and why they failed."""
        self.reports: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        self.word: asyncio.Future[bool] | None = None
        self.changed = asyncio.Condition()

    async def lay(self, job: Job) -> None:
        """The leader's next job."""
        async with self.changed:
            self.number, self.job, self.over = self.number + 1, job, False
            self.causes, self.reports, self.word = {}, asyncio.Queue(), None
            self.changed.notify_all()

    async def begun(self) -> None:
        """Waits until a worker has taken the job."""
        async with self.changed:
            await self.changed.wait_for(lambda: bool(self.causes))

    async def take(self, done: int, group: str) -> tuple[int, Job]:
        """The next job for a worker that has done those up to `done`; one that was begun too often is not given."""
        async with self.changed:
            while True:
                await self.changed.wait_for(lambda: self.number > done and not self.over)
                assert self.job, "was waited for"
                if group in self.causes or len(self.causes) <= RESTARTS:
                    self.causes.setdefault(group, "a worker died")
                    self.changed.notify_all()
                    return self.number, self.job
                self.over = True
                await self.reports.put({"cause": [*self.causes.values()][-1]})

    async def hand_in(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """An epoch, from the first worker; returns whether to go on."""
        if number != self.number or self.over:
            return False
        self.word = asyncio.get_running_loop().create_future()
        await self.reports.put(metrics)
        return await self.word

    async def done(self, number: int) -> None:
        """A job came to its end."""
        if number == self.number and not self.over:
            self.over = True
            await self.reports.put(None)

    async def failing(self, number: int, group: str, why: str) -> None:
        """Why a worker is about to fail; what the first says is the cause, the others only lose contact."""
        if number == self.number and self.causes.get(group) == "a worker died":
            self.causes[group] = why

    async def read(self) -> Mapping[str, Any] | None:
        """For the leader: metrics, the cause of a failure, or None at the end."""
        return await self.reports.get()

    async def answer(self, go_on: bool) -> None:
        """The leader's word on what it read."""
        self.over = self.over or not go_on
        if self.word and not self.word.done():
            self.word.set_result(go_on)


class GroupGoneError(Exception):
    """A group ended; says why."""


class Group:
    """The workers, as their leader sees them. They end with the leader's process."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.desk = plan, ray.remote(_Desk).options(num_cpus=0).remote()
        trainer = ray.train.torch.TorchTrainer(
            _serve,
            train_loop_config={"desk": self.desk},
            scaling_config=ray.train.ScalingConfig(
                num_workers=plan.workers, use_gpu="GPU" in plan.bundle, resources_per_worker=plan.bundle
            ),
            run_config=ray.train.RunConfig(
                name=f"group-{uuid4()}",
                storage_path=plan.ray,
                failure_config=ray.train.FailureConfig(max_failures=GROUP_RESTARTS),
            ),
        )
        self.end = group.fitted(trainer)
        self.place: PlacementGroup | None = None
        """What the workers occupy, as far as they have told."""

    def close(self) -> None:
        """End the workers, and free what they occupy."""
        ray.cancel(self.end, force=True)
        if self.place:
            remove_placement_group(self.place)

    @property
    def gone(self) -> bool:
        """Whether it ended."""
        return bool(ray.wait([self.end], timeout=0)[0])

    def train(self, job: Job, report: Callable[[dict[str, Any]], None]) -> None:
        """Train, calling `report` with every epoch's metrics; if that raises, the workers leave the job.

        Each has the workers' `place`, too. What they wait for is reported as `waiting`, why the job failed, in the
        end, as its `cause`.

        Raises:
            GroupGoneError: the group has ended.
        """
        ray.get(self.desk.lay.remote(job))
        while not ray.wait([self.desk.begun.remote(), self.end], timeout=START_SECONDS)[0]:
            report({"waiting": group.scarcity(self.plan.bundle, self.plan.workers)})
        while (message := self._read()) is not None:
            self.place = message.get("place", self.place)
            go_on = False
            try:
                report(dict(message))
                go_on = True
            finally:
                ray.get(self.desk.answer.remote(go_on))
            if "cause" in message:  # no end follows a failure
                return

    def _read(self) -> Mapping[str, Any] | None:
        message = self.desk.read.remote()
        (first,), _ = ray.wait([message, self.end])
        if first != message:
            try:
                ray.get(self.end)
            except Exception as error:
                raise GroupGoneError(f"the group of workers ended: {cause(error)}") from error
            raise GroupGoneError("the group of workers ended")
        found: Mapping[str, Any] | None = ray.get(message)
        return found


def _serve(config: Mapping[str, Any]) -> None:
    """What each worker of a group runs: job after job, without an end."""
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    desk, first = config["desk"], ray.train.get_context().get_world_rank() == 0

    def agreed(word: Any) -> Any:
        box = [word]
        distributed.broadcast_object_list(box)
        return box[0]

    place = {"place": get_current_placement_group()}
    name, number = agreed(str(uuid4())), 0
    while True:
        number, job = ray.get(desk.take.remote(number, name))
        try:
            with closing(epochs(job)) as results:
                for metrics in results:
                    if not agreed(ray.get(desk.hand_in.remote(number, metrics | place)) if first else None):
                        break
        except Exception as error:
            ray.get(desk.failing.remote(number, name, cause(error)))
            raise
        if first:
            ray.get(desk.done.remote(number))


_groups: dict[str, Group] = {}


def _lead(plan: Plan, job: Job) -> None:
    """Train a job with the group of this process for a plan, started if need be."""
    for left in reversed(range(1 + RESTARTS)):
        found = _groups.get(plan.study)
        if found is None or found.gone:
            found = _groups[plan.study] = Group(plan)
        try:
            return found.train(job, ray.tune.report)
        except GroupGoneError:
            found.close()
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def trial(plan: Plan, config: Mapping[str, Any]) -> None:
    """One Tune trial, of `number` and `spec`: alone in this process, or at the head of a warm Ray Train group.

    What it raises is reported as its `cause`: Tune's own retries are for processes and nodes that die.
    """
    job = Job(plan.trainable, config["spec"], plan.data, plan.checkpoints(config["number"]))
    try:
        if plan.workers == 1:
            with closing(epochs(job)) as results:
                for metrics in results:
                    ray.tune.report(metrics)
        else:
            _lead(plan, job)
    except Exception as error:
        ray.tune.report({"cause": cause(error)})
