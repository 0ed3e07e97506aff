"""Trained models -> versions in MLflow's registry."""

import importlib
import re
import sys
from collections.abc import Mapping
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from grainmill import catalog
from grainmill.errors import TrackingError
from grainmill.tracking import Tracker

CHAMPION = "champion"


class Version(NamedTuple):
    """A registered model."""

    name: str
    number: str

    @property
    def uri(self) -> str:
        """To load exactly this version with."""
        return f"models:/{self.name}/{self.number}"


def register(
    tracker: Tracker, run_id: str, name: str, trainable: str, folder: Path, example: Any, tags: Mapping[str, str]
) -> Version:
    """Store the model in `folder` as a new version of `name` that came from a run, and make it the champion.

    The version holds the code that loads it, a signature and an input example. A run gets one version,
    however often it is registered.

    Args:
        tracker: where.
        run_id: the run that trained it.
        name: of the registered model.
        trainable: dotted path of the trainable's module.
        folder: where `fit` left its checkpoints.
        example: a table that the model takes.
        tags: of the version.
    """
    client = tracker.client
    known = client.search_model_versions(f"run_id = '{run_id}'")
    made = Version(name, str(known[0].version)) if known else _log(tracker, run_id, name, trainable, folder, example)
    for key, value in tags.items():
        client.set_model_version_tag(name, made.number, key, value)
    client.set_registered_model_alias(name, CHAMPION, made.number)
    return made


def _log(tracker: Tracker, run_id: str, name: str, trainable: str, folder: Path, example: Any) -> Version:
    prediction = catalog.find(trainable).load(folder)(example)
    mlflow.set_tracking_uri(tracker.uri)
    with mlflow.start_run(run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"checkpoints": str(folder)},
            code_paths=sorted({_package_path("grainmill"), _package_path(trainable.partition(".")[0])}),
            model_config={"trainable": trainable},
            signature=infer_signature(example, prediction),
            input_example=example,
            pip_requirements=_pinned_requirements(),
        )
    if not tracker.client.search_registered_models(f"name = '{name}'"):
        tracker.client.create_registered_model(name)
    model = mlflow.get_logged_model(info.model_id)
    made = tracker.client.create_model_version(name, model.artifact_location, run_id, model_id=model.model_id)
    return Version(name, str(made.version))


class Stored(NamedTuple):
    """A registered model on this machine."""

    folder: Path
    """With its checkpoints."""
    trainable: str
    run_id: str
    """Of the run that trained it."""


def fetch(tracking_uri: str, model: str) -> Stored:
    """Download a registered model.

    Args:
        tracking_uri: MLflow's.
        model: such as `models:/name@champion` or `models:/name/3`.
    Raises:
        TrackingError: there is no such model, or MLflow does not answer.
    """
    mlflow.set_tracking_uri(tracking_uri)
    try:
        folder = Path(mlflow.artifacts.download_artifacts(model))
        info = mlflow.models.Model.load(str(folder))
    except MlflowException as error:
        raise TrackingError(f"{model} must be in the registry at {tracking_uri}, but: {error.message}") from error
    settings = info.flavors["python_function"]
    checkpoints = folder / settings["artifacts"]["checkpoints"]["path"]
    return Stored(checkpoints, settings["config"]["trainable"], info.run_id)


def _package_path(package: str) -> str:
    module = importlib.import_module(package)
    file = Path(str(module.__file__))
    return str(file.parent if file.name == "__init__.py" else file)


def _pinned_requirements() -> list[str]:
    """Our dependencies in the versions installed here; of the optional ones those that the model has imported."""
    lines = {re.split(r"[\[<>=;~! ]", line)[0]: line for line in requires("grainmill") or () if '"dev"' not in line}
    names = [name for name, line in lines.items() if "extra ==" not in line or name in sys.modules]
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]
