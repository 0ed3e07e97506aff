"""Which trials go on, and which of them win."""

import math
from dataclasses import replace

import pytest
import toy

from grainmill.config.experiment import experiment_model
from grainmill.search.asha import ASHA, expected_epochs, forecast
from grainmill.search.records import TrialRecord


def experiment(epochs=9, **changes):
    space = {"height": {"uniform": [0.0, 9.0]}, "kind": {"choice": ["plain", "nan"]}}
    content = {"name": "toy", "trainable": "toy", "data": {}, "space": space, "objective": {"score": "max"}}
    return experiment_model(toy).model_validate({**content, "base": {"epochs": epochs}, **changes})


def record(number, rows, height=None, kind="plain"):
    """Rows: epoch -> score, or (score, cost)."""
    history = []
    for epoch, value in rows.items():
        score, cost = value if isinstance(value, tuple) else (value, 0.0)
        history.append({"epoch": float(epoch), "score": score, "cost": cost})
    setting = {"height": 1.0 + number if height is None else height, "kind": kind}
    return TrialRecord(number, "running", setting, tuple(history), (), None, {}, {})


def verdicts(asha, values, epoch=1, **kinds):
    return [asha.judge(record(number, {epoch: value})) for number, value in enumerate(values, 1)]


def test_of_those_at_a_rung_the_best_share_goes_on_and_at_least_one():
    asha = ASHA(experiment(search={"grace_epochs": 1, "reduction": 3}))
    # Positions 0; 1; 2; 1 of 4, which is within 4/3; 0.
    assert verdicts(asha, [5, 4, 3, 4.5, 6]) == ["continue", "stop", "stop", "continue", "continue"]


@pytest.mark.parametrize(
    ("search", "rungs"),
    [
        ({"grace_epochs": 1, "reduction": 3}, [1, 3]),
        ({"grace_epochs": 2, "reduction": 2}, [2, 4, 8]),
        ({}, [3]),
        ({"grace_epochs": 9}, []),
        ({"scheduler": "none"}, []),
    ],
)
def test_rungs_are_at_the_grace_times_powers_of_the_reduction_and_before_the_end(search, rungs):
    judged = []
    for epoch in range(1, 9):
        asha = ASHA(experiment(search=search))
        asha.judge(record(1, {epoch: 5.0}))
        if asha.judge(record(2, {epoch: 1.0})) == "stop":
            judged.append(epoch)
    assert judged == rungs


def test_published_setting_goes_on_however_weak_and_is_compared_with():
    asha = ASHA(experiment(search={"grace_epochs": 1}))
    assert asha.judge(record(1, {1: 0.9})) == "continue"
    assert asha.judge(record(0, {1: 0.0}, height=0.5)) == "continue"
    assert asha.judge(record(2, {1: 0.0})) == "stop"


def test_several_objectives_are_ranked_by_domination_and_a_new_end_of_the_front_goes_on():
    asha = ASHA(experiment(objective={"score": "max", "cost": "min"}, search={"grace_epochs": 1, "reduction": 2}))
    assert asha.judge(record(1, {1: (5.0, 5.0)})) == "continue"
    assert asha.judge(record(2, {1: (4.0, 6.0)})) == "stop"  # dominated
    assert asha.judge(record(3, {1: (1.0, 1.0)})) == "continue"  # the cheap end: second of three, within 3/2
    assert asha.judge(record(4, {1: (0.5, 1.5)})) == "stop"
    assert asha.judge(record(5, {1: (9.0, 0.5)})) == "continue"  # dominates all


def test_strata_are_judged_apart():
    asha = ASHA(experiment(search={"grace_epochs": 1, "stratify": "kind"}))
    assert asha.judge(record(1, {1: 9.0})) == "continue"
    assert asha.judge(record(2, {1: 1.0}, kind="nan")) == "continue"
    assert asha.judge(record(3, {1: 0.5}, kind="nan")) == "stop"


def test_search_that_is_carried_on_judges_by_what_was_seen_before():
    search = {"grace_epochs": 1, "reduction": 3}
    seen = [record(number, {1: value, 2: value, 3: value}) for number, value in enumerate([5.0, 4.0, 3.0], 1)]
    asha = ASHA(experiment(search=search), seen)
    assert asha.judge(record(4, {1: 4.9})) == "continue"  # second of four
    assert asha.judge(record(5, {1: 1.0})) == "stop"
    assert asha.judge(record(6, {1: 9.0, 2: 9.0, 3: 2.0})) == "stop"  # at the rung of epoch 3


def test_being_shown_an_epoch_again_changes_nothing():
    asha = ASHA(experiment(search={"grace_epochs": 1, "reduction": 2}))
    assert [asha.judge(record(1, {1: 5.0})) for _ in range(4)] == ["continue"] * 4
    assert asha.judge(record(2, {1: 4.0})) == "stop"


def test_paused_trial_is_promoted_when_enough_worse_ones_came_and_the_highest_rung_first():
    asha = ASHA(experiment(search={"grace_epochs": 1, "reduction": 2, "losers": "pause"}))
    assert verdicts(asha, [5.0, 4.0]) == ["continue", "pause"]
    paused = [record(2, {1: 4.0})]
    assert asha.promoted(paused) is None
    assert asha.judge(record(3, {1: 1.0})) == "pause"
    assert asha.promoted([*paused, record(3, {1: 1.0})]).number == 2  # second of three, within 3/2
    asha.judge(record(4, {1: 6.0, 2: 6.0}))
    asha.judge(record(5, {1: 6.0, 2: 5.0}))
    asha.judge(record(6, {1: 6.0, 2: 4.0}))
    higher = record(5, {1: 6.0, 2: 5.0})
    assert asha.promoted([*paused, higher]).number == 5
    assert asha.promoted([]) is None


def test_expected_epochs_are_those_of_ideal_halving():
    # The first trial has 9; of the 9 others all reach epoch 1, a third epoch 3, a ninth the end.
    checked = experiment(search={"trials": 10, "grace_epochs": 1, "reduction": 3})
    assert math.isclose(expected_epochs(checked), 9 + 9 * (1 + 2 / 3 + 6 / 9))
    assert expected_epochs(experiment(search={"trials": 10, "scheduler": "none"})) == 90


def test_forecast_takes_each_epoch_for_as_dear_as_those_of_the_trial():
    # 9 epochs took 1,800 seconds; 90 epochs take 18,000, which are 5 hours.
    checked = experiment(search={"trials": 10, "scheduler": "none"})
    known = replace(record(3, {9: 1.0}), cost={"cpu_seconds": 1800.0, "gpu_seconds": 0.0})
    assert forecast(checked, known) == "by trial 3, all 10 take about 5 CPU-hours"
