"""Trial of a study as Ray Tune runs it: training in its own process, or leading a worker group."""

from collections.abc import Mapping
from contextlib import closing
from typing import Any
from uuid import uuid4

import ray.tune

from grainmill.cluster import ray_private
from grainmill.execution import heartbeat
from grainmill.execution.mailbox import RESTARTS
from grainmill.execution.training_job import LeftNodeError, StudySetup, TrainingJob, cause, epochs
from grainmill.execution.worker_group import WorkerGroup, WorkerGroupEndedError
from grainmill.messages import Message, NodeLeaving, TrialFailed, encode

_groups: dict[str, WorkerGroup] = {}
"""Warm worker groups of this process, by study."""


def run_trial(setup: StudySetup, config: Mapping[str, Any], watchdog: Any) -> None:
    """Run a trial and report its messages to Tune.

    An error of the training is reported as `TrialFailed`: Tune's own retries are for processes and nodes that die. When
    the node is to be taken away, `NodeLeaving` is reported, and the trial or its group starts again elsewhere, as often
    as that happens. `config` has the `number` and the validated `spec` of the trial.
    """
    number, sender, alone = config["number"], heartbeat.own_sender(watchdog), setup.need.most == 1
    folder, name = setup.checkpoint_folder(number), setup.trial_name(number)
    job = TrainingJob(setup.trainable, config["spec"], setup.data, folder, name, str(uuid4()))
    try:
        if sender.must_leave:  # workers of a group take a step first, because all must leave together
            raise LeftNodeError
        with sender.working_on(job, trains=alone):
            if alone:
                _train(job, sender)
            else:
                _train_in_group(setup, job, watchdog)
    except LeftNodeError:
        _report(NodeLeaving())
        raise ray_private.preempted("its node is to be taken away") from None
    except Exception as error:
        _report(TrialFailed(cause(error)))


def _report(message: Message) -> None:
    ray.tune.report(encode(message))


def _train(job: TrainingJob, sender: heartbeat.HeartbeatSender) -> None:
    with closing(epochs(job, sender.heartbeat)) as reports:
        for report in reports:
            with sender.waiting():
                _report(report)


def _train_in_group(setup: StudySetup, job: TrainingJob, watchdog: Any) -> None:
    """Train with the study's group of this process; start a group where there is none, or the last has ended."""
    for left in reversed(range(1 + RESTARTS)):
        group = _groups.get(setup.study)
        if group is None or group.ended:
            group = _groups[setup.study] = WorkerGroup(setup, watchdog)
        try:
            return group.train(job, _report)
        except WorkerGroupEndedError:
            group.close()
            if not left:
                raise
    raise AssertionError("the last try returns or raises")
