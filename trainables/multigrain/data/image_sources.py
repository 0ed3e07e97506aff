"""Which images there are in a folder, a manifest or a bucket, and the content of one by its name.

No torch here, and nothing is read but what lists them: a corpus may be larger than this machine.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from multigrain.data import buckets
from multigrain.data.folders import SUFFIXES
from multigrain.data.manifest import Reader
from multigrain.errors import DataError


@dataclass(frozen=True)
class Folder:
    """The image files below a folder, named by their path from there; links to folders are not followed."""

    root: Path

    def names(self) -> Sequence[str]:
        """Each image once, in a fixed order. Raises DataError if they cannot be listed."""
        return list(self._below())

    def _below(self) -> Iterator[str]:
        for place, folders, files in os.walk(self.root, onerror=_refuse):
            folders.sort()
            below = os.path.relpath(place, self.root)
            yield from (os.path.normpath(os.path.join(below, file)) for file in sorted(files) if _is_image(file))

    def read(self, name: str) -> bytes:
        """The content of an image. Raises ValueError with the reason why it cannot be read."""
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Listed(Folder):
    """The images that a manifest names, in its column `image`; the root is the folder that it lies in."""

    file: Path

    def names(self) -> Sequence[str]:
        """As written there. Whether an image exists shows when it is read."""
        reader = Reader(self.file)
        (line, header), *records = reader.records()
        reader.check_header(line, header, ("image",))
        reader.stop_if_wrong()
        column = header.index("image")
        names: dict[str, None] = {}
        for line, cells in records:
            if len(cells) != len(header):
                reader.add(line, f"a row must have as many cells as the header, {len(header)}, got {len(cells)}")
            elif not cells[column].strip():
                reader.add(line, "the cell of 'image' must not be empty")
            else:
                names[cells[column]] = None  # an image may be listed once in each role
        reader.stop_if_wrong()
        return list(names)


@dataclass(frozen=True)
class Bucket:
    """The images below a prefix in S3, named by their key from there."""

    source: str

    def names(self) -> Sequence[str]:
        """As in `Folder.names`."""
        bucket, _ = buckets.parsed(self.source)
        with buckets.told(self.source, self._client):
            stored = buckets.listed(self._client, bucket, self._prefix)
        return [name for one in stored if _is_image(name := one.key.removeprefix(self._prefix))]

    def read(self, name: str) -> bytes:
        """As in `Folder.read`; many threads may."""
        bucket, _ = buckets.parsed(self.source)
        with buckets.told(f"s3://{bucket}/{self._prefix}{name}", self._client):
            return self._client.get_object(Bucket=bucket, Key=self._prefix + name)["Body"].read()

    @cached_property
    def _prefix(self) -> str:
        bucket, key = buckets.parsed(self.source)
        with buckets.told(self.source, self._client):
            return buckets.prefix_of(self._client, bucket, key)

    @cached_property
    def _client(self) -> Any:
        return ExitStack().enter_context(buckets.connect(self.source))

    def __reduce__(self) -> tuple[type["Bucket"], tuple[str]]:
        return Bucket, (self.source,)  # another process gets a client of its own


def images(source: str) -> Folder | Bucket:
    """The images of a corpus.

    Args:
        source: a folder, a CSV file as in `manifest` of which only the column `image` counts, or `s3://bucket/prefix`.
    Raises:
        DataError: it is none of these.
    """
    if source.startswith("s3://"):
        buckets.parsed(source)
        return Bucket(source)
    path = Path(source).absolute()
    if source.lower().endswith(".csv"):
        return Listed(path.parent, path)
    if os.path.isdir(path):
        return Folder(path)
    rule = "images must be in a folder, a manifest (.csv) or s3://bucket/prefix"
    raise DataError([f"{rule}, but there is no folder {path}; name one that exists"])


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _refuse(error: OSError) -> None:
    rule = "folders of images must be readable"
    raise DataError([f"{rule}, but {error.filename} is not ({error.strerror}); change its permissions"])
