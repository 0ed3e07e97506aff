import json
import pickle
import shutil
import sys
import tempfile
from hashlib import sha256

import mlflow
import pandas as pd
import pytest
import toy
from mlflow_tables import database
from servers import free_port

from grainmill.errors import StorageError, TrackingError
from grainmill.registry import models
from grainmill.registry.model_card import Interval, ModelCard
from grainmill.tracking.mlflow_runs import Tracker

CARD = ModelCard(
    "toy",
    "name: apples\n",
    {"search": "file:///runs/apples/run-1", "seed": "3"},
    toy.sources(toy.Data()),
    {"python": "3.11.7"},
    {"cpu": "2 x abacus"},
    {"cpu_seconds": 61.7},
    {"score": Interval(0.5, 0.25, 0.75), "epoch": Interval(4)},
)


def register(tracker, folder, run_id):
    example = toy.example(toy.Data())
    return models.register(tracker, run_id, "apples", folder, example, {"score": "0.5"}, CARD)


def fetch(uri, model):
    """A model whose files stay where they are."""
    with models.fetched(uri, model) as stored:
        return stored


def test_each_run_gets_one_version_and_the_first_is_the_champion_the_last_its_challenger(tmp_path):
    tracker = Tracker(database(tmp_path), "apples", tmp_path)
    list(toy.fit(toy.Spec(), toy.Data(), tmp_path / "model"))
    first, second = (tracker.start(name, {}) for name in ("first", "second"))
    versions = [register(tracker, tmp_path / "model", run_id) for run_id in (first, second, second)]
    assert [version.uri for version in versions] == ["models:/apples/1", "models:/apples/2", "models:/apples/2"]
    assert len(tracker.client.search_model_versions("name = 'apples'")) == 2
    challenger = tracker.client.get_model_version_by_alias("apples", "challenger")
    assert (int(challenger.version), challenger.run_id, challenger.tags["score"]) == (2, second, "0.5")
    assert register(tracker, tmp_path / "model", first).number == "1"
    assert tracker.client.get_registered_model("apples").aliases == {"champion": 1, "challenger": 2}
    assert [models.is_champion(tracker.client, version) for version in versions] == [True, False, False]
    assert tracker.client.get_run(first).info.status == "FINISHED"


def test_a_registered_model_comes_back_with_what_made_it(tmp_path):
    uri = database(tmp_path)
    tracker = Tracker(uri, "apples", tmp_path)
    list(toy.fit(toy.Spec(height=0.7), toy.Data(), tmp_path / "model"))
    run_id = tracker.start("first", {})
    register(tracker, tmp_path / "model", run_id)
    for name in ("models:/apples@champion", "models:/apples/1"):
        stored = fetch(uri, name)
        assert (stored.version.uri, stored.trainable, stored.run_id) == ("models:/apples/1", "toy", run_id)
        assert stored.tags["score"] == "0.5"
        table = toy.load(stored.folder)(pd.DataFrame({"x": [2.0]}))
        assert table["y"].tolist() == [1.4]
    for name in ("models:/pears@champion", "models:/apples/2", "models:/apples@best"):
        with pytest.raises(TrackingError, match=f"{name} must be in the registry"):
            fetch(uri, name)


def test_an_example_with_images_comes_back_as_it_was(tmp_path):
    tracker = Tracker(database(tmp_path), "apples", tmp_path)
    list(toy.fit(toy.Spec(), toy.Data(), tmp_path / "model"))
    example = pd.DataFrame({"x": [1.0, 2.5], "image": [b"\x89PNG\r\n\x00\xff", b""]})
    models.register(tracker, tracker.start("first", {}), "apples", tmp_path / "model", example, {}, CARD)
    (tmp_path / "copies").mkdir()
    with models.fetched(tracker.uri, "models:/apples/1", tmp_path / "copies") as stored:
        pd.testing.assert_frame_equal(stored.example, example)
        assert (stored.folder / "state.json").read_bytes() == (tmp_path / "model" / "state.json").read_bytes()
        assert stored.folder.is_relative_to(tmp_path / "copies")
    assert not list((tmp_path / "copies").iterdir())


