"""What the clerk makes of a group whose number of workers changes."""

from types import SimpleNamespace

import pytest
import toy

from grainmill import clerk
from grainmill.experiment import Resources, experiment_model
from grainmill.halving import Halving
from grainmill.study import Study
from grainmill.worker import Plan


@pytest.fixture
def at_work(tmp_path, watch, monkeypatch):
    """A function that lets seconds go by, and has a trial of two to four workers, two CPUs each, say something."""
    content = {"name": "toy", "trainable": "toy", "data": {}, "objective": {"score": "max"}}
    study = Study(f"sqlite:///{tmp_path}/study.db", "trial", experiment_model(toy).model_validate(content), [{}], 1)
    trial = SimpleNamespace(config={"number": study.ask().number})
    plan = Plan("trial", "toy", {}, str(tmp_path), Resources(cpus_per_worker=2), (2, 4))
    outbox, listener = SimpleNamespace(put=lambda _, works: works), SimpleNamespace(heard=lambda: None)
    now = [1000.0]
    monkeypatch.setattr(clerk, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made = clerk.Clerk(plan, study, Halving(study.experiment, ()), outbox, watch, listener)
    made.on_trial_start(0, [], trial)

    def say(seconds, **message):
        now[0] += seconds
        assert made.goes_on(trial, message)
        return made._cost(0)["cpu_seconds"]

    return say


def test_trial_costs_what_really_worked_for_it(at_work, watch):
    assert at_work(10, workers=4, place=None) == 10 * 2 * 2  # until then, room was kept for two
    assert at_work(5, workers=3, place=None) == 40 + 5 * 4 * 2
    assert at_work(60, waiting="for a node") == 80 + 60 * 3 * 2
    assert at_work(600, workers=2, place=None) == 440  # nothing worked meanwhile
    epoch = {"reported": ["epoch", "score"], "variants": "{}", "epoch": 1, "score": 0.5}
    assert at_work(1, **epoch) == 440 + 1 * 2 * 2
    notes = [f"trial-0000: {count} of up to 4 workers" for count in (4, 3, 2)]
    assert watch.notes == [*notes[:2], "for a node", notes[2]]
