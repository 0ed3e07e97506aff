"""Mirrors of buckets on this machine's disk: who reads them, and room for more.

`s3://bucket/a/b.jpg` is mirrored as `<folder>/bucket/a/b.jpg`. In `<folder>/.s3/`, `lock` is held while room is made,
and `<bucket>/lock` while a bucket is mirrored. `<bucket>/uses/` holds a file for each source that was asked for: the
prefixes of its keys, which are folders or one object. Its time is that of the last asking, and each process that reads
the source keeps a shared lock on it as long as it lives; of one that is killed, none is left.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from multigrain.data.buckets import SCHEME
from multigrain.errors import DataError

_held: dict[Path, int] = {}
"""The uses of this process: file -> the descriptor that keeps its lock."""


class Cache(NamedTuple):
    """A folder of mirrors, which all processes of a machine share."""

    folder: Path
    """Absolute."""
    limit: float | None = None
    """GB that all its mirrors may take together; by default half of the disk."""

    @property
    def most(self) -> float:
        """Bytes that all its mirrors may take together."""
        return shutil.disk_usage(self.folder).total / 2 if self.limit is None else self.limit * 1e9

    def books(self, bucket: str) -> Path:
        """The folder of what is known of a bucket's mirror."""
        return self.folder / ".s3" / bucket

    def path(self, url: str) -> Path:
        """Where an object is mirrored."""
        return self.folder / url.removeprefix(SCHEME)

    def url(self, path: Path) -> str | None:
        """Of which object a file is the mirror; None if of none."""
        text, folder = str(path), f"{self.folder}{os.sep}"
        return SCHEME + text.removeprefix(folder) if text.startswith(folder) else None

    def named(self, text: str) -> str:
        """A text with objects in place of their mirrors."""
        return text.replace(f"{self.folder}{os.sep}", SCHEME)


@contextmanager
def claimed(source: str, cache: Cache, bucket: str) -> Iterator[Path]:
    """The books of a mirror; nobody else gets them meanwhile."""
    books, other = cache.books(bucket), "name another folder in `cache`"
    if (cache.folder / bucket).exists() and not books.exists():
        rule = f"{source} needs a folder of its own, where what is not in the bucket is deleted"
        raise DataError([f"{rule}, but {bucket} in {cache.folder} is somebody else's; {other}"])
    try:
        (books / "uses").mkdir(parents=True, exist_ok=True)
        lock = (books / "lock").open("w")
    except OSError as error:
        rule = f"{source} needs a folder to write in, but {cache.folder} is none ({error.strerror})"
        raise DataError([f"{rule}; {other}"]) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield books


def hold(books: Path, prefixes: Iterable[str]) -> None:
    """Keep what lies below some prefixes of a bucket as long as this process lives. Only for whom has the books."""
    text = json.dumps(sorted(prefixes))
    file = books / "uses" / hashlib.sha256(text.encode()).hexdigest()[:16]
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(lock, fcntl.LOCK_SH)
    if file.read_text() != text:  # it is new, or its writer was killed
        os.ftruncate(lock, 0)
        os.pwrite(lock, text.encode(), 0)
    os.utime(file)
    if file in _held:
        os.close(_held[file])
    _held[file] = lock


def check_unread(source: str, cache: Cache, books: Path, prefixes: Iterable[str]) -> None:
    """Raise DataError if another process reads what lies below some prefixes. Only for whom has the books."""
    wanted = tuple(prefixes)
    for file in books.glob("uses/*"):
        theirs = _prefixes(file)
        shared = any(one.startswith(theirs) for one in wanted) or any(one.startswith(wanted) for one in theirs)
        if shared and not _is_alone(file):
            rule = f"{source} must not change while other processes of this machine read its mirror, but did"
            raise DataError([f"{rule}; wait for them, or name another folder than {cache.folder} in `cache`"])


def make_room(source: str, cache: Cache, bucket: str, total: int, needed: int) -> None:
    """Delete mirrors that no living process reads, the last used last, until there is room.

    Only for whom has the books.

    Args:
        total: bytes of the source.
        needed: bytes of it that are still to be read.
    Raises:
        DataError: there cannot be as much.
    """
    remedy = "raise `cache_limit`, or name another folder in `cache`"
    if total > cache.most:
        what = f"{source} has {total / 1e9:.2f} GB, but mirrors in {cache.folder} may have {cache.most / 1e9:.2f}"
        raise DataError([f"{what}; {remedy}"])
    with (cache.folder / ".s3" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        used = sum(_booked(cache, books, bucket) for books in _all_books(cache))
        evicted = _evicted(cache, bucket)
        while needed > (room := min(cache.most - used, shutil.disk_usage(cache.folder).free)):
            try:
                used -= next(evicted)
            except StopIteration:
                what = f"{source} needs {needed / 1e9:.2f} GB free in {cache.folder}, got {max(0, room) / 1e9:.2f}"
                raise DataError([f"{what} beside what is in use; {remedy}"]) from None
        (cache.books(bucket) / "booked").write_text(str(_size(cache.folder / bucket) + needed))


def _all_books(cache: Cache) -> list[Path]:
    return [path for path in (cache.folder / ".s3").iterdir() if path.is_dir()]


def _booked(cache: Cache, books: Path, own: str) -> int:
    """Bytes of a mirror or, while somebody else fills it, those that it will have."""
    size = _size(cache.folder / books.name)
    with _free(books, own) as free, suppress(OSError, ValueError):  # nothing was booked yet
        return size if free else max(size, int((books / "booked").read_text()))
    return size


@contextmanager
def _free(books: Path, own: str) -> Iterator[bool]:
    """Whether nobody fills a mirror, or will before this ends; nobody is waited for."""
    if books.name == own:
        yield True
        return
    with (books / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _evicted(cache: Cache, own: str) -> Iterator[int]:
    """Delete what no use covers, then one use after the other; yields the bytes that each of them took."""
    uses = [file for books in _all_books(cache) for file in books.glob("uses/*")]
    oldest = sorted(uses, key=lambda file: file.stat().st_mtime_ns)
    for books, use in (*((books, None) for books in _all_books(cache)), *((use.parents[1], use) for use in oldest)):
        with _free(books, own) as free:
            if not free or (use and (use in _held or not _is_alone(use))):
                continue
            if use:
                use.unlink()
            kept = {prefix for file in books.glob("uses/*") for prefix in _prefixes(file)}
            freed = _swept(cache.folder / books.name, kept)
        yield freed


def _is_alone(use: Path) -> bool:
    """Whether no other process holds a use. Only for whom has the books."""
    lock = _held[use] if use in _held else os.open(use, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        if use in _held:
            fcntl.flock(lock, fcntl.LOCK_SH)
        else:
            os.close(lock)


def _prefixes(use: Path) -> tuple[str, ...]:
    with suppress(ValueError):  # its writer was killed
        return tuple(json.loads(use.read_text()))
    return ()


def _swept(mirror: Path, kept: set[str]) -> int:
    """Delete what lies below none of some prefixes, each a folder or a file; the bytes that it took."""
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
