"""The mill's side of an evaluation: which model, which settings, and what its run is told."""

import subprocess
import sys
from pathlib import Path

import pytest
import toy

from grainmill import evaluation, registry
from grainmill.errors import EvaluationError, ExperimentError, TrackingError
from grainmill.tracking import Tracker, local_uri


@pytest.fixture
def scale(tmp_path):
    (tmp_path / "scale.txt").write_text("2")
    return f"on.scale={tmp_path / 'scale.txt'}"


def trained(folder):
    list(toy.fit(toy.Spec(height=0.25), toy.Data(), folder))
    return folder


def run(model, overrides, tmp_path):
    return evaluation.evaluate(str(model), overrides, "toy", tmp_path / "out", local_uri(tmp_path))


def test_a_folder_with_checkpoints_or_of_a_run_is_a_model(scale, tmp_path):
    trained(tmp_path / "run-1" / "trials" / "final-0000")
    for folder in (tmp_path / "run-1", tmp_path / "run-1" / "trials" / "final-0000"):
        assessment = run(folder, [scale, "times=3"], tmp_path)
        assert assessment.figures[0].value == 0.25 * 2 * 3
    assert not (tmp_path / "mlflow.db").exists()


def test_a_registered_models_run_gets_the_figures_and_the_files(scale, tmp_path):
    tracker = Tracker(local_uri(tmp_path), "apples", tmp_path)
    run_id = tracker.start("first", {}, {})
    folder = trained(tmp_path / "model")
    registry.register(tracker, run_id, "apples", "toy", folder, toy.example(toy.Data()), {})
    run("models:/apples@champion", [scale], tmp_path)
    assert tracker.client.get_run(run_id).data.metrics == {"scale/height": 0.5, "scale/width": 2.0}
    assert [file.path for file in tracker.client.list_artifacts(run_id, "evaluation")] == ["evaluation/figures.csv"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], ["on: this key is required"]),
        (["on.scale"], ["--set needs key=value, got 'on.scale'"]),
        (["on.scale=x", "tims=2", "times=many"], ["tims: unknown key; did you mean 'times'", "times: must be"]),
    ],
)
def test_wrong_settings_are_told_all_at_once_and_nothing_is_written(overrides, told, tmp_path):
    trained(tmp_path / "model")
    with pytest.raises(ExperimentError) as caught:
        run(tmp_path / "model", overrides, tmp_path)
    assert str(caught.value).startswith("the command line: ")
    for words in told:
        assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_told(scale, tmp_path):
    with pytest.raises(EvaluationError, match=r"no folder .*/nowhere; name a run"):
        run(tmp_path / "nowhere", [scale], tmp_path)
    with pytest.raises(EvaluationError, match=r"No such file.*absent"):
        run(trained(tmp_path / "model"), [f"on.scale={tmp_path / 'absent'}"], tmp_path)
    with pytest.raises(TrackingError, match="models:/apples@champion must be in the registry"):
        run("models:/apples@champion", [scale], tmp_path)


def grainmill(*words, cwd):
    command = [str(Path(sys.executable).with_name("grainmill")), *words]
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin", "COLUMNS": "100"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_command_shows_headlines_notes_and_files(tmp_path):
    trained(tmp_path / "model")
    (tmp_path / "scale.txt").write_text("2")
    done = grainmill("evaluate", "model", "--on", "scale=scale.txt", "--trainable", "toy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "scale/height" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["scale/height", "0.5000", "0.4000 to 0.6000", "0.5000"]
    assert "scale/width" not in done.stdout
    assert "a toy" in done.stdout
    assert str(tmp_path / "evaluation" / "figures.csv") in done.stdout
    wrong = grainmill("evaluate", "model", "--on", "scale", "--trainable", "toy", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "needs key=value" in wrong.stderr
