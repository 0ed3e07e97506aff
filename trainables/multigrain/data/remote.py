"""Objects in buckets of S3 -> the same files below a local folder, for readers that open files.

Beside its lock and its uses (see `cache`), `<cache>/.s3/bucket/` holds files that are not whole yet, and the records:
a line of JSON for each file that was read, with its key, size, ETag and time of modification. A record counts only for
a file of that size and time, and the last one of a key counts. So a crash between a file and its record costs one more
reading of that file, and nothing else.
"""

import json
import os
import shutil
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from multigrain.data.buckets import (
    AGAIN,
    REQUESTS,
    SCHEME,
    Stored,
    among,
    check_keys,
    connect,
    listed,
    parsed,
    prefix_of,
    told,
)
from multigrain.data.cache import Cache, check_unread, claimed, hold, make_room
from multigrain.errors import DataError
from multigrain.hooks import Progress, no_progress

_TRIES = 3
"""Readings of an object whose size is not the listed one; botocore repeats requests that fail by itself."""


class Pin(NamedTuple):
    """The one version of an object that is meant."""

    size: int
    """In bytes."""
    etag: str


def local(source: str, cache: Cache, progress: Progress = no_progress) -> Path:
    """The local path of a source; objects are read first, as far as they are not there yet.

    Of a prefix, all objects below it are mirrored. If the source is one object, so are all others below the prefix it
    lies in: the images of a list lie beside it. The mirror is exact: what is not in the bucket goes. It stays as long
    as this process lives. Processes that mirror one bucket take turns.

    Args:
        source: `s3://bucket/prefix`, or anything else, which is a local path already.
        cache: for the mirrors.
        progress: shows the progress.
    Raises:
        DataError: the objects cannot be read, or not be stored.
    """
    if not source.startswith(SCHEME):
        return Path(source)
    bucket, key = parsed(source)
    with connect(source) as client, claimed(source, cache, bucket) as books:
        with told(source, client):
            prefix = prefix_of(client, bucket, key)
            objects = listed(client, bucket, prefix)
        if not objects:
            raise DataError([f"{source} must be an object or hold some, but there are none; check bucket and prefix"])
        check_keys(bucket, objects)
        mirror = cache.folder / bucket
        strangers = _strangers(mirror, mirror / prefix, {str(mirror / one.key) for one in objects})
        _Mirror(source, cache, bucket, books, [prefix]).update(client, objects, strangers, progress)
    return mirror / key


def fetch(wanted: Mapping[str, Pin | None], cache: Cache, progress: Progress = no_progress) -> None:
    """Mirror single objects, as `local` does; of those that are not there, there is no file afterwards.

    Args:
        wanted: URL -> its pin, if only that version will do. The bucket is not asked for what is pinned and there.
        cache: for the mirrors.
        progress: shows the progress.
    Raises:
        DataError: the objects cannot be read, or not be stored.
    """
    by_bucket: dict[str, dict[str, Pin | None]] = defaultdict(dict)
    for url, pin in wanted.items():
        bucket, key = parsed(url)
        by_bucket[bucket][key] = pin
    for bucket, keys in by_bucket.items():
        source = SCHEME + bucket
        with connect(source) as client, claimed(source, cache, bucket) as books:
            with told(source, client):
                found = among(client, bucket, (key for key, pin in keys.items() if pin is None))
            objects = [*found, *(Stored(key, *pin) for key, pin in keys.items() if pin is not None)]
            check_keys(bucket, objects)
            mirror = cache.folder / bucket
            absent = keys.keys() - {one.key for one in objects}
            folders = {key[: key.rfind("/") + 1] for key in keys}
            barred = {path for folder in folders for path in _folders(mirror, mirror / folder) if _is_file(path)}
            strangers = sorted(barred.union(path for key in absent if _is_file(path := mirror / key)))
            prefixes = {*keys} if len(keys) == 1 else folders
            _Mirror(source, cache, bucket, books, prefixes).update(client, objects, strangers, progress)


def pins(files: Iterable[Path], cache: Cache) -> dict[Path, Pin]:
    """The pins of those files that `local` or `fetch` mirrored."""
    by_bucket: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for file in files:
        if url := cache.url(file):
            bucket, key = parsed(url)
            by_bucket[bucket].append((key, file))
    found: dict[Path, Pin] = {}
    for bucket, keys in by_bucket.items():
        records = _records(cache.books(bucket) / "records")
        found |= {file: Pin(*records[key][:2]) for key, file in keys if key in records}
    return found


