"""The study and what it hands to Tune; no Ray cluster is started."""

import math
from itertools import product

import optuna
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from grainmill.experiment import experiment_model
from grainmill.search import Study, StudySearcher, build_scheduler
from grainmill.space import Parameter, grid, resolve

HEIGHTS = {"height": {"uniform": [0.0, 1.0]}}


def experiment(**changes):
    content = {"name": "toy", "trainable": "toy", "data": {}, "space": HEIGHTS, "objective": {"score": "max"}}
    return experiment_model(toy).model_validate({**content, **changes})


def study(tmp_path, name="trial", trials=5, first=None, **changes):
    checked = experiment(**changes)
    return Study(tmp_path / "study.db", name, checked, checked.reference if first is None else first, trials)


def run(made, number, epochs, height=0.5):
    for epoch in range(1, epochs + 1):
        made.report(number, {"epoch": epoch, "score": height * epoch, "cost": 1.0})


def states(tmp_path, name="trial"):
    stored = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 'study.db'}")
    return [trial.state for trial in stored.trials]


def test_first_trial_has_the_published_setting_and_the_others_stay_in_the_space(tmp_path):
    made = study(tmp_path)
    heights = [made.ask().setting["height"] for _ in range(5)]
    assert heights[0] == toy.Spec().height
    assert all(0 <= height <= 1 for height in heights)
    assert len(set(heights)) == 5


def test_no_more_trials_than_asked_for(tmp_path):
    made = study(tmp_path, trials=2)
    assert [made.ask() is None for _ in range(3)] == [False, False, True]


