"""Settings of the application that Ray Serve runs."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from grainmill.errors import ServingError
from grainmill.serve.app import DIRECT, Settings, application
from grainmill.serve.http import TOKEN

CONFIG = Path(__file__).parents[3] / "infra" / "serve" / "champion.yaml"


def test_the_config_file_that_comes_with_it_is_right():
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(CONFIG.read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "grainmill.serve.app:application"
    assert [one.name for one in application.deployments] == ["Service"]
    assert Settings.model_validate(application.args).model == "models:/demo@champion"


@pytest.mark.parametrize(
    "wrong", [{"model": "models:/demo/1"}, {"model": "demo@champion"}, {"pol_seconds": 1}, {"batch": 0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Settings.model_validate({"model": "models:/demo@champion", "tracking_uri": "http://x", **wrong})


@pytest.mark.parametrize("name", DIRECT)
def test_replicas_that_other_machines_reach_need_a_token(name, monkeypatch):
    settings = {"model": "models:/demo@champion", "tracking_uri": "http://x"}
    monkeypatch.setenv(name, "1")
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ServingError, match=f"must have a token, but {name}=1 opens .*; set {TOKEN}"):
        application(settings)
    monkeypatch.setenv(TOKEN, "secret")
    application(settings)
