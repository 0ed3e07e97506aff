"""Environment of the process: variables that Grainmill reads, and those that it sets for Ray and MLflow."""

import logging
import os
import warnings
from pathlib import Path
from urllib.parse import unquote, urlsplit

from grainmill.config.experiment import Experiment
from grainmill.errors import TrackingError

_DEFAULTS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C must reach us; Tune's own handler returns as if all were done
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study is the record
    # A tracking server that does not answer is reported within seconds; MLflow's defaults take four minutes a call.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # No usage statistics are sent.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Only Grainmill prints progress.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}


def prepare() -> None:
    """Set the defaults that Ray and MLflow read when they are imported; variables that are set already stay."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow|ray|optuna")


def ray_address(named: str | None = None) -> str | None:
    """Address of the Ray cluster to use: the given one, else RAY_ADDRESS; None for a local Ray."""
    return named or os.environ.get("RAY_ADDRESS") or None


def tracking_uri(named: str | None = None, storage: str | None = None) -> str:
    """URI of MLflow: the given one, else MLFLOW_TRACKING_URI, else the database in the storage folder.

    A user and a password in the URI are moved to the variables that MLflow reads, so that no message or file shows
    them.

    Raises:
        TrackingError: none is named, and the storage is in S3, where MLflow cannot have a database.
    """
    from grainmill.storage import workspace
    from grainmill.tracking import mlflow_runs

    uri = named or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        storage = storage or Experiment.model_fields["storage"].default
        if workspace.is_remote(storage):
            raise TrackingError(
                "storage in S3 needs a tracking server, for MLflow's own database is a local file, but none is named; "
                "set tracking.uri or MLFLOW_TRACKING_URI"
            )
        uri = mlflow_runs.local_uri(Path(storage))
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    secret, _, host = parts.netloc.rpartition("@")
    for name, value in zip(("USERNAME", "PASSWORD"), secret.partition(":")[::2], strict=True):
        os.environ.setdefault(f"MLFLOW_TRACKING_{name}", unquote(value))
    plain = parts._replace(netloc=host).geturl()
    if not named:
        os.environ["MLFLOW_TRACKING_URI"] = plain  # processes started from here must not see the password
    return plain
