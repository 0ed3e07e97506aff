"""Environment of the process: variables that Grainmill reads, and those that it sets for Ray and MLflow."""

import logging
import os
import pwd
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from grainmill.config.experiment import Experiment
from grainmill.errors import StorageError, TrackingError
from grainmill.storage import files

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
SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  # the folder that is made there is checked
"""Parents of the folder of this user; all have short paths."""
SOCKET_ROOM = 40
"""Longest path, in bytes, of a folder for Ray's sessions: a socket's path has at most 107, of which Ray adds 66."""
_IDENTITY = (".aws", ".mlflow", ".netrc", ".gitconfig", ".pgpass", ".postgresql")
"""Files of a home folder by which servers and other programs know their user."""


def prepare() -> None:
    """Set the defaults that Ray and MLflow read when they are imported; variables that are set already stay.

    Raises:
        StorageError: this user can write in no temporary folder.
    """
    complete_user()
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # MLflow writes a traceback of each failed statement, and then raises the error, of which we tell.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="mlflow|ray|optuna")


def complete_user() -> None:
    """Give the process what Ray and MLflow expect of every user, who may be a number without a home in a container.

    That is a name, a home folder to write in, and temporary folders to write in whose paths leave room for sockets.
    What is missing is made in a folder of this user alone, see `_own_folder`.
    """
    name, entered = str(os.getuid()), "/"
    with suppress(KeyError):
        name, *_, entered, _ = pwd.getpwuid(os.getuid())
    os.environ.setdefault("LOGNAME", name)
    home = Path(os.environ.get("HOME") or entered)
    if not _can_write(home):
        own = _own_folder()
        for one in _IDENTITY:
            if (home / one).exists():
                _link(own / one, home / one)
        home = own
    os.environ["HOME"] = str(home)

    temporary = Path(tempfile.gettempdir())
    if len(os.fsencode(temporary)) > SOCKET_ROOM:
        link = _own_folder() / f"tmp-{files.digest(os.fsencode(temporary))[:8]}"
        _link(link, temporary)
        temporary = link
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    sessions = Path(os.environ.get("RAY_TMPDIR") or temporary)
    if len(os.fsencode(sessions)) > SOCKET_ROOM or not _can_write(sessions / "ray"):
        os.environ["RAY_TMPDIR"] = str(_own_folder())


def _can_write(folder: Path) -> bool:
    """Return True if files can be made in a folder, or in its parent if there is no such folder yet."""
    existing = folder if folder.exists() else folder.parent
    return folder.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _link(link: Path, target: Path) -> None:
    with suppress(FileExistsError):  # of an earlier command
        link.symlink_to(target)


def _own_folder() -> Path:
    """Folder `grainmill-UID`, which no other user can read; made in the first of `SHORT_PLACES` where that is possible.

    Raises:
        StorageError: it is possible in none of them.
    """
    for place in SHORT_PLACES:
        folder = Path(place, f"grainmill-{os.getuid()}")
        with suppress(OSError):
            with suppress(FileExistsError):
                folder.mkdir(0o700)
            state = folder.lstat()  # another user may have made it, or a link
            if state.st_uid == os.getuid() and state.st_mode & 0o777 == 0o700 and _can_write(folder):
                return folder
    raise StorageError(
        f"Ray and MLflow need a folder to write in, but user {os.getuid()} can write neither in the home folder nor in "
        f"{', '.join(SHORT_PLACES)}; set HOME and TMPDIR to short paths of folders where it can"
    )


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
        uri = mlflow_runs.local_uri(Path(workspace.absolute(storage)))
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
