"""Pictures of a search."""

import warnings

import matplotlib
import optuna
import pytest
import toy
from matplotlib import pyplot
from matplotlib.figure import Figure

from grainmill.config.experiment import experiment_model
from grainmill.registry.models import Version
from grainmill.report import charts, optuna_plots
from grainmill.report import page as report
from grainmill.search.selection import best, candidates
from grainmill.search.study import Study

SPACE = {"height": {"loguniform": [0.01, 1.0]}, "kind": {"choice": ["plain", "nan"]}, "seed": {"int": [0, 99]}}


def searched(tmp_path, trials=7, **changes):
    """A search of which the trials 3 and 4 were stopped, and 5 failed."""
    content = {"name": "toy", "trainable": "toy", "data": {}, "objective": {"score": "max"}, "space": SPACE}
    checked = experiment_model(toy).model_validate({**content, "search": {"sampler": "random"}, **changes})
    study = Study(f"sqlite:///{tmp_path / 'study.db'}", "trial", checked, checked.first, trials)
    for number in range(trials):
        height = float(study.ask().setting.get("height", 1.0))
        for epoch in range(1, 3 if number in (3, 4, 5) else 5):
            row = {"epoch": epoch, "score": height * epoch, "cost": height, "cpu_seconds": 1.0 * epoch}
            study.report(number, row | {"gpu_seconds": 0.0})
        if number == 0:
            study.note(number, "variants", {"twice": {"score": 9.0}})
        study.close(number, failed=number == 5)
    return checked, study, best(checked, study.records)[0]


@pytest.fixture
def figures(monkeypatch):
    """All figures that are saved, in order."""
    seen, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (seen.append(self), save(self, *args, **kw)))
    return seen


def by_name(made):
    return {picture.name: picture for picture in made}


def test_search_has_all_its_pictures_and_leaves_pyplot_as_it_was(tmp_path):
    mine = pyplot.figure()
    before = dict(matplotlib.rcParams)
    made = optuna_plots.charts_of(*searched(tmp_path, objective={"score": "max", "cost": "min"}))
    names = ["front", "curves", "space", "importances", "coordinates", "contour", "timeline"]
    assert [picture.name for picture in made] == names
    assert all(picture.png.startswith(b"\x89PNG") for picture in made)
    assert pyplot.get_fignums() == [mine.number]
    assert {key: value for key, value in matplotlib.rcParams.items() if value != before[key]} == {}
    pyplot.close(mine)


def test_one_objective_has_no_front_and_no_space_has_no_parameters(tmp_path):
    made = optuna_plots.charts_of(*searched(tmp_path, trials=2, space={}))
    assert [picture.name for picture in made] == ["curves", "timeline"]


def test_too_few_complete_trials_say_nothing_of_the_parameters(tmp_path):
    made = by_name(optuna_plots.charts_of(*searched(tmp_path, trials=2)))
    for name in ("importances", "coordinates", "contour"):
        assert made[name].png is None
        assert made[name].text == "left out: it takes 3 complete trials, got 2"


def test_one_parameter_is_not_compared(tmp_path):
    made = by_name(optuna_plots.charts_of(*searched(tmp_path, space={"height": SPACE["height"]})))
    for name in ("importances", "coordinates", "contour"):
        assert made[name].png is None
        assert "it takes 2 searched parameters, got 1" in made[name].text


def test_map_needs_two_numeric_parameters(tmp_path):
    made = by_name(
        optuna_plots.charts_of(*searched(tmp_path, space={name: SPACE[name] for name in ("height", "kind")}))
    )
    assert made["contour"].png is None
    assert "numeric" in made["contour"].text
    assert made["importances"].png


def test_importance_of_equal_trials_is_left_out(tmp_path):
    checked, study, winner = searched(tmp_path)
    subject = charts.Subject(checked, study.records, winner)
    stored = optuna.load_study(study_name="trial", storage=study.url)
    complete = [trial for trial in stored.trials if trial.value is not None and trial.state.name == "COMPLETE"]
    for trial in complete:
        trial.value = 1.0
    assert "equally good" in optuna_plots._importances(subject, complete).text


@pytest.mark.parametrize("way", ["max", "min"])
def test_importance_of_several_objectives_heeds_their_directions(way, tmp_path):
    checked, study, winner = searched(tmp_path, trials=12, objective={"score": way, "cost": "min"})
    stored = optuna.load_study(study_name="trial", storage=study.url)
    complete = [trial for trial in stored.trials if trial.state.name == "COMPLETE"]
    made = optuna_plots._study(charts.Subject(checked, study.records, winner), complete, 2, negated=True)
    assert [direction.name for direction in made.directions] == ["MINIMIZE", "MINIMIZE"]
    sign = -1 if way == "max" else 1
    assert [trial.values for trial in made.trials] == [[sign * trial.values[0], trial.values[1]] for trial in complete]
    assert made.metric_names == ["score", "cost"]


