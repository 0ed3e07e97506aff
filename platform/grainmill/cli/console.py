"""What all commands share: the screen, the environment, and how they end."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote, urlsplit

import typer
from rich.console import Console
from rich.progress import track

from grainmill.config.experiment import Experiment
from grainmill.errors import ExperimentError, GrainmillError, NameTakenError, TrackingError

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130

out = Console()
err = Console(stderr=True)
Item = TypeVar("Item")

File = Annotated[Path, typer.Argument(help="Experiment file, YAML.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting of the file, such as base.epochs=20. Repeatable."
    ),
]


def show_progress(items: Iterable[Item], title: str, length: int) -> Iterable[Item]:
    """The `catalog.Progress` that shows a bar on a terminal."""
    return track(items, title, length, console=err, transient=True, disable=not err.is_terminal)


@contextmanager
def clear_errors() -> Iterator[None]:
    """One message and an exit code for what the user can put right; a traceback only for our defects."""
    warnings.showwarning = _show_warning
    try:
        yield
    except GrainmillError as error:
        err.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(USAGE_ERROR if isinstance(error, ExperimentError | NameTakenError) else FAILURE) from error
    except KeyboardInterrupt:
        err.print("interrupted; the same command carries on from here", style="yellow")
        raise typer.Exit(INTERRUPTED) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)  # where the progress table is on the screen, this goes above it


def prepare_process() -> None:
    """What this process needs before Ray and MLflow are imported."""
    # Ctrl-C and `ray job stop` reach us as KeyboardInterrupt; Tune's own handler would return as if all were done.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the study is the record
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A tracking server that does not answer is reported within seconds; MLflow's defaults take four minutes a call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Nobody is told that this process runs.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The screen is ours alone.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for name in ("alembic", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow|ray|optuna")


def tracking_uri(named: str | None = None, storage: str = Experiment.model_fields["storage"].default) -> str:
    """MLflow's: the one that is named, MLFLOW_TRACKING_URI, or that of a storage folder.

    A user and a password in it go where MLflow reads them, so that nothing can show them.

    Raises:
        TrackingError: there is none: MLflow has no database in S3.
    """
    from grainmill.storage import workspace
    from grainmill.tracking import mlflow_runs

    uri = named or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        if workspace.remote(storage):
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
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # what is started from here would see it there
    return parts._replace(netloc=host).geturl()
