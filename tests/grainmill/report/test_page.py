"""The page of a run."""

import math
import re
from dataclasses import replace

import toy

from grainmill.config.experiment import experiment_model
from grainmill.registry.models import Version
from grainmill.report.charts import Chart
from grainmill.report.page import costs, counted, front, html, rule, saved
from grainmill.search.records import TrialRecord
from grainmill.search.selection import Candidate, Estimate

VERSION = Version("apples", "7")


def record(number, state="complete", height=0.5, epochs=4, cause=None, cpu=3600.0, variants=(), **setting):
    history = tuple({"epoch": epoch, "score": height * epoch, "cost": 0.25} for epoch in range(1, epochs + 1))
    cost = {"cpu_seconds": cpu, "gpu_seconds": cpu / 2}
    return TrialRecord(number, state, {**setting, "height": height}, history, (), cause, dict(variants), cost)


def experiment(space=None, **changes):
    content = {"name": "apples", "trainable": "toy", "data": {}, "objective": {"score": "max"}}
    space = {"height": {"loguniform": [0.1, 1.0]}} if space is None else space
    return experiment_model(toy).model_validate({**content, "space": space, **changes})


def rows(page):
    """Text of all table cells, row by row."""
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr.*?</tr>", page)]


TRIALS = [
    record(0),
    record(1, "stopped", 0.25, 2, cpu=1800.0),
    record(2, "failed", 0.75, 1, "<b>it broke</b>", cpu=360.0),
    record(3, height=1.0, cpu=7200.0),
]
FINALS = [record(0, height=1.0), record(1, height=1.0, epochs=4), record(2, "failed", epochs=2, cpu=900.0)]
BEST = Candidate(TRIALS[3], FINALS[:2], {"score": Estimate(3.6, 0.25), "cost": Estimate(0.25, 0.0)})
OTHER = Candidate(TRIALS[0], FINALS[:1], {"score": Estimate(1.9, 0.5), "cost": Estimate(0.25, math.inf)})
DRAWN = [Chart("curves", "Learning <curves>", "One & all", b"png"), Chart("contour", "Map", "left out: few", None)]


def page(checked=None, pictures=DRAWN, chosen=BEST, trials=TRIALS):
    return html(checked or experiment(), trials, FINALS, [BEST, OTHER], chosen, VERSION, pictures)


def test_page_shows_every_trial_and_marks_the_winner_and_the_published_setting():
    made = page()
    table = rows(made)
    assert ["trial", "state", "epochs", "score", "CPU-hours", "accelerator-hours", "height"] in table
    assert ["0", "complete", "4", "2", "1", "0.5", "0.5"] in table
    assert ["1", "stopped", "2", "0.5", "0.5", "0.25", "0.25"] in table
    assert ["3", "complete", "4", "4", "2", "1", "1"] in table
    assert re.search(r'<tr class="winner"><td>3<', made)
    assert re.search(r'<tr class="reference"><td>0<', made)
    assert "models:/apples/7" in made
    assert "4 trials: 2 complete, 1 stopped, 1 failed" in made


def test_settings_stand_below_their_names_whatever_order_they_were_drawn_in():
    space = {"height": {"uniform": [0.0, 1.0]}, "kind": {"choice": ["plain", "nan"]}}
    made = page(experiment(space), trials=[record(0, kind="plain"), record(1, kind="nan", height=0.75)])
    assert [row[-2:] for row in rows(made) if row[0] == "1" and len(row) > 5] == [["0.75", "nan"]]
    assert [row[-2:] for row in rows(made) if row[:2] == ["trial", "state"]] == [["height", "kind"]]


def test_trial_that_failed_before_its_first_epoch_has_no_figures():
    made = page(trials=[*TRIALS, record(4, "failed", epochs=0, cause="gone", cpu=0.0)])
    assert ["4", "failed: gone", "0", "", "0", "0", "0.5"] in rows(made)


def test_trials_that_were_interrupted_say_where_and_why():
    where = ("in epoch 2: its process died", "in epoch 4: its node was taken away")
    cut = replace(TRIALS[0], interruptions=where), replace(record(4, "failed", cause="gone"), interruptions=where[:1])
    made = page(trials=[*cut, *TRIALS[1:]])
    assert [row[1] for row in rows(made) if row[0] in ("0", "4") and len(row) == 7] == [
        "complete; interrupted in epoch 2: its process died; interrupted in epoch 4: its node was taken away",
        "failed: gone; interrupted in epoch 2: its process died",
    ]
    assert "5 trials: 2 complete, 1 stopped, 2 failed; 2 of them interrupted" in made


def test_trial_outside_the_constraints_says_so():
    made = page(experiment(constraints={"score": {"max": 3.0}}))
    assert [row[1] for row in rows(made) if row[0] in ("0", "3") and len(row) == 7] == [
        "complete",
        "complete, outside the constraints",
    ]


