"""The fixtures that several test files share; see `tests/support`."""

from shared import (  # noqa: F401
    observer,
    postgres,
    pytest_runtest_setup,
    ray_cluster,
    server,
    shapes_folder,
    umpire,
)
