"""MLflow sync: the runs of a study are the same at the end, whatever calls of the server fail."""

import pytest
import toy
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow_tables import database

from grainmill.config.experiment import experiment_model
from grainmill.errors import TrackingError
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study
from grainmill.tracking import sync
from grainmill.tracking.mlflow_runs import Tracker
from grainmill.tracking.sync import MLflowSync


def make_study(folder):
    content = {"name": "toy", "trainable": "toy", "data": {}, "objective": {"score": "max"}, "base": {"epochs": 2}}
    checked = experiment_model(toy).model_validate({**content, "space": {"height": {"uniform": [0, 1]}}})
    return Study(f"sqlite:///{folder / 'study.db'}", "trial", checked, checked.first, 3)


def name(number):
    return f"trial-{number:04d}"


def live(study, sync, deed=lambda: None):
    """Three trials: one is complete, one fails in its second epoch, one is cut short in its first."""
    for number in range(3):
        study.ask()
        sync.enqueue(study.record(number), running=True)
        for epoch in range(1, 3 - number):
            study.report(number, {"epoch": epoch, "score": 10.0 * number + epoch})
            sync.enqueue(study.record(number), running=True)
            deed()
    study.interrupt(0, "its process died")
    study.interrupt(0, "the command ended")
    study.close(0, failed=False)
    study.note(1, "cause", "it broke")
    study.close(1, failed=True)
    for number in range(3):
        sync.enqueue(study.record(number), running=False)


class Recorder:
    """Keeps the calls that a study makes of its sync, to make them again of another: the study takes longest."""

    def __init__(self):
        self.calls = []

    def enqueue(self, record, running):
        self.calls.append(lambda sync: sync.enqueue(record, running=running))

    def drain(self):
        self.calls.append(lambda sync: sync._drained(60))


EXPECTED = {
    "trial-0000": (
        "FINISHED",
        {
            "state": "complete at epoch 2",
            "interruptions": "in epoch 3: its process died; in epoch 3: the command ended",
        },
        [(1, 1.0), (2, 2.0)],
    ),
    "trial-0001": ("FAILED", {"state": "failed at epoch 1", "cause": "it broke"}, [(1, 11.0)]),
    "trial-0002": ("KILLED", {"state": "running"}, []),
}


def told(client, experiment_id, parent, study):
    """Return status, tags, and steps and values of the score of each child run in MLflow."""
    runs = client.search_runs([experiment_id], f"tags.mlflow.parentRunId = '{parent}'", ViewType.ACTIVE_ONLY)
    found = {}
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "score")
        number = int(run.info.run_name[-4:])
        assert float(run.data.params["height"]) == study.record(number).setting["height"]
        assert tuple(metric.timestamp for metric in history) == study.record(number).times
        tags = {key: run.data.tags[key] for key in ("state", "cause", "interruptions") if key in run.data.tags}
        found[run.info.run_name] = run.info.status, tags, [(metric.step, metric.value) for metric in history]
    assert len(found) == len(runs)
    return found


class Faulty(Tracker):
    """Tracker whose call number `bad` fails: before the call, or after it, so that only the answer is lost."""

    CALLS = ("start", "parameters", "runs_by_tag", "last_epoch", "log", "tag", "set_status", "remove")
    bad, after, made = None, False, 0

    def __getattribute__(self, key):
        value = super().__getattribute__(key)
        if key not in Faulty.CALLS:
            return value

        def call(*args):
            self.made += 1
            if self.made != self.bad:
                return value(*args)
            if self.after:
                value(*args)
            raise TrackingError("no answer")

        return call


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(sync, "RETRY_SECONDS", (0,))


@pytest.mark.parametrize("after", [False, True], ids=["asked in vain", "answer lost"])
def test_any_call_that_fails_changes_nothing_in_the_end(tmp_path, hasty, after):
    tracker = Faulty(database(tmp_path), "toy", tmp_path)
    study, recorder = make_study(tmp_path), Recorder()
    live(study, recorder, deed=recorder.drain)  # so that each epoch is told by itself
    bad, calls = 0, 1
    while bad < calls:  # the last round is the first in which none fails
        bad += 1
        tracker.bad = None
        parent = tracker.start(f"parent {bad}", {})
        tracker.bad, tracker.after, tracker.made, notes = bad, after, 0, []
        with MLflowSync(study, name, tracker, parent, notes.append) as sync:
            for call in recorder.calls:
                call(sync)
        calls, tracker.bad = tracker.made, None
        assert told(tracker.client, tracker.experiment_id, parent, study) == EXPECTED, bad
        expected = ["training goes on, and MLflow gets the results later: no answer", "MLflow answers again"]
        assert [note for note in notes if "waiting" not in note] == (expected if bad <= calls else [])
    assert bad > 15


def test_runs_of_a_process_that_was_killed_are_brought_up_to_date(tmp_path):
    """The killed process has sent nothing, a part, or all but the end."""
    tracker = Tracker(database(tmp_path), "toy", tmp_path)
    parent = tracker.start("parent", {})
    study = make_study(tmp_path)
    with MLflowSync(study, name, tracker, parent, print) as sync:
        live(study, sync)
    run_ids = {run_name: run_id for run_id, (run_name, _) in tracker.runs_by_tag("mlflow.parentRunId", parent).items()}
    tracker.client.delete_run(run_ids[name(0)])
    tracker.start(name(1), {}, parent)  # a second one, of an answer that got lost
    tracker.set_status(run_ids[name(2)], "RUNNING")
    with MLflowSync(study, name, tracker, parent, print) as sync:
        for record in study.records:
            sync.enqueue(record, running=False)
    assert told(tracker.client, tracker.experiment_id, parent, study) == EXPECTED
    before = tracker.runs_by_tag("mlflow.parentRunId", parent)
    assert before.keys() >= {run_ids[name(1)], run_ids[name(2)]}


def test_an_end_without_an_answer_is_told_with_the_remedy_and_no_password(tmp_path, hasty, monkeypatch):
    monkeypatch.setattr(sync, "END_SECONDS", 0.5)
    tracker = Tracker(database(tmp_path), "toy", tmp_path)
    parent, study = tracker.start("parent", {}), make_study(tmp_path)
    tracker.client = MlflowClient("http://me:very-secret@127.0.0.1:9")
    tracker.uri = "http://me:very-secret@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    notes = []

    def search():
        with MLflowSync(study, name, tracker, parent, notes.append) as sync:
            live(study, sync)

    with pytest.raises(TrackingError, match="nothing is lost: the same command sends it") as caught:
        search()
    assert "MLflow must answer at http://127.0.0.1:9" in str(caught.value)
    assert "very-secret" not in str(caught.value) + "".join(notes)


def test_an_error_that_cuts_a_study_short_is_the_one_that_is_told(tmp_path, hasty, monkeypatch):
    monkeypatch.setattr(sync, "CUT_SHORT_SECONDS", 0.1)
    tracker = Faulty(database(tmp_path), "toy", tmp_path)
    parent, study = tracker.start("parent", {}), make_study(tmp_path)
    monkeypatch.setattr(Tracker, "runs_by_tag", None)

    def search():
        with MLflowSync(study, name, tracker, parent, print) as sync:
            live(study, sync)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search()


def test_hardware_of_the_workers_is_tagged():
    record = TrialRecord(0, "running", {}, (), (), None, {}, {}, hardware={"gpu": "one card"})
    assert sync._tags(record) == {"state": "running", "hardware.gpu": "one card"}
