"""evaluate(): measures a trained model on benchmarks, and records the results in the run that trained it."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from grainmill import trainable as catalog
from grainmill.config.addresses import hidden
from grainmill.config.validation import checked_settings
from grainmill.config.yaml_document import Overrides
from grainmill.errors import EvaluationError, TrackingError
from grainmill.execution import evaluate_group
from grainmill.registry import comparison, models
from grainmill.storage import workspace
from grainmill.workflows import run_folder


class RecordedEvaluation(NamedTuple):
    """Result of an evaluation, and the version that came of it."""

    result: catalog.EvaluationResult
    version: models.Version | None
    """Registered version of the result's model; None if the result has none or the evaluated model is in a folder."""

    def __repr__(self) -> str:
        values = ", ".join(f"{one.name} {one.value:.4f}" for one in self.result.measurements[:4])
        more = f", {len(self.result.measurements) - 4} more" if len(self.result.measurements) > 4 else ""
        return f"RecordedEvaluation({values}{more}; version {self.version.uri if self.version else None})"


def evaluate(
    model: str,
    overrides: Overrides,
    trainable: str,
    out: Path,
    tracking_uri: str,
    workers: int = 1,
    address: str | None = None,
) -> RecordedEvaluation:
    """Evaluate a model. If it is registered, its run gets the results, and the resulting model becomes a version.

    Several workers are a Ray Train group; their nodes must see `out` and the model's folder. A folder may be in S3.
    See `grainmill.api.evaluate` for the other arguments and for errors.
    """
    with ExitStack() as stack:
        shared = stack.enter_context(_shared_folder(out)) if workers > 1 else None
        stored = None
        if model.startswith(models.SCHEME):
            stored = stack.enter_context(models.fetched(tracking_uri, model, shared))
            folder, name = stored.folder, stored.trainable
        else:
            folder, name = stack.enter_context(workspace.opened(_checkpoints(model), within=shared)).path, trainable
        try:
            found = catalog.find(name)
        except LookupError as error:
            raise EvaluationError(str(error)) from error
        settings = checked_settings(found.Evaluation, overrides)
        if shared:
            from grainmill.cluster.session import connect  # imports Ray, which one worker does not need

            with connect(address):
                result = evaluate_group.run_evaluation_on_group(workers, found, folder, settings, out, shared)
        else:
            result = evaluate_group.run_evaluation(found, folder, settings, out)
        return RecordedEvaluation(result, _record(tracking_uri, stored, result) if stored else None)


@contextmanager
def _shared_folder(out: Path) -> Iterator[Path]:
    """Make a temporary folder in `out`, which all nodes see."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out.absolute(), prefix=".")
    except OSError as error:
        raise EvaluationError(str(error)) from error
    with folder as name:
        yield Path(name)


def _checkpoints(place: str) -> str:
    """Folder of the checkpoints in a folder: those of a finished run's model, or the folder itself."""
    if workspace.is_remote(place) or Path(place).is_dir():
        return run_folder.checkpoints(place.rstrip("/")) or place
    raise EvaluationError(
        f"a model must be a folder or models:/name@alias, but there is no folder {Path(place).absolute()}; "
        "name a run, such as grainmill-runs/demo/run-1"
    )


def _record(
    tracking_uri: str, source: models.RegisteredModel, result: catalog.EvaluationResult
) -> models.Version | None:
    """Record the results in the run, and register the resulting model, if any."""
    client, now = MlflowClient(tracking_uri), int(time.time() * 1000)  # of equal times MLflow shows the larger value
    try:
        client.log_batch(source.run_id, [Metric(one.name, one.value, now, 0) for one in result.measurements])
        for file in result.files:
            client.log_artifact(source.run_id, str(file), "evaluation")
        own, served = ([one for one in result.query_scores if one.served == which] for which in (False, True))
        comparison.save(client, source.version, source.run_id, own)
        if result.model is None:
            return None
        assert result.served is not None, "a model serves a setting"
        version = models.register_evaluated(tracking_uri, source, result.model, result.served, result.measurements)
        comparison.save(client, version, source.run_id, served)
        return version
    except MlflowException as error:
        raise TrackingError(
            f"MLflow at {hidden(tracking_uri)} must record the measurements of run {source.run_id}, but said: "
            f"{hidden(error.message)}; the files are written, and the same command tries again"
        ) from error
