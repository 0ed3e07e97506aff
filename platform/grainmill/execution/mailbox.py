"""Where the leader of a group meets its workers: jobs lie there, reports and the leader's word are left there."""

import asyncio
from collections.abc import Mapping
from typing import Any

from grainmill.execution import evaluate_group
from grainmill.execution.training_job import TrainingJob

RESTARTS = 1
"""Failures of its workers without an epoch in between, or of its whole group, before a job is given up."""


class Mailbox:
    """An actor. Jobs are numbered from 1."""

    def __init__(self) -> None:
        self.number = 0
        self.job: TrainingJob | None = None
        self.over = True
        self.causes: dict[str, str] = {}
        """Groups that took the job, by the identity that each start gives them, and why they failed."""
        self.failures = self.workers = self.epoch = 0
        """Since the last epoch of the job; of the group that took it last; finished."""
        self.reports: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        self.word: asyncio.Future[bool] | None = None
        self.changed = asyncio.Condition()

    async def lay(self, job: TrainingJob) -> None:
        """The leader's next job."""
        async with self.changed:
            self.number, self.job, self.over = self.number + 1, job, False
            self.causes, self.reports, self.word = {}, asyncio.Queue(), None
            self.failures = self.workers = self.epoch = 0
            self.changed.notify_all()

    async def take(self, done: int, name: str, workers: int, place: evaluate_group.Place) -> tuple[int, TrainingJob]:
        """The next job for a worker that has done those up to `done`; one that was begun too often is not given.

        Args:
            done: the number of a job.
            name: of the worker's group.
            workers: of the group.
            place: what they occupy.
        """
        async with self.changed:
            while True:
                await self.changed.wait_for(lambda: self.number > done and not self.over)
                assert self.job, "was waited for"
                if name in self.causes:
                    return self.number, self.job
                # A group of another size is there because a node came or went: the job is not to blame.
                self.failures += workers == self.workers
                if self.failures <= RESTARTS:
                    self.causes[name], self.workers = "a worker died", workers
                    await self.reports.put({"workers": workers, "place": place})
                    return self.number, self.job
                self.over = True
                await self.reports.put({"cause": [*self.causes.values()][-1]})

    async def hand_in(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """An epoch, from the first worker; returns whether to go on."""
        if number != self.number or self.over:
            return False
        if metrics["epoch"] > self.epoch:  # the one before comes again after each start
            self.epoch, self.failures = metrics["epoch"], 0
        self.word = asyncio.get_running_loop().create_future()
        await self.reports.put(metrics)
        return await self.word

    async def done(self, number: int) -> None:
        """A job came to its end."""
        if number == self.number and not self.over:
            self.over = True
            await self.reports.put(None)

    async def leave(self, number: int) -> None:
        """A worker saved the job, and leaves: a node of its group is to be taken away. The next group goes on."""
        if number == self.number and not self.over and self.workers:
            self.workers = 0  # of no size, so that the next one is no failure
            await self.reports.put({"left": True})

    async def failing(self, number: int, group: str, why: str) -> None:
        """Why a worker is about to fail; what the first says is the cause, the others only lose contact."""
        if number == self.number and self.causes.get(group) == "a worker died":
            self.causes[group] = why

    async def read(self) -> Mapping[str, Any] | None:
        """For the leader: who has begun, metrics, the cause of a failure, that they leave, or None at the end."""
        return await self.reports.get()

    async def answer(self, go_on: bool) -> None:
        """The leader's word on the metrics that it read; or, whatever it read, that the job is over."""
        self.over = self.over or not go_on
        if self.word and not self.word.done():
            self.word.set_result(go_on)