def test_first_setting_outside_the_space_is_kept_from_the_sampler(tmp_path):
    made = study(tmp_path, space={"height": {"uniform": [0.6, 0.9]}})
    assert made.ask().setting == {"height": 0.5}
    stored = optuna.load_study(study_name="trial", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert stored.trials[0].params == {}


def test_inactive_parameter_has_its_fixed_value_and_is_not_sampled(tmp_path):
    space = {
        "kind": {"choice": ["plain", "nan"]},
        "height": {"uniform": [0.6, 0.9], "when": {"kind": ["nan"]}, "otherwise": 0.1},
    }
    made = study(tmp_path, trials=20, space=space)
    settings = [made.ask().setting for _ in range(20)]
    assert {setting["height"] for setting in settings if setting["kind"] == "plain"} == {0.1}
    assert all(setting["height"] >= 0.6 for setting in settings[1:] if setting["kind"] == "nan")
    assert {setting["kind"] for setting in settings} == {"plain", "nan"}


@pytest.mark.parametrize(
    ("kind", "belongs"),
    [
        ({"loguniform": [1e-3, 1.0]}, lambda value: 1e-3 <= value <= 1),
        ({"int": [2, 4]}, lambda value: value in (2, 3, 4)),
        ({"choice": [0.25, 0.75]}, lambda value: value in (0.25, 0.75)),
    ],
)
def test_each_kind_of_parameter_is_drawn_from_its_range(tmp_path, kind, belongs):
    made = study(tmp_path, trials=12, space={"height": kind}, search={"sampler": "random"})
    values = [made.ask().setting["height"] for _ in range(12)][1:]
    assert all(map(belongs, values))
    assert len(set(values)) > 1


def test_log_ranges_are_drawn_evenly_in_the_logarithm(tmp_path):
    made = study(tmp_path, trials=101, space={"height": {"loguniform": [1e-4, 1.0]}}, search={"sampler": "random"})
    values = [made.ask().setting["height"] for _ in range(101)][1:]
    below = sum(math.log10(value) < -2 for value in values)
    assert 30 <= below <= 70  # half of 100, four standard deviations either way


def test_trial_that_stopped_early_is_pruned_and_one_at_full_length_complete(tmp_path):
    made = study(tmp_path)
    made.ask(), made.ask()
    run(made, 0, epochs=4)
    run(made, 1, epochs=2)
    assert [made.close(0, failed=False), made.close(1, failed=False)] == ["complete", "stopped"]
    assert states(tmp_path) == [TrialState.COMPLETE, TrialState.PRUNED]


def test_failed_and_not_finite_trials_fail_and_never_win(tmp_path):
    made = study(tmp_path)
    made.ask(), made.ask(), made.ask()
    run(made, 0, epochs=4)
    run(made, 1, epochs=4, height=math.nan)
    run(made, 2, epochs=4, height=9.0)
    made.note(2, "cause", "it broke")
    assert [made.close(0, False), made.close(1, False), made.close(2, True)] == ["complete", "failed", "failed"]
    assert made.best().number == 0
    assert made.record(2).cause == "it broke"


def test_closing_twice_changes_nothing(tmp_path):
    made = study(tmp_path)
    made.ask()
    run(made, 0, epochs=4)
    assert [made.close(0, False), made.close(0, True)] == ["complete", "complete"]


def test_an_epoch_is_taken_down_once(tmp_path):
    made = study(tmp_path)
    made.ask()
    row = {"epoch": 1, "score": 0.1, "cost": 1.0}
    assert [made.report(0, row), made.report(0, row), made.report(0, {**row, "epoch": 2})] == [True, False, True]
    assert [entry["epoch"] for entry in made.record(0).history] == [1, 2]


def test_best_of_several_objectives_is_by_the_first_then_by_the_next(tmp_path):
    made = study(tmp_path, objective={"score": "max", "cost": "min"}, search={"scheduler": "none"})
    for number, (score, cost) in enumerate([(0.5, 3.0), (0.7, 2.0), (0.7, 1.0), (0.6, 0.0)]):
        made.ask()
        made.report(number, {"epoch": 4, "score": score, "cost": cost})
        made.close(number, False)
    assert made.best().number == 2


def test_best_by_a_metric_that_should_be_small(tmp_path):
    made = study(tmp_path, objective={"cost": "min"})
    for number, cost in enumerate([3.0, 1.0, 2.0]):
        made.ask()
        made.report(number, {"epoch": 4, "score": 0.0, "cost": cost})
        made.close(number, False)
    assert made.best().number == 1


def test_without_a_complete_trial_there_is_no_best(tmp_path):
    made = study(tmp_path)
    made.ask()
    assert made.best() is None


def test_reopened_study_hands_out_what_was_running_first_under_the_same_number(tmp_path):
    made = study(tmp_path)
    made.ask(), made.ask()
    run(made, 0, epochs=4)
    made.close(0, False)
    run(made, 1, epochs=1)
    height = made.record(1).setting["height"]

    searcher = StudySearcher(study(tmp_path))
    assert searcher.open_trials == 4
    first = searcher.suggest("a")
    assert first["number"] == 1
    assert first["spec"]["height"] == height
    assert [searcher.suggest(letter)["number"] for letter in "bcd"] == [2, 3, 4]
    assert searcher.suggest("e") == Searcher.FINISHED


def test_study_in_which_all_failed_begins_again_with_its_first_setting(tmp_path):
    made = study(tmp_path, trials=2, first={"height": 0.25})
    for number in range(2):
        made.ask()
        made.close(number, failed=True)
    for _ in range(2):  # opening it does nothing by itself
        again = study(tmp_path, trials=2, first={"height": 0.25})
    assert StudySearcher(again).open_trials == 2
    assert again.ask().setting == {"height": 0.25}
    assert again.ask().setting != {"height": 0.25}
    assert again.ask() is None


def test_suggestion_is_the_whole_settings_of_a_trial(tmp_path):
    made = study(tmp_path, base={"epochs": 7})
    assert StudySearcher(made).suggest("a") == {"number": 0, "spec": {"epochs": 7, "height": 0.5, "kind": "plain"}}


def test_two_studies_share_a_file_without_mixing(tmp_path):
    one, other = study(tmp_path, "trial"), study(tmp_path, "final", trials=1, first={"height": 0.9})
    one.ask()
    assert other.ask().setting == {"height": 0.9}
    assert [len(one.records), len(other.records)] == [1, 1]


@given(st.lists(st.tuples(st.integers(2, 3), st.integers(0, 4), st.integers(0, 2)), max_size=5), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_grid_has_each_setting_of_a_space_once(drawn, turned):
    space = {}
    for size, parent, value in drawn:
        name, condition = f"p{len(space)}", {}
        if f"p{parent}" in space:
            values = space[f"p{parent}"].values
            condition = {"when": {f"p{parent}": [values[value % len(values)]]}, "otherwise": "none"}
        kind = {"int": [0, size - 1]} if size == 2 else {"choice": [0.5, "a", True]}
        space[name] = Parameter.model_validate({**kind, **condition})
    space = dict(reversed(space.items())) if turned else space
    combinations = product(*(parameter.values for parameter in space.values()))
    expected = []
    for values in combinations:
        setting = resolve(space, lambda name, _, values=values: values[list(space).index(name)])
        if setting not in expected:
            expected.append(setting)
    found = list(grid(space))
    assert len(found) == len(expected)
    assert [setting for setting in expected if setting not in found] == []


GRID = {
    "sampler": {"sampler": "grid"},
    "space": {
        "kind": {"choice": ["plain", "nan"]},
        "height": {"choice": [0.25, 0.5, 0.75], "when": {"kind": ["plain"]}, "otherwise": 0.1},
    },
}
GRID_SETTINGS = [("nan", 0.1), ("plain", 0.25), ("plain", 0.5), ("plain", 0.75)]


def grid_study(tmp_path, trials=4, space=GRID["space"]):
    return study(tmp_path, trials=trials, space=space, search=GRID["sampler"])


def points(records):
    return sorted((record.setting["kind"], record.setting["height"]) for record in records)


def test_a_grid_is_searched_whole_with_the_published_setting_first(tmp_path):
    made = grid_study(tmp_path)
    asked = [made.ask() for _ in range(4)]
    assert asked[0].setting == {"kind": "plain", "height": 0.5}
    assert points(asked) == GRID_SETTINGS
    assert made.ask() is None
    stored = optuna.load_study(study_name="trial", storage=f"sqlite:///{tmp_path / 'study.db'}")
    told = [{"kind": "nan"}, *({"kind": "plain", "height": height} for height in (0.25, 0.5, 0.75))]
    assert [params for params in told if params not in [trial.params for trial in stored.trials]] == []


def test_a_grid_without_the_published_setting_is_searched_whole_after_it(tmp_path):
    made = grid_study(tmp_path, trials=3, space={"height": {"choice": [0.6, 0.7]}, "kind": {"choice": ["plain"]}})
    asked = [made.ask() for _ in range(3)]
    assert asked[0].setting["height"] == 0.5
    assert points(asked) == [("plain", 0.5), ("plain", 0.6), ("plain", 0.7)]


def test_a_grid_that_was_cut_short_goes_on_with_what_is_left(tmp_path):
    made = grid_study(tmp_path)
    made.ask(), made.ask()
    run(made, 0, epochs=4)
    made.close(0, False)
    searcher = StudySearcher(grid_study(tmp_path))
    assert searcher.open_trials == 3
    assert [searcher.suggest(letter)["number"] for letter in "abc"] == [1, 2, 3]
    assert searcher.suggest("d") == Searcher.FINISHED
    assert points(searcher.study.records) == GRID_SETTINGS


@pytest.mark.parametrize("broken", [0, 2])
def test_a_setting_of_a_grid_that_failed_is_tried_again_when_the_run_is_carried_on(broken, tmp_path):
    made = grid_study(tmp_path)
    for number in range(4):
        made.ask()
        run(made, number, epochs=4)
        made.close(number, failed=number == broken)
    again = grid_study(tmp_path)
    assert StudySearcher(again).open_trials == 1
    assert again.ask().setting == made.record(broken).setting
    assert again.ask() is None


def test_the_published_setting_outside_a_grid_is_tried_again_too(tmp_path):
    space = {"height": {"choice": [0.6, 0.7]}}
    made = grid_study(tmp_path, trials=3, space=space)
    for number in range(3):
        made.ask()
        run(made, number, epochs=4)
        made.close(number, failed=number == 0)
    again = grid_study(tmp_path, trials=3, space=space)
    assert again.ask().setting == {"height": 0.5}
    assert again.ask() is None


def test_what_fails_in_a_grid_does_not_keep_the_others_from_being_tried(tmp_path):
    made = grid_study(tmp_path)
    asked = []
    for number in range(4):
        asked.append(made.ask())
        made.close(number, failed=True)
    assert points(asked) == GRID_SETTINGS
    again = [made.ask() for _ in range(4)]
    assert points(again) == GRID_SETTINGS
    assert made.ask() is None


def test_a_grid_of_which_all_failed_begins_again_outside_its_points(tmp_path):
    space = {"height": {"choice": [0.6, 0.7]}, "kind": {"choice": ["plain"]}}
    made = grid_study(tmp_path, trials=3, space=space)
    for number in range(3):
        made.ask()
        made.close(number, failed=True)
    again = grid_study(tmp_path, trials=3, space=space)
    assert points([again.ask() for _ in range(3)]) == [("plain", 0.5), ("plain", 0.6), ("plain", 0.7)]


def test_a_grid_that_was_killed_before_a_trial_was_given_out_loses_no_setting(tmp_path, monkeypatch):
    made = grid_study(tmp_path)
    made.ask()

    def killed():
        raise KeyboardInterrupt

    monkeypatch.setattr(made._study, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        made.ask()
    again = grid_study(tmp_path)
    asked = [again.ask() for _ in range(3)]
    assert points([*asked, again.record(0)]) == GRID_SETTINGS
    assert again.ask() is None


class _Trial:
    def __init__(self, number):
        self.config, self.trial_id, self.status = {"number": number}, str(number), "RUNNING"


def _decisions(scheduler, heights, epochs):
    """What the scheduler says to trials that report in turn, epoch after epoch, until they are stopped."""
    trials = [_Trial(number) for number in range(len(heights))]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    stopped = {}
    for epoch in range(1, epochs + 1):
        for trial, height in zip(trials, heights, strict=True):
            if trial in stopped:
                continue
            result = {"epoch": epoch, "score": height * epoch, "training_iteration": 1}
            if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                stopped[trial] = epoch
    return {trial.config["number"]: epoch for trial, epoch in stopped.items()}


def test_asha_counts_epochs_and_stops_the_weak_at_the_grace_epoch():
    checked = experiment(base={"epochs": 9}, search={"grace_epochs": 3, "reduction": 3})
    # Falling heights: at its rung each is worse than the best third of those before it.
    stopped = _decisions(build_scheduler(checked), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], epochs=8)
    assert stopped.keys() >= {3, 4, 5}
    assert set(stopped.values()) == {3}
    assert 0 not in stopped


def test_published_setting_is_never_stopped_however_weak():
    checked = experiment(base={"epochs": 9}, search={"grace_epochs": 1})
    scheduler = build_scheduler(checked)
    weak, strong = _Trial(0), [_Trial(number) for number in range(1, 7)]
    for trial in [*strong, weak]:
        scheduler.on_trial_add(None, trial)
    for trial in strong:
        scheduler.on_trial_result(None, trial, {"epoch": 1, "score": 0.9})
    assert scheduler.on_trial_result(None, weak, {"epoch": 1, "score": 0.0}) == TrialScheduler.CONTINUE
    last = _Trial(7)
    scheduler.on_trial_add(None, last)
    assert scheduler.on_trial_result(None, last, {"epoch": 1, "score": 0.0}) == TrialScheduler.STOP


def test_grace_is_a_third_of_the_epochs_by_default():
    checked = experiment(base={"epochs": 10})
    stopped = _decisions(build_scheduler(checked), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], epochs=9)
    assert set(stopped.values()) == {4}


def test_without_early_stopping_nothing_is_stopped():
    checked = experiment(search={"scheduler": "none"})
    assert type(build_scheduler(checked)) is FIFOScheduler
