"""Atomic writing of files, and digests of their content."""

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """Yield the path of a draft, which becomes the file at the end of the block.

    After a crash, the file is complete or as it was before.
    """
    draft = file.with_name(f"{file.name}.draft")
    yield draft
    sync(draft)
    draft.rename(file)
    sync(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically; characters that UTF-8 does not have are escaped."""
    with atomic(file) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot sync folders
        os.fsync(handle)
    os.close(handle)


def digest(content: bytes) -> str:
    """Return the SHA-256 of some content in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def folder_digest(folder: Path, left_out: Collection[str] = ()) -> str:
    """Return the SHA-256 over the names and contents of all files below a folder, in hexadecimal digits.

    Files and folders of the names in `left_out` are left out. Links to folders are not followed.
    """
    total = hashlib.sha256()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in (path for path in paths if not {*path.relative_to(folder).parts} & {*left_out}):
        total.update(f"{path.relative_to(folder).as_posix()}\0".encode() + bytes.fromhex(file_digest(path)))
    return total.hexdigest()
