"""Objects of S3 below one prefix: read, written, listed and deleted, patiently.

Credentials, region and endpoint are those of the usual variables, such as AWS_PROFILE or AWS_ENDPOINT_URL. An endpoint
that is silent, busy or broken is asked again for minutes; what no patience can heal is told at once.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.utils import parsedate_to_datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from grainmill.errors import StorageError

# The one thing of a trainable's that the mill uses: a client of S3 and its errors, in words, are not written twice.
from multigrain.data.buckets import REQUESTS, SCHEME, Stored, connect, listed, parsed, told
from multigrain.errors import DataError

PATIENCE = 300
"""Seconds that an endpoint is asked again."""
PAUSES = (0.5, 1, 2, 4, 8, 15)
"""Between attempts; the last one again and again."""
_UNMET = ("ConditionalRequestConflict", "NoSuchKey", "PreconditionFailed")
"""What an endpoint says where an object has not, or not any more, the ETag that was asked for."""
_RIGHTS = "s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload"

Result = TypeVar("Result")


class Found(NamedTuple):
    """An object that was read."""

    body: bytes
    etag: str
    age: float
    """Seconds since it was written, by the clock of the endpoint."""


class Objects:
    """What lies below a prefix; names are relative to it. Threads may share it.

    All methods raise StorageError, with the object and the remedy, after `patience` seconds where that could help.
    """

    def __init__(self, url: str, client: Any, manager: Any, patience: float | None = None) -> None:
        self.url, self._client, self._manager = url, client, manager
        self.patience = PATIENCE if patience is None else patience
        self.bucket, key = parsed(url)
        self._prefix = f"{key}/" if key else ""

    def impatient(self) -> "Objects":
        """The same, without patience."""
        return Objects(self.url, self._client, self._manager, 0)

    def get(self, name: str) -> Found | None:
        """An object; None if it is not there."""

        def get() -> Found | None:
            try:
                answer = self._client.get_object(**self._named(name))
            except self._client.exceptions.NoSuchKey:
                return None
            sent = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            age = (parsedate_to_datetime(sent) - answer["LastModified"]).total_seconds() if sent else 0.0
            return Found(answer["Body"].read(), answer["ETag"], age)

        return self._patiently(name, get)

    def put(self, name: str, body: bytes, etag: str | None) -> str | None:
        """Write an object if it still has an ETag, or with None if there is none; its new ETag, None if it has not."""
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}

        def put() -> str | None:
            try:
                made: str = self._client.put_object(**self._named(name), Body=body, **condition)["ETag"]
            except self._client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in _UNMET:
                    raise
            else:
                return made
            # Our own writing may have come through, and its answer not.
            found = self.get(name)
            return found.etag if found and found.body == body else None

        return self._patiently(name, put)

    def upload(self, name: str, file: Path) -> None:
        """Write a file, a large one in parts; parts of one that fails are taken back."""
        self._patiently(name, lambda: self._manager.upload(str(file), self.bucket, self._prefix + name).result())

    def download(self, one: Stored, file: Path) -> None:
        """Read an object of the list."""
        from botocore.exceptions import IncompleteReadError  # type: ignore[import-untyped]

        def read() -> None:
            self._manager.download(self.bucket, one.key, str(file), subscribers=[one]).result()
            if (size := file.stat().st_size) != one.size:
                raise IncompleteReadError(actual_bytes=size, expected_bytes=one.size)

        self._patiently(one.key.removeprefix(self._prefix), read)

    def listed(self) -> dict[str, Stored]:
        """All of them, by name."""
        found = self._patiently("", lambda: listed(self._client, self.bucket, self._prefix))
        return {one.key.removeprefix(self._prefix): one for one in found}

    def delete(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        self._patiently(name, lambda: self._client.delete_object(**self._named(name)))

    def _named(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._prefix + name}

    def _patiently(self, name: str, call: Callable[[], Result]) -> Result:
        until = time.monotonic() + self.patience
        try:
            with told(f"{self.url}/{name}".rstrip("/"), self._client, _RIGHTS):
                for pause in chain(PAUSES, repeat(PAUSES[-1])):
                    try:
                        return call()
                    except Exception as error:
                        if not _passes(error) or time.monotonic() + pause > until:
                            raise
                    time.sleep(pause)
        except DataError as error:
            raise StorageError(str(error)) from None
        raise AssertionError("the pauses have no end")


def _passes(error: Exception) -> bool:
    """Whether what went wrong may pass by itself."""
    from botocore import exceptions  # type: ignore[import-untyped]
    from s3transfer.exceptions import RetriesExceededError  # type: ignore[import-untyped]

    if isinstance(error, exceptions.ClientError):
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or error.response["Error"]["Code"] in ("RequestTimeout", "SlowDown")
    passing = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    return isinstance(error, (*passing, RetriesExceededError))


@contextmanager
def opened(url: str, patience: float | None = None) -> Iterator[Objects]:
    """The objects below `s3://bucket/prefix`; `patience` is `PATIENCE` by default.

    Raises:
        StorageError: the URL is none, or there are no credentials.
    """
    from boto3.s3.transfer import TransferConfig, create_transfer_manager  # type: ignore[import-untyped]

    with ExitStack() as stack:
        try:
            client = stack.enter_context(connect(url))
        except DataError as error:
            raise StorageError(str(error)) from None
        config = TransferConfig(max_concurrency=REQUESTS, preferred_transfer_client="classic")
        manager = stack.enter_context(create_transfer_manager(client, config))
        yield Objects(url.rstrip("/"), client, manager, patience)


def problem(url: str) -> str | None:
    """What is wrong with a URL, in words."""
    try:
        parsed(url.rstrip("/"))
    except DataError as error:
        return str(error)
    return None


__all__ = ["PATIENCE", "REQUESTS", "SCHEME", "Found", "Objects", "Stored", "opened", "problem"]
