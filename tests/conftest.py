"""The fixtures that test files share; see `tests/support`."""

import gc
import os

# Before the libraries are imported: nothing leaves this machine, and only our own output is printed.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # as the command does
os.environ["OMP_NUM_THREADS"] = "1"  # on images this small, threads cost more than they save
os.environ["RAY_TMPDIR"] = os.devnull  # no Ray starts there; the integration tests have a folder for it

import quick_databases
from image_files import image_files, shapes_folder  # noqa: F401
from s3_servers import botocore_loader, bucket, door, moto, place, proxy, waits  # noqa: F401
from toy_files import gated_file  # noqa: F401
from umpire import observer, umpire  # noqa: F401

quick_databases.install()


def pytest_collection():
    """Do not search what is imported for garbage: there is much of it, and it stays."""
    gc.disable()


def pytest_collection_finish():
    """Let later searches for garbage skip what was imported."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup():
    """Forget the tracking server that MLflow's `set_tracking_uri` of an earlier test left in the environment."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
