"""Images of a corpus in a folder, a manifest or a bucket: their names, and their contents one by one.

This module does not import torch, and it only reads listings: a corpus may be larger than this machine.
"""

import os
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from multigrain.data.decoding import MOST_BYTES, read_file
from multigrain.data.listing import Listing, identity, list_images, list_keys
from multigrain.data.manifest import ManifestReader
from multigrain.errors import DataError
from multigrain.hooks import SCHEME, Files, Objects, Pin, data_errors


@dataclass(frozen=True)
class FolderImages:
    """The image files below a folder; names are paths relative to it."""

    root: Path

    def listing(self) -> Listing:
        """List the images in a fixed order, each once. Raises DataError if they cannot be listed."""
        return list_images(self.root)

    def versions(self, names: Sequence[str]) -> dict[str, Pin]:
        """Return sizes and times of modification in nanoseconds."""
        found = {}
        for name in names:
            with suppress(OSError, ValueError):  # it is lost; a name may hold a null byte
                state = os.stat(self.root / name)
                found[name] = state.st_size, str(state.st_mtime_ns)
        return found

    def read(self, name: str) -> bytes:
        """Read an image. Raises ValueError with the reason why it cannot be read."""
        if os.path.isabs(name) or ".." in name.split("/"):  # names come from an index, whoever made it
            raise ValueError("is not below the folder of the images")
        return _content(self.root / name)


@dataclass(frozen=True)
class ListedImages(FolderImages):
    """The images in the column `image` of a manifest; the root is the folder of the manifest."""

    file: Path

    def listing(self) -> Listing:
        """List the images as written there, each once; a missing file shows when it is read."""
        reader = ManifestReader(self.file)
        (line, header), *records = reader.records()
        reader.check_header(line, header, ("image",))
        reader.raise_problems()
        column = header.index("image")
        names: dict[Hashable, str] = {}
        for line, cells in records:
            if reader.has_all_cells(line, cells, header):
                name = cells[column]  # an image may be listed once in each role
                names.setdefault(identity(self.root / name) or os.path.normpath(name), name)
                if not cells[column].strip():
                    reader.add(line, "the cell of 'image' must not be empty")
        reader.raise_problems()
        return Listing(list(names.values()), {})

    def read(self, name: str) -> bytes:
        """Read an image, wherever it is. Raises ValueError with the reason why it cannot be read."""
        return _content(self.root / name)


def _content(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class BucketImages:
    """The images below a prefix in S3; names are keys relative to it."""

    objects: Objects

    def listing(self) -> Listing:
        """List the images. Raises DataError if they cannot be listed."""
        with data_errors():
            return list_keys(self.objects.pins())

    def versions(self, names: Sequence[str]) -> dict[str, Pin]:
        """Return sizes and ETags."""
        with data_errors():
            pins = self.objects.pins()
        return {name: pins[name] for name in names if name in pins}

    def read(self, name: str) -> bytes:
        """Read an image; many threads may. Raises ValueError with the reason why it cannot be read."""
        return self.objects.read(name, MOST_BYTES)


def images(source: str, files: Files) -> FolderImages | BucketImages:
    """Open the images of a corpus.

    Args:
        source: a folder, a manifest (only its column `image` counts), or `s3://bucket/prefix`.
        files: access to S3.
    Raises:
        DataError: the source is none of these.
    """
    if source.startswith(SCHEME):
        with data_errors():
            return BucketImages(files.objects(source))
    path = Path(source).absolute()
    if source.lower().endswith(".csv"):
        return ListedImages(path.parent, path)
    if os.path.isdir(path):
        return FolderImages(path)
    rule = "images must be in a folder, a manifest (.csv) or s3://bucket/prefix"
    raise DataError([f"{rule}, but there is no folder {path}; name one that exists"])
