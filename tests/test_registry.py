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


def test_each_run_gets_one_version_and_the_last_is_the_champion(tmp_path):
    tracker = Tracker(local_uri(tmp_path), "apples", tmp_path)
    list(toy.fit(toy.Spec(), toy.Data(), tmp_path / "model"))
    first, second = (tracker.start(name, {}, {}) for name in ("first", "second"))
    versions = [register(tracker, tmp_path / "model", run_id) for run_id in (first, second, second)]
    assert [version.uri for version in versions] == ["models:/apples/1", "models:/apples/2", "models:/apples/2"]
    assert len(tracker.client.search_model_versions("name = 'apples'")) == 2
    champion = tracker.client.get_model_version_by_alias("apples", "champion")
    assert (int(champion.version), champion.run_id, champion.tags) == (2, second, {"score": "0.5"})
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
        assert (stored.trainable, stored.run_id) == ("toy", run_id)
        table = toy.load(stored.folder)(pd.DataFrame({"x": [2.0]}))
        assert table["y"].tolist() == [1.4]
    for name in ("models:/pears@champion", "models:/apples/2", "models:/apples@best"):
        with pytest.raises(TrackingError, match=f"{name} must be in the registry"):
            registry.fetch(uri, name)
