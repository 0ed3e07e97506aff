"""Digests of content: SHA-256 in hexadecimal digits."""

import hashlib
from pathlib import Path


def digest(content: bytes | memoryview) -> str:
    """Return the digest of some content."""
    return hashlib.sha256(content).hexdigest()


def file_digest(file: Path) -> str:
    """Return the digest of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
