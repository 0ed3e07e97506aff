"""Registered models: trained models become versions in MLflow's registry, and come back from there."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature

from grainmill import trainable as catalog
from grainmill.config.addresses import hidden
from grainmill.errors import TrackingError
from grainmill.registry import integrity, model_card
from grainmill.registry.model_card import Interval, ModelCard
from grainmill.storage.files import folder_digest
from grainmill.storage.names import below
from grainmill.tracking.mlflow_runs import Tracker, check_registry

SCHEME = "models:/"
"""Beginning of the address of a registered model."""
CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases of the version for users, and of the newest version that is not yet shown to be better."""
CHECKPOINT = "checkpoint"
"""Folder of a portable model that its trainable loads and evaluates."""
ABOUT, CARD, LINEAGE = "about", "card.md", "lineage.json"
"""Artifacts of a version: a folder of texts, and in that folder the model card as Markdown and as JSON."""
MANIFEST_DIGEST, PACKAGE_DIGEST = "sha256", "sha256.package"
"""Tags of a version: SHA-256 of the manifest of its portable model, and of all files of the version."""
SETTING, SOURCE, DIGEST = "evaluated.setting", "evaluated.source", "evaluated.digest"
"""Tags of a version that an evaluation made: served setting, URI of the evaluated version, digest of its files."""


class Version(NamedTuple):
    """Version of a registered model."""

    name: str
    number: str

    @classmethod
    def of(cls, version: Any) -> Self:
        """Convert from MLflow's entity."""
        return cls(version.name, str(version.version))

    @property
    def uri(self) -> str:
        """Address of exactly this version, such as `models:/name/3`."""
        return f"{SCHEME}{self.name}/{self.number}"


def register(
    tracker: Tracker, run_id: str, name: str, folder: Path, example: Any, tags: Mapping[str, str], card: ModelCard
) -> Version:
    """Store the model in `folder` as a new version of `name`, unless its run has a version already.

    The first version becomes the champion, each later one the challenger: see `promotion`. A version has a portable
    model, a signature, an input example and the model card; its description is a short form of that card.

    Args:
        tracker: the MLflow experiment.
        run_id: the run that trained the model.
        name: name of the registered model.
        folder: checkpoints that `fit` wrote.
        example: a table that the model takes.
        tags: further tags of the version.
        card: origin of the model.
    """
    client = tracker.client
    trained = [one for one in client.search_model_versions(f"run_id = '{run_id}'") if SOURCE not in one.tags]
    if trained:
        version = Version(name, str(trained[0].version))
    else:
        client.log_inputs(run_id, [_dataset_input(part) for part in card.data])

        def texts(facts: Mapping[str, Any]) -> dict[str, str]:
            return {CARD: card.markdown(name, facts), LINEAGE: card.json(), "experiment.yaml": hidden(card.experiment)}

        version = _create(client, run_id, name, card.trainable, folder, example, {**card.tags(), **tags}, texts)
    if CHAMPION not in client.get_registered_model(name).aliases:
        client.set_registered_model_alias(name, CHAMPION, version.number)
    elif not is_champion(client, version):
        client.set_registered_model_alias(name, CHALLENGER, version.number)
    return version


def is_champion(client: MlflowClient, version: Version) -> bool:
    """Return True if the alias `champion` names this version."""
    return str(client.get_registered_model(version.name).aliases.get(CHAMPION)) == version.number


def _create(
    client: MlflowClient,
    run_id: str,
    name: str,
    trainable: str,
    folder: Path,
    example: Any,
    tags: Mapping[str, str],
    texts: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> Version:
    """Export a model and store it as a version; `texts` makes its texts, by file name, of the export's facts."""
    mlflow.set_tracking_uri(client.tracking_uri)
    with tempfile.TemporaryDirectory() as scratch, mlflow.start_run(run_id):
        portable, about = Path(scratch) / "model", Path(scratch) / ABOUT
        written = texts(catalog.find(trainable).export(folder, portable))
        _stop_if_wrong(integrity.faults(portable), f"the export of {trainable}")
        about.mkdir()
        for file, text in written.items():
            (about / file).write_text(text)
        columns = json.loads((portable / "signature.json").read_text())
        requirements = (portable / "requirements.txt").read_text().splitlines()
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_script.py")),
            artifacts={"model": str(portable), ABOUT: str(about)},
            model_config={"trainable": trainable},
            signature=ModelSignature.from_dict({side: json.dumps(found) for side, found in columns.items()}),
            input_example=example,
            pip_requirements=[f"mlflow=={metadata.version('mlflow')}", *filter(str.strip, requirements)],
        )
        package = Path(mlflow.artifacts.download_artifacts(info.model_uri, dst_path=f"{scratch}/package"))
        digests = {
            MANIFEST_DIGEST: integrity.manifest_digest(portable),
            PACKAGE_DIGEST: integrity.package_digest(package),
        }
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    model = mlflow.get_logged_model(info.model_id)
    description = model_card.description(written[CARD], f"artifacts/{ABOUT}/{CARD}")
    version = client.create_model_version(
        name, model.artifact_location, run_id, {**tags, **digests}, description=description, model_id=model.model_id
    )
    return Version.of(version)


