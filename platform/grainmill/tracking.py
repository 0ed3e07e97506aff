"""MLflow runs: one parent for a search, one child for each trial, all written by one process."""

import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from grainmill.errors import TrackingError

PACKAGES = ("grainmill", "mlflow", "optuna", "ray", "torch")
Status = Literal["FINISHED", "FAILED", "KILLED", "RUNNING"]


def local_uri(storage: Path) -> str:
    """The SQLite database of a storage folder."""
    return f"sqlite:///{storage.absolute() / 'mlflow.db'}"


class Tracker:
    """The runs of one MLflow experiment."""

    def __init__(self, uri: str, experiment: str, storage: Path) -> None:
        """
        Args:
            uri: of the tracking server or database.
            experiment: name of the MLflow experiment, made if need be.
            storage: folder for artifacts where `uri` is a database; a server decides for itself.
        Raises:
            TrackingError: no answer.
        """
        self.uri = uri
        self.client = MlflowClient(uri)
        local = not uri.startswith("http")
        with _clear(uri):
            if found := self.client.get_experiment_by_name(experiment):
                self.experiment_id: str = found.experiment_id
            else:
                artifacts = (storage.absolute() / "mlflow-artifacts" / experiment).as_uri() if local else None
                self.experiment_id = self.client.create_experiment(experiment, artifacts)

    def start(
        self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
    ) -> str:
        """Begin a run, a child of `parent` if one is given; returns its id."""
        family = {"mlflow.parentRunId": parent} if parent else {}
        with _clear(self.uri):
            run = self.client.create_run(self.experiment_id, run_name=name, tags={**environment(), **tags, **family})
            run_id: str = run.info.run_id
            self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
        return run_id

    def log(self, run_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an epoch, with the epoch as the step."""
        now = int(time.time() * 1000)
        with _clear(self.uri):
            self.client.log_batch(run_id, [Metric(name, value, now, epoch) for name, value in metrics.items()])

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add or change tags."""
        with _clear(self.uri):
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def attach(self, run_id: str, name: str, text: str) -> None:
        """Keep a text as an artifact."""
        with _clear(self.uri):
            self.client.log_text(run_id, text, name)

    def set_status(self, run_id: str, status: Status) -> None:
        """End a run, or open it again."""
        with _clear(self.uri):
            if status == "RUNNING":
                self.client.update_run(run_id, status)
            else:
                self.client.set_terminated(run_id, status)


@contextmanager
def _clear(uri: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise TrackingError(
            f"MLflow must answer at {uri}, but said: {error.message}; "
            "start the server, or set tracking.uri or MLFLOW_TRACKING_URI"
        ) from error


def environment() -> dict[str, str]:
    """What a run was made with: Python, packages, and the git commit of the working directory."""
    tags = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    try:
        commit = _git("rev-parse", "HEAD")
        tags |= {"mlflow.source.git.commit": commit, "git.dirty": str(bool(_git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.CalledProcessError):
        pass  # not in a repository, or no git: there is no commit to tell
    return tags


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
