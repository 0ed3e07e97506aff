"""Names of local files that come from elsewhere: keys of a bucket, entries of an index, paths in a model's files."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from grainmill.errors import StorageError

_NOT_PLAIN = re.compile(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]|^/|//|/$|(^|/)\.\.?(/|$)|^$")
"""Backslashes, which other systems take for slashes, control characters, halves of surrogate pairs, and parts between
slashes that are empty, `.` or `..`."""
LONGEST_PART, LONGEST = 255, 1024
"""Bytes of the longest part, the limit of most file systems, and of the longest name, that of S3."""


def is_local(name: object) -> bool:
    """Return whether a name can be the path of a file below a folder, and cannot lead out of that folder."""
    if not isinstance(name, str) or _NOT_PLAIN.search(name):
        return False
    size = len(name.encode())
    return size <= LONGEST_PART or (
        size <= LONGEST and all(len(part.encode()) <= LONGEST_PART for part in name.split("/"))
    )


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
    folders = set[str]()
    for key in known:
        folder = key.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    problems += [
        f"a key must not be an object and a folder at once, got {key!r} in {where}; name the folder as `folder/`"
        for key in known
        if key in folders
    ]
    if problems:
        raise StorageError(*problems)
