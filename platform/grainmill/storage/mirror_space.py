"""Space for mirrors on this machine's disk: which processes use them, and which are deleted to make room.

`s3://bucket/a/b.jpg` is mirrored as `<cache>/bucket/a/b.jpg`. `<cache>/.s3/lock` is held while room is made, and
`<cache>/.s3/<bucket>/lock` while a bucket is mirrored. `<cache>/.s3/<bucket>/uses/` holds an in-use marker for each
source: a file with the prefixes of its keys, which are folders or a single object. Its time of modification is that of
the last use. Each process that reads the source holds a shared lock on the marker as long as it lives; the lock of a
killed process is gone.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from grainmill.errors import StorageError
from grainmill.storage.files import digest
from grainmill.storage.s3 import SCHEME

_held: dict[Path, int] = {}
"""Markers that this process holds: file -> the descriptor that keeps its lock."""


class Cache(NamedTuple):
    """A folder of mirrors, which all processes of a machine share."""

    folder: Path
    """Absolute path."""
    limit: float | None = None
    """GB that all mirrors may take together; half of the disk by default."""

    @property
    def most(self) -> float:
        """Bytes that all mirrors may take together."""
        return shutil.disk_usage(self.folder).total / 2 if self.limit is None else self.limit * 1e9

    def state(self, bucket: str) -> Path:
        """Return the folder with the state of a bucket's mirror."""
        return self.folder / ".s3" / bucket

    def states(self) -> list[Path]:
        """Return the state folders of all mirrors."""
        return [path for path in (self.folder / ".s3").iterdir() if path.is_dir()]

    def url(self, path: Path) -> str | None:
        """Return the URL of the object that a file mirrors; None if the file is no mirror."""
        text, folder = str(path), f"{self.folder}{os.sep}"
        return SCHEME + text.removeprefix(folder) if text.startswith(folder) else None

    def named(self, text: str) -> str:
        """Replace the paths of mirrors in a text by URLs."""
        return text.replace(f"{self.folder}{os.sep}", SCHEME)


