"""Promotion: only a better version becomes champion, also with rivals and after a kill at any point."""

import random
import shutil
import threading

import mlflow
import numpy as np
import pytest
import toy
from mlflow import MlflowClient
from mlflow_tables import database
from shelf import GATE, METRIC, Shelf, spread
from toy_settings import CARD

from grainmill.errors import ExperimentError, PromotionError, TrackingError
from grainmill.registry import comparison, models, promotion, promotion_lock
from grainmill.registry.models import Version
from grainmill.tracking.mlflow_runs import Tracker


@pytest.fixture
def uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return database(tmp_path)


@pytest.fixture
def shelf(uri):
    return Shelf.new(uri)


def test_a_better_version_takes_the_place_and_what_it_took_it_from_is_previous(shelf):
    shelf.add(*spread(0.5)), shelf.add(*spread(0.7, seed=1)), shelf.add(*spread(0.9, seed=2))
    shelf.crown(1)
    shelf.client.set_registered_model_alias("apples", "challenger", 2)
    assert shelf.promote(2).champion.number == "2"
    assert shelf.aliases() == {"champion": 2, "previous": 1}
    shelf.promote(3)
    assert shelf.aliases() == {"champion": 3, "previous": 2}
    (why,) = shelf.history(3)
    assert why.startswith("promoted: copies/map 0.89")
    assert "of models:/apples/2, +0.19" in why
    assert why.endswith("over 40 queries")
    assert shelf.history(1) == ["replaced by models:/apples/2"]
    assert [text.partition(":")[0] for text in shelf.history(2)] == ["promoted", "replaced by models"]


def test_a_version_that_is_not_better_beyond_the_interval_is_refused_and_that_is_written_down(shelf):
    champion = spread(0.5)
    shelf.add(*champion)
    shelf.add(*(value + 0.002 + 0.05 * (-1) ** query for query, value in enumerate(champion)))
    shelf.crown(1)
    with pytest.raises(PromotionError, match=r"models:/apples/2 does not become .* not: copies/map 0\.\d+ against"):
        shelf.promote(2)
    assert shelf.aliases() == {"champion": 1}
    (why,) = shelf.history(2)
    assert why.startswith("refused: it must be better beyond the interval, but is not: copies/map")


def test_few_queries_show_nothing(shelf):
    for mean in (0.1, 0.9):
        shelf.add(*spread(mean, 19))
        shelf.add(*spread(mean, 20))
    shelf.crown(1)
    with pytest.raises(PromotionError, match="over 19 queries, but at least 20 are needed"):
        shelf.promote(3)
    shelf.crown(2)
    shelf.promote(4)
    assert shelf.aliases()["champion"] == 4


def test_the_first_champion_needs_the_gates_alone_and_promoting_it_again_changes_nothing(shelf):
    shelf.add(*spread(0.5))
    with pytest.raises(PromotionError, match=r"copies/map must be at least 0\.9, but is 0\.\d+"):
        shelf.promote(1, [*GATE, "minimum={copies/map: 0.9}"])
    assert shelf.promote(1).why == "there was no champion"
    assert shelf.promote(1).why == "it is the champion already"
    assert shelf.aliases() == {"champion": 1}
    assert [text.partition(":")[0] for text in shelf.history(1)] == ["refused", "promoted"]


def test_other_data_other_metrics_and_none_at_all_are_refused_with_the_command(shelf):
    shelf.add(*spread(0.5))
    shelf.add(*spread(0.9), data="other")
    shelf.add(*spread(0.9), metric="copies/recall@1")
    shelf.add()
    shelf.crown(1)
    told = {
        2: "compared in copies/map on the same data, but models:/apples/1 was evaluated on other data",
        3: "must have been evaluated for copies/map, but copies/recall@1 is measured; grainmill evaluate models:/ap",
        4: "must have been evaluated for copies/map, but nothing is measured",
    }
    for number, text in told.items():
        with pytest.raises(PromotionError) as caught:
            shelf.promote(number)
        assert text in str(caught.value)
        assert shelf.history(number) == []
    with pytest.raises(PromotionError, match=r"got none; measured is copies/map; set promotion\.metric"):
        shelf.promote(1, [])
    shelf.crown(4)
    with pytest.raises(PromotionError, match="models:/apples/4 was not evaluated for it"):
        shelf.promote(1)
    assert shelf.aliases() == {"champion": 4}


