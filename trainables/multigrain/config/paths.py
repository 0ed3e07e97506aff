"""Paths in settings: complete from the start, so that every process, from any folder, means the same."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def absolute(path: str) -> str:
    """Return a path with `~` resolved, from the working folder if it is relative; an address such as s3:// as it is."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _absolute_but_home(path: str) -> str:
    return path if path.startswith("~") else absolute(path)


PathText = Annotated[str, AfterValidator(absolute)]
"""Absolute path, or the address of a place in S3."""
CachePath = Annotated[str, AfterValidator(_absolute_but_home)]
"""Absolute path, or one that begins with `~`, which differs between machines."""
