"""MLflow runs: one parent for a search, one child for each trial, all written by one process."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from grainmill.errors import TrackingError, hidden
from grainmill.storage import workspace
from grainmill.storage.provenance import environment

SQLITE = "sqlite:///"
PARENT = "mlflow.parentRunId"
"""The tag that makes a run a child."""
REACH_SECONDS = 8
"""In which a tracking server must answer where nothing has begun yet."""
Status = Literal["FINISHED", "FAILED", "KILLED", "RUNNING", "SCHEDULED"]


def local_uri(storage: Path) -> str:
    """The SQLite database of a storage folder."""
    return f"{SQLITE}{storage.absolute() / 'mlflow.db'}"


def _make_database(file: Path) -> None:
    """MLflow's tables in a SQLite file: all of them, or none. A process killed in between would leave it unusable."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{uuid4()}")
    try:
        MlflowClient(SQLITE + str(draft)).search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was faster
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)


class Tracker:
    """The runs of one MLflow experiment."""

    def __init__(self, uri: str, experiment: str, storage: Path | str) -> None:
        """
        Args:
            uri: of the tracking server or database.
            experiment: name of the MLflow experiment, made if need be.
            storage: folder, or URL in S3, for artifacts where `uri` is a database; a server decides for itself.
        Raises:
            TrackingError: no answer, within seconds.
        """
        self.uri = uri
        local = not uri.startswith("http")
        check_server(uri)
        with translate_errors(uri):
            if uri.startswith(SQLITE):
                _make_database(Path(uri.removeprefix(SQLITE)))
            self.client = MlflowClient(uri)
            if found := self.client.get_experiment_by_name(experiment):
                self.experiment_id: str = found.experiment_id
            else:
                artifacts = f"{workspace.uri(str(storage))}/mlflow-artifacts/{experiment}" if local else None
                self.experiment_id = self.client.create_experiment(experiment, artifacts)

    def start(
        self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
    ) -> str:
        """Begin a run, a child of `parent` if one is given; returns its id."""
        family = {PARENT: parent} if parent else {}
        with translate_errors(self.uri):
            run = self.client.create_run(self.experiment_id, run_name=name, tags={**environment(), **tags, **family})
        run_id: str = run.info.run_id
        self.parameters(run_id, parameters)
        return run_id

    def parameters(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Set the parameters of a run; the same ones again change nothing."""
        with translate_errors(self.uri):
            self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()])

    def runs_by_tag(self, tag: str, value: str) -> dict[str, tuple[str, str]]:
        """Name and status of the runs with a tag, by id; the youngest first."""
        with translate_errors(self.uri):
            token: str | None = None
            found: dict[str, tuple[str, str]] = {}
            while token != "":
                query = f"tags.`{tag}` = '{value}'"
                page = self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
                found |= {run.info.run_id: (run.info.run_name, run.info.status) for run in page}
                token = page.token or ""
        return found

    def last_epoch(self, run_id: str) -> float:
        """Of which a run has metrics; 0 before the first."""
        with translate_errors(self.uri):
            return float(self.client.get_run(run_id).data.metrics.get("epoch", 0))

    def log(self, run_id: str, epoch: int, metrics: Mapping[str, float], at: int | None = None) -> None:
        """Metrics of an epoch, with the epoch as the step: all of them, or none.

        Args:
            at: when they were measured, in milliseconds since 1970; now by default. Told again with the same time,
                they are there once.
        """
        at = int(time.time() * 1000) if at is None else at
        with translate_errors(self.uri):
            self.client.log_batch(run_id, [Metric(name, value, at, epoch) for name, value in metrics.items()])

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add or change tags."""
        with translate_errors(self.uri):
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def attach(self, run_id: str, name: str, text: str) -> None:
        """Keep a text as an artifact."""
        with translate_errors(self.uri):
            self.client.log_text(run_id, text, name)

    def attach_file(self, run_id: str, file: Path, folder: str) -> None:
        """Keep a file as an artifact, in a folder among those of the run."""
        with translate_errors(self.uri):
            self.client.log_artifact(run_id, str(file), folder)

    def remove(self, run_id: str) -> None:
        """Put a run into MLflow's bin."""
        with translate_errors(self.uri):
            self.client.delete_run(run_id)

    def set_status(self, run_id: str, status: Status) -> None:
        """End a run, put it off, or open it again."""
        with translate_errors(self.uri):
            if status in ("RUNNING", "SCHEDULED"):
                self.client.update_run(run_id, status)
            else:
                self.client.set_terminated(run_id, status)


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Tells what goes wrong with MLflow in one sentence, and no password in it."""
    try:
        yield
    except (MlflowException, OSError) as error:  # artifacts are sent without MLflow's own errors
        raise TrackingError(
            f"MLflow must answer at {hidden(uri)}, but said: {hidden(str(error))}; "
            "start the server, or set tracking.uri or MLFLOW_TRACKING_URI"
        ) from error


def check_server(uri: str) -> None:
    """Ask a server for a sign of life, once. Raises TrackingError within `REACH_SECONDS`."""
    if uri.startswith("http"):
        with translate_errors(uri):
            http_request(get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=REACH_SECONDS)