def test_what_is_not_in_the_registry_is_told(shelf):
    shelf.add(*spread(0.5))
    for model in ("models:/apples/7", "models:/apples@best", "models:/pears/1", "apples", "models:/apples/x"):
        with pytest.raises(TrackingError, match=rf"{model} must be in the registry at sqlite://"):
            promotion.promote(shelf.uri, model, GATE, print)
    with pytest.raises(TrackingError, match="models:/pears@champion must be in the registry"):
        promotion.rollback(shelf.uri, "pears", print)
    shelf.crown(1)
    shelf.client.delete_model_version("apples", "1")  # and the alias goes with it
    with pytest.raises(PromotionError, match="apples has no champion; promote a version"):
        shelf.rollback()


def test_wrong_gates_are_told_all_at_once(shelf):
    shelf.add(*spread(0.5))
    with pytest.raises(ExperimentError) as caught:
        shelf.promote(1, ["metrik=x", "megabytes=-1"])
    assert "metrik" in str(caught.value)
    assert "megabytes" in str(caught.value)


def test_gates_are_those_of_the_experiment_that_trained_the_version(shelf):
    parent = shelf.client.create_run(shelf.experiment).info.run_id
    text = "promotion:\n  metric: copies/map\n  minimum: {copies/map: 0.8}\n"
    shelf.client.log_text(parent, text, "experiment.yaml")
    shelf.add(*spread(0.5), parent=parent)
    with pytest.raises(PromotionError, match=r"copies/map must be at least 0\.8"):
        shelf.promote(1, [])
    shelf.promote(1, ["minimum={copies/map: 0.3}"])
    assert shelf.aliases() == {"champion": 1}


def test_size_and_latency_are_measured_on_the_model_itself(uri, tmp_path):
    tracker = Tracker(uri, "apples", tmp_path)
    list(toy.fit(toy.Spec(), toy.Data(), tmp_path / "model"))
    run_id = tracker.start("first", {})
    models.register(tracker, run_id, "apples", tmp_path / "model", toy.example(toy.Data()), {}, CARD)
    comparison.save(
        tracker.client, Version("apples", "1"), run_id, [toy.QueryScores(METRIC, "data", spread(0.5), False)]
    )
    gates = [*GATE, "megabytes=1e-6", "milliseconds=1e-6"]
    tracker.client.delete_registered_model_alias("apples", "champion")
    with pytest.raises(PromotionError, match=r"files must take at most 1e-06 MB, .*a row must take at most 1e-06 ms"):
        promotion.promote(tracker.uri, "models:/apples/1", gates, print)
    gates = [*GATE, "megabytes=1000", "milliseconds=100000"]
    assert promotion.promote(tracker.uri, "models:/apples/1", gates, print).champion.number == "1"


def test_rollback_goes_back_step_by_step(shelf):
    for number in range(3):
        shelf.add(*spread(0.3 + 0.2 * number, seed=number))
    shelf.crown(1)
    shelf.promote(2), shelf.promote(3)
    assert shelf.rollback().champion.number == "2"
    assert shelf.aliases() == {"champion": 2, "previous": 1}
    assert promotion.rollback(shelf.uri, "models:/apples@champion", print).champion.number == "1"
    assert shelf.aliases() == {"champion": 1}
    with pytest.raises(PromotionError, match="apples has one that replaced none; promote a version"):
        shelf.rollback()
    assert shelf.history(3)[-1] == "rolled back to models:/apples/2"
    assert shelf.history(2)[-2:] == [
        "champion again, models:/apples/3 was rolled back",
        "rolled back to models:/apples/1",
    ]


class Killed(BaseException):
    """Stands for the death of the process."""


def mortal(monkeypatch, at):
    """Let the process die before its change number `at` of the registry."""
    made = []

    def deadly(name):
        method = getattr(MlflowClient, name)

        def call(*args, **kwargs):
            made.append(name)
            if len(made) == at:
                raise Killed
            return method(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, call)

    changes = ("create_experiment", "delete_experiment", "set_model_version_tag", "set_registered_model_alias")
    for name in (*changes, "delete_registered_model_alias"):
        deadly(name)


