"""Fixtures of the tests that start Ray or a server; all of these tests have the marker `integration`."""

from pathlib import Path

import pytest
from arena import arena  # noqa: F401
from ray_support import ray_cluster  # noqa: F401
from servers import postgres, server  # noqa: F401
from shade_index import shades_registry  # noqa: F401
from studies import opened, prompt  # noqa: F401
from toy_models import scale  # noqa: F401


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.integration)
