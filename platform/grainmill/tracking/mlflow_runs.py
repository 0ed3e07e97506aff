"""MLflow runs: one parent run for a search and a child run for each trial, all written by one process."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

# Not part of MLflow's public API, which cannot set a timeout for one request; as of MLflow 3.17.
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.exc import SQLAlchemyError

from grainmill.config.addresses import hidden
from grainmill.errors import TrackingError
from grainmill.storage import sqlite, workspace
from grainmill.storage.provenance import environment

PARENT = "mlflow.parentRunId"
"""Tag of a child run: the id of its parent."""
REACH_SECONDS = 8
"""Time in which a tracking server must answer before a command starts its work."""
Status = Literal["FINISHED", "FAILED", "KILLED", "RUNNING", "SCHEDULED"]


def local_uri(storage: Path) -> str:
    """Address of the SQLite database in a storage folder."""
    return sqlite.url_of(storage / "mlflow.db")


def _make_tables(url: str) -> None:
    MlflowClient(url).search_experiments(max_results=1)


class Tracker:
    """Runs of one MLflow experiment. All methods raise TrackingError if MLflow does not answer."""

    def __init__(self, uri: str, experiment: str, storage: Path | str) -> None:
        """
        Args:
            uri: address of the tracking server or database.
            experiment: name of the MLflow experiment, which is created if there is none.
            storage: folder or S3 URL for artifacts where `uri` is a database; a server has its own place.
        """
        self.uri = uri
        local = not uri.startswith("http")
        check_reachable(uri)
        with translate_errors(uri):
            if file := sqlite.file_of(uri):
                sqlite.make(file, _make_tables)
            self.client = MlflowClient(uri)
            if found := self.client.get_experiment_by_name(experiment):
                self.experiment_id: str = found.experiment_id
                if found.lifecycle_stage == LifecycleStage.DELETED:  # MLflow keeps the name, and refuses new runs
                    self.client.restore_experiment(found.experiment_id)
            else:
                artifacts = f"{workspace.uri(str(storage))}/mlflow-artifacts/{experiment}" if local else None
                self.experiment_id = self.client.create_experiment(experiment, artifacts)

    def start(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Create a run, a child of the run `parent` if given; returns the id."""
        family = {PARENT: parent} if parent else {}
        with translate_errors(self.uri):
            run = self.client.create_run(self.experiment_id, run_name=name, tags={**environment(), **tags, **family})
        return str(run.info.run_id)

    def reopen(self, run_id: str) -> bool:
        """Set a run to RUNNING, and restore it if it was deleted; returns False if there is no such run here."""
        with translate_errors(self.uri):
            try:
                run = self.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return False
                raise
            if run.info.experiment_id != self.experiment_id:
                return False
            if run.info.lifecycle_stage == LifecycleStage.DELETED:
                self.client.restore_run(run_id)
        self.set_status(run_id, "RUNNING")
        return True

    def parameters(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Set the parameters of a run; to set equal ones again has no effect."""
        with translate_errors(self.uri):
            self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()])

    def runs_by_tag(self, tag: str, value: str) -> dict[str, tuple[str, str]]:
        """Name and status of the runs with a tag, by id; the youngest first."""
        query = f"tags.`{tag}` = '{value}'"

        def search(token: str | None) -> Any:
            return self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)

        with translate_errors(self.uri):
            return {run.info.run_id: (run.info.run_name, run.info.status) for run in all_pages(search)}

    def last_epoch(self, run_id: str) -> float:
        """Last epoch of which a run has metrics, or 0."""
        with translate_errors(self.uri):
            return float(self.client.get_run(run_id).data.metrics.get("epoch", 0))

    def log(self, run_id: str, epoch: int, metrics: Mapping[str, float], at: int | None = None) -> None:
        """Record the metrics of an epoch, all or none, with the epoch as the step.

        `at` is the time of the measurement in milliseconds since 1970. With the same time, repeating has no effect.
        """
        at = int(time.time() * 1000) if at is None else at
        with translate_errors(self.uri):
            self.client.log_batch(run_id, [Metric(name, value, at, epoch) for name, value in metrics.items()])

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add or change tags."""
        with translate_errors(self.uri):
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def attach(self, run_id: str, name: str, text: str) -> None:
        """Store a text as an artifact."""
        with translate_errors(self.uri):
            self.client.log_text(run_id, text, name)

    def attach_file(self, run_id: str, file: Path, folder: str) -> None:
        """Store a file in a folder of the run's artifacts."""
        with translate_errors(self.uri):
            self.client.log_artifact(run_id, str(file), folder)

    def remove(self, run_id: str) -> None:
        """Mark a run as deleted."""
        with translate_errors(self.uri):
            self.client.delete_run(run_id)

    def set_status(self, run_id: str, status: Status) -> None:
        """End, postpone or reopen a run."""
        with translate_errors(self.uri):
            if status in ("RUNNING", "SCHEDULED"):
                self.client.update_run(run_id, status)
            else:
                self.client.set_terminated(run_id, status)


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Turn errors of MLflow into a TrackingError of one sentence, without passwords."""
    try:
        yield
    except (MlflowException, OSError, SQLAlchemyError) as error:  # sending artifacts raises OSError
        if isinstance(error, OSError) and error.filename:
            rule = f"MLflow's artifacts must be writable, but: {error.strerror}: {error.filename}"
            raise TrackingError(f"{rule}; mend that, and the same command carries on") from error
        _check_file(uri)  # says more
        raise TrackingError(
            f"MLflow must answer at {hidden(uri)}, but said: {hidden(str(error).partition('[SQL:')[0].strip())}; "
            "start the server, or set tracking.uri or MLFLOW_TRACKING_URI"
        ) from error


def check_reachable(uri: str) -> None:
    """Refuse a server that does not answer within `REACH_SECONDS`, or a SQLite file that MLflow cannot use.

    MLflow itself would try for minutes. Raises TrackingError.
    """
    if uri.startswith("http"):
        with translate_errors(uri):
            http_request(get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=REACH_SECONDS)
    else:
        _check_file(uri)


def check_registry(uri: str) -> None:
    """Refuse as `check_reachable`, and a SQLite file that does not exist: MLflow would make an empty one.

    Raises TrackingError.
    """
    check_reachable(uri)
    file = sqlite.file_of(uri)
    if file and not file.exists():
        raise TrackingError(
            f"MLflow's database is made by tune or train, but there is no {file}; set MLFLOW_TRACKING_URI to the "
            "address that the run printed, or to sqlite:///STORAGE/mlflow.db"
        )


def _check_file(uri: str) -> None:
    file = sqlite.file_of(uri)
    if file and (problem := sqlite.problem(file)):
        raise TrackingError(f"MLflow needs a SQLite file to read and write, but {problem}")


def all_pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Iterate over all results of an MLflow search, which maps the token of a page to the page."""
    token: str | None = None
    while token != "":
        page = search(token)
        yield from page
        token = page.token or ""
