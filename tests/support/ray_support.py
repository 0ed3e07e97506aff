"""Fixture: a local Ray cluster."""

import pytest
from commands import python_path


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray cluster of two CPUs for the session. Its workers can import the modules of this folder."""
    import ray

    environment = {"PYTHONPATH": python_path(), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
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
