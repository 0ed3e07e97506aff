"""Objects in a bucket of S3 -> the same files below a local folder, for readers that list folders.

`s3://bucket/a/b.csv` becomes `<cache>/bucket/a/b.csv`. Beside the mirror, `<cache>/.s3/bucket/` holds its lock, files
that are not whole yet, and the records: a line of JSON for each file that was read, with its key, size, ETag and time
of modification. A record counts only for a file of that size and time, and the last one of a key counts. So a crash
between a file and its record costs one more reading of that file, and nothing else.

Credentials, region and endpoint are those of the usual variables, such as AWS_PROFILE or AWS_ENDPOINT_URL.
"""

import fcntl
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from multigrain.data import DataError

_SCHEME = "s3://"
_READERS = 16
"""Requests at once."""
_TRIES = 3
"""Readings of an object whose size is not the listed one; botocore repeats requests that fail by itself."""


class _Stored(NamedTuple):
    """One object as the bucket lists it."""

    key: str
    size: int
    etag: str

    def on_queued(self, future: Any, **_: Any) -> None:
        """Tell the transfer manager what it would ask the endpoint for."""
        future.meta.provide_transfer_size(self.size)
        future.meta.provide_object_etag(self.etag)


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
    if not source.startswith(_SCHEME):
        return Path(source)
    bucket, key = parsed(source)
    with connect(source) as client, _claimed(source, cache, bucket) as books:
        with told(source, client):
            prefix = prefix_of(client, bucket, key)
            objects = listed(client, bucket, prefix)
        if not objects:
            raise DataError([f"{source} must be an object or hold some, but there are none; check bucket and prefix"])
        _check_keys(bucket, objects)
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


def parsed(source: str) -> tuple[str, str]:
    """Bucket and key. What is no bucket's name is not told: it may hold credentials."""
    bucket, _, key = source.removeprefix(_SCHEME).partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        rule = "a source in S3 must be s3://bucket/prefix, the bucket of 2 to 255 letters, digits, `.`, `_` and `-`"
        raise DataError([f"{rule}, got another; credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"])
    if key and _strange(key.removesuffix("/")):
        raise DataError([f"a prefix in S3 must be a plain path below its bucket, got {key!r}; name another"])
    return bucket, key


def _strange(key: str) -> bool:
    """Whether a key is no path of plain names, and could lead out of its folder, or cannot be the name of a file."""
    return bool(re.search(r"[\\\0]", key)) or any(
        name in ("", ".", "..") or len(os.fsencode(name)) > 255 for name in key.split("/")
    )


@contextmanager
def connect(source: str) -> Iterator[Any]:
    """A client for the bucket of a source; threads may share it."""
    import boto3.session  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    config = Config(
        connect_timeout=10,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": 5},
        max_pool_connections=_READERS,
    )
    try:
        with told(source):
            client = boto3.session.Session().client("s3", config=config)
    except DataError:
        raise
    except ValueError:  # its text shows the URL, which may hold a password
        raise DataError([f"{source} needs a URL in AWS_ENDPOINT_URL, but that is none; set or unset it"]) from None
    with closing(client):
        yield client


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


def prefix_of(client: Any, bucket: str, key: str) -> str:
    """What the keys of a source begin with: the folder that its key is, or lies in if it is an object's."""
    if not key or key.endswith("/"):
        return key
    first = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
    return key[: key.rfind("/") + 1] if first and first[0]["Key"] == key else f"{key}/"


