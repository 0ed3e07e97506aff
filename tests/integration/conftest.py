"""Fixtures of the tests that start Ray or a server; all of these tests have the marker `integration`."""

import os
import tempfile
from pathlib import Path

import pytest
from arena import arena  # noqa: F401
from ray_support import ray_cluster  # noqa: F401
from servers import postgres, server, tracking_server  # noqa: F401
from shade_index import shades_registry  # noqa: F401
from studies import opened, prompt  # noqa: F401
from toy_models import scale  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def ray_folder():
    """A folder for the Ray sessions of this process of pytest alone. Its path is short, for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        yield
        del os.environ["RAY_TMPDIR"]


def pytest_collection_modifyitems(items):
    """Mark these tests, and put them first: they take longest, and two processes share them."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.integration)
    items.sort(key=lambda item: "integration" not in item.keywords)
