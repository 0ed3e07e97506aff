import math
import statistics

import pytest
import toy

from grainmill.config.experiment import experiment_model
from grainmill.search.records import TrialRecord
from grainmill.search.selection import best, candidates, choose, front, shipped

TWO = {"score": "max", "cost": "min"}
T_2, T_3 = 4.302653, 3.182446  # Student's t at 97.5 % for 2 and 3 degrees of freedom, from a printed table


def experiment(**changes):
    content = {"name": "toy", "trainable": "toy", "data": {}, "objective": {"score": "max"}}
    space = {"height": {"uniform": [0.0, 1.0]}}
    return experiment_model(toy).model_validate({**content, "space": space, **changes})


def record(number, score, cost=0.0, state="complete", variants=None, **setting):
    history = ({"epoch": 4.0, "score": score, "cost": cost},)
    return TrialRecord(number, state, setting or {"height": float(number)}, history, (), None, variants or {}, {})


def numbers(records):
    return [one.number for one in records]


def test_best_are_the_complete_trials_in_the_order_of_their_objective():
    records = [record(0, 0.5), record(1, 0.9, state="stopped"), record(2, 0.8), record(3, 0.9, state="failed")]
    assert numbers(best(experiment(), records)) == [2, 0]
    assert numbers(best(experiment(objective={"cost": "min"}), [record(0, 0, 3.0), record(1, 0, 1.0)])) == [1, 0]
    assert best(experiment(), []) == []


def test_the_front_comes_before_what_it_dominates_whatever_the_weights():
    records = [record(0, 0.9, 5.0), record(1, 0.5, 1.0), record(2, 0.89, 5.5)]
    # Weighted, trial 2 is worth 0.89 - 0.0055, more than trial 1 with 0.5 - 0.001; but trial 0 dominates it.
    weighted = experiment(objective=TWO, winner={"weights": {"cost": 0.001}})
    assert numbers(best(weighted, records)) == [0, 1, 2]
    assert numbers(best(experiment(objective=TWO), records)) == [1, 0, 2]


def test_trials_inside_the_constraints_come_first():
    records = [record(0, 0.9, 5.0), record(1, 0.5, 1.0), record(2, 0.7, 3.0)]
    assert numbers(best(experiment(constraints={"cost": {"max": 3.0}}), records)) == [2, 1, 0]
    assert numbers(best(experiment(constraints={"cost": {"min": 2.0}, "score": {"min": 0.8}}), records)) == [0, 2, 1]


def test_a_setting_is_a_candidate_once_whatever_its_seed():
    records = [record(0, 0.5, height=1.0, seed=1), record(1, 0.6, height=1.0, seed=2), record(2, 0.1, height=2.0)]
    assert numbers(best(experiment(), records)) == [1, 2]


def test_front_holds_trials_and_variants_that_nothing_dominates():
    records = [
        record(0, 0.5, 1.0, variants={"p4": {"score": 0.7}, "p5": {"score": 0.4}}),
        record(1, 0.9, 2.0, variants={"p4": {"score": math.nan}}),
        record(2, 0.65, 1.5),
        record(3, 2.0, 0.0, state="stopped"),
    ]
    found = front(experiment(objective=TWO), records)
    assert [(entry.record.number, entry.variant, entry.metrics["score"]) for entry in found] == [
        (1, None, 0.9),
        (0, "p4", 0.7),  # costs what its trial did
    ]
    assert front(experiment(), []) == []


def finals(*scores):
    """Trainings of candidates 0, 1, ... with seeds 1, 2, ..."""
    return [
        record(10 * index + seed, score, height=float(index), seed=seed)
        for index, group in enumerate(scores)
        for seed, score in enumerate(group, 1)
    ]


def trials(count):
    return [record(number, 0.5) for number in range(count)]


def test_interval_is_students_of_the_spread_inside_all_candidates():
    groups = [(0.8, 0.9), (0.5, 0.5, 0.8)]
    found = candidates(trials(2), finals(*groups))
    squares = sum((value - statistics.fmean(group)) ** 2 for group in groups for value in group)
    deviation = math.sqrt(squares / 3)  # five trainings less two means
    first, second = (one.estimates["score"] for one in found)
    assert (first.mean, second.mean) == pytest.approx((0.85, 0.6))
    assert first.half == pytest.approx(T_3 * deviation / math.sqrt(2), rel=1e-6)
    assert second.high - second.low == pytest.approx(2 * T_3 * deviation / math.sqrt(3), rel=1e-6)


def test_without_a_second_training_there_is_no_interval():
    (only,) = candidates([None], [record(0, 0.7, height=0.3)])
    assert only.estimates["score"].mean == 0.7
    assert math.isinf(only.estimates["score"].half)
    assert choose(experiment(), [only]) is only
    assert shipped(experiment(), only).number == 0


def test_training_that_failed_does_not_count_and_a_candidate_without_any_is_left_out():
    records = finals((0.8, 0.9, 0.7), (0.5,))
    records[1] = record(records[1].number, 9.9, state="failed", **records[1].setting)
    records[3] = record(records[3].number, 9.9, state="failed", **records[3].setting)
    (only,) = candidates(trials(2), records)
    assert only.estimates["score"].mean == pytest.approx(0.75)
    assert only.estimates["score"].half == pytest.approx(12.7062 * math.sqrt(0.005) / math.sqrt(2), rel=1e-5)


def test_better_lower_bound_wins_over_a_better_mean_of_fewer_trainings():
    found = candidates(trials(2), finals((0.80,), (0.785, 0.795, 0.775)))
    deviation = 0.01  # of (0.785, 0.795, 0.775), two degrees of freedom
    lows = [0.80 - T_2 * deviation, 0.785 - T_2 * deviation / math.sqrt(3)]
    assert [one.estimates["score"].low for one in found] == pytest.approx(lows, rel=1e-6)
    assert choose(experiment(), found) is found[1]


def test_objective_that_should_be_small_is_judged_by_its_upper_end():
    rows = [record(number, 0.0, cost, height=height, seed=number) for number, cost, height in [
        (1, 1.0, 0.0), (2, 2.0, 1.0), (3, 2.0, 1.0), (4, 2.5, 1.0),
    ]]  # fmt: skip
    found = candidates(trials(2), rows)
    assert choose(experiment(objective={"cost": "min"}), found) is found[0]
    assert choose(experiment(objective={"cost": "max"}), found) is found[1]


def test_constraints_hold_of_the_means_and_weights_decide_between_objectives():
    rows = [
        record(number, score, cost, height=height, seed=number)
        for number, score, cost, height in [
            (1, 0.9, 5.0, 0.0),
            (2, 0.9, 5.2, 0.0),
            (3, 0.5, 1.0, 1.0),
            (4, 0.5, 1.2, 1.0),
        ]
    ]
    found = candidates(trials(2), rows)
    assert choose(experiment(), found) is found[0]
    assert choose(experiment(constraints={"cost": {"max": 2.0}}), found) is found[1]
    assert choose(experiment(constraints={"cost": {"max": 0.5}}), found) is found[0]  # none is inside
    assert choose(experiment(objective=TWO), found) is found[1]
    assert choose(experiment(objective=TWO, winner={"weights": {"cost": 0.01}}), found) is found[0]


def test_the_best_training_of_the_winner_is_shipped():
    (only,) = candidates(trials(1), finals((0.7, 0.9, 0.8)))
    assert shipped(experiment(), only).setting["seed"] == 2
