"""A group that does one job after another."""

import pytest
import ray
import toy
from ray.util.state import list_actors

from grainmill.config.resources import Resources
from grainmill.execution import watchdog, worker_group
from grainmill.execution.training_job import StudySetup, TrainingJob
from grainmill.messages import EpochReport, TrialFailed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in Ray Data, which Train imports
def test_group_does_job_after_job_with_the_same_workers_until_one_fails(tmp_path, ray_cluster, umpire):
    """One group for all of it: a whole job, one that is stopped, a whole one, a broken one, a whole one."""
    group = worker_group.WorkerGroup(StudySetup("trial", "toy", toy.Data(), tmp_path, Resources(), 2), watchdog.start())

    def job(name, **spec):
        return TrainingJob("toy", toy.Spec(epochs=3, **spec), toy.Data(umpire=umpire.port), str(tmp_path / name))

    def pids(name):
        return {(rank, pid) for heard, _, rank, pid in umpire.heard if heard == name}

    def train(name, report=None, **spec):
        said = []
        group.train(job(name, **spec), lambda message: said.append(message) or (report and report(message)))
        return [
            getattr(message, "epoch", getattr(message, "cause", None))
            for message in said
            if isinstance(message, EpochReport | TrialFailed)
        ]

    assert train("whole") == [1, 2, 3]
    first = pids("whole")
    assert sorted(rank for rank, _ in first) == [0, 1]

    def stop(message):
        if isinstance(message, EpochReport):
            raise SystemExit

    with pytest.raises(SystemExit):
        train("stopped", stop)
    where, asked = ray.get_runtime_context().gcs_address, [("class_name", "=", "PreemptionWatcher")]
    assert list_actors(address=where, filters=asked) == []  # draining is up to our watchdog
    assert train("next") == [1, 2, 3]
    assert pids("next") == first
    assert pids("stopped") <= first  # the second worker may find the first one's epoch in the checkpoint
    assert {epoch for name, epoch, _, _ in umpire.heard if name == "stopped"} == {1}

    *epochs, why = train("broken", kind="broken")  # begun twice, and both times from its start or its first epoch
    assert set(epochs) == {1}  # the second time, it goes on from there
    assert "the toy is broken" in why
    assert train("after") == [1, 2, 3]
    assert not pids("after") & first

    assert not group.ended
    group.close()
    ray.wait([group.end], timeout=60)
    assert group.ended
    with pytest.raises(worker_group.WorkerGroupEndedError):
        train("closed")
