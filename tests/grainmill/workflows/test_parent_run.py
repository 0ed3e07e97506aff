"""The parent MLflow run of a run that is carried on, where MLflow no longer has what it had."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow_tables import database

from grainmill.config.experiment import Experiment
from grainmill.tracking.mlflow_runs import Tracker
from grainmill.workflows.run_folder import Run
from grainmill.workflows.tune import _parent


@pytest.fixture
def parent(tmp_path):
    """Opens the parent run of one run's folder, with the database in a folder of the given name."""
    experiment = Experiment(name="toy", trainable="toy", data={}, base={"epochs": 2}, objective={"score": "max"})
    home = Run(tmp_path, str(tmp_path), lambda: None)

    def open_in(server="first"):
        tracker = Tracker(database(tmp_path / server), "toy", tmp_path)
        return _parent(tracker, experiment, home), tracker.client

    return open_in


def test_run_is_found_again_by_its_note_or_its_tag(parent, tmp_path):
    first, client = parent()
    (tmp_path / "parent-run").unlink()
    assert parent()[0] == first
    client.set_terminated(first)
    assert parent()[0] == first
    assert client.get_run(first).info.status == "RUNNING"


def test_deleted_run_is_restored(parent):
    first, client = parent()
    client.delete_run(first)
    assert parent()[0] == first
    assert client.get_run(first).info.lifecycle_stage == "active"


@pytest.mark.parametrize("note", [None, "", "nothing that MLflow knows"])
def test_run_is_made_anew_where_the_server_does_not_know_it(note, parent, tmp_path):
    first, _ = parent()
    if note is not None:
        (tmp_path / "parent-run").write_text(note)
    second, client = parent("second")
    assert second != first
    assert (tmp_path / "parent-run").read_text() == second
    assert client.get_run(second).data.params == {"objective.score": "max"}


def test_what_was_found_in_the_data_is_recorded(parent, tmp_path):
    experiment = Experiment(name="toy", trainable="toy", data={}, base={"epochs": 2}, objective={"score": "max"})
    experiment._findings = SimpleNamespace(figures={"classes": "2"}, warnings=["odd"], facts={"classes": {"a": 1}})
    assert experiment.found() == ["classes   2", "warning: odd"]
    tracker = Tracker(database(tmp_path / "first"), "toy", tmp_path)
    run_id = _parent(tracker, experiment, Run(tmp_path, str(tmp_path), lambda: None))
    stored = tracker.client.download_artifacts(run_id, "data.json", str(tmp_path))
    assert json.loads(Path(stored).read_text()) == {"classes": {"a": 1}, "warnings": ["odd"]}
