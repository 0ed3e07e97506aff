"""The command as its user runs it, in a process of its own."""

import os
import signal
import uuid

import mlflow
import pytest
import toy
import yaml
from commands import left_behind, start
from PIL import Image

from grainmill import environment
from grainmill.errors import TrackingError
from grainmill.tracking.mlflow_runs import local_uri


@pytest.fixture
def file(tmp_path):
    """An experiment whose trials wait in their second epoch until the gate is opened."""
    os.mkfifo(tmp_path / "gate")
    content = {
        "name": "cut-short",
        "trainable": "toy",
        "data": {"diary": str(tmp_path / "diary"), "gate": str(tmp_path / "gate")},
        "space": {"height": {"uniform": [0.0, 1.0]}},
        "objective": {"score": "max"},
        "search": {"trials": 3, "scheduler": "none"},
        "storage": str(tmp_path / "runs"),
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("deadly", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_search_cut_short_leaves_no_process_and_the_same_command_carries_it_on(file, tmp_path, deadly, code):
    mark = str(uuid.uuid4())
    process = start(["tune", file], tmp_path, mark)
    for line in process.stdout:
        if "running  1/4" in line:  # the first epoch of a trial is on record
            break
    process.send_signal(deadly)
    rest = process.communicate()[0]
    assert process.returncode == code, rest
    assert ("the same command carries on" in rest) == (code == 130)
    assert left_behind(mark) == []

    (tmp_path / "gate").unlink()
    (tmp_path / "gate").write_text("open")
    again = start(["tune", file], tmp_path, mark)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    assert "3 trials: 3 complete" in output
    assert "models:/cut-short/1, alias champion" in output
    assert left_behind(mark) == []
    diary = (tmp_path / "diary").read_text().splitlines()
    names = [*(f"trial-{number:04d}" for number in range(3)), *(f"final-{number:04d}" for number in range(4))]
    assert sorted(diary) == sorted(f"{name} {epoch}" for name in names for epoch in (1, 2, 3, 4))
    client = mlflow.MlflowClient(local_uri(tmp_path / "runs"))
    runs = client.search_runs([client.get_experiment_by_name("cut-short").experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted([*names, "cut-short run-1"])
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "score")
        of_all = run.info.run_name == "cut-short run-1"  # holds the metrics of the model alone
        assert [metric.step for metric in history] == ([4] if of_all else [1, 2, 3, 4])


@pytest.mark.slow
def test_evaluation_on_two_workers_cut_short_ends_with_code_130_and_leaves_no_process(tmp_path):
    mark = str(uuid.uuid4())
    list(toy.fit(toy.Spec(), toy.Data(), tmp_path / "model"))
    os.mkfifo(tmp_path / "scale")
    words = ["evaluate", "model", "--trainable", "toy", "--on", "scale=scale", "--workers", 2]
    process = start(words, tmp_path, mark)
    with (tmp_path / "scale").open("w"):  # opens once a worker reads
        process.send_signal(signal.SIGINT)
        output = process.communicate()[0]
    assert process.returncode == 130, output
    assert output.splitlines() == ["interrupted; the same command carries on from here"]
    assert left_behind(mark) == []
    assert os.listdir(tmp_path / "evaluation") == []


def test_wrong_file_ends_with_code_2_before_anything_starts(file, tmp_path):
    process = start(["tune", file, "--set", "search.trails=4"], tmp_path, "none")
    output = process.communicate()[0]
    assert process.returncode == 2
    assert "search.trails: unknown key; did you mean 'trials'?" in output
    assert not (tmp_path / "runs").exists()


def test_name_used_with_other_settings_ends_with_code_2_and_tells_the_difference(file, tmp_path):
    home = tmp_path / "runs" / "cut-short"
    home.mkdir(parents=True)
    (home / "experiment.yaml").write_text("name: cut-short\nsearch:\n  trials: 7\n")
    process = start(["tune", file], tmp_path, "none")
    output = process.communicate()[0]
    assert process.returncode == 2
    assert "--set name=cut-short-2" in output
    assert "-  trials: 7" in output
    assert sorted(path.name for path in home.iterdir()) == ["experiment.yaml"]


def test_tracking_server_that_does_not_answer_ends_with_code_1_and_the_remedy(file, tmp_path):
    process = start(["tune", file, "--set", "tracking.uri=http://127.0.0.1:9"], tmp_path, "none")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "MLflow must answer at http://127.0.0.1:9" in output
    assert "Traceback" not in output


def test_password_in_the_address_of_the_server_is_nowhere_to_be_seen(file, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:very%2Dsecret@127.0.0.1:9")
    for words in (["tune", file], ["promote", "models:/apples/1"], ["rollback", "apples"]):
        process = start(words, tmp_path, "none")
        output = process.communicate()[0]
        assert process.returncode == 1
        assert "MLflow must answer at http://127.0.0.1:9, but said" in output
        assert "secret" not in output
        assert "Traceback" not in output
    in_file = start(["tune", file, "--set", "tracking.uri=http://me:very-secret@127.0.0.1:9"], tmp_path, "none")
    output = in_file.communicate()[0]
    assert in_file.returncode == 2
    assert "tracking.uri: must not hold a user or a password" in output
    assert "very-secret" not in output
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in kept)


def test_a_user_and_a_password_go_where_mlflow_reads_them(monkeypatch):
    variables = {"MLFLOW_TRACKING_URI": "https://me:p%40ss@host:5000/path"}
    monkeypatch.setattr(os, "environ", variables)
    assert environment.tracking_uri() == "https://host:5000/path"
    assert (variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")
    assert variables["MLFLOW_TRACKING_URI"] == "https://host:5000/path"  # all that child processes see
    assert environment.tracking_uri() == "https://host:5000/path"  # a second call finds the server, too
    assert environment.tracking_uri("http://other", "runs") == "http://other"
    del variables["MLFLOW_TRACKING_URI"]
    assert environment.tracking_uri(storage="/runs") == "sqlite:////runs/mlflow.db"


def test_storage_in_s3_needs_a_tracking_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match=r"none is named; set tracking\.uri or MLFLOW_TRACKING_URI"):
        environment.tracking_uri(storage="s3://bucket/runs")
    assert environment.tracking_uri("http://host", "s3://bucket/runs") == "http://host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert environment.tracking_uri(storage="s3://bucket/runs") == "http://other"


def test_images_that_will_be_left_out_are_told_when_a_file_is_checked(tmp_path):
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "images/a/4.png").write_bytes(b"")
    data = {"folder": "images", "skip_broken": True}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "data": data, "objective": {"top1": "max"}}))
    process = start(["validate", "mine.yaml"], tmp_path, "none")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.splitlines()[:2] == ["warning: 1 of 12 images will be left out:", "  images/a/4.png is empty"]
    assert "mine.yaml is right." in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "mine.yaml"]
