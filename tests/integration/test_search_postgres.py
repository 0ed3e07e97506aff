"""The study in a PostgreSQL of its own, and databases that fail."""

import subprocess
import sys

import pytest
from studies import searched, told

from grainmill.errors import StorageError
from grainmill.search import study as module


def test_study_in_postgresql_is_the_one_in_sqlite(postgres, tmp_path, opened):
    in_file = searched(opened(f"sqlite:///{tmp_path / 'study.db'}"))
    assert len(in_file) == 4
    assert searched(opened(postgres.url(), "same")) == in_file
    assert told(opened(postgres.url(), "same")) == in_file


def test_searches_that_share_a_database_do_not_mix(postgres, opened):
    one, two = opened(postgres.url(), "mine/run-1/trial"), opened(postgres.url(), "yours/run-1/trial")
    one.ask()
    two.ask(), one.ask(), two.ask()
    one.note(1, "cause", "mine")
    assert [record.number for record in one.records] == [record.number for record in two.records] == [0, 1]
    assert [record.cause for record in two.records] == [None, None]
    again = opened(postgres.url(), "mine/run-1/trial")
    assert [record.cause for record in again.records] == [None, "mine"]
    assert again.remaining == 2


def test_other_tools_of_optuna_read_the_study_of_a_search(postgres, opened):
    expected = searched(opened(postgres.url(), "read/run-1/trial"))
    script = (
        "import sys, optuna\n"
        "study = optuna.load_study(study_name='read/run-1/trial', storage=sys.argv[1])\n"
        "print(study.metric_names, study.best_trial.number)\n"
        "for trial in study.trials: print(trial.number, trial.state.name, len(trial.intermediate_values))\n"
    )
    found = subprocess.run([sys.executable, "-c", script, postgres.url()], capture_output=True, text=True, check=True)
    best = max((row for row in expected if row[1] == "complete"), key=lambda row: row[3][-1]["score"])[0]
    kinds = [f"{'COMPLETE' if row[1] == 'complete' else 'PRUNED'} {len(row[3])}" for row in expected]
    assert found.stdout.splitlines() == [f"['score'] {best}", *(f"{n} {kind}" for n, kind in enumerate(kinds))]


def test_database_that_stops_in_the_middle_and_comes_back_loses_nothing(postgres, opened, tmp_path, monkeypatch):
    expected = searched(opened(f"sqlite:///{tmp_path / 'study.db'}"))
    study, pauses = opened(postgres.url(), "stopped"), []

    def pause(seconds):
        """Instead of waiting: the database comes back before the third attempt."""
        pauses.append(seconds)
        if len(pauses) == 2:
            postgres.start()

    monkeypatch.setattr(module.time, "sleep", pause)
    report, reports = study.report, []

    def report_and_stop(number, metrics):
        reports.append(number)
        if len(reports) == 3:
            postgres.stop()
        return report(number, metrics)

    study.report = report_and_stop
    assert searched(study) == expected
    assert pauses == list(module.PATIENCE[:2])


def test_database_that_stays_away_is_named_without_its_password_and_the_search_carries_on_later(
    postgres, opened, tmp_path, prompt
):
    expected = searched(opened(f"sqlite:///{tmp_path / 'study.db'}"))
    url, place = postgres.url("secret"), f"mill:***@127.0.0.1:{postgres.port}/postgres"
    study = opened(url, "away")
    study.ask()
    study.report(0, {"epoch": 1, "score": 0.5, "cost": 1.0})
    postgres.stop()
    try:
        with pytest.raises(StorageError) as caught:
            study.report(0, {"epoch": 2, "score": 1.0, "cost": 1.0})
        with pytest.raises(StorageError) as refused:
            opened(url, "away")
    finally:
        postgres.start()
    for message in map(str, (caught.value, refused.value)):
        assert place in message
        assert "secret" not in message
        assert "the same command carries on" in message
    assert searched(opened(url, "away")) == expected
