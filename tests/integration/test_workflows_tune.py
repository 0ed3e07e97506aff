"""The whole chain on real Ray and MLflow: with the toy in seconds, and with MultiGrain on real files."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import toy
from mlflow_tables import database

from grainmill import trainable as catalog
from grainmill.config.experiment import experiment_model
from grainmill.errors import SearchError
from grainmill.tracking.mlflow_runs import local_uri
from grainmill.workflows import run_folder, tune

pytestmark = pytest.mark.usefixtures("ray_cluster")


def experiment(storage, trainable="toy", **changes):
    content = {
        "name": "chain",
        "trainable": trainable,
        "data": {},
        "space": {"height": {"uniform": [0.0, 1.0]}},
        "objective": {"score": "max"},
        "search": {"trials": 4, "scheduler": "none"},
        "storage": str(storage),
    }
    return experiment_model(catalog.find(trainable)).model_validate({**content, **changes})


def call(verb, checked, storage, observer):
    return verb(checked, database(storage), None, observer, catalog.no_progress)


@pytest.fixture(scope="module")
def twice(tmp_path_factory, ray_cluster):
    """The same experiment run two times: storage, outcomes."""
    from umpire import Memory

    storage = tmp_path_factory.mktemp("storage")
    checked = experiment(storage)
    return storage, [call(tune.tune, checked, storage, Memory()) for _ in range(2)]


@pytest.fixture
def client(twice):
    return mlflow.MlflowClient(local_uri(twice[0]))


def test_winner_is_the_best_trial_and_is_trained_again(twice):
    _, (first, _) = twice
    heights = [record.setting["height"] for record in first.records]
    assert heights[0] == toy.Spec().height
    assert first.winner.trial.setting["height"] == max(heights)
    assert [one.trial.setting["height"] for one in first.candidates] == sorted(heights)[:1:-1]
    settings = [final.setting for one in first.candidates for final in one.trainings]
    assert settings == [{**one.trial.setting, "seed": seed} for one in first.candidates for seed in (1, 2)]
    assert first.final.setting == {"height": max(heights), "seed": 1}
    assert first.final.metrics["score"] == max(heights)


def test_second_run_adds_a_version_that_is_a_challenger(twice, client):
    storage, outcomes = twice
    assert [outcome.version.uri for outcome in outcomes] == ["models:/chain/1", "models:/chain/2"]
    assert [outcome.champion for outcome in outcomes] == [True, False]
    assert client.get_registered_model("chain").aliases == {"champion": 1, "challenger": 2}
    assert [Path(outcome.report).parent.name for outcome in outcomes] == ["run-1", "run-2"]
    done = json.loads((storage / "chain" / "run-1" / "done.json").read_text())
    assert done["version"] == "models:/chain/1"


def test_version_names_its_run_and_its_score(twice, client):
    _, (first, _) = twice
    version = client.get_model_version("chain", "1")
    assert client.get_run(version.run_id).info.run_name == f"final-{first.final.number:04d}"
    assert float(version.tags["score"]) == pytest.approx(first.final.metrics["score"], abs=1e-6)


def test_one_finished_parent_a_run_with_its_children_file_and_report(twice, client):
    storage, outcomes = twice
    experiment_id = client.get_experiment_by_name("chain").experiment_id
    runs = client.search_runs([experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    for number, outcome in enumerate(outcomes, start=1):
        parent = (storage / "chain" / f"run-{number}" / "parent-run").read_text()
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
        names = [f"{study}-{number:04d}" for study in ("trial", "final") for number in range(4)]
        assert sorted(run.info.run_name for run in children) == sorted(names)
        assert client.get_run(parent).data.metrics["score"] == outcome.final.metrics["score"]
        assert {item.path for item in client.list_artifacts(parent)} == {"experiment.yaml", "report", "report.html"}
        assert Path(outcome.report).read_text().startswith("<!doctype html>")


def test_registered_model_loads_in_a_process_without_our_packages_installed(twice, tmp_path):
    storage, outcomes = twice
    code = textwrap.dedent(f"""
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
        import mlflow, pandas as pd
        mlflow.set_tracking_uri({local_uri(storage)!r})
        model = mlflow.pyfunc.load_model("models:/chain@champion")
        print(model.metadata.signature.inputs, file=sys.stderr)
        print(model.predict(pd.DataFrame({{"x": [3.0]}}))["y"].tolist())
    """)
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout) == [3.0 * outcomes[0].final.setting["height"]]
    assert "'x': double" in loaded.stderr


def test_train_needs_no_search_and_shares_a_name_with_one(tmp_path, observer):
    checked = experiment(tmp_path, base={"height": 0.7})
    with run_folder.claim(checked, "run", print):
        pass
    outcome = call(tune.train, checked, tmp_path, observer)
    assert outcome.winner.trial is None
    assert len(outcome.candidates) == 1
    assert outcome.final.metrics["score"] == 0.7
    assert outcome.version.uri == "models:/chain/1"
    assert Path(outcome.report).parent.name == "train-1"


def test_no_secret_of_the_environment_is_written(tmp_path, observer, monkeypatch):
    ours = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", *ours):
        monkeypatch.setenv(name, f"canary {name}")
    call(tune.train, experiment(tmp_path), tmp_path, observer)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "experiment.yaml", "lineage.json", "card.md", "report.html"} <= {path.name for path in written}
    assert [str(path) for path in written if b"canary" in path.read_bytes()] == []
    (card,) = tmp_path.rglob("card.md")
    assert "| epochs | 4 |" in card.read_text(), "a number of epochs is no metric with an interval"
    assert "| epoch |" not in card.read_text()


def test_a_version_comes_of_its_trial_its_seed_and_its_data(twice, client):
    storage, (first, _) = twice
    version = client.get_model_version("chain", "1")
    parent = (storage / "chain" / "run-1" / "parent-run").read_text()
    tags = version.tags
    assert (tags["search.run"], tags["search"]) == (parent, (storage / "chain" / "run-1").as_uri())
    assert tags["trial"] == f"trial-{first.winner.trial.number:04d}"
    assert client.get_run(tags["trial.run"]).info.run_name == tags["trial"]
    assert (tags["training"], tags["seed"]) == (f"final-{first.final.number:04d}", "1")
    assert client.get_run(version.run_id).info.run_name == tags["training"]
    assert (tags["data.heights"], tags["data.scale"]) == ("a1b2", "c3d4")
    assert float(tags["cost.cpu_seconds"]) >= 0
    assert tags["hardware.workers"] == "1 of 1 CPU"
    pictures = {item.path for item in client.list_artifacts(version.run_id, "report")}
    assert pictures == {item.path for item in client.list_artifacts(parent, "report")} != set()


def test_search_without_a_winner_says_why_and_registers_nothing(tmp_path, observer):
    broken = experiment(tmp_path, base={"kind": "broken"}, search={"trials": 1})
    with pytest.raises(SearchError, match=r"none of 1 did.*the toy is broken"):
        call(tune.tune, broken, tmp_path, observer)
    client = mlflow.MlflowClient(local_uri(tmp_path))
    assert not client.search_registered_models()
    parent = client.get_run((tmp_path / "chain" / "run-1" / "parent-run").read_text())
    assert parent.info.status == "FAILED"


def test_tracking_server_gets_the_runs_the_artifacts_and_the_model(tracking_server, tmp_path, observer):
    server, before = tracking_server, set(tracking_server.artifacts.rglob("MLmodel"))
    tune.train(experiment(tmp_path / "runs"), server.uri, None, observer, catalog.no_progress)
    client = mlflow.MlflowClient(server.uri)
    version = client.get_model_version_by_alias("chain", "champion")
    assert client.get_run(version.run_id).info.run_name == "final-0000"
    parent = (tmp_path / "runs" / "chain" / "train-1" / "parent-run").read_text()
    assert {item.path for item in client.list_artifacts(parent)} == {"experiment.yaml", "report.html"}
    assert set(server.artifacts.rglob("MLmodel")) > before
    mlflow.set_tracking_uri(server.uri)
    model = mlflow.pyfunc.load_model("models:/chain@champion")
    assert model.predict(pd.DataFrame({"x": [2.0]}))["y"].tolist() == [1.0]


def test_multigrain_from_images_to_the_same_descriptors_in_a_new_process(tmp_path, observer):
    base = {"image_size": 32, "epochs": 1, "model": {"trunk": "narrow"}, "batch": {"size": 24, "length_factor": 1.0}}
    checked = experiment(
        tmp_path,
        "multigrain",
        data={"builtin": "shapes", "image_size": 40, "images": 96},
        base=base,
        space={"loss.weight": {"uniform": [0.1, 1.0]}, "model.p": {"uniform": [1.0, 6.0]}},
        objective={"mean_top1_copy_map": "max"},
        search={"trials": 2},
        resources={"retrain_workers": 2},
        winner={"candidates": 1},
    )
    outcome = call(tune.tune, checked, tmp_path, observer)
    images = sorted((tmp_path / "data" / "shapes-96x40" / "val").rglob("*.png"))
    code = textwrap.dedent(f"""
        import mlflow, numpy, pandas, pathlib, sys
        mlflow.set_tracking_uri({local_uri(tmp_path)!r})
        model = mlflow.pyfunc.load_model("models:/chain@champion")
        table = pandas.DataFrame({{"image": [pathlib.Path(name).read_bytes() for name in sys.argv[1:]]}})
        numpy.save("descriptors.npy", numpy.stack(model.predict(table)["embedding"]))
    """)
    subprocess.run([sys.executable, "-c", code, *map(str, images)], cwd=tmp_path, check=True)
    checkpoints = Path(outcome.report).parent / "trials" / f"final-{outcome.final.number:04d}"
    expected = catalog.find("multigrain").load(checkpoints)(pd.DataFrame({"image": [p.read_bytes() for p in images]}))
    loaded = np.load(tmp_path / "descriptors.npy")
    assert loaded.shape == (len(images), 128)
    assert np.abs(loaded - np.stack(expected["embedding"])).max() <= 1e-5
    assert np.allclose(np.linalg.norm(loaded, axis=1), 1, atol=1e-4)