class _Mirror(NamedTuple):
    """A part of a bucket's mirror, for whom has its books."""

    source: str
    cache: Cache
    bucket: str
    books: Path
    prefixes: Iterable[str]

    def update(self, client: Any, objects: Sequence[Stored], strangers: Sequence[Path], progress: Progress) -> None:
        """Delete files, and read objects that are not there as they should be."""
        hold(self.books, self.prefixes)
        mirror = self.cache.folder / self.bucket
        self._delete(strangers)
        records = _records(self.books / "records")
        missing = [one for one in objects if not _is_current(one, f"{mirror}/{one.key}", records.get(one.key))]
        targets = [mirror / one.key for one in missing]
        outdated = [path for path in targets if _is_file(path)]
        below = [file for path in targets if path.is_dir() for file in _strangers(mirror, path, set())]
        self._delete([*outdated, *below])
        if missing:
            needed = sum(one.size for one in missing)
            make_room(self.source, self.cache, self.bucket, sum(one.size for one in objects), needed)
            self._read(client, missing, progress)

    def _delete(self, files: Sequence[Path]) -> None:
        if files:
            check_unread(self.source, self.cache, self.books, self.prefixes)
        for path in files:
            path.unlink()
            for folder in _folders(self.cache.folder / self.bucket, path.parent):
                with suppress(OSError):  # it is not empty
                    folder.rmdir()

    def _read(self, client: Any, missing: Sequence[Stored], progress: Progress) -> None:
        """Read objects in parallel, large ones in parts; the first that fails ends it."""
        from boto3.s3.transfer import TransferConfig, create_transfer_manager  # type: ignore[import-untyped]

        etags = {one.key: one.etag for one in missing}
        client.meta.events.register(
            "provide-client-params.s3.GetObject", lambda params, **_: params | {"IfMatch": etags[params["Key"]]}
        )
        drafts = self.books / "drafts"
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir()
        waiting, ended = deque(missing), SimpleQueue[BaseException | None]()
        config = TransferConfig(max_concurrency=REQUESTS, preferred_transfer_client="classic")
        # The manager is left first; by an exception, it cancels what the readers wait for, and takes no more.
        with (
            (self.books / "records").open("ab", buffering=0) as records,
            ThreadPoolExecutor(REQUESTS) as pool,
            create_transfer_manager(client, config) as manager,
        ):

            def work() -> None:
                draft = drafts / str(threading.get_ident())
                try:
                    while waiting:
                        try:
                            one = waiting.popleft()
                        except IndexError:  # another reader was faster
                            return
                        self._keep(manager, client, one, draft, records)
                        ended.put(None)
                except BaseException as error:
                    ended.put(error)

            for _ in range(REQUESTS):
                pool.submit(work)
            for error in progress((ended.get() for _ in missing), f"reading {self.source}", len(missing)):
                if error is not None:
                    raise error

    def _keep(self, manager: Any, client: Any, one: Stored, draft: Path, records: Any) -> None:
        """Read an object, put it in place and note it."""
        with told(f"{SCHEME}{self.bucket}/{one.key}", client):
            _download(manager, self.bucket, one, draft)
        record = [*one, draft.stat().st_mtime_ns]
        target = self.cache.folder / self.bucket / one.key
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(target)
        records.write(b"\n" + json.dumps(record).encode())  # begins a line, since the last may be cut short


def _strangers(mirror: Path, root: Path, wanted: set[str]) -> list[Path]:
    """All files below a root that are not wanted, or what is no folder but must be one; empty folders go."""
    if barred := [path for path in _folders(mirror, root) if _is_file(path)]:
        return barred[:1]
    found = []
    for place, folders, names in os.walk(root, topdown=False):
        links = (name for name in folders if os.path.islink(os.path.join(place, name)))
        paths = (os.path.join(place, name) for name in (*names, *links))
        found += [Path(path) for path in paths if path not in wanted]
        with suppress(OSError):  # it is not empty
            os.rmdir(place)
    return found


def _is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _folders(mirror: Path, folder: Path) -> tuple[Path, ...]:
    """A folder and those that it lies in, below a mirror."""
    return (folder, *folder.parents)[: -len(mirror.parts)]


def _records(file: Path) -> dict[str, list[Any]]:
    """Key -> size, ETag and time of modification; a line that was cut short is none."""
    records = {}
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with suppress(ValueError):
            key, *record = json.loads(line)
            records[key] = record
    return records


def _is_current(one: Stored, path: str, record: list[Any] | None) -> bool:
    """Whether a file is the object as it was read."""
    if record is None:
        return False
    try:
        found = os.stat(path)
    except OSError:
        return False
    return record == [found.st_size, one.etag, found.st_mtime_ns] and found.st_size == one.size


def _download(manager: Any, bucket: str, one: Stored, draft: Path) -> None:
    for _ in range(_TRIES):
        manager.download(bucket, one.key, str(draft), subscribers=[one]).result()
        if (size := draft.stat().st_size) == one.size:
            return
    raise DataError([f"{SCHEME}{bucket}/{one.key} must have {one.size:,} bytes as listed, got {size:,}; {AGAIN}"])