def test_a_model_of_another_kind_is_refused(tmp_path):
    tracker = Tracker(database(tmp_path), "apples", tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "MLmodel").write_text("flavors: {python_function: {loader_module: json}}\n")
    tracker.client.create_registered_model("pears")
    tracker.client.create_model_version("pears", str(tmp_path / "plain"))
    with pytest.raises(TrackingError, match="models:/pears/1 must be a model that grainmill registered"):
        fetch(tracker.uri, "models:/pears/1")


@pytest.fixture
def stored(tmp_path):
    """Tracker, run id, and folder of the portable model of models:/apples/1."""
    tracker = Tracker(database(tmp_path), "apples", tmp_path)
    list(toy.fit(toy.Spec(height=0.7), toy.Data(), tmp_path / "model"))
    run_id = tracker.start("first", {})
    register(tracker, tmp_path / "model", run_id)
    return tracker, run_id, fetch(tracker.uri, "models:/apples/1").portable


def test_a_version_tells_where_it_comes_from(stored):
    tracker, run_id, portable = stored
    version = tracker.client.get_model_version("apples", "1")
    assert CARD.tags().items() <= version.tags.items()
    assert version.tags["sha256"] == sha256((portable / "MANIFEST.json").read_bytes()).hexdigest()
    assert version.description.startswith("# apples\n")
    assert "| height | 0.7 |" in version.description.splitlines()
    about = fetch(tracker.uri, "models:/apples/1").about
    assert set(about) == {"card.md", "experiment.yaml", "lineage.json"}
    assert about["lineage.json"] == CARD.json()
    assert version.description.partition("\n\nThe whole card")[0] in about["card.md"]
    inputs = tracker.client.get_run(run_id).inputs.dataset_inputs
    found = {(one.dataset.name, one.dataset.digest, one.tags[0].value) for one in inputs}
    assert found == {("heights", "a1b2", "training"), ("scale", "c3d4", "evaluation")}


def test_a_model_is_loaded_by_mlflow_alone(stored):
    _, _, portable = stored
    code = (portable.parent.parent / "pyfunc_script.py").read_text()
    imports = {line.split()[1].partition(".")[0] for line in code.splitlines() if line.startswith(("import", "from"))}
    assert imports - set(sys.stdlib_module_names) == {"mlflow", "pandas"}
    lines = (portable.parent.parent / "requirements.txt").read_text().splitlines()
    assert sorted(line.partition("==")[0] for line in lines) == ["mlflow", "pandas"]
    assert not list(portable.parent.parent.rglob("*.pkl"))


def resealed(portable):
    """Change a file, and its digest in the manifest as well."""
    (portable / "model.py").write_text("load = print\n")
    manifest = json.loads((portable / "MANIFEST.json").read_text())
    manifest["model.py"] = {"bytes": 13, "sha256": sha256(b"load = print\n").hexdigest()}
    (portable / "MANIFEST.json").write_text(json.dumps(manifest))


def append(file):
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as text:
        text.write("\n# more\n")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: (p / "model.py").write_text("load = print\n"), "model.py was changed"),
        (lambda p: (p / "checkpoint/state.json").write_text("{"), "checkpoint/state.json was changed"),
        (lambda p: (p / "signature.json").unlink(), "signature.json is missing"),
        (lambda p: (p / "more.py").touch(), "more.py is not listed"),
        (resealed, "MANIFEST.json was changed"),
        (lambda p: (p.parent.parent / "python_model").write_bytes(pickle.dumps(1)), "python_model holds a pickle"),
        (lambda p: (p.parent.parent / "python_model.pkl").touch(), "python_model.pkl holds a pickle"),
        (lambda p: append(p.parent.parent / "pyfunc_script.py"), "a file beside the model was changed"),
        (lambda p: append(p.parent.parent / "MLmodel"), "a file beside the model was changed"),
        (lambda p: append(p.parent / "about/card.md"), "a file beside the model was changed"),
        (lambda p: append(p.parent.parent / "code/evil.py"), "a file beside the model was changed"),
        (lambda p: (p.parent.parent / "requirements.txt").unlink(), "a file beside the model was changed"),
        (lambda p: (p / "more").symlink_to("/etc"), "more is not listed"),
        (lambda p: (p.parent / "about/x").symlink_to("/etc/hostname"), "artifacts/about/x is a link"),
        (lambda p: (p.parent.parent / "code").symlink_to("/etc"), "code is a link"),
    ],
)
def test_a_version_whose_files_were_tampered_with_is_refused(stored, damage, told):
    tracker, _, portable = stored
    damage(portable)
    with pytest.raises(TrackingError, match=f"models:/apples/1 {told}"):
        fetch(tracker.uri, "models:/apples/1")


