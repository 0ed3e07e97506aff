"""Mailbox between the driver of a worker group and its workers: holds the job, their messages and the answers."""

import asyncio

from grainmill.execution.placement import Reservation
from grainmill.execution.training_job import TrainingJob
from grainmill.messages import EpochReport, NodeLeaving, TrialFailed, WorkersStarted

RESTARTS = 1
"""Failures of a job's workers without an epoch in between, or of its whole group, before the job is given up."""
DIED = "a worker died"

JobMessage = EpochReport | WorkersStarted | NodeLeaving | TrialFailed


class Mailbox:
    """An actor. It numbers the jobs from 1."""

    def __init__(self) -> None:
        self.number = 0
        self.job: TrainingJob | None = None
        self.over = True
        self.causes: dict[str, str] = {}
        """Why each group that took the job failed, by the id that a group gets at each start."""
        self.failures = 0
        """Failures of the job since its last epoch."""
        self.workers = 0
        """Size of the group that took the job last; 0 after it has left its nodes."""
        self.epoch = 0
        self.messages: asyncio.Queue[JobMessage | None] = asyncio.Queue()
        self.go_on: asyncio.Future[bool] | None = None
        self.changed = asyncio.Condition()

    async def put_job(self, job: TrainingJob) -> None:
        """Replace the job by the driver's next one."""
        async with self.changed:
            self.number, self.job, self.over = self.number + 1, job, False
            self.causes, self.messages, self.go_on = {}, asyncio.Queue(), None
            self.failures = self.workers = self.epoch = 0
            self.changed.notify_all()

    async def take_job(self, done: int, group: str, workers: int, reservation: Reservation) -> tuple[int, TrainingJob]:
        """Wait for the job after a worker's last one, number `done`. A job that failed too often is given up instead.

        `workers` is the size of the worker's group. Returns the job and its number.
        """
        async with self.changed:
            while True:
                await self.changed.wait_for(lambda: self.number > done and not self.over)
                assert self.job, "was waited for"
                if group in self.causes:
                    return self.number, self.job
                # A group of another size started because a node came or went: the job is not to blame.
                self.failures += workers == self.workers
                if self.failures <= RESTARTS:
                    self.causes[group], self.workers = DIED, workers
                    await self.messages.put(WorkersStarted(workers, reservation))
                    return self.number, self.job
                self.over = True
                await self.messages.put(TrialFailed([*self.causes.values()][-1]))

    async def report_epoch(self, number: int, report: EpochReport) -> bool:
        """Deliver an epoch of the first worker. Returns the driver's answer: True to go on."""
        if number != self.number or self.over:
            return False
        if report.epoch > self.epoch:  # after a restart, the last epoch is reported again
            self.epoch, self.failures = report.epoch, 0
        self.go_on = asyncio.get_running_loop().create_future()
        await self.messages.put(report)
        return await self.go_on

    async def job_done(self, number: int) -> None:
        """Note that a job is complete."""
        if number == self.number and not self.over:
            self.over = True
            await self.messages.put(None)

    async def workers_leave(self, number: int) -> None:
        """Note that the workers have saved the job and leave a node. The next group goes on."""
        if number == self.number and not self.over and self.workers:
            self.workers = 0  # differs from any size, so that the next start is no failure
            await self.messages.put(NodeLeaving())

    async def worker_fails(self, number: int, group: str, reason: str) -> None:
        """Note why a worker is about to fail. The first reason counts: the other workers only lose their connection."""
        if number == self.number and self.causes.get(group) == DIED:
            self.causes[group] = reason

    async def next_message(self) -> JobMessage | None:
        """Wait for the workers' next message; None when the job is complete."""
        return await self.messages.get()

    async def answer(self, go_on: bool) -> None:
        """Answer the epoch report that the driver has read. False ends the job, whatever was read."""
        self.over = self.over or not go_on
        if self.go_on and not self.go_on.done():
            self.go_on.set_result(go_on)
