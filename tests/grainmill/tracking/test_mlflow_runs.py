import errno
import socket

import pytest
from mlflow import MlflowClient
from mlflow_tables import database

from grainmill.errors import TrackingError
from grainmill.tracking import mlflow_runs
from grainmill.tracking.mlflow_runs import Tracker, local_uri


@pytest.fixture(scope="module")
def tracker(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    return Tracker(database(storage), "apples", storage)


def test_run_holds_parameters_tags_and_its_parent(tracker):
    parent = tracker.start("parent", {})
    child = tracker.start("child", {"state": "running"}, parent)
    tracker.parameters(parent, {"a": 1})
    tracker.parameters(child, {"loss.weight": 0.5, "model.trunk": "narrow"})
    run = tracker.client.get_run(child)
    assert run.data.params == {"loss.weight": "0.5", "model.trunk": "narrow"}
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["state"] == "running"
    assert run.info.run_name == "child"
    assert "mlflow.parentRunId" not in tracker.client.get_run(parent).data.tags


def test_metrics_have_the_epoch_as_their_step(tracker):
    run_id = tracker.start("metrics", {})
    for epoch in (1, 2, 3):
        tracker.log(run_id, epoch, {"top1": epoch / 10})
    history = tracker.client.get_metric_history(run_id, "top1")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_status_and_tags_change_and_a_text_is_kept(tracker):
    run_id = tracker.start("life", {"state": "running"})
    tracker.set_status(run_id, "KILLED")
    tracker.set_status(run_id, "RUNNING")
    assert tracker.client.get_run(run_id).info.status == "RUNNING"
    tracker.set_status(run_id, "FINISHED")
    tracker.tag(run_id, {"state": "complete"})
    tracker.attach(run_id, "note.txt", "hello")
    run = tracker.client.get_run(run_id)
    assert (run.info.status, run.data.tags["state"]) == ("FINISHED", "complete")
    assert [item.path for item in tracker.client.list_artifacts(run_id)] == ["note.txt"]


def test_second_tracker_uses_the_same_experiment_and_keeps_artifacts_in_the_storage(tracker, tmp_path):
    again = Tracker(tracker.uri, "apples", tmp_path)
    assert again.experiment_id == tracker.experiment_id
    stored = MlflowClient(tracker.uri).get_experiment(tracker.experiment_id)
    assert stored.artifact_location.endswith("/mlflow-artifacts/apples")


def test_experiment_and_run_that_were_deleted_are_restored(tracker, tmp_path):
    pears = Tracker(tracker.uri, "pears", tmp_path)
    run_id = pears.start("parent", {})
    tracker.client.delete_run(run_id)
    tracker.client.delete_experiment(pears.experiment_id)
    again = Tracker(tracker.uri, "pears", tmp_path)
    assert again.experiment_id == pears.experiment_id
    assert again.reopen(run_id)
    again.log(run_id, 1, {"top1": 0.5})
    assert again.client.get_run(run_id).info.status == "RUNNING"


def test_run_of_another_server_or_experiment_is_not_reopened(tracker, tmp_path):
    other = Tracker(tracker.uri, "plums", tmp_path).start("parent", {})
    assert [tracker.reopen(run_id) for run_id in ("0" * 32, "no id", other)] == [False] * 3


def test_database_that_is_a_folder_is_named_soon(tmp_path):
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(TrackingError, match=r"needs a SQLite file to read and write, but \S+/mlflow.db is a folder"):
        Tracker(local_uri(tmp_path), "apples", tmp_path)


def test_artifacts_that_cannot_be_written_are_named(tracker, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/note.txt")

    monkeypatch.setattr(tracker.client, "log_text", full)
    with pytest.raises(TrackingError, match=r"^MLflow's artifacts must be writable, but: No space .*: /disk/note.txt;"):
        tracker.attach("a run", "note.txt", "hello")


def test_server_that_does_not_answer_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9.*MLFLOW_TRACKING_URI"):
        Tracker("http://127.0.0.1:9", "apples", tmp_path)


def test_database_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "storage" / "mlflow.db"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.search_experiments", killed)
        with pytest.raises(KeyboardInterrupt):
            Tracker(local_uri(tmp_path / "storage"), "toy", tmp_path)
    assert list(file.parent.iterdir()) == []
    made = Tracker(local_uri(tmp_path / "storage"), "toy", tmp_path)
    again = Tracker(local_uri(tmp_path / "storage"), "toy", tmp_path)
    assert made.experiment_id == again.experiment_id
    assert [path.name for path in file.parent.iterdir()] == ["mlflow.db"]


def test_runs_are_found_by_a_tag_with_their_name_and_status(tmp_path):
    tracker = Tracker(database(tmp_path), "toy", tmp_path)
    parent = tracker.start("parent", {"place": "file:///a%27b"})
    child = tracker.start("child", {}, parent)
    tracker.log(child, 3, {"epoch": 3.0})
    tracker.set_status(child, "SCHEDULED")
    assert tracker.runs_by_tag("mlflow.parentRunId", parent) == {child: ("child", "SCHEDULED")}
    assert tracker.runs_by_tag("place", "file:///a%27b") == {parent: ("parent", "RUNNING")}
    assert [tracker.last_epoch(child), tracker.last_epoch(parent)] == [3, 0]


def test_server_that_takes_the_call_and_does_not_answer_is_refused_after_one_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_runs, "REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with pytest.raises(TrackingError, match=r"must answer at http://127\.0\.0\.1:\d+, but said: .*timed out"):
            Tracker(f"http://me:very-secret@127.0.0.1:{mute.getsockname()[1]}", "apples", tmp_path)
        mute.accept()[0].close()
        mute.setblocking(False)
        with pytest.raises(BlockingIOError):  # it was called once
            mute.accept()


def test_metrics_that_are_told_again_with_their_time_are_there_once(tracker):
    run_id = tracker.start("again", {})
    for _ in range(2):
        tracker.log(run_id, 1, {"top1": 0.5, "cost": float("nan")}, at=1_700_000_000_000)
    (one,) = tracker.client.get_metric_history(run_id, "top1")
    assert (one.timestamp, one.step, one.value) == (1_700_000_000_000, 1, 0.5)
    assert len(tracker.client.get_metric_history(run_id, "cost")) == 1


def test_looking_into_a_registry_makes_no_database(tmp_path):
    with pytest.raises(TrackingError, match=r"there is no .*none/mlflow\.db; set MLFLOW_TRACKING_URI"):
        mlflow_runs.check_registry(mlflow_runs.local_uri(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []
