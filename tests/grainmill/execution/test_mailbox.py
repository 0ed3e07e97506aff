"""The mailbox between a worker group and its driver."""

import asyncio

import pytest

from grainmill.execution.mailbox import Mailbox
from grainmill.execution.training_job import TrainingJob
from grainmill.messages import EpochReport, NodeLeaving, TrialFailed, WorkersStarted

JOB = TrainingJob("toy", {"epochs": 2}, {}, "/nowhere")


def epoch(number):
    return EpochReport(number, {"epoch": number}, {})


def played(scene):
    """Run an asyncio scene on a mailbox; 30 seconds at most."""

    async def play():
        async with asyncio.timeout(30):
            await scene(Mailbox())

    asyncio.run(play())


async def waits(task):
    """Whether a task still waits when nothing else is left to do."""
    for _ in range(10):
        await asyncio.sleep(0)
    return not task.done()


def taken(mailbox, done, group, workers=2):
    """What a worker does between jobs, without its place."""
    return mailbox.take_job(done, group, workers, None)


BEGUN = WorkersStarted(2, None)


def test_worker_waits_until_a_job_is_laid():
    async def scene(mailbox):
        worker = asyncio.create_task(taken(mailbox, 0, "one"))
        assert await waits(worker)
        await mailbox.put_job(JOB)
        assert await worker == (1, JOB)

    played(scene)


def test_both_workers_get_the_job_and_no_one_gets_it_again():
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        assert [await taken(mailbox, 0, "one"), await taken(mailbox, 0, "one")] == [(1, JOB)] * 2
        again = asyncio.create_task(taken(mailbox, 1, "one"))
        assert await waits(again)
        await mailbox.job_done(1)
        assert [await mailbox.next_message(), await mailbox.next_message()] == [BEGUN, None]
        assert await waits(again)
        other = TrainingJob("toy", {}, {}, "/elsewhere")
        await mailbox.put_job(other)
        assert await again == (2, other)

    played(scene)


def test_driver_gets_one_message_for_each_group_that_starts():
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        await taken(mailbox, 0, "one"), await taken(mailbox, 0, "one")
        await taken(mailbox, 0, "two", 3)
        assert [await mailbox.next_message(), await mailbox.next_message()] == [BEGUN, WorkersStarted(3, None)]
        assert mailbox.messages.empty()
        await mailbox.put_job(JOB)
        assert await waits(asyncio.create_task(mailbox.next_message()))

    played(scene)


@pytest.mark.parametrize("go_on", [True, False])
def test_epoch_waits_for_the_drivers_answer(go_on):
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        await taken(mailbox, 0, "one")
        word = asyncio.create_task(mailbox.report_epoch(1, epoch(1)))
        assert [await mailbox.next_message(), await mailbox.next_message()] == [BEGUN, epoch(1)]
        assert await waits(word)
        await mailbox.answer(go_on)
        assert await word is go_on

    played(scene)


def test_job_that_was_stopped_is_over_and_its_end_is_not_reported():
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        await taken(mailbox, 0, "one")
        word = asyncio.create_task(mailbox.report_epoch(1, epoch(1)))
        assert await waits(word)
        await mailbox.answer(False)  # whatever the driver has read by then
        assert not await word
        assert not await mailbox.report_epoch(1, epoch(2))
        await mailbox.job_done(1)
        assert [await mailbox.next_message(), await mailbox.next_message()] == [BEGUN, epoch(1)]
        assert mailbox.messages.empty()
        assert await waits(late := asyncio.create_task(taken(mailbox, 0, "two")))  # a group that begins anew waits, too
        await mailbox.put_job(JOB)
        assert await late == (2, JOB)

    played(scene)


def test_what_is_said_of_an_earlier_job_is_refused():
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        await taken(mailbox, 0, "one")
        await mailbox.put_job(JOB)
        await taken(mailbox, 1, "one")
        assert not await mailbox.report_epoch(1, epoch(2))
        await mailbox.job_done(1)
        await mailbox.worker_fails(1, "one", "an old grief")
        assert not mailbox.over
        await taken(mailbox, 1, "two")
        stuck = asyncio.create_task(taken(mailbox, 1, "three"))
        assert [await mailbox.next_message() for _ in range(3)] == [BEGUN, BEGUN, TrialFailed("a worker died")]
        assert await waits(stuck)

    played(scene)


def test_job_is_begun_once_more_and_then_failed_with_the_first_cause_of_the_last_group():
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        await taken(mailbox, 0, "one"), await taken(mailbox, 0, "one")  # two workers are one group
        await mailbox.worker_fails(1, "one", "a worker raised")
        await taken(mailbox, 0, "two")
        await mailbox.worker_fails(1, "two", "another raised")
        await mailbox.worker_fails(1, "two", "connection lost")
        late = [asyncio.create_task(taken(mailbox, 0, "three")) for _ in range(2)]
        assert [await mailbox.next_message() for _ in range(3)] == [BEGUN, BEGUN, TrialFailed("another raised")]
        assert [await waits(task) for task in late] == [True, True]
        assert mailbox.messages.empty()
        await mailbox.put_job(JOB)  # counts anew
        assert [await task for task in late] == [(2, JOB)] * 2
        await taken(mailbox, 0, "four")

    played(scene)


def test_failures_with_an_epoch_between_them_are_no_failure_of_the_job():
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        for last, group in enumerate("abcdef", 1):
            assert await taken(mailbox, 0, group) == (1, JOB)
            words = [asyncio.create_task(mailbox.report_epoch(1, epoch(number))) for number in (last - 1, last)]
            assert [await waits(word) for word in words] == [True, True]
        assert await taken(mailbox, 0, "g") == (1, JOB)
        again = asyncio.create_task(mailbox.report_epoch(1, epoch(6)))  # its result comes again after a start
        assert await waits(again)
        assert await waits(asyncio.create_task(taken(mailbox, 0, "h")))
        assert mailbox.over

    played(scene)


def test_group_of_another_size_is_no_failure_of_the_job():
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        for group, workers in (("a", 2), ("b", 1), ("c", 2), ("d", 1), ("e", 1)):
            assert await taken(mailbox, 0, group, workers) == (1, JOB)
        assert await waits(asyncio.create_task(taken(mailbox, 0, "f", 1)))
        assert mailbox.over

    played(scene)


def test_group_that_leaves_says_so_once_and_is_no_failure_of_the_job():
    async def scene(mailbox):
        await mailbox.put_job(JOB)
        for group in "abcdefgh":
            assert await taken(mailbox, 0, group) == (1, JOB)
            await mailbox.workers_leave(1), await mailbox.workers_leave(1)  # both of its workers
            await mailbox.worker_fails(1, group, "connection lost")
            assert [await mailbox.next_message() for _ in range(2)] == [BEGUN, NodeLeaving()]
        assert mailbox.messages.empty()
        assert await taken(mailbox, 0, "i") == (1, JOB)
        await mailbox.workers_leave(0)  # of an earlier job
        assert await taken(mailbox, 0, "j") == (1, JOB)
        assert await waits(asyncio.create_task(taken(mailbox, 0, "k")))
        assert mailbox.over

    played(scene)


def test_groups_that_fail_without_a_job_use_up_none():
    async def scene(mailbox):
        idle = [asyncio.create_task(taken(mailbox, 0, f"idle {number}")) for number in range(5)]
        for task in idle:
            assert await waits(task)
            task.cancel()
        await mailbox.put_job(JOB)
        assert await taken(mailbox, 0, "one") == (1, JOB)
        assert await taken(mailbox, 0, "two") == (1, JOB)

    played(scene)
