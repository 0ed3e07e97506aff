"""Trained models -> versions in MLflow's registry."""

import hashlib
import importlib
import re
import sys
from collections.abc import Mapping
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from grainmill import catalog
from grainmill.errors import TrackingError
from grainmill.tracking import Tracker

CHAMPION, CHALLENGER = "champion", "challenger"
"""The alias of the version for users, and of the newest one that has yet to show that it is better."""
SETTING, SOURCE, DIGEST = "evaluated.setting", "evaluated.source", "evaluated.digest"
"""Tags of a version that an evaluation made."""


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
    """Store the model in `folder` as a new version of `name` that came from a run.

    The first one becomes the champion, each later one the challenger: see `promotion`. The version holds the code that
    loads it, a signature and an input example. A run gets one version, however often it is registered.

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
    trained = [one for one in client.search_model_versions(f"run_id = '{run_id}'") if SOURCE not in one.tags]
    if trained:
        made = Version(name, str(trained[0].version))
    else:
        made = _log(client, run_id, name, trainable, folder, example, tags)
    if CHAMPION not in client.get_registered_model(name).aliases:
        client.set_registered_model_alias(name, CHAMPION, made.number)
    elif not is_champion(client, made):
        client.set_registered_model_alias(name, CHALLENGER, made.number)
    return made


def is_champion(client: MlflowClient, version: Version) -> bool:
    """Whether a version is the one for users."""
    return str(client.get_registered_model(version.name).aliases.get(CHAMPION)) == version.number


def _log(
    client: MlflowClient,
    run_id: str,
    name: str,
    trainable: str,
    folder: Path,
    example: Any,
    tags: Mapping[str, str],
) -> Version:
    prediction = catalog.find(trainable).load(folder)(example)
    mlflow.set_tracking_uri(client.tracking_uri)
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
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    model = mlflow.get_logged_model(info.model_id)
    made = client.create_model_version(name, model.artifact_location, run_id, dict(tags), model_id=model.model_id)
    return Version(name, str(made.version))


class Stored(NamedTuple):
    """A registered model on this machine."""

    version: Version
    folder: Path
    """With its checkpoints."""
    trainable: str
    run_id: str
    """Of the run that trained it."""
    example: Any
    """A table that it takes."""
    tags: Mapping[str, str]


def fetch(tracking_uri: str, model: str, into: Path | None = None) -> Stored:
    """Download a registered model.

    Args:
        tracking_uri: MLflow's.
        model: such as `models:/name@champion` or `models:/name/3`.
        into: a new folder; by default, the files stay where they are if this machine sees them.
    Raises:
        TrackingError: there is no such model, `register` did not make it, or MLflow does not answer.
    """
    mlflow.set_tracking_uri(tracking_uri)
    try:
        known = look_up(MlflowClient(tracking_uri), model.removeprefix("models:/"))
        version = Version(known.name, str(known.version))
        folder = Path(mlflow.artifacts.download_artifacts(version.uri, dst_path=into and str(into)))
        info = mlflow.models.Model.load(str(folder))
    except MlflowException as error:
        raise TrackingError(
            f"{model} must be in the registry at {tracking_uri}, named as models:/name@alias or models:/name/version, "
            f"but: {error.message}"
        ) from error
    settings = info.flavors.get("python_function", {})
    trainable = settings.get("config", {}).get("trainable")
    if trainable is None:
        raise TrackingError(f"{model} must be a model that grainmill registered, got one of another kind; name another")
    checkpoints = folder / settings["artifacts"]["checkpoints"]["path"]
    example = info.load_input_example(str(folder))
    return Stored(version, checkpoints, trainable, known.run_id, example, known.tags)


def look_up(client: MlflowClient, model: str) -> Any:
    """MLflow's version, of `name@alias` or `name/number`. Raises MlflowException."""
    name, at, alias = model.partition("@")
    if at:
        return client.get_model_version_by_alias(name, alias)
    name, _, number = model.partition("/")
    return client.get_model_version(name, number)


def register_evaluated(tracking_uri: str, source: Stored, folder: Path, served: str) -> Version:
    """Store a model that an evaluation made of a registered one as a further version; the champion stays as it is.

    The version is of the same run, and has its source's tags, too. There is one of each setting and content.

    Args:
        tracking_uri: MLflow's.
        source: what was evaluated.
        folder: of the model; its trainable's `load` reads it.
        served: the setting that it serves.
    """
    client = MlflowClient(tracking_uri)
    identity = {SETTING: served, DIGEST: _digest(folder)}
    name, run_id = source.version.name, source.run_id
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if identity.items() <= known.tags.items():
            return Version(name, str(known.version))
    tags = {**source.tags, SOURCE: source.version.uri, **identity}
    return _log(client, run_id, name, source.trainable, folder, source.example, tags)


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _package_path(package: str) -> str:
    module = importlib.import_module(package)
    file = Path(str(module.__file__))
    return str(file.parent if file.name == "__init__.py" else file)


def _pinned_requirements() -> list[str]:
    """Our dependencies in the versions installed here; of the optional ones those that the model has imported."""
    lines = {re.split(r"[\[<>=;~! ]", line)[0]: line for line in requires("grainmill") or () if '"dev"' not in line}
    names = [name for name, line in lines.items() if "extra ==" not in line or name in sys.modules]
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]
