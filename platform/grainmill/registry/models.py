"""Trained models -> versions in MLflow's registry."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema

from grainmill import trainable as catalog
from grainmill.errors import TrackingError, hidden
from grainmill.registry import integrity, model_card
from grainmill.registry.model_card import Interval, ModelCard
from grainmill.tracking.mlflow_runs import Tracker

CHAMPION, CHALLENGER = "champion", "challenger"
"""The alias of the version for users, and of the newest one that has yet to show that it is better."""
CHECKPOINT = "checkpoint"
"""The part of a portable model that its trainable evaluates."""
ABOUT, CARD, LINEAGE = "about", "card.md", "lineage.json"
"""Among the artifacts of a version: the folder of texts about it, its model card, and where it comes from."""
MANIFEST_DIGEST = "sha256"
"""Tag of a version: of its portable model's manifest, which has the digests of all files."""
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
    tracker: Tracker, run_id: str, name: str, folder: Path, example: Any, tags: Mapping[str, str], card: ModelCard
) -> Version:
    """Store the model in `folder` as a new version of `name` that came from a run.

    The first one becomes the champion, each later one the challenger: see `promotion`. The version holds a portable
    model, a signature and an input example; its description is the model's card, which is whole among its artifacts,
    beside all of its lineage. A run gets one version, however often it is registered.

    Args:
        tracker: where.
        run_id: the run that trained it.
        name: of the registered model.
        folder: where `fit` left its checkpoints.
        example: a table that the model takes.
        tags: of the version, beside those of its lineage.
        card: where the model comes from; its trainable is the dotted path of a module.
    """
    client = tracker.client
    trained = [one for one in client.search_model_versions(f"run_id = '{run_id}'") if SOURCE not in one.tags]
    if trained:
        made = Version(name, str(trained[0].version))
    else:
        client.log_inputs(run_id, [_input(source) for source in card.data])

        def about(facts: Mapping[str, Any]) -> dict[str, str]:
            settings = hidden(card.experiment)
            return {CARD: model_card.card(name, facts, card), LINEAGE: card.json(), "experiment.yaml": settings}

        made = _log(client, run_id, name, card.trainable, folder, example, {**card.tags(), **tags}, about)
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
    about: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> Version:
    """A new version; `about` makes texts to keep with it, by file name, of what the export told of the model."""
    mlflow.set_tracking_uri(client.tracking_uri)
    with tempfile.TemporaryDirectory() as scratch, mlflow.start_run(run_id):
        portable, told = Path(scratch) / "model", Path(scratch) / ABOUT
        texts = about(catalog.find(trainable).export(folder, portable))
        _stop_at(integrity.faults(portable), f"the export of {trainable}")
        told.mkdir()
        for file, text in texts.items():
            (told / file).write_text(text)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_script.py")),
            artifacts={"model": str(portable), ABOUT: str(told)},
            model_config={"trainable": trainable},
            signature=_signature(portable),
            input_example=example,
            pip_requirements=[f"mlflow=={version('mlflow')}", *_lines(portable / "requirements.txt")],
        )
        tags = {**tags, MANIFEST_DIGEST: integrity.manifest_digest(portable)}
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    model = mlflow.get_logged_model(info.model_id)
    description = model_card.description(texts[CARD], f"artifacts/{ABOUT}/{CARD}")
    made = client.create_model_version(
        name, model.artifact_location, run_id, dict(tags), description=description, model_id=model.model_id
    )
    return Version(name, str(made.version))


class RegisteredModel(NamedTuple):
    """A registered model on this machine."""

    version: Version
    folder: Path
    """With its checkpoint."""
    portable: Path
    """What anyone can load; not changed since it was registered."""
    trainable: str
    run_id: str
    """Of the run that trained it."""
    example: Any
    """A table that it takes."""
    tags: Mapping[str, str]
    about: Mapping[str, str]
    """Texts about it, its card and its lineage among them, by file name."""


