"""The record of a search."""

import math
import sqlite3
from itertools import product

import optuna
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from toy_settings import experiment

from grainmill.config.space import Parameter, grid, resolve
from grainmill.errors import StorageError
from grainmill.search.study import Study


def study(tmp_path, name="trial", trials=5, first=None, **changes):
    checked = experiment(**changes)
    return Study(
        f"sqlite:///{tmp_path / 'study.db'}", name, checked, checked.first if first is None else [first], trials
    )


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
    made = study(tmp_path, trials=41, space={"height": {"loguniform": [1e-4, 1.0]}}, search={"sampler": "random"})
    values = [made.ask().setting["height"] for _ in range(41)][1:]
    below = sum(math.log10(value) < -2 for value in values)
    assert 8 <= below <= 32  # half of 40, four standard deviations either way


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


def test_study_in_which_all_failed_begins_again_with_its_first_setting(tmp_path):
    made = study(tmp_path, trials=2, first={"height": 0.25})
    for number in range(2):
        made.ask()
        made.close(number, failed=True)
    for _ in range(2):  # opening it does nothing by itself
        again = study(tmp_path, trials=2, first={"height": 0.25})
    assert again.remaining == 2
    assert again.ask().setting == {"height": 0.25}
    assert again.ask().setting != {"height": 0.25}
    assert again.ask() is None


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


@pytest.mark.parametrize("broken", [0, 2])
def test_a_setting_of_a_grid_that_failed_is_tried_again_when_the_run_is_carried_on(broken, tmp_path):
    made = grid_study(tmp_path)
    for number in range(4):
        made.ask()
        run(made, number, epochs=4)
        made.close(number, failed=number == broken)
    again = grid_study(tmp_path)
    assert again.remaining == 1
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
    assert made.ask() is None
    made = grid_study(tmp_path)
    assert points([made.ask() for _ in range(4)]) == GRID_SETTINGS
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


def test_a_grid_that_was_cut_short_goes_on_with_what_is_left(tmp_path):
    made = grid_study(tmp_path)
    made.ask(), made.ask()
    run(made, 0, epochs=4)
    made.close(0, False)
    again = grid_study(tmp_path)
    assert [again.ask().number for _ in range(2)] == [2, 3]
    assert again.ask() is None
    assert points(again.records) == GRID_SETTINGS


def test_what_failed_is_not_made_up_for_before_the_run_is_carried_on(tmp_path):
    made = study(tmp_path, trials=2)
    for number in range(2):
        made.ask()
        made.close(number, failed=True)
    assert made.remaining == 0
    assert made.ask() is None


def test_first_settings_are_tried_in_turn_after_the_published_one(tmp_path):
    made = study(tmp_path, search={"first": [{"height": 0.125}, {"height": 7.0}]})
    assert [made.ask().setting["height"] for _ in range(3)] == [0.5, 0.125, 7.0]
    assert made.ask().setting["height"] not in (0.5, 0.125, 7.0)


def test_first_setting_that_failed_is_tried_again_when_the_run_is_carried_on(tmp_path):
    made = study(tmp_path, trials=3, search={"first": [{"height": 0.125}]})
    for number in range(3):
        made.ask()
        run(made, number, epochs=4)
        made.close(number, failed=number == 1)
    again = study(tmp_path, trials=3, search={"first": [{"height": 0.125}]})
    assert again.ask().setting == {"height": 0.125}
    assert again.ask() is None


