"""Copies of S3 objects on this machine's disk, for trainables, which open files: `s3://` sources -> local paths.

In the state folder of a bucket's mirror (see `mirror_space`), `drafts/` holds incomplete files, and `records` a
line of JSON for each file that was read: its key, size, ETag and time of modification. A record counts only for a
file of the same size and time, and the last record of a key counts. So a crash between a file and its record costs one
more reading of the file, and nothing else.
"""

import json
import os
import shutil
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from grainmill.errors import SourceError, StorageError
from grainmill.storage import mirror_space, s3
from grainmill.storage.mirror_space import Cache
from grainmill.storage.names import check_keys
from grainmill.storage.s3 import READING, SCHEME, PinnedEntry, S3Entry, S3Prefix
from grainmill.trainable import Pin, Progress, no_progress


@contextmanager
def _source_errors() -> Iterator[None]:
    """Raise StorageError as SourceError, the ValueError that a trainable expects."""
    try:
        yield
    except StorageError as error:
        raise SourceError(*error.args) from error.__cause__


@dataclass(frozen=True)
class S3Files:
    """Gives a trainable access to S3; see `trainable.Files`. Each run makes one, and so lists its data once."""

    listings: MutableMapping[Any, Any] = field(default_factory=dict)

    def mirror(self, cache: str, limit: float | None) -> "Mirror":
        """Return the mirrors below the folder `cache`."""
        return Mirror(Path(cache).expanduser().absolute(), limit)

    @_source_errors()
    def objects(self, source: str) -> "S3Objects":
        """Return the objects below `s3://bucket/prefix`."""
        s3.parse(source)
        return S3Objects(source)


@dataclass(frozen=True)
class S3Objects:
    """The objects below a prefix; names are relative to it. Threads may share an instance, and it can be pickled."""

    source: str

    @_source_errors()
    def pins(self) -> dict[str, Pin]:
        """List the objects with size and ETag, once."""
        return self._pins

    @cached_property
    def _pins(self) -> dict[str, Pin]:
        return {name: (entry.size, entry.etag) for name, entry in self._store.listed().items()}

    @_source_errors()
    def read(self, name: str, most: int) -> bytes:
        """Read an object of at most `most` bytes."""
        if (found := self._store.get(name, most)) is None:
            raise StorageError(f"{self._store.url}/{name} must stay as it was listed, but is gone; begin anew")
        return found.body

    @cached_property
    def _stack(self) -> ExitStack:
        return ExitStack()  # closes the client when this object goes

    @cached_property
    def _store(self) -> S3Prefix:
        store = self._stack.enter_context(s3.opened(self.source, 0, READING))
        return store.at(store.folder_of(s3.parse(self.source)[1]))

    def __reduce__(self) -> tuple[type["S3Objects"], tuple[str]]:
        return S3Objects, (self.source,)  # another process opens a client of its own


class Mirror(Cache):
    """A folder of mirrors that reads what is missing. Processes that mirror the same bucket take turns."""

    @_source_errors()
    def fetch(self, source: str, progress: Progress = no_progress) -> Path:
        """Mirror a source and return its local path; a source outside S3 is a path already.

        All objects below a prefix are mirrored; for a single object, all objects of its folder, since a list of images
        lies beside them. The mirror is exact: files that are not in the bucket are deleted. It is kept on the disk as
        long as this process lives.

        Raises:
            SourceError: the objects cannot be read, or not be stored.
        """
        if not source.startswith(SCHEME):
            return Path(source)
        bucket, key = s3.parse(source)
        with _opened(self, source, bucket) as mirror:
            folder = mirror.store.folder_of(key)
            entries = mirror.store.entries(folder)
            if not entries:
                raise StorageError(
                    f"{source} must be an object or hold some, but there are none; check bucket and prefix"
                )
            check_keys(bucket, (entry.key for entry in entries))
            strangers = mirror.strangers(mirror.root / folder, {str(mirror.root / entry.key) for entry in entries})
            mirror.update([folder], entries, strangers, progress)
        return self.folder / bucket / key

    @_source_errors()
    def fetch_objects(self, wanted: Mapping[str, Pin | None], progress: Progress = no_progress) -> None:
        """Mirror single objects as `fetch` does; the files of objects that do not exist are deleted.

        Args:
            wanted: URL -> the only version that will do, or None. S3 is not asked for a pinned version that is there.
            progress: shows the progress.
        Raises:
            SourceError: the objects cannot be read, or not be stored.
        """
        by_bucket: dict[str, dict[str, Pin | None]] = defaultdict(dict)
        for url, pin in wanted.items():
            bucket, key = s3.parse(url)
            by_bucket[bucket][key] = pin
        for bucket, keys in by_bucket.items():
            with _opened(self, SCHEME + bucket, bucket) as mirror:
                found = mirror.store.find(key for key, pin in keys.items() if pin is None)
                entries = [*found, *(S3Entry(key, *pin) for key, pin in keys.items() if pin is not None)]
                check_keys(bucket, (entry.key for entry in entries))
                absent = keys.keys() - {entry.key for entry in entries}
                folders = {key[: key.rfind("/") + 1] for key in keys}
                places = {path for folder in folders for path in mirror.folders(mirror.root / folder)}
                strangers = sorted(path for path in places | {mirror.root / key for key in absent} if _is_file(path))
                mirror.update({*keys} if len(keys) == 1 else folders, entries, strangers, progress)

    @_source_errors()
    def path(self, url: str) -> Path:
        """Return the local path of an object's mirror. Raises SourceError if the URL is not valid."""
        return self.folder.joinpath(*s3.parse(url))

    def pins(self, paths: Iterable[Path]) -> dict[Path, tuple[str, Pin]]:
        """Return URL and version of the files that were mirrored."""
        records: dict[str, dict[str, list[Any]]] = {}
        found: dict[Path, tuple[str, Pin]] = {}
        for path in paths:
            if url := self.url(path):
                bucket, key = s3.parse(url)
                if bucket not in records:
                    records[bucket] = _records(self.state(bucket) / "records")
                if key in records[bucket]:
                    size, etag, _ = records[bucket][key]
                    found[path] = url, (size, etag)
        return found


