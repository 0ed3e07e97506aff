"""Objects in a bucket of S3 -> the same files below a local folder, for readers that list folders.

`s3://bucket/a/b.csv` becomes `<cache>/bucket/a/b.csv`. Beside the mirror, `<cache>/.s3/bucket/` holds its lock, files
that are not whole yet, and the records: a line of JSON for each file that was read, with its key, size, ETag and time
of modification. A record counts only for a file of that size and time, and the last one of a key counts. So a crash
between a file and its record costs one more reading of that file, and nothing else.
"""

import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from multigrain.buckets import (
    AGAIN,
    REQUESTS,
    SCHEME,
    Stored,
    check_keys,
    connect,
    listed,
    parsed,
    prefix_of,
    told,
)
from multigrain.data import DataError

__all__ = ["connect", "listed", "local", "parsed", "prefix_of", "told"]

_TRIES = 3
"""Readings of an object whose size is not the listed one; botocore repeats requests that fail by itself."""


def local(source: str, cache: Path) -> Path:
    """The local path of a source; objects are read first, as far as they are not there yet.

    Of a prefix, all objects below it are mirrored. If the source is one object, so are all others below the prefix it
    lies in: the images of a manifest lie beside it. The mirror is exact: what is not in the bucket goes. Processes
    that mirror one bucket take turns.

    Args:
        source: `s3://bucket/prefix`, or anything else, which is a local path already.
        cache: folder that holds the mirrors.
    Raises:
        DataError: the objects cannot be read, or not be stored.
    """
    if not source.startswith(SCHEME):
        return Path(source)
    bucket, key = parsed(source)
    with connect(source) as client, _claimed(source, cache, bucket) as books:
        with told(source, client):
            prefix = prefix_of(client, bucket, key)
            objects = listed(client, bucket, prefix)
        if not objects:
            raise DataError([f"{source} must be an object or hold some, but there are none; check bucket and prefix"])
        check_keys(bucket, objects)
        mirror = cache / bucket
        _prune(mirror, mirror / prefix, {str(mirror / one.key) for one in objects})
        records = _records(books / "records")
        missing = [one for one in objects if not _current(one, mirror / one.key, records.get(one.key))]
        needed, free = sum(one.size for one in missing) / 1e9, shutil.disk_usage(cache).free / 1e9
        if needed > free:
            what = f"{source} needs {needed:.2f} GB free in {cache}, got {free:.2f}"
            raise DataError([f"{what}; name another folder with --set cache=..."])
        if missing:
            _read(client, bucket, missing, mirror, books)
    return mirror / key


@contextmanager
def _claimed(source: str, cache: Path, bucket: str) -> Iterator[Path]:
    """The folder of a mirror's lock, drafts and records; nobody else gets it meanwhile."""
    books, other = cache / ".s3" / bucket, "name another folder with --set cache=..."
    if (cache / bucket).exists() and not books.exists():
        rule = f"{source} needs a folder of its own, where what is not in the bucket is deleted"
        raise DataError([f"{rule}, but {cache / bucket} is somebody else's; {other}"])
    try:
        books.mkdir(parents=True, exist_ok=True)
        lock = (books / "lock").open("w")
    except OSError as error:
        rule = f"{source} needs a folder to write in, but {books} is none ({error.strerror})"
        raise DataError([f"{rule}; {other}"]) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield books


def _prune(mirror: Path, root: Path, wanted: set[str]) -> None:
    """Delete all below a root that is not wanted, empty folders, and what is no folder but must be one."""
    for path in (root, *root.parents):
        if path == mirror:
            break
        if path.is_file() or path.is_symlink():
            path.unlink()
    for place, folders, names in os.walk(root, topdown=False):
        links = (name for name in folders if os.path.islink(os.path.join(place, name)))
        for name in (*names, *links):
            if (path_ := os.path.join(place, name)) not in wanted:
                os.unlink(path_)
        with suppress(OSError):  # it is not empty
            os.rmdir(place)


def _records(file: Path) -> dict[str, list[object]]:
    """Key -> size, ETag and time of modification; a line that was cut short is none."""
    records = {}
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with suppress(ValueError):
            key, *record = json.loads(line)
            records[key] = record
    return records


def _current(one: Stored, path: Path, record: list[object] | None) -> bool:
    """Whether a file is the object as it was read."""
    if record is None or not path.is_file():
        return False
    found = path.stat()
    return record == [found.st_size, one.etag, found.st_mtime_ns] and found.st_size == one.size


def _read(client: Any, bucket: str, missing: Sequence[Stored], mirror: Path, books: Path) -> None:
    """Read objects in parallel, large ones in parts; the first that fails ends it."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager  # type: ignore[import-untyped]

    drafts = books / "drafts"
    shutil.rmtree(drafts, ignore_errors=True)
    drafts.mkdir()
    waiting = deque(missing)
    config = TransferConfig(max_concurrency=REQUESTS, preferred_transfer_client="classic")
    # The manager is left first: if that is by an exception, it cancels what the readers wait for, and takes no more.
    with (
        (books / "records").open("ab", buffering=0) as records,
        ThreadPoolExecutor(REQUESTS) as pool,
        create_transfer_manager(client, config) as manager,
    ):

        def work(draft: Path) -> None:
            while waiting:
                try:
                    one = waiting.popleft()
                except IndexError:  # another reader was faster
                    return
                with told(f"{SCHEME}{bucket}/{one.key}", client):
                    _download(manager, bucket, one, draft)
                record = [*one, draft.stat().st_mtime_ns]
                target = mirror / one.key
                target.parent.mkdir(parents=True, exist_ok=True)
                draft.replace(target)
                records.write(b"\n" + json.dumps(record).encode())  # begins a line, since the last may be cut short

        for done in as_completed([pool.submit(work, drafts / str(number)) for number in range(REQUESTS)]):
            done.result()


def _download(manager: Any, bucket: str, one: Stored, draft: Path) -> None:
    for _ in range(_TRIES):
        manager.download(bucket, one.key, str(draft), subscribers=[one]).result()
        if (size := draft.stat().st_size) == one.size:
            return
    raise DataError([f"{SCHEME}{bucket}/{one.key} must have {one.size:,} bytes as listed, got {size:,}; {AGAIN}"])
