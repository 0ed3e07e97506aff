"""The simulator of the search benchmark."""

import pytest

from tests.benchmarks.curves import FLOOR, World, hypervolume, lag, play, share

SETTING = {
    "loss.weight": 0.5,
    "model.p": 3.0,
    "batch.repeats": 3,
    "augment.crop": 0.2,
    "optimizer.rate": 0.2,
}


@pytest.fixture(scope="module")
def world():
    return World(seed=1, epochs=6)


def test_three_copies_start_behind_and_overtake_near_epoch_70_of_120():
    def ahead(epoch):
        # Of Fig. A.1: three copies end 0.9 points above one.
        return 0.9 - lag(3, epoch / 120) + lag(1, epoch / 120)

    assert ahead(40) < -1.5
    assert abs(ahead(70)) < 0.1
    assert ahead(120) == 0.9


def test_hypervolume_is_the_area_above_the_floor():
    # Two steps of a stair: 3 x 1 and 1 x 2 more; what is dominated, or below the floor, adds nothing.
    points = [(4.0, 2.0), (2.0, 4.0), (1.5, 1.5), (9.0, 0.5), (0.5, 9.0), (2.0, 4.0)]
    assert hypervolume(points, (1.0, 1.0)) == 3 * 1 + 1 * 2
    assert hypervolume([], (1.0, 1.0)) == 0


def test_published_setting_of_one_copy_does_not_depend_on_lambda_in_copy_detection(world):
    alone = {**SETTING, "batch.repeats": 1}
    assert world.end({**alone, "loss.weight": 0.2})[1] == world.end({**alone, "loss.weight": 0.9})[1]
    assert world.end({**SETTING, "loss.weight": 0.2})[1] != world.end({**SETTING, "loss.weight": 0.9})[1]


def test_same_number_trains_the_same_again_and_ends_near_its_true_values(world):
    first, again = (list(world.training(SETTING, 7)) for _ in range(2))
    assert first == again
    assert first != list(world.training(SETTING, 8))
    assert [metrics["epoch"] for _, metrics in first] == [1, 2, 3, 4, 5, 6]
    last = first[-1][1]
    assert last["top1"] == pytest.approx(world.end(SETTING)[0], abs=1)
    assert last["mean"] == pytest.approx((last["top1"] + last["copy_map"]) / 2)


class Steady:
    """A world in which an epoch takes as many seconds as its trial's number says."""

    epochs = 3

    def training(self, setting, number):
        for epoch in range(1, self.epochs + 1):
            yield setting["seconds"], {"epoch": epoch}


class Listed:
    """Gives a list of trials, stops some of them after an epoch, and keeps what it was told."""

    def __init__(self, seconds, stopped=(), paused=()):
        self.left = [(number, {"seconds": each}) for number, each in enumerate(seconds)]
        self.stopped, self.paused, self.told = stopped, list(paused), []

    def suggest(self):
        return self.left.pop(0) if self.left else None

    def goes_on(self, number, metrics):
        self.told.append((number, metrics["epoch"]))
        return (number, metrics["epoch"]) not in [*self.stopped, *self.paused]

    def ended(self, number, metrics):
        if (number, metrics["epoch"]) in self.paused:
            self.left.append((number, {"seconds": 1.0}))


def test_workers_take_the_next_trial_when_one_ends_and_all_their_seconds_count():
    player = Listed([1.0, 2.0, 1.0], stopped=[(0, 2)])
    finished = play(Steady(), player, workers=2, budget=100)
    # Trial 0 stops at 2 s, 2 runs from then to 5 s, 1 to 6 s.
    assert [trial.seconds for trial in finished] == [2 * 5, 2 * 6]
    assert player.told == [(0, 1), (0, 2), (1, 1), (2, 1), (1, 2), (2, 2), (2, 3), (1, 3)]


def test_paused_trial_goes_on_where_it_was():
    player = Listed([1.0, 1.0], paused=[(0, 1)])
    finished = play(Steady(), player, workers=1, budget=100)
    assert player.told == [(0, 1), (1, 1), (1, 2), (1, 3), (0, 2), (0, 3)]
    assert [trial.seconds for trial in finished] == [4, 6]


def test_trial_that_ends_after_the_budget_is_not_finished():
    assert len(play(Steady(), Listed([1.0, 1.0, 1.0]), workers=1, budget=6)) == 2


def test_share_counts_what_ended_by_then(world):
    finished = play(world, Listed([]), workers=1, budget=1)
    assert share(world, finished, True, 1) == 0
    trial = type("Finish", (), {"seconds": 5.0, "setting": SETTING})
    top1, copy_map = world.end(SETTING)
    assert share(world, [trial], True, 4.9) == 0
    area = (top1 - FLOOR["top1"]) * (copy_map - FLOOR["copy_map"])
    assert share(world, [trial], True, 5) == pytest.approx(area / world.best[True])
    assert share(world, [trial], False, 5) == pytest.approx(((top1 + copy_map) / 2 - FLOOR["mean"]) / world.best[False])
