"""Studies whose trials are reported without Ray."""

import pytest
import sqlalchemy
from toy_settings import experiment

from grainmill.search import study as module
from grainmill.search.study import Study

RANDOM = {"sampler": "random"}


@pytest.fixture
def prompt(monkeypatch):
    """Make the study retry database errors without pauses."""
    monkeypatch.setattr(module, "PATIENCE", (0.01,) * 3)


@pytest.fixture
def opened():
    """A function that opens a study with random settings. Its database connections are closed after the test."""
    engines = set()

    def open_study(url, name="trial", trials=4, **changes):
        checked = experiment(**{"search": RANDOM, **changes})
        return Study(url, name, checked, checked.first, trials)

    def collect(connection):
        engines.add(connection.engine)

    sqlalchemy.event.listen(sqlalchemy.Engine, "engine_connect", collect)
    yield open_study
    sqlalchemy.event.remove(sqlalchemy.Engine, "engine_connect", collect)
    for engine in engines:
        engine.dispose()


def searched(study, epochs=4):
    """Run a study to its end without Ray; trials of low height have all epochs, the others half of them."""
    for record in study.records:
        if record.state == "running":
            trained(study, record, epochs)
    while record := study.ask():
        trained(study, record, epochs)
    return told(study)


def trained(study, record, epochs=4):
    """Report the epochs of a trial to its study, and close it."""
    for epoch in range(1, 1 + (epochs if record.setting["height"] < 0.6 else epochs // 2)):
        score = record.setting["height"] * epoch
        study.report(record.number, {"epoch": epoch, "score": score, "cost": 1.0})
    study.note(record.number, "cost", {"cpu_seconds": 3.0})
    study.close(record.number, failed=False)


def told(study):
    return [(record.number, record.state, record.setting, record.history, record.cost) for record in study.records]
