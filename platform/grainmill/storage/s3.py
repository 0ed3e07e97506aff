"""Objects in S3 below one prefix: read, write, list and delete them, with retries and errors in plain words.

Credentials, region and endpoint come from the usual variables, such as AWS_PROFILE or AWS_ENDPOINT_URL. botocore sends
a failed request again, up to five times in all. `S3Prefix` then repeats the operation for as long as its `patience`
lasts. An error that no retry can heal is raised at once.
"""

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from grainmill.errors import StorageError
from grainmill.storage.names import is_local

SCHEME = "s3://"
REQUESTS = 16
"""Number of requests that are sent at the same time."""
PATIENCE = 300
"""Time limit for repeating a failing operation, in seconds."""
PAUSES = (0.5, 1, 2, 4, 8, 15)
"""Pauses between attempts, in seconds; the last one repeats."""
READING = "s3:ListBucket and s3:GetObject"
"""Rights that reading needs."""
WRITING = "s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload"
"""Rights that reading and writing need."""
_CONDITION_FAILED = ("ConditionalRequestConflict", "NoSuchKey", "PreconditionFailed")
"""Error codes for a conditional write to an object that no longer has the expected ETag."""
_DOWNLOADS = 3
"""Attempts to download an object whose size differs from the listed one."""

Result = TypeVar("Result")


class S3Object(NamedTuple):
    """Content and state of one object."""

    body: bytes
    etag: str
    age: float
    """Age of the object in seconds, by the clock of the endpoint."""


class S3Entry(NamedTuple):
    """An object in a listing of its bucket; gives the transfer manager the size, which saves a request."""

    key: str
    size: int
    etag: str

    def on_queued(self, future: Any, **_: Any) -> None:
        """Give size and ETag to a download before it starts."""
        future.meta.provide_transfer_size(self.size)
        future.meta.provide_object_etag(self.etag)


class PinnedEntry(S3Entry):
    """An entry whose download fails if the object no longer has the entry's ETag."""

    def on_queued(self, future: Any, **_: Any) -> None:
        """Make the requests of a download conditional on the ETag."""
        super().on_queued(future)
        future.meta.call_args.extra_args["IfMatch"] = self.etag


