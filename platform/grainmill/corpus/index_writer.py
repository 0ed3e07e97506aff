"""Index writer: adds rows to an index and drops others, one process at a time; a crash leaves no row twice."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grainmill.corpus import index
from grainmill.corpus.index import RECORD, IndexRecord
from grainmill.errors import BusyError, CorpusError
from grainmill.storage import files

LOCK, DRAFT = ".lock", ".draft"
GROUP = 2048
"""Rows of a row group, the unit of reading."""


class IndexWriter:
    """An index that this process has locked. What it cannot trust is deleted: the images are embedded again."""

    def __init__(self, folder: Path, record: IndexRecord) -> None:
        self.folder, self.record = folder, _stored_record(folder, record)
        self._finish()
        damaged = index.faults(folder, self.record)
        kept = {name: digest for name, digest in self.record.parts.items() if name not in damaged}
        if damaged or kept != self.record.parts or self.record.listing is not None:
            self._set(kept)
        for name in damaged:
            (folder / name).unlink(missing_ok=True)

    def keep(self, versions: Mapping[str, tuple[int, str]]) -> set[str]:
        """Drop the rows of images that are gone or have other sizes or versions; returns the names of the others."""
        kept: set[str] = set()
        for path in index.parts(self.folder):
            keys = pq.read_table(path, columns=["id", "size", "version"]).to_pylist()
            mask = [versions.get(row["id"]) == (row["size"], row["version"]) for row in keys]
            if not any(mask):
                self._set({name: digest for name, digest in self.record.parts.items() if name != path.name})
                path.unlink()
            elif not all(mask):
                self._write(path.name, pq.read_table(path).filter(pa.array(mask)))
            kept.update(row["id"] for row, good in zip(keys, mask, strict=True) if good)
        return kept

    def add(self, table: pa.Table) -> None:
        """Add rows as a new file."""
        last = max((int(name[5:11]) for name in self.record.parts), default=-1)
        self._write(f"part-{last + 1:06d}.parquet", table)

    def finish(self, listing: str) -> None:
        """Record that all images of a listing, by its digest, were embedded."""
        self.record = self.record._replace(listing=listing)
        self.record.write(self.folder)

    def _write(self, name: str, table: pa.Table) -> None:
        """Write a file in the place of the one of that name. The record comes first: see `_finish`."""
        draft = self.folder / DRAFT
        table = table.replace_schema_metadata(index.schema(self.record).metadata)
        pq.write_table(table, draft, row_group_size=GROUP, compression="zstd", use_dictionary=["class"])
        files.sync(draft)
        self._set({**self.record.parts, name: files.file_digest(draft)})
        draft.rename(self.folder / name)
        files.sync(self.folder)

    def _finish(self) -> None:
        """Give the file its name that a crash left as a draft; a draft that is not in the record is not whole."""
        draft = self.folder / DRAFT
        if draft.exists():
            digest = files.file_digest(draft)
            for name in [name for name, recorded in self.record.parts.items() if recorded == digest]:
                draft.rename(self.folder / name)
            draft.unlink(missing_ok=True)

    def _set(self, parts: dict[str, str]) -> None:
        self.record = self.record._replace(parts=parts, listing=None)
        self.record.write(self.folder)


@contextmanager
def opened(folder: Path, record: IndexRecord) -> Iterator[IndexWriter]:
    """Open the index of a model and a source, or create it, and lock it against other writers during the block.

    Raises:
        BusyError: another process writes to the index.
        CorpusError: the folder holds something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index.check_age(folder)
        if not (folder / RECORD).exists() and set(os.listdir(folder)) - {LOCK, f"{RECORD}.draft"}:
            rule = f"an index needs a folder of its own, but {folder.absolute()} holds other files"
            raise CorpusError(f"{rule}; name another with --out")
        lock = (folder / LOCK).open("w")
    except OSError as error:
        rule = f"an index needs a folder to write in, but {folder.absolute()} is none ({error.strerror})"
        raise CorpusError(f"{rule}; name another with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = f"one process at a time writes an index, but another writes {folder.absolute()}"
            raise BusyError(f"{rule}; wait for it, or name another with --out") from None
        yield IndexWriter(folder, record)


def _stored_record(folder: Path, record: IndexRecord) -> IndexRecord:
    """Return the record of an index after a check; a new one if it is damaged, or if there is none.

    Raises:
        CorpusError: the index is of another model or source.
    """
    try:
        stored = IndexRecord.read(folder)
    except (OSError, ValueError, KeyError, TypeError):
        stored = record
        for path in index.parts(folder):
            _check_part(path, record)
        record.write(folder)
    index.check_model(folder, stored.model, record.model)
    if stored.source != record.source:
        rule = f"an index is of one source, but {folder.absolute()} is of {stored.source}"
        raise CorpusError(f"{rule}, got {record.source}; name another with --out")
    return stored


def _check_part(path: Path, record: IndexRecord) -> None:
    """Raise CorpusError if a file, beside a record that is damaged, is of another index; it is not to be deleted."""
    try:
        made = (pq.read_metadata(path).metadata or {}).get(index.KEY)
    except (OSError, ValueError, pa.ArrowException):
        return
    if made != record.identity.encode():
        found = json.loads(made)["model"] if made else "another program"
        raise CorpusError(f"the record of an index is damaged, and {path} is of {found}; name another with --out")
