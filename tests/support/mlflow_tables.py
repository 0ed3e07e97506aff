"""Databases of MLflow whose tables are copied, because MLflow takes a second to make them."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from grainmill.tracking.mlflow_runs import Tracker, local_uri


@functools.cache
def _template():
    """Make the file with empty tables, once in a process; it is removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-tables-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tracker = Tracker(local_uri(folder), "template", folder)
    tracker.client.delete_experiment(tracker.experiment_id)
    return folder / "mlflow.db"


def database(folder):
    """Return the URI of the database in a storage folder. A missing file is copied from the template."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copyfile(_template(), folder / "mlflow.db")
    return local_uri(folder)
