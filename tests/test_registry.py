import sys
from unittest.mock import Mock

import toy

from grainmill import registry
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
