"""Fixtures of the tests of workflows."""

from toy_models import scale  # noqa: F401
