"""What a run will take of a cluster: small cases worked out by hand, others held against a slow simulation."""

import math
import random
import statistics

import pytest
import toy

from grainmill.cluster.shape import Cluster, NodeType
from grainmill.config.experiment import experiment_model
from grainmill.workflows import forecast
from grainmill.workflows.forecast import Pace

HEAD = NodeType("head", {"CPU": 0.0}, 1)


def experiment(epochs=4, winner=(1, 1), **changes):
    space = {"height": {"uniform": [0.0, 9.0]}, "kind": {"choice": ["plain", "nan"]}}
    content = {"name": "toy", "trainable": "toy", "data": {}, "space": space, "objective": {"score": "max"}}
    content |= {"base": {"epochs": epochs}, "winner": dict(zip(("candidates", "seeds"), winner, strict=True))}
    return experiment_model(toy).model_validate({**content, **changes})


def cluster(nodes, cpus=1, idle=50, least=0):
    return Cluster(HEAD, (NodeType("worker", {"CPU": float(cpus)}, nodes, least),), nodes, idle)


def whole(trials, **search):
    return {"trials": trials, "scheduler": "none", **search}


def test_one_trial_on_one_node_takes_its_epochs_after_the_nodes_start():
    run = forecast.simulate(experiment(search=whole(1)), cluster(1), Pace(10, 100, 0), 0)
    assert (run.search, run.retraining) == (100 + 40, 40)
    assert (run.epochs, run.busy) == ((4, 4), (40, 40))
    assert run.nodes == {"worker": 100 + 80 + 50, "head": 100 + 80 + 50}
    assert (run.booting, run.waiting, run.leaving) == (100, 0, 50)


def test_waves_follow_each_other_and_a_node_that_waits_too_long_goes_and_comes_again():
    # Three trials on two nodes: both until 140, then one until 180. The other goes at 190, and is asked for again at
    # 180, just before, for the second of two trainings.
    run = forecast.simulate(experiment(search=whole(3), winner=(1, 2)), cluster(2), Pace(10, 100, 0), 0)
    assert (run.search, run.retraining) == (180, 40)
    assert run.nodes == {"worker": 2 * (100 + 120 + 50), "head": 270}
    assert (run.booting, run.waiting, run.leaving) == (200, 40, 100)
    # With a time-out of 30 it has gone at 170, and comes again at 280.
    run = forecast.simulate(experiment(search=whole(3), winner=(1, 2)), cluster(2, idle=30), Pace(10, 100, 0), 0)
    assert (run.search, run.retraining) == (180, 140)
    assert run.nodes == {"worker": 170 + (320 + 30 - 180) + (220 + 30), "head": 350}
    assert (run.booting, run.waiting, run.leaving) == (300, 0, 90)


def test_processes_start_anew_for_the_best_and_not_for_a_trial_after_another():
    # Both nodes train from 107 to 147, one of them until 187. Then both train, of a process of its own each.
    run = forecast.simulate(experiment(search=whole(3), winner=(1, 2)), cluster(2), Pace(10, 100, 7), 0)
    assert (run.search, run.retraining, run.busy) == (187, 47, (120, 80))
    assert run.nodes == {"worker": 2 * (234 + 50), "head": 284}
    assert (run.booting, run.waiting, run.leaving) == (200, 40, 100)


def test_workers_that_are_spread_keep_a_node_each():
    changes = {"search": whole(1), "resources": {"workers": 2, "placement": "spread"}}
    run = forecast.simulate(experiment(**changes), cluster(2, cpus=2), Pace(10, 100, 0), 0)
    assert (run.search, run.retraining) == (140, 80)
    assert run.nodes == {"worker": (140 + 50) + (140 + 80 + 50), "head": 270}


def test_a_trial_of_few_or_many_workers_takes_as_many_as_there_is_room_for():
    run = forecast.simulate(experiment(search=whole(1), resources={"workers": [1, 4]}), cluster(3), Pace(10, 0, 0), 0)
    assert (run.search, run.retraining, run.busy) == (40, 120, (120, 120))