@pytest.mark.parametrize("path", ["../other", "/etc", "artifacts/../../other", ""])
def test_no_path_in_a_model_leads_out_of_its_files(stored, path):
    tracker, _, portable = stored
    file = portable.parent.parent / "MLmodel"
    file.write_text(file.read_text().replace("path: artifacts/model", f"path: {path!r}"))
    with pytest.raises(StorageError, match=f"the MLmodel of models:/apples/1 must lead to .*, got '{path}'"):
        fetch(tracker.uri, "models:/apples/1")


def test_loading_a_version_changes_nothing_of_it(stored):
    tracker, _, portable = stored
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.pyfunc.load_model("models:/apples/1")
    assert fetch(tracker.uri, "models:/apples/1").portable == portable


def test_a_download_is_gone_after_its_use(stored, tmp_path, monkeypatch):
    tracker, _, portable = stored
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    package = portable.parent.parent
    monkeypatch.setattr(models.MlflowClient, "get_model_version_download_uri", lambda *_: "mlflow-artifacts:/1/x")
    monkeypatch.setattr(
        mlflow.artifacts, "download_artifacts", lambda _, dst_path: shutil.copytree(package, f"{dst_path}/x")
    )
    with models.fetched(tracker.uri, "models:/apples/1") as found:
        assert found.folder.is_relative_to(tmp_path / "scratch")
        assert (found.folder / "state.json").is_file()
    assert not list((tmp_path / "scratch").iterdir())


def test_mlflow_refuses_to_load_what_was_tampered_with(stored):
    tracker, _, portable = stored
    (portable / "checkpoint/state.json").write_text('{"height": 9}')
    mlflow.set_tracking_uri(tracker.uri)
    with pytest.raises(ValueError, match="the toy was changed"):
        mlflow.pyfunc.load_model("models:/apples/1")


def test_an_export_with_a_pickle_is_not_registered(tmp_path, monkeypatch):
    def export(folder, out):
        facts = toy_export(folder, out)
        (out / "weights").write_bytes(pickle.dumps(facts))
        manifest = json.loads((out / "MANIFEST.json").read_text())
        content = (out / "weights").read_bytes()
        manifest["weights"] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        (out / "MANIFEST.json").write_text(json.dumps(manifest))
        return facts

    toy_export = toy.export
    monkeypatch.setattr(toy, "export", export)
    tracker = Tracker(database(tmp_path), "apples", tmp_path)
    list(toy.fit(toy.Spec(), toy.Data(), tmp_path / "model"))
    with pytest.raises(TrackingError, match="weights holds a pickle"):
        register(tracker, tmp_path / "model", tracker.start("first", {}))
    assert not tracker.client.search_registered_models()


def test_an_alias_of_a_version_that_is_gone_points_nowhere(stored):
    tracker, _, _ = stored
    tracker.client.delete_model_version("apples", "1")
    for name in ("models:/apples@champion", "models:/apples/1"):
        with pytest.raises(TrackingError, match=f"{name} must be in the registry"):
            fetch(tracker.uri, name)


def test_a_registry_that_does_not_answer_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    with pytest.raises(TrackingError, match=f"MLflow must answer at http://127.0.0.1:{port}") as caught:
        fetch(f"http://me:hunter2@127.0.0.1:{port}", "models:/apples/1")
    assert "hunter2" not in str(caught.value)