def test_published_setting_winner_and_second_training_stand_side_by_side():
    table = rows(page())
    assert ["", "published setting", "winner", "trained again"] in table
    assert ["height", "0.5", "1", "1"] in table
    assert ["score", "2.0000", "4.0000", "3.6000 ± 0.2500"] in table


def test_candidates_stand_with_what_they_reached_before_and_again():
    table = rows(page(experiment(objective={"score": "max", "cost": "min"}), pictures=[]))
    expected = ["3", "4.0000", "3.6000 ± 0.2500", "0.2500", "0.2500 ± 0.0000", "winner"]
    assert expected in table
    assert ["0", "2.0000", "1.9000 ± 0.5000", "0.2500", "0.2500", ""] in table


def test_page_is_one_file_and_what_trials_say_is_escaped():
    made = page()
    assert "<b>it broke" not in made
    assert "failed: &lt;b&gt;it broke&lt;/b&gt;" in made
    assert "<h2>Learning &lt;curves&gt;</h2>" in made
    assert "One &amp; all" in made
    assert made.count("data:image/png;base64,cG5n") == 1
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script", made)


def test_picture_that_was_left_out_has_its_reason():
    made = page()
    assert "<h2>Map</h2>" in made
    assert "left out: few" in made
    assert made.count("<img") == 1


def test_training_without_a_search_has_its_metrics_and_its_cost_alone():
    single = Candidate(None, FINALS[:1], BEST.estimates)
    made = html(experiment({}), (), FINALS[:1], [single], single, VERSION, [])
    assert ["", "trained"] in rows(made)
    assert ["score", "3.6000 ± 0.2500"] in rows(made)
    assert re.findall("<h2>(.*?)</h2>", made) == ["Cost"]
    assert "1 trial: 1 complete" in made


def test_trials_are_counted_by_their_end():
    assert counted(TRIALS[:1]) == "1 trial: 1 complete"
    assert counted(TRIALS) == "4 trials: 2 complete, 1 stopped, 1 failed"


def test_cost_is_added_up_by_what_it_was_spent_on():
    header, table = costs(TRIALS, FINALS)
    assert header == ["", "trainings", "epochs", "CPU-hours", "accelerator-hours"]
    assert table == [
        ["complete trials", "2", "8", "3", "1.5"],
        ["trials stopped early", "1", "2", "0.5", "0.25"],
        ["trials that failed", "1", "1", "0.1", "0.05"],
        ["final trainings", "3", "10", "2.25", "1.12"],
        ["in all", "7", "21", "5.85", "2.92"],
    ]


def test_saving_is_the_cost_of_an_epoch_times_those_that_were_not_run():
    # Half an hour for two epochs, two to go: 0.5 hours beside the 3.6 that were spent.
    told = saved(experiment(), TRIALS)
    assert told.startswith("Stopping early saved 2 epochs: 0.5 CPU-hours, 12% of what")
    assert "0.25 accelerator-hours, 12%" in told
    assert "estimate" in told
    assert saved(experiment(), [TRIALS[0], TRIALS[3]]) == ""


def test_rule_names_what_counts():
    told = rule(experiment(), BEST)
    assert (
        "Goal: large score. All complete trials are ordered by score, and the 2 best trials are trained again" in told
    )
    assert "from 2 fresh seeds" in told
    assert "best of these by score, where the poorer ends of the 95 % intervals count" in told
    assert "constraint" not in told
    assert "front" not in told


def test_rule_of_several_objectives_names_front_and_weights():
    chosen = {"candidates": 1, "seeds": 1, "weights": {"cost": 0.5}}
    told = rule(experiment(objective={"score": "max", "cost": "min"}, winner=chosen), BEST)
    assert "Goal: large score and small cost. All complete trials are ordered by Pareto front, then by the" in told
    assert "(weights: score 1, cost 0.5)" in told
    assert "the best trial is trained again from a fresh seed" in told
    assert "the values of the new training count" in told


def test_rule_says_whether_the_winner_keeps_the_constraints():
    told = rule(experiment(constraints={"score": {"min": 1.0, "max": 4.0}}), BEST)
    assert "ordered by constraints (those that meet them first), then by score" in told
    assert "(1 ≤ score ≤ 4) wins only if all candidates do; the winner meets them" in told
    assert "the winner misses it" in rule(experiment(constraints={"score": {"max": 3.5}}), BEST)


def test_front_lists_trials_and_variants_the_best_by_the_first_objective_first():
    several = experiment(objective={"score": "max", "cost": "min"})
    trials = [
        record(0, variants={"small": {"cost": 0.125}, "large": {"score": 1.0}}),
        record(1, height=0.75),
        record(2, "stopped", height=9.0),
    ]
    expected = [["1", "", "3", "0.25"], ["0", "small", "2", "0.125"]]
    assert front(several, trials) == (["trial", "variant", "score", "cost"], expected)
    made = page(several, pictures=[Chart("front", "Pareto front", "", b"png")], trials=trials)
    assert expected[1] in rows(made)
