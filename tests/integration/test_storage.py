"""The study in a PostgreSQL of its own, and databases that fail."""

import shutil
import subprocess
import sys

import pytest
import sqlalchemy
from toy_settings import experiment

from grainmill.errors import StorageError
from grainmill.search import study as module
from grainmill.search.study import Study

RANDOM = {"sampler": "random"}


@pytest.fixture
def prompt(monkeypatch):
    """Attempts follow each other at once."""
    monkeypatch.setattr(module, "PATIENCE", (0.01,) * 3)


@pytest.fixture
def opened():
    """Opens studies, and closes their connections in the end."""
    studies = []

    def open_study(url, name="trial", trials=4, **changes):
        checked = experiment(**{"search": RANDOM, **changes})
        studies.append(Study(url, name, checked, checked.first, trials))
        return studies[-1]

    yield open_study
    for study in studies:
        engine(study).dispose()


def engine(study):
    return study._study._storage._backend.engine


def searched(study):
    """What comes of a study without Ray: high ones run two of four epochs, low ones all."""
    for record in study.records:
        if record.state == "running":
            trained(study, record)
    while record := study.ask():
        trained(study, record)
    return told(study)


def trained(study, record):
    for epoch in range(1, 5 if record.setting["height"] < 0.6 else 3):
        score = record.setting["height"] * epoch
        study.report(record.number, {"epoch": epoch, "score": score, "cost": 1.0})
    study.note(record.number, "cost", {"cpu_seconds": 3.0})
    study.close(record.number, failed=False)


def told(study):
    return [(record.number, record.state, record.setting, record.history, record.cost) for record in study.records]


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


class Outage:
    """The database answers no commit from the `first` on, so many times."""

    def __init__(self, study, first, times):
        self.seen, self.first, self.times = 0, first, times
        sqlalchemy.event.listen(engine(study), "commit", self._commit)

    def _commit(self, connection):
        self.seen += 1
        if self.first <= self.seen < self.first + self.times:
            raise sqlalchemy.exc.OperationalError("COMMIT", None, Exception("gone"))


@pytest.mark.slow
def test_no_commit_that_fails_once_loses_or_doubles_anything(tmp_path, prompt, opened):
    opened(f"sqlite:///{tmp_path / 'new.db'}", trials=2)  # making the tables takes longest
    count = Outage(calm := opened(f"sqlite:///{shutil.copy(tmp_path / 'new.db', tmp_path / '0.db')}", trials=2), 0, 0)
    expected = sorted(map(str, (row[2:] for row in searched(calm))))
    assert count.seen > 30
    for number in range(1, count.seen + 1):
        study = opened(f"sqlite:///{shutil.copy(tmp_path / 'new.db', tmp_path / f'{number}.db')}", trials=2)
        Outage(study, number, 1)
        # Numbers may differ, and what stands before the others.
        assert sorted(map(str, (row[2:] for row in searched(study)))) == expected, f"commit {number} of {count.seen}"


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


def test_search_that_is_carried_on_draws_what_it_would_have_drawn(tmp_path, opened):
    calm = searched(opened(f"sqlite:///{tmp_path / 'calm.db'}"))
    for _ in range(3):
        study = opened(f"sqlite:///{tmp_path / 'cut.db'}")
        trained(study, study.ask())
    assert searched(opened(f"sqlite:///{tmp_path / 'cut.db'}")) == calm
    assert len({record[2]["height"] for record in calm}) == 4


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "qmc", "random"])
def test_search_that_is_carried_on_draws_nothing_twice(tmp_path, opened, sampler):
    for count in range(1, 7):
        study = opened(f"sqlite:///{tmp_path / 'study.db'}", trials=12, search={"sampler": sampler})
        study.ask(), study.ask()
        assert len({record.setting["height"] for record in study.records}) == 2 * count
