"""evaluate(): a trained model on benchmarks, recorded in the run that trained it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from pydantic import ValidationError

from grainmill import catalog, registry
from grainmill.document import Document
from grainmill.errors import EvaluationError
from grainmill.findings import describe


def evaluate(model: str, overrides: Sequence[str], trainable: str, out: Path, tracking_uri: str) -> catalog.Assessment:
    """Evaluate a model; a registered one's run gets the figures and the files.

    Args:
        model: `models:/name@alias`, `models:/name/version`, or a folder: of a run, or with checkpoints.
        overrides: the trainable's `Evaluation`, as `a.b=value`; the value is read as YAML.
        trainable: of a folder; a registered model knows its own.
        out: folder for files.
        tracking_uri: MLflow's.
    Raises:
        ExperimentError: the settings are wrong.
        EvaluationError: there is no model, or a benchmark cannot be evaluated.
        TrackingError: the model is not registered, or MLflow does not answer.
    """
    stored = registry.fetch(tracking_uri, model) if model.startswith("models:/") else None
    folder, name = (stored.folder, stored.trainable) if stored else (_checkpoints(Path(model)), trainable)
    found = catalog.find(name)
    settings = _settings(found, overrides)
    try:
        assessment = found.evaluate(folder, settings, out)
    except (OSError, ValueError) as error:
        raise EvaluationError(str(error)) from error
    if stored:
        _record(tracking_uri, stored.run_id, assessment)
    return assessment


def _settings(trainable: catalog.Trainable, overrides: Sequence[str]) -> Any:
    document = Document(None)
    for override in overrides:
        document.override(override)
    document.stop_if_wrong()
    try:
        return trainable.Evaluation.model_validate(document.tree)
    except ValidationError as error:
        for details in error.errors():
            document.add(details["loc"], describe(trainable.Evaluation, details))
    document.stop_if_wrong()
    raise AssertionError("a validation error is a problem")


def _checkpoints(folder: Path) -> Path:
    """The checkpoints in a folder: of a run, those of its final training."""
    final = folder / "trials" / "final-0000"
    if final.is_dir():
        return final
    if folder.is_dir():
        return folder
    raise EvaluationError(
        f"a model must be a folder or models:/name@alias, but there is no folder {folder.absolute()}; "
        "name a run, such as grainmill-runs/demo/run-1"
    )


def _record(tracking_uri: str, run_id: str, assessment: catalog.Assessment) -> None:
    client = MlflowClient(tracking_uri)
    client.log_batch(run_id, [Metric(one.name, one.value, 0, 0) for one in assessment.figures])
    for file in assessment.files:
        client.log_artifact(run_id, str(file), "evaluation")