class S3Prefix:
    """The objects below a prefix; their names are relative to it. Threads may share an instance.

    All methods raise StorageError, with the object and the remedy, after `patience` seconds if repeating could help.
    """

    def __init__(self, url: str, client: Any, manager: Any, patience: float | None, rights: str) -> None:
        self.url, self._client, self._manager, self._rights = url.rstrip("/"), client, manager, rights
        self.patience = PATIENCE if patience is None else patience
        self.bucket, key = parse(self.url)
        self._prefix = f"{key}/" if key else ""

    def impatient(self) -> "S3Prefix":
        """Return the same prefix with a patience of 0 seconds."""
        return S3Prefix(self.url, self._client, self._manager, 0, self._rights)

    def at(self, folder: str) -> "S3Prefix":
        """Return another folder of the bucket; `folder` is empty or ends in `/`."""
        return S3Prefix(f"{SCHEME}{self.bucket}/{folder}", self._client, self._manager, self.patience, self._rights)

    def get(self, name: str, most: int | None = None) -> S3Object | None:
        """Read an object; return None if it does not exist.

        Raises:
            StorageError: it has more than `most` bytes, of which none are read then, or cannot be read.
        """

        def get() -> S3Object | None:
            try:
                answer = self._client.get_object(**self._location(name))
            except self._client.exceptions.NoSuchKey:
                return None
            if most is not None and answer["ContentLength"] > most:
                answer["Body"].close()
                raise StorageError(f"has more than {most:,} bytes, the most that are read")
            sent = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            age = (parsedate_to_datetime(sent) - answer["LastModified"]).total_seconds() if sent else 0.0
            return S3Object(answer["Body"].read(), answer["ETag"], age)

        return self._retry(self._prefix + name, get)

    def put(self, name: str, body: bytes, etag: str | None) -> str | None:
        """Write an object if its ETag is still `etag`, or with None if it does not exist.

        Returns:
            The new ETag; None if the condition does not hold.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}

        def put() -> str | None:
            try:
                written: str = self._client.put_object(**self._location(name), Body=body, **condition)["ETag"]
            except self._client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in _CONDITION_FAILED:
                    raise
            else:
                return written
            # An earlier attempt may have written the object although its response was lost.
            found = self.get(name)
            return found.etag if found and found.body == body else None

        return self._retry(self._prefix + name, put)

    def upload(self, name: str, file: Path) -> None:
        """Write a file, a large one in parts; the parts of a failed upload are deleted."""
        key = self._prefix + name
        self._retry(key, lambda: self._manager.upload(str(file), self.bucket, key).result())

    def download(self, entry: S3Entry, file: Path) -> None:
        """Read an object of a listing into a file."""
        from botocore.exceptions import IncompleteReadError  # type: ignore[import-untyped]

        def download() -> None:
            for _ in range(_DOWNLOADS):
                self._manager.download(self.bucket, entry.key, str(file), subscribers=[entry]).result()
                if (size := file.stat().st_size) == entry.size:
                    return
            raise IncompleteReadError(actual_bytes=size, expected_bytes=entry.size)

        self._retry(entry.key, download)

    def listed(self) -> dict[str, S3Entry]:
        """List the objects, by name."""
        return {entry.key.removeprefix(self._prefix): entry for entry in self.entries(self._prefix)}

    def entries(self, prefix: str) -> list[S3Entry]:
        """List the objects of the bucket below a prefix, without those that only stand for a folder."""

        def entries() -> list[S3Entry]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [entry for page in pages for entry in _entries(page) if not entry.key.endswith("/")]

        return self._retry(None, entries)

    def find(self, keys: Iterable[str]) -> list[S3Entry]:
        """Look up single keys of the bucket; keys that do not exist are left out.

        Pages of up to 1,000 objects are listed from one wanted key to the next, so the objects between are skipped.
        """
        wanted = sorted({*keys})  # the order in which S3 lists them

        def find() -> list[S3Entry]:
            found: list[S3Entry] = []
            index, after = 0, ""
            while index < len(wanted):
                key = wanted[index]
                after = max(after, key[:-1] + chr(ord(key[-1]) - 1))
                page = self._client.list_objects_v2(Bucket=self.bucket, StartAfter=after)
                entries = {entry.key: entry for entry in _entries(page)}
                last = max(entries, default="")
                end = bisect_right(wanted, last)
                found += [entries[key] for key in wanted[index:end] if key in entries]
                if not page["IsTruncated"]:
                    break
                index, after = end, last
            return found

        return self._retry(None, find)

    def folder_of(self, key: str) -> str:
        """Return the key itself if it is a folder, otherwise the folder of the object with this key; ends in `/`."""
        if not key or key.endswith("/"):
            return key
        page = self._retry(None, lambda: self._client.list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1))
        return key[: key.rfind("/") + 1] if any(entry.key == key for entry in _entries(page)) else f"{key}/"

    def delete(self, name: str) -> None:
        """Delete an object; it need not exist."""
        self._retry(self._prefix + name, lambda: self._client.delete_object(**self._location(name)))

    def _location(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._prefix + name}

    def _retry(self, key: str | None, operation: Callable[[], Result]) -> Result:
        """Run an operation on a key, or with None on the prefix, until it succeeds or patience ends."""
        until = time.monotonic() + self.patience
        name = self.url if key is None else f"{SCHEME}{self.bucket}/{key}"
        with _explained(name, self._client, self._rights):
            for pause in chain(PAUSES, repeat(PAUSES[-1])):
                try:
                    return operation()
                except Exception as error:
                    if not _may_pass(error) or time.monotonic() + pause > until:
                        raise
                time.sleep(pause)
        raise AssertionError("the pauses have no end")


def _entries(page: Any) -> list[S3Entry]:
    return [S3Entry(entry["Key"], entry["Size"], entry["ETag"]) for entry in page.get("Contents", [])]


def _may_pass(error: Exception) -> bool:
    """Return whether a later attempt may succeed."""
    from botocore import exceptions  # type: ignore[import-untyped]
    from s3transfer.exceptions import RetriesExceededError  # type: ignore[import-untyped]

    if isinstance(error, exceptions.ClientError):
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or error.response["Error"]["Code"] in ("RequestTimeout", "SlowDown")
    passing = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    return isinstance(error, (*passing, RetriesExceededError))


@contextmanager
def opened(url: str, patience: float | None = None, rights: str = WRITING) -> Iterator[S3Prefix]:
    """Open the objects below `s3://bucket/prefix`.

    Args:
        patience: seconds for which failing operations are repeated; `PATIENCE` by default.
        rights: what the credentials must allow, for messages.
    Raises:
        StorageError: the URL is not valid, or there are no credentials.
    """
    from boto3.s3.transfer import TransferConfig, create_transfer_manager  # type: ignore[import-untyped]

    config = TransferConfig(max_concurrency=REQUESTS, preferred_transfer_client="classic")
    parse(url)
    with closing(_client(url)) as client, create_transfer_manager(client, config) as manager:
        yield S3Prefix(url, client, manager, patience, rights)


def _client(url: str) -> Any:
    import boto3.session  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    retries = {"mode": "standard", "total_max_attempts": 5}
    config = Config(connect_timeout=10, read_timeout=30, retries=retries, max_pool_connections=REQUESTS)
    try:
        with _explained(url):
            return boto3.session.Session().client("s3", config=config)
    except ValueError:  # its text shows the URL, which may hold a password
        rule = f"{url} needs a URL in AWS_ENDPOINT_URL, but the value is not a URL"
        raise StorageError(f"{rule}; set or unset it") from None


def parse(url: str) -> tuple[str, str]:
    """Split `s3://bucket/key`. The message about an invalid bucket hides its value, which may hold credentials.

    Raises:
        StorageError: the bucket is not a valid name, or the key is not a plain path.
    """
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        rule = "a source in S3 must be s3://bucket/prefix, the bucket of 2 to 255 letters, digits, `.`, `_` and `-`"
        raise StorageError(f"{rule}, got another; credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if key and not is_local(key.removesuffix("/")):
        raise StorageError(f"a prefix in S3 must be a plain path below its bucket, got {key!r}; name another")
    return bucket, key


_NO_ANSWER = "needs an endpoint that answers in time, but {endpoint} does not; check AWS_ENDPOINT_URL and the network"
_AGAIN = "try again when nobody writes there"
_CODES = {
    "must be in a bucket that exists, but {endpoint} has none of that name; check both": "NoSuchBucket",
    "must be open to these credentials, but access is denied; allow {rights}, or use others": (
        "AccessDenied AllAccessDisabled 403"
    ),
    "needs credentials that are still good, but these have expired; renew them": (
        "ExpiredToken ExpiredTokenException RequestExpired TokenRefreshRequired UnauthorizedSSOTokenError"
    ),
    "needs credentials that {endpoint} knows, but it refuses these; check them, and AWS_ENDPOINT_URL": (
        "InvalidAccessKeyId InvalidToken SignatureDoesNotMatch"
    ),
    "needs credentials, but none are complete; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE": (
        "NoCredentialsError PartialCredentialsError CredentialRetrievalError ProfileNotFound"
    ),
    f"must stay as it was listed, but has changed; {_AGAIN}, or begin anew": (
        "NoSuchKey PreconditionFailed S3DownloadFailedError"
    ),
}
"""Message -> the endpoint's error codes and the names of the exceptions that it explains."""
_MESSAGES = {code: message for message, codes in _CODES.items() for code in codes.split()}


