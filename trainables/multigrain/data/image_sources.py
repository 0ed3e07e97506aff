"""Which images there are in a folder, a manifest or a bucket, and the content of one by its name.

No torch here, and nothing is read but what lists them: a corpus may be larger than this machine.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from multigrain.data.folders import SUFFIXES
from multigrain.data.manifest import Reader
from multigrain.errors import DataError
from multigrain.hooks import SCHEME, Files, Objects, data_errors


@dataclass(frozen=True)
class FolderImages:
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
class ListedImages(FolderImages):
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
class BucketImages:
    """The images below a prefix in S3, named by their key from there."""

    objects: Objects

    def names(self) -> Sequence[str]:
        """List the images; see `FolderImages.names`."""
        with data_errors():
            return [name for name in self.objects.names() if _is_image(name)]

    def read(self, name: str) -> bytes:
        """Read an image; many threads may. Raises ValueError with the reason why it cannot be read."""
        return self.objects.read(name)


def images(source: str, files: Files) -> FolderImages | BucketImages:
    """Open the images of a corpus.

    Args:
        source: a folder, a CSV file as in `manifest` of which only the column `image` counts, or `s3://bucket/prefix`.
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


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _refuse(error: OSError) -> None:
    rule = "folders of images must be readable"
    raise DataError([f"{rule}, but {error.filename} is not ({error.strerror}); change its permissions"])