class _BucketMirror(NamedTuple):
    """The mirror of one bucket, locked by this process."""

    cache: Cache
    source: str
    """URL for messages."""
    bucket: str
    state: Path
    store: S3Prefix
    threads: Executor
    records: Any
    """File, open to append records."""

    @property
    def root(self) -> Path:
        return self.cache.folder / self.bucket

    def update(
        self, prefixes: Iterable[str], entries: Sequence[S3Entry], strangers: Sequence[Path], progress: Progress
    ) -> None:
        """Delete strangers, and read the objects that are missing or have changed.

        Args:
            prefixes: folders or objects that this process uses from now on.
            entries: objects that must be there afterwards.
            strangers: files that must not be there.
            progress: shows the progress.
        """
        mirror_space.hold(self.state, prefixes)
        self._delete(prefixes, strangers)
        records = _records(self.state / "records")
        missing = [entry for entry in entries if not _is_current(entry, f"{self.root}/{entry.key}", records)]
        targets = [self.root / entry.key for entry in missing]
        outdated = [path for path in targets if _is_file(path)]
        below = [file for path in targets if path.is_dir() for file in self.strangers(path, set())]
        self._delete(prefixes, [*outdated, *below])
        if missing:
            needed = sum(entry.size for entry in missing)
            mirror_space.make_room(self.source, self.cache, self.bucket, sum(entry.size for entry in entries), needed)
            self._read(missing, progress)

    def _delete(self, prefixes: Iterable[str], files: Sequence[Path]) -> None:
        if files:
            mirror_space.check_unused(self.source, self.cache, self.state, prefixes)
        for path in files:
            path.unlink()
            for folder in self.folders(path.parent):
                with suppress(OSError):  # it is not empty
                    folder.rmdir()

    def _read(self, missing: Sequence[S3Entry], progress: Progress) -> None:
        """Read objects in parallel, large ones in parts, until the first error."""
        drafts = self.state / "drafts"
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir()
        waiting, finished = deque(missing), SimpleQueue[BaseException | None]()

        def work() -> None:
            draft = drafts / str(threading.get_ident())
            try:
                while True:
                    try:
                        entry = waiting.popleft()
                    except IndexError:
                        return
                    self._keep(entry, draft)
                    finished.put(None)
            except BaseException as error:
                finished.put(error)

        for _ in range(s3.REQUESTS):
            self.threads.submit(work)
        try:
            for error in progress((finished.get() for _ in missing), f"reading {self.source}", len(missing)):
                if error is not None:
                    raise error
        finally:
            waiting.clear()

    def _keep(self, entry: S3Entry, draft: Path) -> None:
        """Read an object, put its file in place and append its record."""
        self.store.download(PinnedEntry(*entry), draft)
        record = [*entry, draft.stat().st_mtime_ns]
        target = self.root / entry.key
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(target)
        self.records.write(b"\n" + json.dumps(record).encode())  # begins a line: the last one may be cut short

    def strangers(self, root: Path, wanted: set[str]) -> list[Path]:
        """Return the unwanted files below a root, or a file in the place of its folder; delete empty folders."""
        if blocking := [path for path in self.folders(root) if _is_file(path)]:
            return blocking[:1]
        found = []
        for place, folders, names in os.walk(root, topdown=False):
            links = (name for name in folders if os.path.islink(os.path.join(place, name)))
            paths = (os.path.join(place, name) for name in (*names, *links))
            found += [Path(path) for path in paths if path not in wanted]
            with suppress(OSError):  # it is not empty
                os.rmdir(place)
        return found

    def folders(self, folder: Path) -> tuple[Path, ...]:
        """Return a folder of the mirror and the folders above it."""
        return (folder, *folder.parents)[: -len(self.root.parts)]


@contextmanager
def _opened(cache: Cache, source: str, bucket: str) -> Iterator[_BucketMirror]:
    """Lock and open the mirror of a bucket."""
    # On an exception the store is closed first, which cancels what the threads wait for.
    with (
        mirror_space.locked(source, cache, bucket) as state,
        (state / "records").open("ab", buffering=0) as records,
        ThreadPoolExecutor(s3.REQUESTS) as threads,
        s3.opened(source, 0, READING) as store,
    ):
        yield _BucketMirror(cache, source, bucket, state, store, threads, records)


def _is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _records(file: Path) -> dict[str, list[Any]]:
    """Read records: key -> size, ETag and time of modification. A line that was cut short is skipped."""
    records = {}
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with suppress(ValueError):
            key, *record = json.loads(line)
            records[key] = record
    return records


def _is_current(entry: S3Entry, path: str, records: Mapping[str, list[Any]]) -> bool:
    """Return whether a file is the object of a listing, as it was read."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return records.get(entry.key) == [entry.size, entry.etag, found.st_mtime_ns] and found.st_size == entry.size
