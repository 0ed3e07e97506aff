"""Fixtures of the tests of embedding and finding images."""

from shade_index import shades_registry  # noqa: F401