@contextmanager
def _explained(name: str, client: Any = None, rights: str = READING) -> Iterator[None]:
    """Turn errors of botocore into StorageError: botocore's own messages may show URLs with passwords.

    Args:
        name: URL of the object or the prefix.
        client: client whose endpoint the message names.
        rights: rights that the operation needs.
    """
    from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
    from botocore import exceptions
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    silent = (exceptions.ConnectionError, exceptions.HTTPClientError, RetriesExceededError)
    try:
        yield
    except (*silent, Boto3Error, exceptions.BotoCoreError, exceptions.ClientError, S3DownloadFailedError) as error:
        server = urlsplit(client.meta.endpoint_url).netloc if client else "@"
        endpoint = "the endpoint" if "@" in server else server
        if isinstance(error, silent):
            message = _NO_ANSWER
        elif isinstance(error, exceptions.IncompleteReadError):
            sizes = error.kwargs
            message = f"must have {sizes['expected_bytes']:,} bytes as listed, got {sizes['actual_bytes']:,}; {_AGAIN}"
        elif isinstance(error, exceptions.ClientError):
            code = error.response["Error"]["Code"]
            message = _MESSAGES.get(code, f"must be served, but {endpoint} answers {code}; try again later")
        else:
            code = type(error).__name__
            message = _MESSAGES.get(code, f"must be in reach, but is not ({code}); check the variables of AWS")
        raise StorageError(f"{name} {message.replace('{endpoint}', endpoint).replace('{rights}', rights)}") from None