def test_groups_share_nodes_and_the_best_are_trained_on_more_workers_in_less_time():
    # Nodes of three CPUs: two groups of two on a node each; the third CPUs together hold another.
    run = forecast.simulate(
        experiment(search=whole(3), resources={"workers": 2, "retrain_workers": 4}),
        cluster(2, cpus=3),
        Pace(10, 0, 0),
        0,
    )
    assert (run.search, run.retraining) == (40, 20)
    assert run.busy == (3 * 2 * 40, 4 * 20)
    assert run.nodes["worker"] == 2 * (60 + 50)
    assert math.isclose(run.waiting, 2 * 20 - 4 * 20 / 3)


def test_nodes_that_are_always_there_need_no_start_and_stay_to_the_end():
    run = forecast.simulate(experiment(search=whole(2)), cluster(2, least=1), Pace(10, 100, 0), 0)
    # One trial from 0 to 40, the other from 100 to 140, and the training of the best on either until 180.
    assert (run.search, run.retraining) == (140, 40)
    assert run.nodes["head"] == 140 + 50
    assert run.nodes["worker"] == 190 + (140 + 50)


def test_no_more_run_at_once_than_are_allowed():
    run = forecast.simulate(experiment(search=whole(4), resources={"concurrent": 2}), cluster(4), Pace(10, 0, 0), 0)
    assert run.search == 80
    assert run.nodes["worker"] == 120 + 50 + 80 + 50


def test_a_budget_ends_the_search_at_the_epoch_that_spends_it():
    changes = {"budget": {"cpu_hours": 100 / 3600}, "resources": {"cpus_per_worker": 2}}
    # 20 CPU-seconds an epoch on one node: after five epochs the first trial is through and the second at its first.
    run = forecast.simulate(experiment(search=whole(9), **changes), cluster(1, cpus=2), Pace(10, 0, 0), 0)
    assert (run.epochs[0], run.search) == (5, 50)


@pytest.mark.parametrize("losers", ["stop", "pause"])
def test_a_single_place_halves_as_the_trials_one_after_another_do(losers):
    """Against the rule of asynchronous asha, written out for one objective and one trial at a time."""
    trials, epochs, reduction = 12, 4, 2
    search = {"trials": trials, "grace_epochs": 1, "reduction": reduction, "losers": losers}
    search["sampler"] = "random"
    for seed in range(10):
        run = forecast.simulate(experiment(epochs, search=search), cluster(1), Pace(10, 0, 0), seed)
        chance = random.Random(seed)
        worth = [chance.random() for _ in range(trials)]  # each is drawn at its first epoch, in their order
        assert run.epochs[0] == slow(worth, epochs, reduction, losers)


def slow(worth, epochs, reduction, losers):
    """Epochs that trials take together."""
    rungs, total, paused, left = {1: [], 2: []}, 0, {}, list(range(len(worth)))

    def good(number, rung):
        better = sum(worth[other] > worth[number] for other in rungs[rung])
        return better < max(1, len(rungs[rung]) / reduction)

    while True:
        again = [(rung, worth[number], number) for number, rung in paused.items() if good(number, rung)]
        if again:
            epoch, _, number = max(again, key=lambda one: one[0])
            del paused[number]
        elif left:
            epoch, number = 0, left.pop(0)
        else:
            return total
        while epoch < epochs:
            epoch, total = epoch + 1, total + 1
            if epoch in rungs:
                rungs[epoch].append(number)
                if number and not good(number, epoch):
                    if losers == "pause":
                        paused[number] = epoch
                    break


def test_the_share_that_goes_on_is_about_that_of_the_reduction():
    def epochs(sampler):
        search = {"trials": 200, "grace_epochs": 3, "reduction": 3, "sampler": sampler}
        runs = [forecast.simulate(experiment(9, search=search), cluster(8), Pace(1, 0, 0), seed) for seed in range(5)]
        return statistics.fmean(run.epochs[0] for run in runs)

    assert epochs("random") == pytest.approx(9 + 199 * (3 + 6 / 3), rel=0.1)  # were the better third known at once
    assert epochs("tpe") > 1.05 * epochs("random")  # which learns, and so finds better ones later


def test_strata_and_several_objectives_are_played_too():
    search = {"trials": 20, "grace_epochs": 1, "stratify": "kind"}
    changes = {"objective": {"score": "max", "cost": "min"}, "search": search}
    run = forecast.simulate(experiment(9, **changes), cluster(4), Pace(1, 0, 0), 0)
    assert 20 + 8 < run.epochs[0] < 20 * 9
    assert forecast.simulate(experiment(9, **changes), cluster(4), Pace(1, 0, 0), 0) == run
