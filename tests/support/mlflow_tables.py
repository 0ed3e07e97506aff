"""Databases of MLflow whose tables are copied, because MLflow takes a second to make them."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from grainmill.tracking.mlflow_runs import Tracker, local_uri


@functools.cache
def _template():
    """The file with empty tables. It is made once in a process and goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-tables-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tracker = Tracker(local_uri(folder), "template", folder)
    tracker.client.delete_experiment(tracker.experiment_id)
    return folder / "mlflow.db"


def database(folder):
    """The URI of the database in a storage folder. The file is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copyfile(_template(), folder / "mlflow.db")
    return local_uri(folder)
