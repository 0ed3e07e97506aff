"""What several test files share: one Ray cluster, and a screen that remembers."""

import os
from pathlib import Path

# Before the libraries are imported: nothing leaves this machine, and only our own output is printed.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}

import pytest
import ray

from multigrain.data import DataSettings, untracked
from multigrain.demo import write_builtin

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """40 drawn images of 32 pixels in 8 classes, 26 of them for training, with a copy-detection set; read only."""
    settings = DataSettings(builtin="shapes", images=40, image_size=32)
    return write_builtin(settings, tmp_path_factory.mktemp("builtin"), untracked)


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for the session; its workers find the toy trainable."""
    environment = {"PYTHONPATH": str(TESTS), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


class Memory:
    """A `Watch` that keeps what it is told."""

    def __init__(self):
        self.notes, self.trials = [], []

    def note(self, message):
        self.notes.append(message)

    def trial(self, name, record):
        self.trials.append((name, record.state, int(record.metrics.get("epoch", 0))))


@pytest.fixture
def watch():
    return Memory()