def test_curves_end_in_a_mark_where_trials_ended_and_rungs_are_thin_lines(tmp_path, figures):
    checked, study, winner = searched(tmp_path, search={"grace_epochs": 2, "sampler": "random"})
    charts.curves(charts.Subject(checked, study.records, winner))
    lines = figures[0].axes[0].lines
    rungs = [line for line in lines if list(line.get_xdata()) == [2, 2]]
    assert [line.get_linestyle() for line in rungs] == [":"]
    marks = [(line.get_xdata()[0], line.get_marker()) for line in lines if len(line.get_xdata()) == 1]
    assert sorted(marks) == sorted([(4, "o")] * 4 + [(2, "x")] * 2 + [(2, "X")])


def test_front_marks_variants_winner_and_published_setting(tmp_path, figures):
    checked, study, _ = searched(tmp_path, objective={"score": "max", "cost": "min"})
    winner = study.record(1)
    made = charts.front(charts.Subject(checked, study.records, winner))
    ax = figures[0].axes[0]
    points = [line for line in ax.lines if line.get_linestyle() == "None"]
    at = {(float(p.get_xdata()[0]), float(p.get_ydata()[0])): p for p in points}
    assert len(points) == 5  # four complete trials and a variant
    first = study.record(0)
    variant = at[9.0, first.metrics["cost"]]
    assert (variant.get_marker(), variant.get_markeredgecolor()) == ("D", "black")
    published = at[first.metrics["score"], first.metrics["cost"]]
    assert published.get_markerfacecolor() == charts.COLOURS["published setting"]
    assert published.get_markeredgecolor() != "black"  # its own variant is better
    assert at[winner.metrics["score"], winner.metrics["cost"]].get_marker() == "*"
    assert "0" in [text.get_text() for text in ax.texts]
    assert made.title == "Pareto front"


def test_front_of_four_objectives_shows_pairs_of_three(tmp_path, figures):
    objective = {"score": "max", "cost": "min", "cpu_seconds": "min", "gpu_seconds": "min"}
    checked, study, winner = searched(tmp_path, objective=objective)
    assert "first three" in charts.front(charts.Subject(checked, study.records, winner)).text
    labels = [(ax.get_xlabel().split()[0], ax.get_ylabel().split()[0]) for ax in figures[0].axes]
    assert labels == [("score", "cost"), ("score", "cpu_seconds"), ("cost", "cpu_seconds")]
    assert figures[0].axes[1].get_ylabel() == "cpu_seconds / s (smaller is better)"


def test_space_shows_a_parameter_only_where_it_was_searched(tmp_path, figures):
    space = {**SPACE, "height": {"uniform": [0.0, 1.0], "when": {"kind": ["plain"]}, "otherwise": 0.1}}
    checked, study, winner = searched(tmp_path, space=space)
    charts.space(charts.Subject(checked, study.records, winner))
    plain = sum(record.setting["kind"] == "plain" for record in study.records)
    assert [len(ax.lines) for ax in figures[0].axes] == [plain, 7, 7]
    assert 0 < plain < 7


def test_timeline_has_a_bar_for_each_trial_and_none_for_adopted_ones(tmp_path, figures):
    (tmp_path / "earlier").mkdir()
    _, earlier, _ = searched(tmp_path / "earlier")
    checked, study, winner = searched(tmp_path)
    study.adopt(earlier.url, "trial")
    optuna_plots.charts_of(checked, study, winner)
    (bars,) = [figure.axes[0].patches for figure in figures if figure.axes[0].get_xlabel() == "time"]
    assert [round(bar.get_y() + bar.get_height() / 2) for bar in bars] == list(range(7))
    shown = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars]
    assert shown[3:6] == [charts.COLOURS["stopped"]] * 2 + [charts.COLOURS["failed"]]


def test_loss_weight_and_p_have_the_map_before_all_others():
    def trial(**params):
        kinds = {name: optuna.distributions.FloatDistribution(0, 9) for name in params}
        return optuna.trial.create_trial(params=params, distributions=kinds, value=params["other"])

    trials = [trial(**{"loss.weight": x, "model.p": 1.0 * (x > 1), "other": x}) for x in (1.0, 2.0, 3.0)]
    study = optuna.create_study()
    study.add_trials(trials)
    assert optuna_plots._pair(study, trials) == ("loss.weight", "model.p")


def test_report_writes_the_page_and_its_pictures(tmp_path):
    checked, study, winner = searched(tmp_path)
    found = candidates([winner], [winner])
    with warnings.catch_warnings(action="error"):
        page, files = report.write(tmp_path, checked, study, [], found, found[0], Version("toy", "1"))
    assert page == tmp_path / "report.html"
    assert page.read_text().count("<img") == 6
    assert sorted((tmp_path / "report").iterdir()) == sorted(files)
    assert {file.stem for file in files} == {"curves", "space", "importances", "coordinates", "contour", "timeline"}