def listed(client: Any, bucket: str, prefix: str) -> list[_Stored]:
    """The objects below a prefix, without those that only stand for a folder."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [
        _Stored(one["Key"], one["Size"], one["ETag"])
        for page in pages
        for one in page.get("Contents", [])
        if not one["Key"].endswith("/")
    ]


def _check_keys(bucket: str, objects: Sequence[_Stored]) -> None:
    problems = [
        f"a key must be a plain path below its bucket, got {one.key!r} in {bucket}; rename the object"
        for one in objects
        if _strange(one.key)
    ]
    folders = {one.key[: end.start()] for one in objects for end in re.finditer("/", one.key)}
    problems += [
        f"a key must not be an object and a folder at once, got {one.key!r} in {bucket}; name the folder as `folder/`"
        for one in objects
        if one.key in folders
    ]
    if problems:
        raise DataError(problems)


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


def _current(one: _Stored, path: Path, record: list[object] | None) -> bool:
    """Whether a file is the object as it was read."""
    if record is None or not path.is_file():
        return False
    found = path.stat()
    return record == [found.st_size, one.etag, found.st_mtime_ns] and found.st_size == one.size


def _read(client: Any, bucket: str, missing: Sequence[_Stored], mirror: Path, books: Path) -> None:
    """Read objects in parallel, large ones in parts; the first that fails ends it."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager  # type: ignore[import-untyped]

    drafts = books / "drafts"
    shutil.rmtree(drafts, ignore_errors=True)
    drafts.mkdir()
    waiting = deque(missing)
    config = TransferConfig(max_concurrency=_READERS, preferred_transfer_client="classic")
    # The manager is left first: if that is by an exception, it cancels what the readers wait for, and takes no more.
    with (
        (books / "records").open("ab", buffering=0) as records,
        ThreadPoolExecutor(_READERS) as pool,
        create_transfer_manager(client, config) as manager,
    ):

        def work(draft: Path) -> None:
            while waiting:
                try:
                    one = waiting.popleft()
                except IndexError:  # another reader was faster
                    return
                with told(f"{_SCHEME}{bucket}/{one.key}", client):
                    _download(manager, bucket, one, draft)
                record = [*one, draft.stat().st_mtime_ns]
                target = mirror / one.key
                target.parent.mkdir(parents=True, exist_ok=True)
                draft.replace(target)
                records.write(b"\n" + json.dumps(record).encode())  # begins a line, since the last may be cut short

        for done in as_completed([pool.submit(work, drafts / str(number)) for number in range(_READERS)]):
            done.result()


def _download(manager: Any, bucket: str, one: _Stored, draft: Path) -> None:
    for _ in range(_TRIES):
        manager.download(bucket, one.key, str(draft), subscribers=[one]).result()
        if (size := draft.stat().st_size) == one.size:
            return
    raise DataError([f"{_SCHEME}{bucket}/{one.key} must have {one.size:,} bytes as listed, got {size:,}; {_AGAIN}"])


_AGAIN = "try again when nobody writes there"
_SILENT = "needs an endpoint that answers in time, but {endpoint} does not; check AWS_ENDPOINT_URL and the network"
_CODES = {
    "must be in a bucket that exists, but {endpoint} has none of that name; check both": "NoSuchBucket",
    "must be open to these credentials, but access is denied; allow s3:ListBucket and s3:GetObject, or use others": (
        "AccessDenied AllAccessDisabled 403"
    ),
    "needs credentials that are still good, but these have expired; renew them": (
        "ExpiredToken ExpiredTokenException RequestExpired TokenRefreshRequired UnauthorizedSSOTokenError"
    ),
    "needs credentials that {endpoint} knows, but it refuses these; check them, and AWS_ENDPOINT_URL": (
        "InvalidAccessKeyId InvalidToken SignatureDoesNotMatch"
    ),
    "needs credentials, but none are whole; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE": (
        "NoCredentialsError PartialCredentialsError CredentialRetrievalError ProfileNotFound"
    ),
    f"must not change while it is read, but does; {_AGAIN}": "NoSuchKey S3DownloadFailedError",
}
"""What is wrong -> the endpoint's codes and the exceptions' names for it."""
_RULES = {code: rule for rule, codes in _CODES.items() for code in codes.split()}


@contextmanager
def told(name: str, client: Any = None) -> Iterator[None]:
    """What goes wrong with an object or a prefix, in our words: botocore's may show URLs with passwords."""
    from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
    from botocore import exceptions  # type: ignore[import-untyped]
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError  # type: ignore[import-untyped]

    silent = (exceptions.ConnectionError, exceptions.HTTPClientError, RetriesExceededError)
    try:
        yield
    except (*silent, Boto3Error, exceptions.BotoCoreError, exceptions.ClientError, S3DownloadFailedError) as error:
        server = urlsplit(client.meta.endpoint_url).netloc if client else "@"
        endpoint = "the endpoint" if "@" in server else server
        if isinstance(error, silent):
            rule = _SILENT
        elif isinstance(error, exceptions.ClientError):
            code = error.response["Error"]["Code"]
            rule = _RULES.get(code, f"must be readable, but {endpoint} answers {code}; try again later")
        else:
            code = type(error).__name__
            rule = _RULES.get(code, f"must be readable, but is not ({code}); check the variables of AWS")
        raise DataError([f"{name} {rule.replace('{endpoint}', endpoint)}"]) from None
