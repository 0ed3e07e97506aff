"""Commands that are cut short leave no process behind, and the same command carries on."""

import os
import signal
import uuid

import mlflow
import psutil
import pytest
import toy
from commands import left_behind, start

from grainmill.tracking.mlflow_runs import local_uri


@pytest.mark.parametrize(
    ("victim", "deadly", "code"),
    [("command", signal.SIGINT, 130), ("command", signal.SIGKILL, -9), ("raylet", signal.SIGKILL, 1)],
)
def test_search_cut_short_leaves_no_process_and_the_same_command_carries_it_on(
    gated_file, tmp_path, victim, deadly, code
):
    mark = str(uuid.uuid4())
    process = start(["tune", gated_file], tmp_path, mark)
    for line in process.stdout:
        if "running  1/4" in line:  # the first epoch of a trial is on record
            break
    children = psutil.Process(process.pid).children()
    (process if victim == "command" else next(one for one in children if one.name() == victim)).send_signal(deadly)
    rest = process.communicate()[0]
    assert process.returncode == code, rest
    assert ("the same command carries on" in rest) == (code > 0)
    assert "Traceback" not in rest
    assert left_behind(mark) == []

    (tmp_path / "gate").unlink()
    (tmp_path / "gate").write_text("open")
    again = start(["tune", gated_file], tmp_path, mark)
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
