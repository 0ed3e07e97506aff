"""Source of a corpus: its images with their versions, and whether an index has them as they are now."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from grainmill import trainable
from grainmill.corpus.index import Index
from grainmill.errors import CorpusError
from grainmill.storage.mirror import S3Files
from grainmill.storage.s3 import SCHEME


class Corpus(NamedTuple):
    """The images of a source, as they were listed."""

    images: trainable.Images
    listing: trainable.Listing
    versions: Mapping[str, tuple[int, str]]
    """Size in bytes and version of each image that is there, by name."""

    @property
    def digest(self) -> str:
        """SHA-256 of names, sizes and versions."""
        total = hashlib.sha256()
        for name, version in sorted(self.versions.items()):
            total.update(json.dumps([name, *version]).encode())
        return total.hexdigest()


def canonical(source: str) -> str:
    """Return the one spelling of a source: an absolute path without links, or a URL without a final slash.

    The name of a manifest stays, even if it is a link: paths in the file are relative to the folder of that name.
    """
    if source.startswith(SCHEME):
        return source.rstrip("/")
    folder, name = os.path.split(source) if source.lower().endswith(".csv") else (source, "")
    return os.path.join(os.path.realpath(folder), name) if name else os.path.realpath(folder)


def list_corpus(trainable_name: str, source: str) -> Corpus:
    """List the images of a source. Raises CorpusError if there are none, or if they cannot be listed."""
    try:
        images = trainable.find(trainable_name).images(source, S3Files())
        listing = images.listing()
        versions = images.versions(listing.names)
    except ValueError as error:
        raise CorpusError(str(error)) from error
    if not listing.names:
        beside = [f"{name}, which {reason}" for name, reason in listing.left_out.items()]
        found = f"none were found there, only {beside[0]}" if beside else "none were found there"
        raise CorpusError(f"{source} must hold images, but {found}; name another folder or prefix")
    return Corpus(images, listing, versions)


def warn_if_older(made: Index) -> None:
    """Warn if an index does not have all images of its source as they are now."""
    record = made.record
    try:
        corpus = list_corpus(record.model.trainable, record.source)
    except (CorpusError, LookupError) as error:
        warnings.warn(f"cannot tell if {made.folder} has the images as they are now: {error}", stacklevel=3)
        return
    if record.listing == corpus.digest:
        return
    embedded = made.versions()
    gone = len(embedded.keys() - corpus.versions.keys())
    changed = sum(name in corpus.versions and corpus.versions[name] != version for name, version in embedded.items())
    new = len(corpus.versions.keys() - embedded.keys())
    rule = f"the index is older than its images ({gone:,} gone, {changed:,} changed, {new:,} not in it)"
    again = f"`grainmill embed` with --out {made.folder} brings it up to date"
    warnings.warn(f"{rule}; {again}", stacklevel=3)
