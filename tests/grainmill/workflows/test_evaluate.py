"""Evaluation of a model: the model, its settings, the workers, and the records in MLflow."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import toy
from commands import python_path
from mlflow_tables import database
from toy_models import registered, run, trained
from toy_settings import CARD
from typer.testing import CliRunner

from grainmill.cli.app import app
from grainmill.errors import EvaluationError, ExperimentError, TrackingError
from grainmill.registry import comparison, models, promotion
from grainmill.tracking.mlflow_runs import local_uri


def test_a_folder_with_checkpoints_or_of_a_run_is_a_model(scale, tmp_path):
    trained(tmp_path / "run-1" / "trials" / "final-0003")
    (tmp_path / "run-1" / "done.json").write_text('{"checkpoints": "trials/final-0003"}')
    for folder in (tmp_path / "run-1", tmp_path / "run-1" / "trials" / "final-0003"):
        result, version = run(folder, [scale, "times=3"], tmp_path)
        assert result.measurements[0].value == 0.25 * 2 * 3
        assert version is None
    assert not (tmp_path / "mlflow.db").exists()


def test_a_registered_models_run_gets_the_figures_and_the_files(scale, tmp_path):
    tracker, run_id = registered(tmp_path)
    assert run("models:/apples@champion", [scale], tmp_path).version is None
    assert tracker.client.get_run(run_id).data.metrics == {"scale/height": 0.5, "scale/workers": 1.0}
    assert [file.path for file in tracker.client.list_artifacts(run_id, "evaluation")] == ["evaluation/figures.csv"]
    # A later figure takes the place of an earlier one that is larger; MLflow takes 1,000 at once.
    run("models:/apples@champion", [scale, "times=-1", "extra=999"], tmp_path)
    metrics = tracker.client.get_run(run_id).data.metrics
    extra = {f"scale/extra {number}": float(number) for number in range(999)}
    assert metrics == {"scale/height": -0.5, "scale/workers": 1.0, **extra}
    assert [one.version for one in tracker.client.search_model_versions("name = 'apples'")] == [1]


def test_a_model_that_comes_of_a_registered_one_is_a_further_version_of_it_and_not_the_champion(scale, tmp_path):
    tracker, run_id = registered(tmp_path)
    settings = [scale, "times=3", "serve=500/p4-whitened"]
    assert run("models:/apples@champion", settings, tmp_path).version.uri == "models:/apples/2"
    version = tracker.client.get_model_version("apples", "2")
    assert version.run_id == run_id
    assert (version.tags["score"], version.tags["evaluated.setting"]) == ("0.25", "500/p4-whitened")
    assert version.tags["evaluated.source"] == "models:/apples/1"
    assert int(tracker.client.get_model_version_by_alias("apples", "champion").version) == 1
    table = pd.DataFrame({"x": [2.0]})
    for uri, height in (("models:/apples@champion", 0.25), ("models:/apples/2", 0.75)):
        assert mlflow.pyfunc.load_model(uri).predict(table)["y"].tolist() == [2 * height]
    with models.fetched(local_uri(tmp_path), "models:/apples/2") as stored:
        pd.testing.assert_frame_equal(stored.example, toy.example(toy.Data()))

    # The same again makes none, another setting or content does, and so does what is made of that.
    assert run("models:/apples@champion", settings, tmp_path).version.number == "2"
    assert run("models:/apples/1", [scale, "times=3", "serve=224/p3"], tmp_path).version.number == "3"
    assert run("models:/apples/1", [scale, "times=5", "serve=224/p3"], tmp_path).version.number == "4"
    assert run("models:/apples/4", [scale, "times=5", "serve=224/p3"], tmp_path).version.number == "5"
    assert tracker.client.get_model_version("apples", "5").tags["evaluated.source"] == "models:/apples/4"
    # The run that trained the champion still has one version of its own.
    again = models.register(tracker, run_id, "apples", tmp_path / "model", toy.example(toy.Data()), {}, CARD)
    assert again.number == "1"


def test_what_was_measured_of_each_version_is_kept_and_decides_on_the_champion(scale, tmp_path):
    tracker, _ = registered(tmp_path)
    settings = [scale, "times=3", "serve=500/p4", "queries=40"]
    run("models:/apples@champion", settings, tmp_path)
    for number, mean in (("1", 0.5), ("2", 1.5)):
        found = comparison.load(tracker.client, tracker.client.get_model_version("apples", number))
        assert found.keys() == {"scale/height"}
        assert found["scale/height"].mean == pytest.approx(mean, abs=0.01)
        assert found["scale/height"].data == "40 queries"
    done = promotion.promote(tracker.uri, "models:/apples/2", ["metric=scale/height"], print)
    assert done.champion.uri == "models:/apples/2"
    assert tracker.client.get_registered_model("apples").aliases == {"champion": 2, "previous": 1}


def test_a_figure_that_mlflow_does_not_take_is_told(scale, tmp_path):
    registered(tmp_path)
    with pytest.raises(TrackingError, match=r"must record the measurements of run .*scale/extra\?"):
        run("models:/apples@champion", [scale, "odd=scale/extra?"], tmp_path)


def test_one_worker_does_without_ray(scale, tmp_path):
    trained(tmp_path / "model")
    script = f"""