def fetch(tracking_uri: str, model: str, into: Path | None = None) -> RegisteredModel:
    """Download a registered model.

    Args:
        tracking_uri: MLflow's.
        model: such as `models:/name@champion` or `models:/name/3`.
        into: a new folder; by default, the files stay where they are if this machine sees them.
    Raises:
        TrackingError: there is no such model, `register` did not make it, its files are not those that were
            registered, or MLflow does not answer.
    """
    mlflow.set_tracking_uri(tracking_uri)
    try:
        known = look_up(MlflowClient(tracking_uri), model.removeprefix("models:/"))
        version = Version(known.name, str(known.version))
        folder = Path(mlflow.artifacts.download_artifacts(version.uri, dst_path=into and str(into)))
        info = mlflow.models.Model.load(str(folder))
    except MlflowException as error:
        raise TrackingError(
            f"{model} must be in the registry at {hidden(tracking_uri)}, named as models:/name@alias or "
            f"models:/name/version, but: {hidden(error.message)}"
        ) from error
    settings = info.flavors.get("python_function", {})
    trainable = settings.get("config", {}).get("trainable")
    if trainable is None:
        raise TrackingError(f"{model} must be a model that grainmill registered, got one of another kind; name another")
    portable, about = (folder / settings["artifacts"][name]["path"] for name in ("model", ABOUT))
    others = [path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(portable)]
    pickles = [f"{path.relative_to(folder)} holds a pickle" for path in others if integrity.holds_pickle(path)]
    _stop_at(integrity.faults(portable, known.tags.get(MANIFEST_DIGEST, "")) + pickles, model)
    example = info.load_input_example(str(folder))
    texts = {path.name: path.read_text() for path in about.iterdir()}
    return RegisteredModel(
        version, portable / CHECKPOINT, portable, trainable, known.run_id, example, known.tags, texts
    )


def _stop_at(faults: Sequence[str], what: str) -> None:
    if faults:
        raise TrackingError(
            f"a model must be the one that was registered, and hold no pickle, but in {what} {', '.join(faults)}; "
            "put the files back, or register it again"
        )


def look_up(client: MlflowClient, model: str) -> Any:
    """MLflow's version, of `name@alias` or `name/number`. Raises MlflowException."""
    name, at, alias = model.partition("@")
    if at:
        return client.get_model_version_by_alias(name, alias)
    name, _, number = model.partition("/")
    return client.get_model_version(name, number)


def register_evaluated(
    tracking_uri: str, source: RegisteredModel, folder: Path, served: str, figures: Sequence[catalog.Measurement]
) -> Version:
    """Store a model that an evaluation made of a registered one as a further version; the champion stays as it is.

    The version is of the same run, and has its source's tags, too. There is one of each setting and content.

    Args:
        tracking_uri: MLflow's.
        source: what was evaluated.
        folder: of the model; its trainable's `load` reads it.
        served: the setting that it serves.
        figures: of the evaluation.
    """
    client = MlflowClient(tracking_uri)
    identity = {SETTING: served, DIGEST: _digest(folder)}
    name, run_id = source.version.name, source.run_id
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if identity.items() <= known.tags.items():
            return Version(name, str(known.version))
    tags = {**source.tags, SOURCE: source.version.uri, **identity}
    measured = {one.name: Interval(one.value, one.low, one.high) for one in figures}

    def about(facts: Mapping[str, Any]) -> dict[str, str]:
        card = model_card.card_of_evaluated(source.about[CARD], source.version.uri, served, facts, measured)
        return {**source.about, CARD: card}

    return _log(client, run_id, name, source.trainable, folder, source.example, tags, about)


def _input(source: catalog.DataPart) -> DatasetInput:
    profile, where = json.dumps({"rows": source.rows}), json.dumps({"uri": hidden(source.where)})
    dataset = Dataset(source.name, source.digest, "local", where, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", source.role)])


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _signature(portable: Path) -> ModelSignature:
    told = json.loads((portable / "signature.json").read_text())
    return ModelSignature(*(Schema.from_json(json.dumps(told[side])) for side in ("inputs", "outputs")))


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.strip()]
