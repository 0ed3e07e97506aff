"""What Tune is given of a search; no Ray cluster is started."""

import pytest
import toy
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from grainmill.config.experiment import experiment_model
from grainmill.execution.searcher import Scheduler, StudySearcher
from grainmill.search.asha import ASHA
from grainmill.search.study import Study

HEIGHTS = {"height": {"uniform": [0.0, 1.0]}}


def opened(tmp_path, trials=5, **changes):
    content = {"name": "toy", "trainable": "toy", "data": {}, "space": HEIGHTS, "objective": {"score": "max"}}
    checked = experiment_model(toy).model_validate({**content, **changes})
    return Study(f"sqlite:///{tmp_path / 'study.db'}", "trial", checked, checked.first, trials)


def searcher(study, spent=lambda: False):
    return StudySearcher(study, ASHA(study.experiment, study.records), spent)


def report(study, number, epoch, score):
    study.report(number, {"epoch": epoch, "score": score, "cost": 1.0})


def numbers(made, letters):
    return [made.suggest(letter)["number"] for letter in letters]


def test_suggestion_is_the_whole_settings_of_a_trial(tmp_path):
    made = searcher(opened(tmp_path, base={"epochs": 7}))
    expected = toy.Spec(epochs=7)
    assert made.suggest("a") == {"number": 0, "spec": expected}


def test_reopened_study_hands_out_what_was_running_first_under_the_same_number(tmp_path):
    before = opened(tmp_path)
    before.ask(), before.ask()
    report(before, 0, 4, 0.5)
    before.close(0, False)
    report(before, 1, 1, 0.5)
    made = searcher(opened(tmp_path))
    assert not made.finished
    first = made.suggest("a")
    assert first["number"] == 1
    assert first["spec"].height == before.record(1).setting["height"]
    assert before.record(1).interruptions == ("in epoch 2: the command ended",)
    assert numbers(made, "bcd") == [2, 3, 4]
    assert made.suggest("e") == Searcher.FINISHED
    assert [record.interruptions for record in before.records if record.number != 1] == [(), (), (), ()]


def test_study_whose_trials_all_ended_is_finished(tmp_path):
    study = opened(tmp_path, trials=1)
    study.ask()
    report(study, 0, 4, 0.5)
    study.close(0, False)
    assert searcher(opened(tmp_path, trials=1)).finished


def test_no_more_is_given_when_the_budget_is_spent(tmp_path):
    left = [True, False]
    made = searcher(opened(tmp_path), spent=lambda: not left)
    assert numbers(made, "ab") == [0, 1]
    left.clear()
    assert made.finished
    assert made.suggest("c") == Searcher.FINISHED


PAUSING = {"base": {"epochs": 4}, "search": {"losers": "pause", "grace_epochs": 1, "reduction": 2}}


def test_paused_trial_goes_on_under_its_number_once_it_is_among_the_best(tmp_path):
    study = opened(tmp_path, trials=4, **PAUSING)
    made = searcher(study)
    assert numbers(made, "abcd") == [0, 1, 2, 3]
    for number, score in enumerate([0.9, 0.5, 0.4, 0.1]):
        report(study, number, 1, score)
        verdict = made.asha.judge(study.record(number))
        # Of two at the rung the better one goes on, of three and of four the better two.
        assert verdict == ("continue" if number == 0 else "pause"), number
        if verdict == "pause":
            study.note(number, "paused", True)
            made.on_trial_complete("abcd"[number])
        if number == 2:
            assert study.record(1).state == "paused"
    assert numbers(made, "e") == [1]  # 0.5 is the second of four by now
    assert study.record(1).state == "running"
    assert made.suggest("f") is None  # what runs can still change the order
    made.on_trial_complete("a"), made.on_trial_complete("e")
    assert made.suggest("g") == Searcher.FINISHED


@pytest.mark.parametrize(("goes_on", "decision"), [(True, TrialScheduler.CONTINUE), (False, TrialScheduler.STOP)])
def test_scheduler_does_as_it_is_told(goes_on, decision):
    heard = []
    made = Scheduler(lambda trial, result: heard.append((trial, result)) or goes_on)
    assert made.on_trial_result(None, "trial", {"epoch": 1}) == decision
    assert heard == [("trial", {"epoch": 1})]