import sys
from pathlib import Path
from grainmill.workflows import evaluate
evaluate.evaluate("model", ["{scale}"], "toy", Path("out"), "sqlite:///none.db")
print("ray" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


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
    with pytest.raises(EvaluationError, match=r"trainable must be installed .*got 'tpy'"):
        run(tmp_path / "model", [scale], tmp_path, trainable="tpy")
    with pytest.raises(TrackingError, match=r"made by tune or train, but there is no .*mlflow\.db"):
        run("models:/apples@champion", [scale], tmp_path)


def grainmill(*words, cwd):
    command = [str(Path(sys.executable).with_name("grainmill")), *words, "--trainable", "toy"]
    environment = {
        "PYTHONPATH": python_path(),
        "PATH": "/usr/bin:/bin",
        "COLUMNS": "100",
        "MLFLOW_TRACKING_URI": local_uri(cwd),
    }
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def cells(output, word):
    """Return the cells of each table row that contains the word."""
    rows = [line for line in output.splitlines() if "│" in line and word in line]
    return [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows]


def test_the_command_shows_headlines_published_figures_notes_files_and_the_model(tmp_path):
    trained(tmp_path / "model")
    (tmp_path / "scale.txt").write_text("2")
    settings = ("--on", "scale=scale.txt", "--set", "paper=true", "--set", "serve=500/p4")
    done = grainmill("evaluate", "model", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "scale/height") == [["scale/height", "0.5000", "0.4000 to 0.6000", "0.5000"]]
    assert "scale/workers" not in done.stdout
    assert [line.strip() for line in done.stdout.splitlines()].count("heights") == 1
    assert "┃ pixels \\ p* ┃ 3      ┃ inf    ┃" in done.stdout
    assert cells(done.stdout, "│ 224   ") == [["224", "0.2500", "0.5000"]]
    assert cells(done.stdout, "│ 500   ") == [["500", "0.1250", "3.0000"]]
    first, second = done.stdout.split("published: ")[1:]
    assert first.splitlines()[0].strip() == "scale"
    assert cells(first, "Table") == [
        ["Toy", "0.5", "3", "500", "height", "0.9150", "Table 7"],
        ["None", "", "1", "224", "height", "3.7800", "Table 8"],
    ]
    assert second.splitlines()[0].strip() == "copies strong with 10,000 distractors"
    assert cells(second, "Table") == [["Toy", "1", "3", "800", "map", "0.5000", "Table 9"]]
    told = done.stdout.splitlines()[-3:]
    assert told[0] == "a toy, of rank 0"
    assert told[1] == str(tmp_path / "evaluation" / "figures.csv")
    assert told[2].split() == ["model", str(tmp_path / "evaluation" / "model")]


def test_the_command_tells_the_version_and_how_to_load_it(tmp_path):
    registered(tmp_path)
    (tmp_path / "scale.txt").write_text("2")
    settings = ("--on", "scale=scale.txt", "--set", "serve=500/p4")
    done = grainmill("evaluate", "models:/apples@champion", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, load = done.stdout.splitlines()[-2:]
    assert model.split(maxsplit=1) == ["model", "models:/apples/2, serves 500/p4"]
    code = load.split(maxsplit=1)[1]
    scope = {"mlflow": mlflow, "table": pd.DataFrame({"x": [2.0]})}
    exec(f"found = [{code.replace(';', ',')}][-1].predict(table)['y'].tolist()", scope)
    assert scope["found"] == [0.5]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["model", "--on", "scale"], 2, "--on needs BENCHMARK=PATH, got 'scale'"),
        (["model", "--on", "scale=scale.txt", "--set", "tmes=3"], 2, "did you mean 'times'?"),
        (["model", "--on", "scale=absent.txt"], 1, "No such file or directory: 'absent.txt'"),
        (["nowhere", "--on", "scale=scale.txt"], 1, "name a run"),
        (["models:/apples@champion", "--on", "scale=scale.txt"], 1, "must be in the registry"),
        (["model", "--on", "scale=scale.txt", "--workers", "0"], 2, "than or equal to 1"),
        (["model"], 2, "Missing option '--on'"),
    ],
)
def test_the_command_tells_what_is_wrong_and_writes_nothing(tmp_path, monkeypatch, words, code, told):
    trained(tmp_path / "model")
    (tmp_path / "scale.txt").write_text("2")
    monkeypatch.chdir(tmp_path)
    variables = {"COLUMNS": "100", "MLFLOW_TRACKING_URI": database(tmp_path)}
    done = CliRunner(env=variables).invoke(app, ["evaluate", *words, "--trainable", "toy"])
    assert (done.exit_code, done.stdout) == (code, "")
    assert isinstance(done.exception, SystemExit), "no defect"
    assert told in " ".join(done.stderr.replace("│", "").split())
    assert not (tmp_path / "evaluation").exists()
