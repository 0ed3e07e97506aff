import sys
from unittest.mock import Mock

import pandas as pd
import pytest
import toy

from grainmill import registry
from grainmill.errors import TrackingError
from grainmill.tracking import Tracker, local_uri


def register(tracker, folder, run_id):
    example = toy.example(toy.Data())
    return registry.register(tracker, run_id, "apples", "toy", folder, example, {"score": "0.5"})


def test_each_run_gets_one_version_and_the_first_is_the_champion_the_last_its_challenger(tmp_path):
    tracker = Tracker(local_uri(tmp_path), "apples", tmp_path)
    list(toy.fit(toy.Spec(), toy.Data(), tmp_path / "model"))
    first, second = (tracker.start(name, {}, {}) for name in ("first", "second"))
    versions = [register(tracker, tmp_path / "model", run_id) for run_id in (first, second, second)]
    assert [version.uri for version in versions] == ["models:/apples/1", "models:/apples/2", "models:/apples/2"]
    assert len(tracker.client.search_model_versions("name = 'apples'")) == 2
    challenger = tracker.client.get_model_version_by_alias("apples", "challenger")
    assert (int(challenger.version), challenger.run_id, challenger.tags) == (2, second, {"score": "0.5"})
    assert register(tracker, tmp_path / "model", first).number == "1"
    assert tracker.client.get_registered_model("apples").aliases == {"champion": 1, "challenger": 2}
    assert [registry.is_champion(tracker.client, version) for version in versions] == [True, False, False]
    assert tracker.client.get_run(first).info.status == "FINISHED"


def test_requirements_are_pinned_to_what_is_installed():
    from importlib.metadata import version

    pinned = dict(line.split("==") for line in registry._pinned_requirements())
    assert pinned["torch"] == version("torch").partition("+")[0]
    assert {"mlflow", "ray", "pillow", "safetensors"} <= pinned.keys()
    assert "pytest" not in pinned


def test_an_optional_package_is_required_by_the_models_that_import_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    assert not any(line.startswith("timm") for line in registry._pinned_requirements())
    monkeypatch.setitem(sys.modules, "timm", Mock())
    assert any(line.startswith("timm==") for line in registry._pinned_requirements())


def test_a_registered_model_comes_back_with_what_made_it(tmp_path):
    uri = local_uri(tmp_path)
    tracker = Tracker(uri, "apples", tmp_path)
    list(toy.fit(toy.Spec(height=0.7), toy.Data(), tmp_path / "model"))
    run_id = tracker.start("first", {}, {})
    register(tracker, tmp_path / "model", run_id)
    for name in ("models:/apples@champion", "models:/apples/1"):
        stored = registry.fetch(uri, name)
        assert (stored.version.uri, stored.trainable, stored.run_id) == ("models:/apples/1", "toy", run_id)
        assert stored.tags == {"score": "0.5"}
        table = toy.load(stored.folder)(pd.DataFrame({"x": [2.0]}))
        assert table["y"].tolist() == [1.4]
    for name in ("models:/pears@champion", "models:/apples/2", "models:/apples@best"):
        with pytest.raises(TrackingError, match=f"{name} must be in the registry"):
            registry.fetch(uri, name)


def test_an_example_with_images_comes_back_as_it_was(tmp_path):
    tracker = Tracker(local_uri(tmp_path), "apples", tmp_path)
    list(toy.fit(toy.Spec(), toy.Data(), tmp_path / "model"))
    example = pd.DataFrame({"x": [1.0, 2.5], "image": [b"\x89PNG\r\n\x00\xff", b""]})
    registry.register(tracker, tracker.start("first", {}, {}), "apples", "toy", tmp_path / "model", example, {})
    stored = registry.fetch(tracker.uri, "models:/apples/1", tmp_path / "copy" / "model")
    pd.testing.assert_frame_equal(stored.example, example)
    assert (stored.folder / "state.json").read_bytes() == (tmp_path / "model" / "state.json").read_bytes()
    assert stored.folder.is_relative_to(tmp_path / "copy" / "model")


def test_a_model_of_another_kind_is_refused(tmp_path):
    tracker = Tracker(local_uri(tmp_path), "apples", tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "MLmodel").write_text("flavors: {python_function: {loader_module: json}}\n")
    tracker.client.create_registered_model("pears")
    tracker.client.create_model_version("pears", str(tmp_path / "plain"))
    with pytest.raises(TrackingError, match="models:/pears/1 must be a model that grainmill registered"):
        registry.fetch(tracker.uri, "models:/pears/1")


def test_the_digest_tells_names_and_contents_apart(tmp_path):
    folders = []
    for number, files in enumerate(
        [{"a": "12", "b": "3"}, {"a": "1", "b": "23"}, {"a": "12", "c": "3"}, {"a/b": "3", "c": "12"}, {"a": "12"}]
    ):
        for name, text in files.items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        folders.append(tmp_path / str(number))
    (tmp_path / "again").mkdir()
    for name, text in (("b", "3"), ("a", "12")):
        (tmp_path / "again" / name).write_text(text)
    digests = [registry._digest(folder) for folder in folders]
    assert len(set(digests)) == len(folders)
    assert registry._digest(tmp_path / "again") == digests[0]
