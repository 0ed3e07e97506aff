"""Names of local files that come from elsewhere: keys of a bucket, entries of an index, paths in a model's files."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from grainmill.errors import StorageError

_SPECIAL = re.compile(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Backslashes, which other systems take for slashes, control characters, and halves of surrogate pairs."""
MOST_BYTES = 255, 1024
"""Longest part between slashes, which is the limit of most file systems, and longest name, which is that of S3."""


def is_local(name: object) -> bool:
    """Return whether a name can be the path of a file below a folder, and cannot lead out of that folder."""
    if not isinstance(name, str) or _SPECIAL.search(name):
        return False
    parts = [len(part.encode()) if part not in (".", "..") else 0 for part in name.split("/")]
    return all(0 < length <= MOST_BYTES[0] for length in parts) and len(name.encode()) <= MOST_BYTES[1]


def below(folder: Path, name: object, where: str) -> Path:
    """Return the path of a file below a folder, by a name found in `where`. Raises StorageError if it leads elsewhere.

    Links are resolved: the file itself is below the folder, too.
    """
    if not is_local(name) or not Path(os.path.realpath(folder / str(name))).is_relative_to(folder.resolve()):
        raise StorageError(f"a path in {where} must lead to a file below its folder, got {name!r}; fetch it again")
    return folder / str(name)


def check_keys(where: str, keys: Iterable[str]) -> None:
    """Raise StorageError with all keys found in `where` that cannot be the paths of files below one folder."""
    known = [*keys]
    problems = [
        f"a key must be a plain path below its bucket, got {key!r} in {where}; rename the object"
        for key in known
        if not is_local(key)
    ]
    folders = {key[:index] for key in known for index, letter in enumerate(key) if letter == "/"}
    problems += [
        f"a key must not be an object and a folder at once, got {key!r} in {where}; name the folder as `folder/`"
        for key in known
        if key in folders
    ]
    if problems:
        raise StorageError(*problems)
