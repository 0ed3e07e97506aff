"""Recording of a trial whose number of workers changes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import toy

from grainmill.config.experiment import experiment_model
from grainmill.config.resources import Resources
from grainmill.execution import trial_callback
from grainmill.execution.training_job import StudySetup
from grainmill.messages import EpochReport, NodeLeaving, WaitingForResources, WorkersStarted, encode
from grainmill.search.asha import ASHA
from grainmill.search.study import Study


@pytest.fixture
def group(tmp_path, observer, monkeypatch):
    """A trial of two to four workers, two CPUs each, and its callback; `say`: the trial sends a message."""
    content = {"name": "toy", "trainable": "toy", "data": {}, "objective": {"score": "max"}}
    study = Study(f"sqlite:///{tmp_path}/study.db", "trial", experiment_model(toy).model_validate(content), [{}], 1)
    trial = SimpleNamespace(config={"number": study.ask().number})
    plan = StudySetup("trial", "toy", toy.Data(), str(tmp_path), Resources(cpus_per_worker=2), (2, 4))
    mlflow_sync, listener = SimpleNamespace(enqueue=lambda _, running: running), SimpleNamespace(poll=lambda: None)
    now = [1000.0]
    monkeypatch.setattr(trial_callback, "time", SimpleNamespace(monotonic=lambda: now[0]))
    released = []
    monkeypatch.setattr(trial_callback.placement, "free_orphaned", lambda: released.append(now[0]))
    made = trial_callback.TrialCallback(plan, study, ASHA(study.experiment, ()), mlflow_sync, observer, listener)
    made.on_trial_start(0, [], trial)

    def say(seconds, message):
        now[0] += seconds
        assert made.receive(trial, encode(message))
        return made._cost(0)["cpu_seconds"]

    return SimpleNamespace(say=say, callback=made, study=study, trial=trial, released=released)


EPOCH = EpochReport(1, {"epoch": 1, "score": 0.5}, {})


def test_trial_costs_what_really_worked_for_it(group, observer):
    assert group.say(10, WorkersStarted(4, None)) == 10 * 2 * 2  # until then, room was kept for two
    assert group.say(5, WorkersStarted(3, None)) == 40 + 5 * 4 * 2
    assert group.say(60, WaitingForResources("for a node")) == 80 + 60 * 3 * 2
    assert group.released == [1075.0]  # where it waits, room that the dead have taken is given back
    assert group.say(600, WorkersStarted(2, None)) == 440  # nothing worked meanwhile
    assert group.say(1, EPOCH) == 440 + 1 * 2 * 2
    notes = [f"trial-0000: {count} of up to 4 workers" for count in (4, 3, 2)]
    again = "trial-0000: its workers began again in epoch 1; goes on from its last checkpoint"
    assert observer.notes == [*notes[:2], again, "for a node", notes[2], again]


def test_hardware_is_that_of_the_workers_that_trained_last(group):
    group.say(1, replace(EPOCH, hardware={"gpu": "old card"}))
    group.say(1, replace(EPOCH, epoch=2, metrics={"epoch": 2, "score": 0.5}, hardware={"gpu": "new card"}))
    group.say(1, replace(EPOCH, epoch=3, metrics={"epoch": 3, "score": 0.5}))
    assert group.study.record(0).hardware == {"gpu": "new card"}


def test_what_cut_a_group_short_is_told_once_each_time(group, observer):
    group.say(1, WorkersStarted(4, None))
    group.say(1, EPOCH)
    group.say(1, NodeLeaving())
    group.say(1, WorkersStarted(4, None))
    group.say(1, WorkersStarted(4, None))
    group.callback.on_trial_start(0, [], group.trial)  # by Tune, after the trial's process has died
    group.say(1, WorkersStarted(4, None))
    # That a trial pauses and goes on is none.
    group.study.note(0, "paused", True)
    group.callback.on_trial_complete(0, [], group.trial)
    group.study.note(0, "paused", False)
    group.callback.on_trial_start(0, [], group.trial)
    group.say(1, WorkersStarted(4, None))
    assert group.released == []
    group.callback.end_unfinished()
    assert group.released == [1007.0]  # or a node would not go
    why = ["its node was taken away", "its workers began again", "its process died"]
    assert group.study.record(0).interruptions == tuple(f"in epoch 2: {one}" for one in why)