def test_a_process_may_die_anywhere_in_a_promotion_or_a_rollback(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(promotion_lock, "EXPIRES_SECONDS", 0.01)  # what a dead process holds is taken over at once
    right = promotion_lock.PromotionLock.check
    monkeypatch.setattr(
        promotion_lock.PromotionLock, "check", lambda one: setattr(one, "_until", float("inf")) or right(one)
    )
    for number in range(3):
        shelf.add(*spread(0.3 + 0.2 * number, seed=number))
    shelf.crown(1)
    shelf.promote(2)
    at, died = 0, True
    while died:
        at, died = at + 1, False
        shutil.copy(tmp_path / "mlflow.db", tmp_path / f"{at}.db")
        one = Shelf(f"sqlite:///{tmp_path / f'{at}.db'}")
        with monkeypatch.context() as patch:
            mortal(patch, at)
            try:
                one.promote(3)
                one.rollback()
            except Killed:
                died = True
        now = one.aliases()
        assert (now["champion"], now["previous"]) in ((2, 1), (2, 2), (3, 2)), at
        if now["champion"] == 3:
            assert one.history(3)[-1].startswith(("promoting", "promoted", "rolling back")), at
        one.promote(3)
        assert one.aliases() == {"champion": 3, "previous": 2}, at
        assert any(text.startswith("promoted") for text in one.history(3)), at
        assert one.rollback().champion.number == "2", at
        assert one.aliases() == {"champion": 2, "previous": 1}, at
    assert at > 12


def test_a_promotion_lock_has_one_holder_until_it_is_released_or_expires(shelf, monkeypatch):
    order = []
    with promotion_lock.hold(shelf.client, "apples", print) as first:

        def wait():
            with promotion_lock.hold(MlflowClient(shelf.uri), "apples", order.append) as second:
                order.append(second.number)

        thread = threading.Thread(target=wait)
        thread.start()
        while not order:
            thread.join(0.01)
        assert "another promotion of apples is under way" in order[0]
        first.check()
        with promotion_lock.hold(shelf.client, "apple", print) as other:  # that of another model
            assert other.number == 1
    thread.join()
    assert order[1:] == [first.number + 1]
    monkeypatch.setattr(promotion_lock, "EXPIRES_SECONDS", 0.05)
    lost = promotion_lock.hold(shelf.client, "apples", print)
    dead = lost.__enter__()
    with promotion_lock.hold(shelf.client, "apples", print) as heir:
        assert heir.number == dead.number + 1
        with pytest.raises(PromotionError, match="nothing was changed, try again"):
            dead.check()
    active = [one.name for one in shelf.client.search_experiments() if one.name.startswith("grainmill")]
    assert active == []
    with pytest.raises(mlflow.MlflowException):
        lost.__exit__(None, None, None)


def false_promotions(draw, rounds):
    """Share of rounds in which one of two equally good networks would be promoted."""
    return sum(comparison.difference(*draw()).low > 0 for _ in range(rounds)) / rounds


def test_of_two_that_are_equally_good_one_in_twenty_is_promoted_at_most():
    """Correlated average precisions on 20 queries, the smallest number; half of them are 1."""
    rng, rounds = np.random.default_rng(0), 1000

    def draw():
        hard = rng.normal(size=20)
        return [np.clip(0.9 + 0.3 * (0.8 * hard + 0.6 * rng.normal(size=20)), 0, 1) for _ in range(2)]

    rate = false_promotions(draw, rounds)
    assert rate <= 0.05 + 2 * (0.05 * 0.95 / rounds) ** 0.5
    assert rate > 0.005


def test_an_interval_is_that_of_its_definition():
    rng = np.random.default_rng(3)
    first, second = rng.random(50), rng.random(50)
    found = comparison.difference(first, second)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    pairs = list(zip(first, second, strict=True))
    drawn = random.Random(5)
    means = []
    for _ in range(5000):
        sample = [drawn.choice(pairs) for _ in pairs]
        means.append(sum(one - other for one, other in sample) / len(sample))
    means.sort()
    assert found.low == pytest.approx(means[125], abs=0.01)
    assert found.high == pytest.approx(means[-126], abs=0.01)
    assert comparison.difference(first, first) == (0, 0, 0)
