import re

import toy

from grainmill.experiment import experiment_model
from grainmill.registry import Version
from grainmill.report import counted, html
from grainmill.search import Record


def record(number, state="complete", height=0.5, epochs=4, cause=None, **setting):
    history = tuple({"epoch": epoch, "score": height * epoch, "top1": 0.25} for epoch in range(1, epochs + 1))
    return Record(number, state, {"height": height, **setting}, history, "run", cause)


def experiment(space=None, **changes):
    content = {"name": "apples", "trainable": "toy", "data": {}, "objective": {"score": "max"}}
    space = {"height": {"loguniform": [0.1, 1.0]}} if space is None else space
    return experiment_model(toy).model_validate({**content, "space": space, **changes})


def rows(page):
    """Text of all table cells, row by row."""
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr.*?</tr>", page)]


TRIALS = [
    record(0),
    record(1, "stopped", 0.25, 2),
    record(2, "failed", 0.75, 1, "<b>it broke</b>"),
    record(3, height=1.0),
]


def test_page_shows_every_trial_and_marks_the_winner_and_the_published_setting():
    page = html(experiment(), TRIALS, TRIALS[3], record(0, height=1.0), Version("apples", "7"))
    table = rows(page)
    assert ["0", "complete", "4", "2", "0.25", "0.5"] in table
    assert ["1", "stopped", "2", "0.5", "0.25", "0.25"] in table
    assert ["3", "complete", "4", "4", "0.25", "1"] in table
    assert re.search(r'<tr class="winner"><td>3<', page)
    assert re.search(r'<tr class="reference"><td>0<', page)
    assert "models:/apples/7" in page
    assert "4 trials: 2 complete, 1 stopped, 1 failed" in page


def test_published_setting_winner_and_second_training_stand_side_by_side():
    page = html(experiment(), TRIALS, TRIALS[3], record(0, height=0.9), Version("apples", "7"))
    table = rows(page)
    assert ["", "published setting", "winner", "trained again"] in table
    assert ["height", "0.5", "1", "0.9"] in table
    assert ["score", "2", "4", "3.6"] in table


def test_page_is_one_file_and_what_trials_say_is_escaped():
    page = html(experiment(), TRIALS, TRIALS[3], TRIALS[3], Version("apples", "7"))
    assert "<b>it broke" not in page
    assert "&lt;b&gt;it broke&lt;/b&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_choices_conditions_and_several_objectives_are_drawn():
    space = {"kind": {"choice": ["plain", "nan"]}, "height": {"uniform": [0.0, 1.0]}}
    several = experiment(space, objective={"score": "max", "top1": "max"}, search={"scheduler": "none"})
    trials = [record(number, kind=kind) for number, kind in enumerate(["plain", "nan", "broken"])]
    assert html(several, trials, trials[0], trials[0], Version("apples", "7")).count("data:image/png") == 2


def test_training_without_a_search_has_its_metrics_and_no_plots():
    page = html(experiment(), [TRIALS[0]], None, TRIALS[0], Version("apples", "7"))
    assert ["score", "2"] in rows(page)
    assert "<img" not in page


def test_trials_are_counted_by_their_end():
    assert counted(TRIALS[:1]) == "1 trial: 1 complete"
    assert counted(TRIALS) == "4 trials: 2 complete, 1 stopped, 1 failed"
