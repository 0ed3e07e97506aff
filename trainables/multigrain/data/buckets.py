"""Buckets of S3: their client, what lies in them, and what is wrong with them.

Credentials, region and endpoint are those of the usual variables, such as AWS_PROFILE or AWS_ENDPOINT_URL.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from multigrain.errors import DataError

SCHEME = "s3://"
REQUESTS = 16
"""At once."""
AGAIN = "try again when nobody writes there"


class Stored(NamedTuple):
    """One object as the bucket lists it."""

    key: str
    size: int
    etag: str

    def on_queued(self, future: Any, **_: Any) -> None:
        """Tell the transfer manager what it would ask the endpoint for."""
        future.meta.provide_transfer_size(self.size)
        future.meta.provide_object_etag(self.etag)


def parsed(source: str) -> tuple[str, str]:
    """Bucket and key. What is no bucket's name is not told: it may hold credentials."""
    bucket, _, key = source.removeprefix(SCHEME).partition("/")
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
        max_pool_connections=REQUESTS,
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


def prefix_of(client: Any, bucket: str, key: str) -> str:
    """What the keys of a source begin with: the folder that its key is, or lies in if it is an object's."""
    if not key or key.endswith("/"):
        return key
    first = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
    return key[: key.rfind("/") + 1] if first and first[0]["Key"] == key else f"{key}/"


def listed(client: Any, bucket: str, prefix: str) -> list[Stored]:
    """The objects below a prefix, without those that only stand for a folder."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [
        Stored(one["Key"], one["Size"], one["ETag"])
        for page in pages
        for one in page.get("Contents", [])
        if not one["Key"].endswith("/")
    ]


def among(client: Any, bucket: str, keys: Iterable[str]) -> list[Stored]:
    """Those of some keys that a bucket has.

    It is listed from key to key: a page has 1,000 objects, and what lies between two keys is passed over.
    """
    wanted = sorted({*keys})  # as S3 lists them
    found: list[Stored] = []
    index, after = 0, ""
    while index < len(wanted):
        key = wanted[index]
        after = max(after, key[:-1] + chr(ord(key[-1]) - 1))
        page = client.list_objects_v2(Bucket=bucket, StartAfter=after)
        objects = {one["Key"]: Stored(one["Key"], one["Size"], one["ETag"]) for one in page.get("Contents", [])}
        last = max(objects, default="")
        end = bisect_right(wanted, last)
        found += [objects[one] for one in wanted[index:end] if one in objects]
        if not page["IsTruncated"]:
            break
        index, after = end, last
    return found


def check_keys(bucket: str, objects: Sequence[Stored]) -> None:
    """Raise DataError for keys that cannot be the names of files below one folder."""
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


_SILENT = "needs an endpoint that answers in time, but {endpoint} does not; check AWS_ENDPOINT_URL and the network"
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
    "needs credentials, but none are whole; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE": (
        "NoCredentialsError PartialCredentialsError CredentialRetrievalError ProfileNotFound"
    ),
    f"must stay as it was listed, but has changed; {AGAIN}, or begin anew": (
        "NoSuchKey PreconditionFailed S3DownloadFailedError"
    ),
}
"""What is wrong -> the endpoint's codes and the exceptions' names for it."""
_RULES = {code: rule for rule, codes in _CODES.items() for code in codes.split()}


@contextmanager
def told(name: str, client: Any = None, rights: str = "s3:ListBucket and s3:GetObject") -> Iterator[None]:
    """What goes wrong with an object or a prefix, in our words: botocore's may show URLs with passwords.

    Args:
        name: of the object or the prefix.
        client: whose endpoint is told.
        rights: what is needed.
    """
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
            rule = _RULES.get(code, f"must be served, but {endpoint} answers {code}; try again later")
        else:
            code = type(error).__name__
            rule = _RULES.get(code, f"must be in reach, but is not ({code}); check the variables of AWS")
        raise DataError([f"{name} {rule.replace('{endpoint}', endpoint).replace('{rights}', rights)}"]) from None
