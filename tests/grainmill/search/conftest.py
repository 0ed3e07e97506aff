"""Fixtures of the tests of studies."""

from studies import opened, prompt  # noqa: F401