class RegisteredModel(NamedTuple):
    """A version and its files on this machine."""

    version: Version
    folder: Path
    """Checkpoint that the trainable loads and evaluates."""
    portable: Path
    """Model that loads without Grainmill; its files are unchanged since it was registered."""
    trainable: str
    run_id: str
    """Run that trained the model."""
    example: Any
    """A table that the model takes."""
    tags: Mapping[str, str]
    about: Mapping[str, str]
    """Texts about the model, such as its card, by file name."""


@contextmanager
def fetched(tracking_uri: str, model: str, within: Path | None = None) -> Iterator[RegisteredModel]:
    """Download a registered model for the time of the block, and check its files.

    Args:
        tracking_uri: address of MLflow.
        model: such as `models:/name@champion` or `models:/name/3`.
        within: parent folder of the copy; by default, the files stay where they are if this machine sees them.
    Raises:
        TrackingError: there is no such model, its files were changed, or MLflow does not answer.
    """
    check_registry(tracking_uri)
    mlflow.set_tracking_uri(tracking_uri)
    with tempfile.TemporaryDirectory(dir=within) as scratch:
        try:
            client = MlflowClient(tracking_uri)
            entity = look_up(client, model)
            version = Version.of(entity)
            source = client.get_model_version_download_uri(*version)
            here = within is None and urlsplit(source).scheme in ("", "file")
            folder = Path(mlflow.artifacts.download_artifacts(version.uri, dst_path=None if here else scratch))
            stored = _checked(model, entity, folder)
        except MlflowException as error:
            raise not_registered(tracking_uri, model, error) from error
        yield stored


def _checked(model: str, entity: Any, folder: Path) -> RegisteredModel:
    """Check the files of a version; its `entity` in MLflow has the digests. Raises TrackingError if they differ."""
    info = mlflow.models.Model.load(str(folder))
    settings = info.flavors.get("python_function", {})
    trainable = settings.get("config", {}).get("trainable")
    if trainable is None:
        raise TrackingError(f"{model} must be a model that grainmill registered, got one of another kind; name another")
    paths = (settings["artifacts"][name]["path"] for name in ("model", ABOUT))
    portable, about = (below(folder, path, f"the MLmodel of {model}") for path in paths)
    known, whole = (entity.tags.get(tag, "") for tag in (MANIFEST_DIGEST, PACKAGE_DIGEST))
    _stop_if_wrong(integrity.faults(portable, known) or integrity.package_faults(folder, whole), model)
    return RegisteredModel(
        version=Version.of(entity),
        folder=portable / CHECKPOINT,
        portable=portable,
        trainable=trainable,
        run_id=entity.run_id,
        example=info.load_input_example(str(folder)),
        tags=entity.tags,
        about={path.name: path.read_text() for path in about.iterdir()},
    )


def _stop_if_wrong(faults: Sequence[str], model: str) -> None:
    if faults:
        raise TrackingError(
            f"a model must be the one that was registered, and hold no pickle, but in {model} {', '.join(faults)}; "
            "put the files back, or register it again"
        )


def look_up(client: MlflowClient, model: str) -> Any:
    """Return MLflow's entity of a version named as `models:/name@alias` or `models:/name/number`.

    Raises:
        MlflowException: there is no such version.
    """
    name, at, alias = model.removeprefix(SCHEME).partition("@")
    if at:
        return client.get_model_version_by_alias(name, alias)
    name, _, number = name.partition("/")
    return client.get_model_version(name, number)


def not_registered(tracking_uri: str, model: str, error: MlflowException) -> TrackingError:
    """Explain why `look_up` or a download failed."""
    return TrackingError(
        f"{model} must be in the registry at {hidden(tracking_uri)}, named as models:/name@alias or "
        f"models:/name/version, but: {hidden(error.message)}"
    )


def register_evaluated(
    tracking_uri: str, source: RegisteredModel, folder: Path, served: str, measurements: Sequence[catalog.Measurement]
) -> Version:
    """Store a model that an evaluation made of a registered one as a further version; the champion does not change.

    The version belongs to the same run and has the tags of its source. A setting with the same files is stored once.

    Args:
        tracking_uri: address of MLflow.
        source: the evaluated model.
        folder: the new model, which its trainable's `load` reads.
        served: setting that the new model serves.
        measurements: results of the evaluation.
    """
    client = MlflowClient(tracking_uri)
    identity = {SETTING: served, DIGEST: folder_digest(folder)}
    name, run_id = source.version.name, source.run_id
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if identity.items() <= known.tags.items():
            return Version.of(known)
    tags = {**source.tags, SOURCE: source.version.uri, **identity}
    intervals = {one.name: Interval(one.value, one.low, one.high) for one in measurements}

    def texts(facts: Mapping[str, Any]) -> dict[str, str]:
        card = model_card.evaluated_markdown(source.about[CARD], source.version.uri, served, facts, intervals)
        return {**source.about, CARD: card}

    return _create(client, run_id, name, source.trainable, folder, source.example, tags, texts)


def _dataset_input(part: catalog.DataPart) -> DatasetInput:
    profile, where = json.dumps({"rows": part.rows}), json.dumps({"uri": hidden(part.where)})
    dataset = Dataset(part.name, part.digest, "local", where, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", part.role)])