@contextmanager
def locked(source: str, cache: Cache, bucket: str) -> Iterator[Path]:
    """Lock the mirror of a bucket, waiting for other processes; yields its state folder."""
    state, remedy = cache.state(bucket), "name another folder in `cache`"
    if (cache.folder / bucket).exists() and not state.exists():
        rule = f"{source} needs a folder of its own, where what is not in the bucket is deleted"
        raise StorageError(f"{rule}, but {bucket} in {cache.folder} is somebody else's; {remedy}")
    try:
        (state / "uses").mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("w")
    except OSError as error:
        rule = f"{source} needs a folder to write in, but {cache.folder} is none ({error.strerror})"
        raise StorageError(f"{rule}; {remedy}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield state


def hold(state: Path, prefixes: Iterable[str]) -> None:
    """Keep what is mirrored below some prefixes until this process ends. The caller must hold the bucket's lock."""
    text = json.dumps(sorted(prefixes))
    marker = state / "uses" / digest(text.encode())[:16]
    lock = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(lock, fcntl.LOCK_SH)
    if marker.read_text() != text:  # it is new, or its writer was killed
        os.ftruncate(lock, 0)
        os.pwrite(lock, text.encode(), 0)
    os.utime(marker)
    if marker in _held:
        os.close(_held[marker])
    _held[marker] = lock


def check_unused(source: str, cache: Cache, state: Path, prefixes: Iterable[str]) -> None:
    """Raise StorageError if another process uses what is mirrored below some prefixes. The caller must hold the
    bucket's lock."""
    wanted = tuple(prefixes)
    for marker in state.glob("uses/*"):
        used = _prefixes(marker)
        shared = any(prefix.startswith(used) for prefix in wanted) or any(prefix.startswith(wanted) for prefix in used)
        if shared and not _is_unused(marker):
            rule = f"{source} must not change while other processes of this machine read its mirror, but did"
            raise StorageError(f"{rule}; wait for them, or name another folder than {cache.folder} in `cache`")


def make_room(source: str, cache: Cache, bucket: str, total: int, needed: int) -> None:
    """Delete mirrors that no living process uses, the least recently used first, until there is room.

    The caller must hold the bucket's lock.

    Args:
        source: URL for messages.
        cache: folder of the mirrors.
        bucket: bucket that needs the room.
        total: bytes of the source.
        needed: bytes of the source that are still to be read.
    Raises:
        StorageError: the limit or the disk is too small.
    """
    remedy = "raise `cache_limit`, or name another folder in `cache`"
    if total > cache.most:
        rule = f"{source} has {total / 1e9:.2f} GB, but mirrors in {cache.folder} may have {cache.most / 1e9:.2f}"
        raise StorageError(f"{rule}; {remedy}")
    with (cache.folder / ".s3" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        used = sum(_booked(cache, state, bucket) for state in cache.states())
        evicted = _evicted(cache, bucket)
        while needed > (room := min(cache.most - used, shutil.disk_usage(cache.folder).free)):
            try:
                used -= next(evicted)
            except StopIteration:
                rule = f"{source} needs {needed / 1e9:.2f} GB free in {cache.folder}, got {max(0, room) / 1e9:.2f}"
                raise StorageError(f"{rule} beside what is in use; {remedy}") from None
        (cache.state(bucket) / "booked").write_text(str(_size(cache.folder / bucket) + needed))


def _booked(cache: Cache, state: Path, own: str) -> int:
    """Return the bytes of a mirror; while another process fills it, the bytes that it will have."""
    size = _size(cache.folder / state.name)
    with _try_lock(state, own) as unlocked, suppress(OSError, ValueError):  # nothing was booked yet
        return size if unlocked else max(size, int((state / "booked").read_text()))
    return size


@contextmanager
def _try_lock(state: Path, own: str) -> Iterator[bool]:
    """Lock a bucket's mirror without waiting; yields False if another process holds the lock."""
    if state.name == own:
        yield True
        return
    with (state / "lock").open("w") as lock:
        yield _locked_now(lock.fileno())


def _locked_now(file: int) -> bool:
    """Lock a file if no other process has locked it; return whether it is locked now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _evicted(cache: Cache, own: str) -> Iterator[int]:
    """Delete what no marker covers, then one unused source after the other; yields the freed bytes of each step."""
    markers = [marker for state in cache.states() for marker in state.glob("uses/*")]
    oldest = sorted(markers, key=lambda marker: marker.stat().st_mtime_ns)
    steps = [*((state, None) for state in cache.states()), *((marker.parents[1], marker) for marker in oldest)]
    for state, marker in steps:
        with _try_lock(state, own) as locked:
            if not locked or (marker and (marker in _held or not _is_unused(marker))):
                continue
            if marker:
                marker.unlink()
            kept = {prefix for left in state.glob("uses/*") for prefix in _prefixes(left)}
            freed = _sweep(cache.folder / state.name, kept)
        yield freed


def _is_unused(marker: Path) -> bool:
    """Return whether no other process holds a marker. The caller must hold the bucket's lock."""
    if marker in _held:
        unused = _locked_now(_held[marker])
        fcntl.flock(_held[marker], fcntl.LOCK_SH)
        return unused
    with marker.open("r+") as file:
        return _locked_now(file.fileno())


def _prefixes(marker: Path) -> tuple[str, ...]:
    with suppress(ValueError):  # its writer was killed
        return tuple(json.loads(marker.read_text()))
    return ()


def _sweep(mirror: Path, kept: set[str]) -> int:
    """Delete the files below none of some prefixes, each a folder or a file; returns the freed bytes."""
    freed, places = 0, []
    for place, folders, names in os.walk(mirror):
        below = os.path.relpath(place, mirror)
        prefix = "" if below == "." else f"{below}/"
        if prefix in kept:
            folders.clear()
            continue
        places.append(place)
        for name in (*names, *(folder for folder in folders if os.path.islink(os.path.join(place, folder)))):
            if f"{prefix}{name}" in kept:
                continue
            path = os.path.join(place, name)
            freed += os.lstat(path).st_size
            os.unlink(path)
    for place in reversed(places):
        with suppress(OSError):  # it is not empty
            os.rmdir(place)
    return freed


def _size(folder: Path) -> int:
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)