def test_first_setting_is_not_lost_where_a_process_died_while_it_was_given_out(tmp_path, monkeypatch):
    made = study(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grainmill.search.study.resolve", killed)
        with pytest.raises(KeyboardInterrupt):
            made.ask()
    again = study(tmp_path)
    assert {again.ask().setting["height"] for _ in range(5)} > {0.5}
    assert again.ask() is None
    assert states(tmp_path).count(TrialState.FAIL) == 1


def test_settings_beside_the_space_are_kept(tmp_path):
    made = study(tmp_path, trials=1, space={}, first={"height": 0.25, "seed": 3})
    assert made.ask().setting == {"height": 0.25, "seed": 3}


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc", "random"])
@pytest.mark.parametrize("objective", [{"score": "max"}, {"score": "max", "cost": "min"}])
def test_every_sampler_draws_settings_of_a_conditional_space_under_constraints(sampler, objective, tmp_path):
    space = {
        "kind": {"choice": ["plain", "nan"]},
        "height": {"uniform": [0.6, 0.9], "when": {"kind": ["nan"]}, "otherwise": 0.1},
        "epochs": {"int": [1, 3]},
    }
    made = study(
        tmp_path,
        "trial",
        14,
        space=space,
        objective=objective,
        search={"sampler": sampler},
        constraints={"cost": {"max": 0.5}},
    )
    for number in range(14):
        asked = made.ask().setting
        assert asked["height"] == 0.1 if asked["kind"] == "plain" else number == 0 or 0.6 <= asked["height"] <= 0.9
        if number < 12:  # the last two run beside each other
            made.report(number, {"epoch": 4, "score": asked["height"], "cost": asked["height"]})
            assert made.close(number, failed=False) == "complete"


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_samplers_with_a_model_find_the_better_half_of_a_range(sampler, tmp_path):
    made = study(tmp_path, trials=30, search={"sampler": sampler})
    heights = []
    for number in range(30):
        height = made.ask().setting["height"]
        heights.append(height)
        made.report(number, {"epoch": 4, "score": -((height - 0.9) ** 2), "cost": 1.0})
        made.close(number, failed=False)
    assert sum(height > 0.7 for height in heights[15:]) >= 10  # 4.5 of 15 by chance


def test_samplers_learn_nothing_good_of_a_trial_that_was_stopped(tmp_path):
    """Stopped trials claim far better values than complete ones ever reach; they must not attract the sampler."""
    made = study(tmp_path, trials=40, objective={"score": "max", "cost": "min"})
    later = []
    for number in range(40):
        height = made.ask().setting["height"]
        low = height < 0.5
        made.report(number, {"epoch": 1 if low else 4, "score": 100.0 if low else height, "cost": -height})
        assert made.close(number, failed=False) == ("stopped" if low else "complete")
        later.append(low)
    assert sum(later[20:]) <= 6  # half of 20 by chance


def test_earlier_search_is_learnt_from_and_its_trials_are_not_ours(tmp_path):
    (tmp_path / "earlier").mkdir()
    earlier = study(tmp_path / "earlier", trials=4, space={"height": {"uniform": [0.0, 2.0]}})
    for number in range(4):
        earlier.ask()
        run(earlier, number, epochs=4 if number else 2)
        earlier.close(number, failed=False)
    made = study(tmp_path, trials=2)
    for _ in range(2):  # the second time changes nothing
        made.adopt(earlier.url, "trial")
    stored = optuna.load_study(study_name="trial", storage=made.url)
    adopted = [trial for trial in stored.trials if "adopted" in trial.user_attrs]
    assert [trial.values for trial in adopted] == [[2.0]] * 3
    heights = [record.setting["height"] for record in earlier.records[1:]]
    assert [trial.params for trial in adopted] == [{"height": h} if h <= 1 else {} for h in heights]
    assert made.records == []
    assert [made.ask().setting["height"] == 0.5, made.ask() is None, made.ask()] == [True, False, None]


def test_warm_start_from_a_search_of_another_objective_or_from_none_is_refused(tmp_path):
    (tmp_path / "earlier").mkdir()
    earlier = study(tmp_path / "earlier", objective={"cost": "min"})
    made = study(tmp_path)
    with pytest.raises(StorageError, match=r"same objective, score, but 'trial' has cost; set search.warm_start"):
        made.adopt(earlier.url, "trial")
    with pytest.raises(StorageError, match=r"no study 'final' at sqlite.*; set search.warm_start"):
        made.adopt(earlier.url, "final")


def test_cost_is_what_was_noted_or_what_the_last_epoch_said(tmp_path):
    made = study(tmp_path)
    made.ask(), made.ask()
    made.report(0, {"epoch": 1, "score": 1.0, "cost": 1.0, "cpu_seconds": 5.0, "gpu_seconds": 0.0})
    assert made.record(0).cost == {"cpu_seconds": 5.0, "gpu_seconds": 0.0}
    made.note(0, "cost", {"cpu_seconds": 6.0, "gpu_seconds": 0.0})
    assert made.record(0).cost == {"cpu_seconds": 6.0, "gpu_seconds": 0.0}
    assert made.record(1).cost == {}


def test_database_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    made = study(tmp_path)
    made.ask()
    pauses, answer = [], made._study._storage.get_trial
    monkeypatch.setattr("grainmill.search.study.time.sleep", pauses.append)

    def away(*args, **kwargs):
        if len(pauses) < 3:
            raise StorageInternalError("gone")
        return answer(*args, **kwargs)

    monkeypatch.setattr(made._study._storage, "get_trial", away)
    assert made.record(0).number == 0
    assert pauses == [0.5, 1, 2]


def test_database_that_stays_away_is_named_without_its_password(tmp_path, monkeypatch):
    made = study(tmp_path)
    monkeypatch.setattr("grainmill.search.study.time.sleep", lambda _: None)

    def away(*args, **kwargs):
        raise StorageInternalError("gone")

    monkeypatch.setattr(made._study._storage, "get_all_trials", away)
    made.url = "postgresql://me:secret@host/name"
    with pytest.raises(StorageError, match=r"must answer at postgresql://me:\*\*\*@host/name, but does not \(gone\)"):
        made.ask()


def test_database_of_another_version_of_optuna_is_refused_and_left_alone(tmp_path):
    study(tmp_path)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("update alembic_version set version_num = 'v0.9.0.a'")
    database.close()
    with pytest.raises(StorageError, match=r"must be of this Optuna, .*optuna storage upgrade"):
        study(tmp_path)
